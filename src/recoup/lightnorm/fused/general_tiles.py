"""A tile of activations in the scratch memory of the numba kernels: read, rounded to a format and to blocks.

Legend: W channels of a block, rows ``pitch`` apart, n places of each; ``format`` a `tile_format.TileFormat`.

Truncation to a format without subnormals is a mask, a comparison and a minimum. Blocks of such values, whose
significand is the format's, are shorter than formats' own kernel has them: no element is subnormal, and an element
whose exponent is the shared one or larger is a multiple of the quantum already. So x becomes
``trunc(x / quantum) * quantum`` without further cases, the quantum from the largest or second largest exponent.
"""

# ruff: noqa: A002, ARG001 - format is the field's word; numba fixes an intrinsic's arguments

from typing import Any

from numba.extending import intrinsic

from recoup.formats.cpu_kernels import LANES, as_float, as_integer, block_kernel, float_kernel, float_nearest_kernel
from recoup.lightnorm.cpu_rounding import inner
from recoup.lightnorm.fused.tile_format import GENERAL, MASK, NEAREST, PLAIN, WHOLE

_intrinsic: Any = intrinsic


@_intrinsic
def _trunc(typing_context, a):
    """The float a toward zero."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        function = builder.module.declare_intrinsic("llvm.trunc", [arguments[0].type])
        return builder.call(function, arguments)

    return a(a), generate


@inner
def infinity_of(keys):
    """The bits of infinity."""
    T = keys.dtype.type
    return T(0x7F800000) if keys.itemsize == 4 else T(0x7FF0000000000000)


@inner
def _magnitude_mask(keys):
    """All bits but the sign's."""
    T = keys.dtype.type
    return T(~T(T(1) << T(keys.itemsize * 8 - 1)))


@inner
def _truncate_row(source, row, format):
    """Toward zero, flushed and saturated; the largest magnitude read."""
    T = source.dtype.type
    absolute = _magnitude_mask(source)
    mask, low, top = T(format.mask), T(format.low), T(format.top)
    peak = T(0)
    for i in range(source.size):
        v = source[i]
        u = T(v & absolute)
        peak = max(peak, u)
        q = min(T(u & mask), top)
        q = T(0) if u < low else q
        row[i] = T(q | T(v ^ u))
    return peak


@inner
def _peak_of(source):
    """The largest magnitude as bits."""
    T = source.dtype.type
    absolute, peak = _magnitude_mask(source), T(0)
    for i in range(source.size):
        peak = max(peak, T(source[i] & absolute))
    return peak


@inner
def copy(source, to):
    """A loop: numba's assignment of slices is several times slower."""
    for i in range(to.size):
        to[i] = source[i]


@inner
def _copy_row(source, row):
    """A copy; the largest magnitude as bits."""
    T = source.dtype.type
    absolute, peak = _magnitude_mask(source), T(0)
    for i in range(source.size):
        v = source[i]
        peak = max(peak, T(v & absolute))
        row[i] = v
    return peak


@inner
def read_tile(keys, tile, spare, at, places, width, n, pitch, format):
    """B(F(x)) of a tile into ``tile``; the largest magnitude of x as bits, by which callers know NaN and infinities.

    ``at``: the first row's first element; ``spare``: scratch as large as the tile, and two rows.
    """
    T = keys.dtype.type
    peak = T(0)
    # The blocks' own kernel does not work in place, or its loops would not be vectors: it writes from spare to tile.
    into = spare if format.inputs == GENERAL else tile
    for w in range(width):
        source, row = keys[at + w * places : at + w * places + n], into[w * pitch : w * pitch + n]
        if format.values == MASK:
            peak = max(peak, _truncate_row(source, row, format))
        elif format.values == PLAIN:
            peak = max(peak, _copy_row(source, row))
        else:
            peak = max(peak, _peak_of(source))
            if format.values == NEAREST:
                float_nearest_kernel(source, row, 0, n, format.nearest)
            else:
                float_kernel(source, row, 0, n, format.floats)
    if format.inputs == WHOLE:
        _share_whole(tile, spare, width, n, pitch, format)
    elif format.inputs == GENERAL:
        _share_generally(spare, tile, width, pitch, format)
    return peak


@inner
def share_exponents(tile, spare, width, n, pitch, format):
    """Results in ``tile`` rounded to blocks; where they then are."""
    if format.results == WHOLE:
        _share_whole(tile, spare, width, n, pitch, format)
    elif format.results == GENERAL:
        _share_generally(tile, spare, width, pitch, format)
        return spare
    return tile


@inner
def _share_generally(source, result, width, pitch, format):
    """The formats' own kernel, on rows as long as the pitch: one block of ``width`` channels, in as many steps."""
    steps = (pitch + LANES - 1) // LANES
    block_kernel(source, result, 0, steps, (width, pitch, width, 1, steps), format.blocks, source[:0])


@inner
def _share_whole(tile, spare, width, n, pitch, format):
    """Truncation to blocks of values in a format of the same significand, in place.

    The largest and the second largest exponent of every place wait in spare's first rows. An exponent below the
    smallest normal's, that of a block of zeros, counts as that one, so that the quantum's reciprocal is finite.
    """
    T = tile.dtype.type
    infinity = infinity_of(tile)
    low, reciprocal, quantum = T(format.low), T(format.reciprocal), T(format.quantum)
    largest, second = spare[:n], spare[pitch : pitch + n]
    for i in range(largest.size):
        largest[i] = 0
        second[i] = 0
    for w in range(width):
        row = tile[w * pitch : w * pitch + n]
        for i in range(row.size):
            e = T(row[i] & infinity)
            second[i] = max(second[i], min(e, largest[i]))
            largest[i] = max(largest[i], e)
    shared = second if format.outlier else largest
    for w in range(width):
        row = tile[w * pitch : w * pitch + n]
        for i in range(row.size):
            e = max(shared[i], low)
            row[i] = as_integer(_trunc(as_float(row[i]) * as_float(T(reciprocal - e))) * as_float(T(e - quantum)))
