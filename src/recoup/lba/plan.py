"""Which form of the kernels computes a product, at which scale, with which constants.

A plan depends on the operands through their largest and smallest magnitudes only: those decide whether float32 lanes
can hold every intermediate value at some power-of-two scale. Where they cannot, float64 lanes do, with the same bits.
"""

import math
import struct
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from torch import Tensor

from recoup.formats import Float, Int
from recoup.lba import emit_integer as integer
from recoup.lba import emit_narrow as narrow
from recoup.lba import emit_wide as wide
from recoup.lba.config import LBA
from recoup.lba.emit_code import CONSTANTS, OUTER, PRODUCT, SUM, Form
from recoup.lba.emit_integer import Whole
from recoup.lba.emit_narrow import Narrow
from recoup.lba.emit_wide import Quantiser, Wide

LOW, HIGH = -126, 127  # exponents of float32's normal numbers
UNBOUNDED = 2.0**-900  # below everything that products and sums of float32 numbers can reach
HEADROOM = 1 - 1e-4  # a bound summed up in float32 is trusted this far
WORTH_SUMMING = 64  # products of every element, beside which one more pass over the elements is cheap
WORTH_CALLING = 1 << 22  # multiply-adds, beside which torch's own calls are
FRACTION, DOUBLE_FRACTION = 23, 52  # stored bits of float32's and float64's significands


@dataclass(frozen=True, slots=True)
class Extent:
    """Exponents, floor(log2), of the largest and the smallest magnitude that is not zero; and the largest itself."""

    largest: float
    high: int
    low: int

    @classmethod
    def of(cls, high: int, low: int) -> "Extent":
        """From the bits of both magnitudes as float32; all zero: as if they were one.

        NaN and infinities, whose bits are above every number's, show as ``finite`` False.
        """
        if high == 0:
            return cls(0.0, 0, 0)
        return cls(struct.unpack("<f", struct.pack("<i", high))[0], _exponent(high), _exponent(low))

    @property
    def finite(self) -> bool:
        """Whether neither NaN nor infinity is among them."""
        return math.isfinite(self.largest)


def _exponent(bits: int) -> int:
    """Of a magnitude's bits; without a leading one, of the first bit that is one."""
    return (bits >> FRACTION) - HIGH if bits >> FRACTION else bits.bit_length() + LOW - FRACTION - 1


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """A kernel and what to call it with; it equals itself alone, so that it can be a key.

    Attributes:
        form: of the steps.
        a_scale, b_scale: exponents of the powers of two that the operands are multiplied by.
        a_least, b_least: magnitudes below these are zero to the unit and must become zero (0: none).
        unscale: exponent of the result's factor.
        finished: whether float32 lanes that flush may multiply by it: no result leaves the normal numbers.
        floats, integers: the form's constants.
    """

    form: Form
    a_scale: int
    b_scale: int
    a_least: float
    b_least: float
    unscale: int
    finished: bool
    floats: np.ndarray
    integers: np.ndarray

    @property
    def b_least_bits(self) -> int:
        """``b_least`` as float32 bits."""
        return struct.unpack("<i", struct.pack("<f", self.b_least))[0]


def plan(a: Extent, b: Extent, chunk_sum: float, config: LBA, fma: bool, whole: bool = False) -> Plan:
    """The fastest kernel that is exact.

    Args:
        a, b: what the operands reach.
        chunk_sum: a bound of the sum of |x w| over any chunk, infinity if unknown.
        config: the unit.
        fma: whether multiply-add is one instruction.
        whole: whether all operands are whole numbers.
    """
    if whole and _counts(config):
        return _whole_plan(config)
    if not _truncates(config):
        return _wide_plan(config.code, _far(a.largest * b.largest, config))
    limits = (_may_reach(a.largest * b.largest, config.product), _may_reach(chunk_sum, config.accumulator))
    return _float_plan((a.high, a.low), (b.high, b.low), limits, config.code, fma)


@lru_cache(maxsize=1024)
def _float_plan(a: tuple[int, int], b: tuple[int, int], limits: tuple[bool, bool], code: str, fma: bool) -> Plan:
    """Of a unit that truncates, from exponents alone: calls with operands of the same size share it."""
    config = LBA.from_code(code)
    scales = _scales(Extent(0.0, *a), Extent(0.0, *b), config, fma)
    return _wide_plan(code) if scales is None else _narrow_plan(scales, limits, config, fma)


def _counts(config: LBA) -> bool:
    """Whether whole operands give whole numbers that saturate, within float32."""
    accumulator = config.accumulator
    small = isinstance(accumulator, Int) and accumulator.overflow == "saturate" and accumulator.bits <= integer.MAX_BITS
    return small and config.scale == 1 and config.product is None and config.promotion is None


def _whole_plan(config: LBA) -> Plan:
    assert isinstance(config.accumulator, Int)
    floats, integers = np.zeros(CONSTANTS, np.float32), np.zeros(CONSTANTS, np.int32)
    floats[integer.TOP], floats[integer.BOTTOM] = config.accumulator.largest_value, config.accumulator.smallest_value
    return Plan(Whole(), 0, 0, 0.0, 0.0, 0, True, floats, integers)


