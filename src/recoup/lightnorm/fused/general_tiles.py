"""A tile of activations in the scratch memory of LightNorm's fused kernels: read, rounded to a format and to blocks.

Legend: W channels of a block, rows ``pitch`` apart, n places of each. ``how``: see `general.constants`.

Truncation to a format without subnormals is a mask, a comparison and a minimum. Blocks of such values, whose
significand is the format's, are shorter than formats' own kernel has them: no element is subnormal, and an element
whose exponent is the shared one or larger is a multiple of the quantum already. So x becomes
``trunc(x / quantum) * quantum`` without further cases, the quantum from the largest or second largest exponent.
"""

# ruff: noqa: ARG001 - numba fixes an intrinsic's arguments

from typing import Any

from numba import njit
from numba.extending import intrinsic

from recoup.formats.cpu_kernels import as_float, as_integer, block_kernel, float_kernel, float_nearest_kernel

PLAIN, MASK, ANY, NEAREST = 0, 1, 2, 3  # how[0]: rounding to the format
NONE, WHOLE, GENERAL = 0, 1, 2  # how[18]: rounding to blocks

_intrinsic: Any = intrinsic
_njit: Any = njit(nogil=True, cache=True)


@_intrinsic
def _trunc(typing_context, a):
    """The float a toward zero."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        function = builder.module.declare_intrinsic("llvm.trunc", [arguments[0].type])
        return builder.call(function, arguments)

    return a(a), generate


@_njit
def infinity_of(keys):
    """The bits of infinity."""
    T = keys.dtype.type
    return T(0x7F800000) if keys.itemsize == 4 else T(0x7FF0000000000000)


@_njit
def exact(how):
    """The constants that round float64, as `cpu.rounding` gives them."""
    return (how[25], how[26], how[27], how[28], how[29], how[30], how[31], how[32])


@_njit
def _mask(source, row, how):
    """Toward zero, flushed and saturated; the largest magnitude read."""
    T = source.dtype.type
    absolute = T(~T(T(1) << T(source.itemsize * 8 - 1)))
    mask, low, top = T(how[33]), T(how[34]), T(how[35])
    peak = T(0)
    for i in range(source.size):
        v = source[i]
        u = T(v & absolute)
        peak = max(peak, u)
        q = min(T(u & mask), top)
        q = T(0) if u < low else q
        row[i] = T(q | T(v ^ u))
    return peak


@_njit
def _peak(source):
    """The largest magnitude as bits."""
    T = source.dtype.type
    absolute, peak = T(~T(T(1) << T(source.itemsize * 8 - 1))), T(0)
    for i in range(source.size):
        peak = max(peak, T(source[i] & absolute))
    return peak


@_njit
def copy(source, to):
    """A loop: numba's assignment of slices is several times slower."""
    for i in range(to.size):
        to[i] = source[i]


@_njit
def _copied(source, row):
    """A copy; the largest magnitude as bits."""
    T = source.dtype.type
    absolute, peak = T(~T(T(1) << T(source.itemsize * 8 - 1))), T(0)
    for i in range(source.size):
        v = source[i]
        peak = max(peak, T(v & absolute))
        row[i] = v
    return peak


@_njit
def take(keys, tile, spare, at, places, width, n, pitch, how):
    """B(F(x)) of a tile into ``tile``; the largest magnitude of x as bits."""
    T = keys.dtype.type
    peak, mode = T(0), how[0]
    into = spare if how[18] == GENERAL else tile
    for w in range(width):
        source, row = keys[at + w * places : at + w * places + n], into[w * pitch : w * pitch + n]
        if mode == MASK:
            peak = max(peak, _mask(source, row, how))
            continue
        if mode == PLAIN:
            peak = max(peak, _copied(source, row))
            continue
        peak = max(peak, _peak(source))
        if mode == NEAREST:
            c = (how[11], how[12], how[13], how[14], how[15], how[16], how[17])
            float_nearest_kernel(source, row, 0, n, c)
        else:
            f = (how[1], how[2], how[3], how[4], how[5], how[6], how[7], how[8], how[9], how[10])
            float_kernel(source, row, 0, n, f)
    if how[18] == WHOLE:
        _whole_blocks(tile, spare, width, n, pitch, how)
    elif how[18] == GENERAL:
        _any_blocks(spare, tile, width, pitch, how)
    return peak


@_njit
def share(tile, spare, width, n, pitch, how):
    """What is in ``tile`` rounded to blocks again; where it then is."""
    if how[36] == WHOLE:
        _whole_blocks(tile, spare, width, n, pitch, how)
    elif how[36] == GENERAL:
        _any_blocks(tile, spare, width, pitch, how)
        return spare
    return tile


@_njit
def _any_blocks(source, result, width, pitch, how):
    """The formats' own kernel on a tile: not in place, or its loops would not be vectors."""
    constants = (how[19], how[20], how[21], how[22], how[23], how[24])
    lanes = (pitch + 511) // 512
    block_kernel(source, result, 0, lanes, (width, pitch, width, 1, lanes), constants, source[:0])


@_njit
def _whole_blocks(tile, spare, width, n, pitch, how):
    """Truncation to blocks of values in a format of the same significand, in place."""
    T = tile.dtype.type
    infinity, outlier = infinity_of(tile), how[23] != 0
    low, up, down = T(how[34]), T(how[37]), T(how[38])
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
    shared = second if outlier else largest
    for w in range(width):
        row = tile[w * pitch : w * pitch + n]
        for i in range(row.size):
            e = max(shared[i], low)
            row[i] = as_integer(_trunc(as_float(row[i]) * as_float(T(up - e))) * as_float(T(e - down)))
