"""What brings a tile to its format and blocks, as numbers for the numba kernels of general_tiles.py.

The numbers cross from Python to a kernel as plain tuples within a plain tuple, which numba reads fastest (see
cpu_rounding.py); `named` gives them their names there.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch

from recoup.formats import BlockFloat, Float
from recoup.formats.constants import (
    BlockConstants,
    FloatConstants,
    NearestConstants,
    block_constants,
    float_constants,
    nearest_constants,
)
from recoup.lightnorm.cpu_rounding import Rounding, inner, rounding_of

PLAIN, MASK, ANY, NEAREST = 0, 1, 2, 3  # to the format: not at all, a mask, `float_kernel`, `float_nearest_kernel`
NONE, WHOLE, GENERAL = 0, 1, 2  # to blocks: not at all, whole multiples of the quantum, `block_kernel`
FRACTION, BIAS = 23, 127
SPAN = 100  # exponents between a format's ends for which the blocks' powers of two stay normal float32

# Of the types that constants have, or every kernel would be compiled for these as well.
NO_FLOATS, NO_NEAREST = FloatConstants(*[0] * 10), NearestConstants(*[0] * 7)
NO_BLOCKS = BlockConstants(0, 0, 0, 0, False, 0)


class TileFormat(NamedTuple):
    """How kernels round a tile's values; bits are those of the input's dtype, unless said otherwise.

    Attributes:
        rounding: of float64 to the format.
        floats, nearest, blocks: what the formats' kernels take, of ANY, of NEAREST and of GENERAL.
        values: PLAIN, MASK, ANY or NEAREST: how values come to the format.
        mask, low, top: of MASK: keeps the mantissa's bits; the smallest normal and the largest value, as bits.
        inputs, results: NONE, WHOLE or GENERAL: how inputs, and how results come to blocks. They differ where results
            may be NaN, which WHOLE does not keep.
        outlier: of WHOLE: 1 where a lone largest element keeps its exponent.
        reciprocal: of WHOLE: less an exponent's bits, the bits of the quantum's reciprocal.
        quantum: of WHOLE: an exponent's bits less this are the bits of the quantum.
    """

    rounding: Rounding
    floats: tuple
    nearest: tuple
    blocks: tuple
    values: int
    mask: int
    low: int
    top: int
    inputs: int
    results: int
    outlier: int
    reciprocal: int
    quantum: int

    def for_any_factors(self) -> "TileFormat":
        """The same where factors are not ordinary numbers, so that results may be NaN."""
        return self if self.results == NONE else self._replace(results=GENERAL)

    def numbers(self) -> tuple:
        """What a kernel is given."""
        rounding, floats, nearest, blocks, *own = self
        return tuple(rounding), floats, nearest, blocks, tuple(own)


@inner
def named(numbers: Any) -> Any:
    """`TileFormat.numbers` as a `TileFormat`, inside a kernel."""
    rounding, floats, nearest, blocks, own = numbers
    return TileFormat(Rounding(*rounding), floats, nearest, blocks, *own)


@lru_cache(maxsize=256)
def tile_format(form: Float | None, blocks: BlockFloat | None, dtype: torch.dtype) -> TileFormat:
    """How to round to a format, None for none, and to blocks."""
    floats = NO_FLOATS if form is None else float_constants(form, dtype)
    nearest = None if form is None else nearest_constants(form, dtype)
    shared = NO_BLOCKS if blocks is None else block_constants(blocks, dtype)
    values, mask = PLAIN if form is None else ANY if nearest is None else NEAREST, 0
    if form is not None and form.rounding == "zero" and not form.subnormals:
        values, mask = MASK, -1 << (floats.fraction - form.mantissa)
    sharing = NONE if blocks is None else WHOLE if whole(form, blocks, dtype) else GENERAL
    depth = 0 if blocks is None else (blocks.significand - 1) << FRACTION
    return TileFormat(
        values=values,
        mask=mask,
        low=floats.zero_below,
        top=floats.largest,
        inputs=sharing,
        results=sharing,
        outlier=int(shared.outlier),
        reciprocal=(2 * BIAS << FRACTION) + depth,
        quantum=depth,
        rounding=rounding_of(form),
        floats=tuple(floats),
        nearest=tuple(nearest or NO_NEAREST),
        blocks=tuple(shared),
    )


def whole(form: Float | None, blocks: BlockFloat, dtype: torch.dtype) -> bool:
    """Whether WHOLE holds: values are cut to whole multiples of their block's quantum; see general_tiles.py.

    Truncation without subnormals leaves none below the smallest normal; a significand of the format's bits makes every
    element at the shared exponent or above a multiple of the quantum; and the quanta and their reciprocals are normal.
    """
    if form is None or dtype != torch.float32 or form.rounding != "zero" or form.subnormals:
        return False
    low, high = form.min_exponent, form.max_exponent
    fits = blocks.min_exponent <= low and high <= blocks.max_exponent and blocks.rounding == "zero"
    depth = blocks.significand - 1
    normal = low - depth > -BIAS and depth - low < BIAS and high - depth < BIAS
    return fits and normal and blocks.significand == form.mantissa + 1 and high - low + depth < SPAN
