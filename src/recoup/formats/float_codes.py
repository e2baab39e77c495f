"""The codes of a `Float`: which bits are its fraction, exponent, sign and flag, and the values they stand for."""

# ruff: noqa: A002 - format is the word of the contract and of the field

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from recoup.errors import RecoupError
from recoup.formats.pieces import in_units, put_together, take_apart
from recoup.formats.spec import Float

__all__ = ["FloatFields", "decode_float", "encode_float"]


@dataclass(frozen=True, slots=True)
class FloatFields:
    """Where a `Float`'s code keeps its fields: from bit 0 up the fraction, the exponent, the sign, perhaps a flag.

    The exponent field of binade e is ``e + bias``. Where the binades leave a code free, field 0 belongs to zero and
    the subnormals (without them, to zero alone), as in IEEE 754. Where every exponent code is a binade (`Float.lba`),
    the top bit is the **non-zero flag**, which is the hidden bit too: 1 for every value but zero, whose fraction and
    exponent are then 0. So an accumulator that equals the emulation of the paper's 12 bits, M7E4, has 13. Either way
    zero has a sign.

    Rounding and overflow are no part of a code. A top exponent field that is no binade holds infinity (fraction 0) and
    NaN (any other fraction); other free exponent fields are no codes. Where it is a binade, and incomplete (e4m3fn),
    all ones is NaN and infinity has no code. NaN is written with sign 0 and, of the fraction, only the top bit set (or
    as all ones); every NaN code is read.

    The formats ``*fnuz`` are given by their values, as in `Float.parse`: what ml_dtypes reads as NaN is their -0.

    Attributes:
        format: the format.

    Raises:
        RecoupError: not a `Float`.

    Source: IEEE 754-2019 section 3.4, and ml_dtypes for its names. The flag's place above the sign, the zeros' signs
    beside it and the one NaN that is written are our definitions.

    >>> m7e4 = FloatFields(Float.lba(4, 7, bias=10))
    >>> m7e4.fraction, m7e4.exponent, m7e4.bias, m7e4.sign, m7e4.flag, m7e4.bits
    (7, 4, 10, 11, 12, 13)
    >>> e5m2 = FloatFields(Float.parse("e5m2"))
    >>> e5m2.flag, e5m2.bits, hex(e5m2.largest), hex(e5m2.infinity), hex(e5m2.nan)
    (None, 8, '0x7b', '0x7c', '0x7e')
    """

    format: Float

    def __post_init__(self) -> None:
        if not isinstance(self.format, Float):
            raise RecoupError(f"FloatFields(format={self.format!r}): format must be a Float")

    @property
    def fraction(self) -> int:
        """Width of the fraction field, which starts at bit 0."""
        return self.format.mantissa

    @property
    def exponent(self) -> int:
        """Width of the exponent field above it; 0 for a single binade without subnormals."""
        return self.format.bits - 1 - self.format.mantissa

    @property
    def sign(self) -> int:
        """Position of the sign bit, which is 1 for negative values."""
        return self.fraction + self.exponent

    @property
    def flag(self) -> int | None:
        """Position of the non-zero flag, the top bit; None where zero has an exponent code."""
        return self.sign + 1 if not self.format.subnormals and self._binades == 1 << self.exponent else None

    @property
    def bits(self) -> int:
        """Width of a code, at most 64: `Float.bits`, and one more with the flag."""
        return self.sign + (1 if self.flag is None else 2)

    @property
    def bias(self) -> int:
        """Exponent field less exponent."""
        return (self.flag is None) - self.format.min_exponent

    @property
    def largest(self) -> int:
        """The code of the largest finite value."""
        return self.top_rank if self.flag is None else self.top_rank - (1 << self.fraction) + (1 << self.flag)

    @property
    def infinity(self) -> int | None:
        """The code of +infinity; None where it has none."""
        return self.ones - (1 << self.fraction) + 1 if self._top_is_free else None

    @property
    def nan(self) -> int | None:
        """The code that is written for NaN; None where there is none."""
        if self.infinity is not None:
            return self.infinity + (1 << self.fraction >> 1) if self.fraction else None
        return self.largest | self.ones if self.largest & self.ones < self.ones else None

    @property
    def ones(self) -> int:
        """The mask of the fraction and exponent fields."""
        return (1 << self.sign) - 1

    @property
    def top_rank(self) -> int:
        """The largest value's rank: its code without sign and flag, were exponent field 0 always that of zero."""
        steps = int(math.ldexp(self.format.largest_value, self.fraction - self.format.max_exponent))
        return ((self._binades - 1) << self.fraction) + steps

    @property
    def _binades(self) -> int:
        return self.format.max_exponent - self.format.min_exponent + 1

    @property
    def _top_is_free(self) -> bool:
        return self.format.max_exponent + self.bias < (1 << self.exponent) - 1


def encode_float(x: Tensor, format: Float) -> tuple[Tensor, Tensor]:
    """The codes of ``x``, and where they exist."""
    fields, pieces = FloatFields(format), take_apart(x)
    hidden = 1 << fields.fraction
    binade = pieces.exponent.clamp(min=format.min_exponent) - format.min_exponent
    units, exact = in_units(pieces, binade + format.min_exponent - fields.fraction)
    rank = (binade << fields.fraction) + units
    legal = exact & (rank <= fields.top_rank)
    if not format.subnormals:
        legal &= (units == 0) | (units >= hidden)
    codes = rank
    if fields.flag is not None:
        codes = torch.where(rank == 0, 0, rank - hidden + _signed(1 << fields.flag))
    for special, code in ((pieces.infinite, fields.infinity), (pieces.nan, fields.nan)):
        codes = codes.masked_fill(special, 0 if code is None else _signed(code))
        legal = torch.where(special, code is not None, legal)
    return torch.where(pieces.negative & ~pieces.nan, codes | _signed(1 << fields.sign), codes), legal


def decode_float(codes: Tensor, format: Float) -> tuple[Tensor, Tensor]:
    """The values of ``codes``, whose bits above the format's are 0, and where they exist: float64."""
    fields = FloatFields(format)
    hidden = 1 << fields.fraction
    magnitude, negative = codes & fields.ones, codes >> fields.sign & 1 == 1
    rank, flagged = magnitude, torch.ones_like(negative)
    if fields.flag is not None:
        flagged = codes >> fields.flag & 1 == 1
        rank = torch.where(flagged, magnitude + hidden, 0)
    legal = (flagged | (magnitude == 0)) & (rank <= fields.top_rank)
    if not format.subnormals:
        legal &= (rank == 0) | (rank >= hidden)
    field, fraction = rank >> fields.fraction, rank & (hidden - 1)
    units = torch.where(field > 0, fraction + hidden, fraction)
    power = field.clamp(min=1) - 1 + format.min_exponent - fields.fraction
    x = put_together(negative, units.where(legal, 0), power.where(legal, 0))
    if fields.infinity is not None:
        infinite, nan = magnitude == fields.infinity, magnitude > fields.infinity
        signed = torch.where(negative, -torch.inf, torch.inf).to(x.dtype)
        x, legal = x.where(~infinite, signed), legal | infinite | nan
    else:
        nan = (magnitude == fields.ones) & flagged & (fields.nan is not None)
        legal = legal | nan
    return x.masked_fill(nan, torch.nan), legal


def _signed(code: int) -> int:
    """The int64 that has a code's bits."""
    return code - (1 << 64) if code >> 63 else code