def _truncates(config: LBA) -> bool:
    """Whether every step truncates, without subnormals: what float32 lanes can do."""
    formats = (config.accumulator, *([config.product] if config.product else []))
    plain = all(isinstance(f, Float) and f.rounding == "zero" and not f.subnormals for f in formats)
    return plain and config.promotion is None


def _may_reach(bound: float, format: Float | Int | None) -> bool:  # noqa: A002
    return format is not None and not bound < format.largest_value * HEADROOM


@dataclass(frozen=True, slots=True)
class _Scales:
    """Exponents of what operands, products and sums are multiplied by, and the least operands as in `Plan`."""

    a: int
    b: int
    a_least: float
    b_least: float
    product: int
    sum: int


def _scales(a: Extent, b: Extent, config: LBA, fma: bool) -> _Scales | None:
    """Powers of two that keep every value of float32 lanes normal, or None."""
    product, accumulator = config.product, config.accumulator
    assert isinstance(accumulator, Float)
    tops = [f.max_exponent for f in (product, accumulator) if f is not None]
    if not fma and (config.product is None or config.underflow):
        return _unscaled(config) if config.product is not None else None
    # The kernels read subnormal operands as zero. Underflow with the largest partner makes an operand zero anyway.
    least_a = least_b = -math.inf
    if product is not None and config.underflow:
        least_a, least_b = product.min_exponent - b.high - 1, product.min_exponent - a.high - 1
    if max(a.low, least_a) < LOW or max(b.low, least_b) < LOW:
        return None
    if not config.underflow:
        # Nothing may be flushed: one scale for all, as large as the largest values allow, at which the finest bit of a
        # product as it is added (fused: an exact one, of both significands' bits) must still be a normal number.
        common = min(HIGH - 1 - max(tops), HIGH)
        finest = -2 * FRACTION if product is None else -product.mantissa
        fits = common + a.low + b.low + finest >= LOW and common >= -HIGH
        return _divided(a, b, common, common) if fits else None
    # Each format's smallest normal becomes float32's, so that flushing is its underflow.
    at_sum = LOW - accumulator.min_exponent
    at_product = at_sum if product is None else LOW - product.min_exponent
    if accumulator.max_exponent + at_sum > HIGH or not LOW <= -at_sum <= HIGH:
        return None
    if product is None:
        return _divided(a, b, at_product, at_sum)
    scale_a = -a.high - 1
    scale_b = at_product - scale_a
    inside = b.high + scale_b < 0  # both operands are below one, and so is every product
    factors = max(abs(scale_a), abs(scale_b)) < HIGH and LOW <= at_sum - at_product <= HIGH
    if not inside or not factors or product.max_exponent + at_product > HIGH:
        return None
    if a.high < 0 and abs(at_product) < HIGH and b.high + at_product < 0:
        scale_a, scale_b = 0, at_product  # rows below one, as weights are, are read as they lie
    least = (_power(least_a) if a.low < least_a else 0.0, _power(least_b) if b.low < least_b else 0.0)
    return _Scales(scale_a, scale_b, *least, at_product, at_sum)


def _power(exponent: float) -> float:
    """Of two, or zero where float32 has nothing below it."""
    return 2.0**exponent if exponent >= LOW - FRACTION else 0.0


def _unscaled(config: LBA) -> _Scales | None:
    formats = [f for f in (config.product, config.accumulator) if isinstance(f, Float)]
    inside = all(f.min_exponent >= LOW and f.max_exponent <= HIGH for f in formats)
    return _Scales(0, 0, 0.0, 0.0, 0, 0) if inside else None


def _divided(a: Extent, b: Extent, total: int, at_sum: int) -> _Scales | None:
    """``total`` divided between the operands so that none leaves the normal range: fused, or without underflow, every
    one of them counts. The two factors must be float32 numbers themselves."""
    least = max(LOW - a.low, total - (HIGH - 1 - b.high), -HIGH + 1)
    most = min(HIGH - 1 - a.high, total - (LOW - b.low), HIGH - 1)
    if least > most or (abs(total - least) >= HIGH and abs(total - most) >= HIGH):
        return None
    scale_a = min(max(-a.high, least), most)
    if abs(total - scale_a) >= HIGH:
        return None
    return _Scales(scale_a, total - scale_a, 0.0, 0.0, total, at_sum)


