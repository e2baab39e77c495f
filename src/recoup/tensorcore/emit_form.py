"""Which kernel a tensor core's product takes: lanes, tile, and how its exponents are kept.

Exponents are kept in bytes where the operands' own reach allows it, which formats of 8 bits and float16 always do, and
bfloat16 and TF32 do for nearly all data: `Reach` is what is asked of them.
"""

import math
from dataclasses import dataclass

from llvmlite import ir

from recoup.kernels.llvm import I8, I16, I32, I64, Target
from recoup.tensorcore.config import TensorCore

VECTORS = 4  # of a row's sums in registers
NARROW_BITS = 22  # a sum's, in float32 lanes: 23, less one for the start at 1.5 M
ZERO, FLOAT16_MIN = -126, -14  # exponents of a zero and of float16's subnormals, as the unit sees them
INFINITE = 128  # the exponent from which float32 is infinite
BIAS = 127  # of float32, and of exponents in bytes
WORD_BIAS = 1024 + BIAS  # of exponents in 16 bits
SPREAD = 62  # between an operand's lowest set bit and its largest exponent, so that sums of two fit a byte
FOLDED_SPREAD = 42  # the same of sums of two that leave a bit for the sign
AVX512 = 64  # bytes of a register


@dataclass(frozen=True, slots=True)
class Reach:
    """Of an operand's nonzero values: no set bit is below 2^low, no exponent above ``high``."""

    low: int
    high: int

    @property
    def spread(self) -> int:
        """Places between them."""
        return self.high - self.low


Pair = tuple[Reach, Reach]


@dataclass(frozen=True, slots=True)
class Form:
    """A kernel.

    Attributes:
        group, fraction, output: the unit's.
        wide: lanes of float64, else of float32.
        short: exponents in 8 bits, else in 16.
        register: bytes of the processor's vectors; `AVX512` are AVX-512's, whose additions round each its own way.
        piece: bytes of the vectors that count cuts. A core that runs 512 bits in two halves compares halves on every
            port, but whole registers only where it multiplies.
        rows: of a block, whose sums stay in registers.
        bounded: no sum reaches infinity.
        folded: a byte of a lowest bit has the sign in its first bit, so that sums of two have the product's.
        repeated: rows' exponents and lowest bits are kept as often as 32 bits hold them, which every processor spreads
            at no cost; a core that spreads bytes as cheaply fetches a quarter.
    """

    group: int
    fraction: int
    output: str
    wide: bool
    short: bool
    register: int
    piece: int
    rows: int
    bounded: bool
    folded: bool
    repeated: bool

    @property
    def lanes(self) -> int:
        """Of a vector of floats."""
        return self.register // (8 if self.wide else 4)

    @property
    def columns(self) -> int:
        """Of a tile."""
        return VECTORS * self.lanes

    @property
    def integer(self) -> ir.IntType:
        """What exponents are kept in."""
        return I8 if self.short else I16

    @property
    def kept(self) -> ir.IntType:
        """What a row's exponent is kept in."""
        return I32 if self.repeated else self.integer

    @property
    def packed(self) -> ir.IntType:
        """What holds an exponent of every vector."""
        return I32 if self.short else I64

    @property
    def pieces(self) -> int:
        """Vectors that a row's exponents take."""
        return max(1, self.columns * self.integer.width // 8 // self.piece)

    @property
    def weight(self) -> int:
        """What a cut counts. Of a constant other than one LLVM makes a masked addition; one it takes from a mask that
        it first turns into bytes."""
        return 2 if self.piece == 64 else 1

    @property
    def bias(self) -> int:
        """Of a product's exponent as it is kept."""
        return BIAS if self.short else WORD_BIAS

    @property
    def copies(self) -> int:
        """Of columns' lowest bits: for either sign of rows."""
        return 1 if self.folded else 2

    @property
    def never(self) -> int:
        """An exponent of a lowest bit that no cut reaches; folded, of a zero among the columns with the sign set, so
        that two zeros, whose sum leaves seven bits, are positive."""
        if self.folded:
            return 2 * FOLDED_SPREAD + 1
        return 63 if self.short else 2000

    @property
    def clip(self) -> int:
        """The exponent of q, as far as lowest bits reach: above, every product is cut."""
        return self.never if self.folded else 1 if self.short else 1500


def form_of(config: TensorCore, processor: Target, reach: Pair | None = None, K: int = 1) -> Form:
    """The kernel for a unit and operands of a reach (None: of whatever their formats hold) and ``K`` terms: as many
    rows as leave registers for a tile's columns."""
    short = fits(config, reach or of_formats(config), K)
    wide = not short or config.output == "float16" or config.fraction + config.sum_bits > NARROW_BITS
    register = AVX512 if "avx512bw" in processor.features else 32 if "avx2" in processor.features else 16
    piece = 32 if register == 64 and processor.halves else register
    many = 3 if piece == 32 and not (wide and short) else 4
    return Form(
        config.group,
        config.fraction,
        config.output,
        wide,
        short,
        register,
        piece,
        many if register == 64 else 2,
        short and config.output != "float16",
        short and folds(config.fraction, reach or of_formats(config)),
        not (short and processor.halves),
    )


def of_formats(config: TensorCore) -> Pair:
    """The reach of any values of the operands' formats."""
    first, second = (Reach(f.min_exponent - f.mantissa, f.max_exponent) for f in config.formats)
    return first, second


def fits(config: TensorCore, reach: Pair, K: int) -> bool:
    """Whether bytes hold everything: differences of exponents, sums' exponents as float32 has them, sums of lowest bits
    and the distance of the cut. No bit then lies so low that the exponent of a zero, -126 and its partner's, could cut
    it, and neither a sum nor what it is cut with, 23 - fraction above it, reaches infinity."""
    a, b = reach
    low, high, above = a.low + b.low, a.high + b.high, max(23 - config.fraction, 0)
    return (
        max(a.spread, b.spread) <= SPREAD
        and low >= max(a.high, b.high, 0) + ZERO
        and high + 2 + math.ceil(math.log2(max(K, 1))) + above <= BIAS - 1
        and -128 <= cut_offset(config.fraction, reach) <= 127
    )


def folds(fraction: int, reach: Pair) -> bool:
    """Whether seven bits hold sums of lowest bits, eight the distance of the cut, and zeros have an exponent that no
    sum of one with another operand's takes out of the bytes or above a product's."""
    spreads = [each.spread for each in reach]
    return (
        max(spreads) <= FOLDED_SPREAD
        and 0 <= folded_offset(fraction, reach) <= 255
        and sum(spreads) <= lowest_product(reach) <= 255
    )


def lowest_product(reach: Pair) -> int:
    """A byte's exponent that no product and no sum of products is below."""
    return BIAS + reach[0].low + reach[1].low


def folded_offset(fraction: int, reach: Pair) -> int:
    """What lies between a sum's exponent in a byte, E + 127, and that of q above operands' lowest bits."""
    return fraction + lowest_product(reach)


def cut_offset(fraction: int, reach: Pair) -> int:
    """What lies between a sum's exponent in a signed byte, E - 1, and that of q as lowest bits have it."""
    return fraction - 1 + reach[0].high + reach[1].high