def _narrow_plan(scales: _Scales, limits: tuple[bool, bool], config: LBA, fma: bool) -> Plan:
    product, accumulator = config.product, config.accumulator
    assert isinstance(accumulator, Float)
    form = Narrow(product is None, limits[0], limits[1], not fma, config.underflow)
    floats, integers = np.zeros(CONSTANTS, np.float32), np.zeros(CONSTANTS, np.int32)
    floats[narrow.RATIO] = 2.0 ** (scales.sum - scales.product)
    floats[narrow.SUM_TOP] = math.ldexp(accumulator.largest_value, scales.sum)
    integers[narrow.SUM_MASK] = -1 << (FRACTION - accumulator.mantissa)
    integers[narrow.SUM_LOW] = _bits(accumulator.min_exponent)
    if product is not None:
        floats[narrow.PRODUCT_TOP] = math.ldexp(product.largest_value, scales.product)
        integers[narrow.PRODUCT_MASK] = -1 << (FRACTION - product.mantissa)
        integers[narrow.PRODUCT_LOW] = _bits(product.min_exponent)
    normal = config.underflow and accumulator.min_exponent >= LOW and accumulator.max_exponent <= HIGH
    finished = normal or scales.sum == 0
    return Plan(form, scales.a, scales.b, scales.a_least, scales.b_least, -scales.sum, finished, floats, integers)


def _bits(exponent: int) -> int:
    """A power of two as float32 bits; at least the smallest normal number."""
    return max(exponent + HIGH, 1) << FRACTION


@lru_cache(maxsize=256)
def _wide_plan(code: str, far: bool = False) -> Plan:
    config = LBA.from_code(code)
    floats, integers = np.zeros(CONSTANTS, np.float64), np.zeros(CONSTANTS, np.int64)
    formats = {PRODUCT: config.product, SUM: config.accumulator, OUTER: config.outer}
    plain = all(
        f is None or (isinstance(f, Float) and f.rounding == "zero" and not f.subnormals) for f in formats.values()
    )
    made = {slot: None if f is None else _quantiser(f, config, plain) for slot, f in formats.items()}
    for slot, f in formats.items():
        if f is not None:
            _constants(f, config, slot, floats, integers)
    near = _rounds_once(config.product, config.accumulator, config) and _rounds_once(
        config.accumulator, config.outer, config
    )
    total, outer = made[SUM], made[OUTER]
    assert total is not None
    assert outer is not None
    rounding = "zero" if plain else "nearest" if near and config.gradient == "identity" else "odd"
    form = Wide(made[PRODUCT], total, outer, rounding, far)
    units = isinstance(config.outer, Int)
    unscale = math.frexp(config.scale)[1] - 1 if units else 0
    return Plan(form, 0, 0, 0.0, 0.0, unscale, False, floats, integers)


def _far(product: float, config: LBA) -> bool:
    """Whether products up to this one may be beyond what a sum that wraps takes as it is."""
    wraps = isinstance(config.accumulator, Int) and config.accumulator.overflow == "wrap"
    return wraps and product / config.scale >= wide.FAR


def _rounds_once(term: Float | Int | None, total: Float | Int, config: LBA) -> bool:
    """Whether rounding ``term + total`` to float64 first leaves its rounding to nearest in ``total`` as it is.

    The proof is in `emit_wide`; it needs terms with no more bits than the sum, and none that reach far below the sum's
    smallest normal.
    """
    if not isinstance(term, Float) or not isinstance(total, Float) or total.rounding != "nearest":
        return False
    fine = term.min_exponent - term.mantissa
    return term.mantissa <= total.mantissa and (not config.underflow or fine >= total.min_exponent - DOUBLE_FRACTION)


def _quantiser(format: Float | Int, config: LBA, plain: bool) -> Quantiser:  # noqa: A002
    if isinstance(format, Int):
        return Quantiser(format.overflow)
    flush = config.underflow and not format.subnormals
    return Quantiser("mask" if plain else format.rounding, flush)


def _constants(format: Float | Int, config: LBA, slot: int, floats: np.ndarray, integers: np.ndarray) -> None:  # noqa: A002
    at = slot * wide.SLOT
    floats[at + wide.TOP] = format.largest_value
    if isinstance(format, Int):
        floats[at + wide.BOTTOM] = format.smallest_value
        floats[at + wide.RANGE], floats[at + wide.INVERSE_RANGE] = 2.0**format.bits, 2.0**-format.bits
        floats[at + wide.SCALE], floats[at + wide.INVERSE] = config.scale, 1 / config.scale
        return
    floats[at + wide.LOW] = format.smallest_normal if config.underflow else UNBOUNDED
    integers[at + wide.MASK] = -1 << (DOUBLE_FRACTION - format.mantissa)
    integers[at + wide.SPREAD] = (DOUBLE_FRACTION - format.mantissa) << DOUBLE_FRACTION
    integers[at + wide.DEPTH] = format.mantissa << DOUBLE_FRACTION


def chunk_bound(x: Tensor, largest: float, partner: float, uses: int, config: LBA) -> float:
    """A bound of the sum of |x w| over any chunk of any row of x [..., K]; the largest |x| and |w| are given.

    It is summed up only where it might show that no limit is needed, and is cheap beside the ``uses`` products of every
    element and the call itself.
    """
    K = x.shape[-1]
    chunk = min(config.chunk or K, K)
    bound = chunk * largest * partner
    few = uses < WORTH_SUMMING or x.numel() * uses < WORTH_CALLING or K % chunk
    if few or not _truncates(config) or not _may_reach(bound, config.accumulator):
        return bound
    return partner * float(x.detach().abs().unflatten(-1, (-1, chunk)).sum(-1).amax())
