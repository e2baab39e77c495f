"""LightNorm's passes on CUDA as Triton kernels; gpu.py calls them. The arithmetic is that of cpu_kernels.py.

Legend: x, g, xhat, y, dx [N, C, P] contiguous; K chunks of a channel's elements, each cut into pieces of STEPS LANES
elements, one program a piece. Sums are pairs (sum, error), every addition followed by the exact error it made.
Products and sums round separately: the kernels are compiled with enable_fp_fusion=False.
"""

# Triton's language is typed for its own compiler:
# ruff: noqa: RET505
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportIndexIssue=false, reportAttributeAccessIssue=false

import triton
import triton.language as tl

from recoup.lightnorm import cpu_rounding

NONE, TRUNCATE = tl.constexpr(cpu_rounding.NONE), tl.constexpr(cpu_rounding.TRUNCATE)
MAGNITUDE, SIGN = tl.constexpr(cpu_rounding.MAGNITUDE), tl.constexpr(cpu_rounding.SIGN)
EXPONENT = tl.constexpr(cpu_rounding.EXPONENT)
NOWHERE = tl.constexpr((1 << 31) - 1)


@triton.jit
def add_pair(total, error, v, more):
    """(total, error) + (v, more): TwoSum."""
    t = total + v
    z = t - total
    return t, error + ((total - (t - z)) + (v - z)) + more


@triton.jit
def joined(total, error):
    """The pairs of all lanes as one; in any order, as a pair is exact."""
    return tl.reduce((total, error), 0, add_pair)


@triton.jit
def rounded(v, mask, low, top, spread, depth, MODE: tl.constexpr, NEAREST: tl.constexpr, FLUSH: tl.constexpr):
    """float64 to a format, as float64: `cpu_rounding.truncated` and `cpu_rounding.generally`; NaN is kept."""
    bits = v.to(tl.int64, bitcast=True)
    sign, size = bits & SIGN, bits & MAGNITUDE
    low, top = low.to(tl.int64), top.to(tl.int64)
    if MODE == TRUNCATE:
        cut = tl.where(size < low, 0, tl.minimum(size & mask.to(tl.int64), top))
        return (tl.where(size > EXPONENT, size, cut) | sign).to(tl.float64, bitcast=True)
    else:
        binade = tl.minimum(tl.maximum(size, low) & EXPONENT, top)
        large = (binade + spread.to(tl.int64)).to(tl.float64, bitcast=True)
        largest = top.to(tl.float64, bitcast=True)
        magnitude = size.to(tl.float64, bitcast=True)
        held = tl.minimum(magnitude, largest * 2.0)
        r = (held + large) - large
        if not NEAREST:
            quantum = (binade - depth.to(tl.int64)).to(tl.float64, bitcast=True)
            r = r - tl.where(r > held, quantum, 0.0)
        if FLUSH:
            r = tl.where(size < low, 0.0, r)
        r = tl.where(size > EXPONENT, magnitude, tl.minimum(r, largest))
        return (r.to(tl.int64, bitcast=True) | sign).to(tl.float64, bitcast=True)


@triton.jit
def odd(value, error):
    """The exact value + error rounded to odd: `cpu_rounding._odd`."""
    bits = value.to(tl.int64, bitcast=True)
    moved = tl.where((error > 0) == (value > 0), bits + 1, bits - 1)
    inexact = (error > 0) | (error < 0)  # NaN, which infinities leave, is neither
    return tl.where(inexact & ((bits & 1) == 0), moved, bits).to(tl.float64, bitcast=True)


@triton.jit
def odd_sum(x, y):
    """x + y rounded to odd."""
    t = x + y
    z = t - x
    return odd(t, (x - (t - z)) + (y - z))


@triton.jit
def halves(x):
    """Two halves of a float64, of 26 bits each."""
    large = x * 134217729.0
    high = large - (large - x)
    return high, x - high


@triton.jit
def scaled_difference(x, mean, factor):
    """(x - mean) factor, each rounded to odd."""
    difference = odd_sum(x, -mean)
    product = difference * factor
    a, b = halves(difference)
    c, d = halves(factor)
    return odd(product, ((a * c - product) + a * d + b * c) + b * d)


@triton.jit
def finite_kernel(keys, found, size, INFINITE: tl.constexpr, ABSOLUTE: tl.constexpr, LANES: tl.constexpr):
    """found = 1 where a number's bits are those of NaN or infinity."""
    at = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    bits = tl.load(keys + at, mask=at < size, other=0) & ABSOLUTE
    tl.store(found, 1, mask=tl.max(bits, 0) >= INFINITE)


@triton.jit
def _address(i, c, channels, places):
    """Of a channel's elements i."""
    return ((i // places).to(tl.int64) * channels + c) * places + i % places


@triton.jit(do_not_specialize=["channels", "places", "pieces", "chunks", "short", "longer"])
def moments_kernel(
    x, sums, ends, indices, channels, places, pieces, chunks, short, longer,
    STEPS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Of one piece: the sum [2], maximum and minimum [2], and their first indices [2]; all in [C, K, pieces, 2]."""
    c, piece, chunk = tl.program_id(0), tl.program_id(1) % pieces, tl.program_id(1) // pieces
    begin = chunk * short + tl.minimum(chunk, longer)
    end = begin + short + tl.where(chunk < longer, 1, 0)
    lane = tl.arange(0, LANES)
    total, error = tl.zeros((LANES,), tl.float64), tl.zeros((LANES,), tl.float64)
    high = tl.full((LANES,), float("-inf"), x.dtype.element_ty)
    low = tl.full((LANES,), float("inf"), x.dtype.element_ty)
    at_high, at_low = tl.full((LANES,), NOWHERE, tl.int32), tl.full((LANES,), NOWHERE, tl.int32)
    for step in range(STEPS):
        i = begin + (piece * STEPS + step) * LANES + lane
        inside = i < end
        v = tl.load(x + _address(i, c, channels, places), mask=inside, other=0.0)
        total, error = add_pair(total, error, v.to(tl.float64), 0.0)
        more, less = inside & (v > high), inside & (v < low)
        high, low = tl.where(more, v, high), tl.where(less, v, low)
        at_high, at_low = tl.where(more, i, at_high), tl.where(less, i, at_low)
    s, e = joined(total, error)
    top, bottom = tl.max(high, 0), tl.min(low, 0)
    out = ((c.to(tl.int64) * chunks + chunk) * pieces + piece) * 2
    tl.store(sums + out, s)
    tl.store(sums + out + 1, e)
    tl.store(ends + out, top.to(tl.float64))
    tl.store(ends + out + 1, bottom.to(tl.float64))
    tl.store(indices + out, tl.min(tl.where(high == top, at_high, NOWHERE), 0).to(tl.int64))
    tl.store(indices + out + 1, tl.min(tl.where(low == bottom, at_low, NOWHERE), 0).to(tl.int64))


@triton.jit(do_not_specialize=["pieces", "chunks", "nowhere"])
def join_kernel(
    sums, ends, indices, out_sums, out_ends, out_indices, pieces, chunks, nowhere,
    ENDS: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """The pieces of a channel together. ``nowhere``: index in a chunk of NaN, that of cpu.py."""
    c = tl.program_id(0).to(tl.int64)
    piece = tl.arange(0, PIECES)
    inside = piece < pieces
    total, error = tl.full((), 0.0, tl.float64), tl.full((), 0.0, tl.float64)
    for chunk in range(chunks):
        at = ((c * chunks + chunk) * pieces + piece) * 2
        v, more = tl.load(sums + at, mask=inside, other=0.0), tl.load(sums + at + 1, mask=inside, other=0.0)
        v, more = joined(v, more)
        total, error = add_pair(total, error, v, more)
        if ENDS:
            high = tl.load(ends + at, mask=inside, other=float("-inf"))
            low = tl.load(ends + at + 1, mask=inside, other=float("inf"))
            at_high = tl.load(indices + at, mask=inside, other=NOWHERE)
            at_low = tl.load(indices + at + 1, mask=inside, other=NOWHERE)
            top, bottom = tl.max(high, 0), tl.min(low, 0)
            at_high = tl.min(tl.where(high == top, at_high, NOWHERE), 0)
            at_low = tl.min(tl.where(low == bottom, at_low, NOWHERE), 0)
            out = (c * chunks + chunk) * 2
            tl.store(out_ends + out, top)
            tl.store(out_ends + out + 1, bottom)
            tl.store(out_indices + out, tl.where(at_high == NOWHERE, nowhere, at_high))
            tl.store(out_indices + out + 1, tl.where(at_low == NOWHERE, nowhere, at_low))
    tl.store(out_sums + c * 2, total)
    tl.store(out_sums + c * 2 + 1, error)


@triton.jit(do_not_specialize=["channels", "places", "pieces", "elements"])
def products_kernel(
    g, xhat, plain, cross, channels, places, pieces, elements,
    STEPS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Of one piece: the sums of g and of g xhat, as pairs in [C, pieces, 2]."""
    c, piece = tl.program_id(0), tl.program_id(1)
    lane = tl.arange(0, LANES)
    total, error = tl.zeros((LANES,), tl.float64), tl.zeros((LANES,), tl.float64)
    total_x, error_x = tl.zeros((LANES,), tl.float64), tl.zeros((LANES,), tl.float64)
    for step in range(STEPS):
        i = (piece * STEPS + step) * LANES + lane
        at, inside = _address(i, c, channels, places), i < elements
        v = tl.load(g + at, mask=inside, other=0.0).to(tl.float64)
        h = tl.load(xhat + at, mask=inside, other=0.0).to(tl.float64)
        total, error = add_pair(total, error, v, 0.0)
        total_x, error_x = add_pair(total_x, error_x, v * h, 0.0)
    out = (c.to(tl.int64) * pieces + piece) * 2
    s, e = joined(total, error)
    tl.store(plain + out, s)
    tl.store(plain + out + 1, e)
    s, e = joined(total_x, error_x)
    tl.store(cross + out, s)
    tl.store(cross + out + 1, e)


@triton.jit
def _tile(rows, channels, places, tiles, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Addresses of a tile of samples' channels by places, whether they exist, and the channels."""
    row = (tl.program_id(0) // tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    place = tl.program_id(0) % tiles * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row[:, None] < rows) & (place[None, :] < places)
    return row[:, None] * places + place[None, :], inside, (row % channels)[:, None]


_PLAIN = ["rows", "channels", "places", "tiles", "chunks", "mask", "low", "top", "spread", "depth"]
_DIFFERENCE = ["mask_D", "low_D", "top_D", "spread_D", "depth_D"]


@triton.jit(do_not_specialize=_PLAIN[:4] + _PLAIN[5:] + _DIFFERENCE)
def normalize_kernel(
    x, xhat, y, mean, reciprocal, scale, shift, rows, channels, places, tiles, mask, low, top, spread, depth,
    mask_D, low_D, top_D, spread_D, depth_D,
    MODE: tl.constexpr, NEAREST: tl.constexpr, FLUSH: tl.constexpr,
    MODE_D: tl.constexpr, NEAREST_D: tl.constexpr, FLUSH_D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """xhat = F(D(x - mu) r), y = F(gamma xhat + beta)."""
    at, inside, c = _tile(rows, channels, places, tiles, ROWS, COLUMNS)
    v, mu, r = tl.load(x + at, mask=inside, other=0.0).to(tl.float64), tl.load(mean + c), tl.load(reciprocal + c)
    if MODE_D != NONE:
        v = rounded(odd_sum(v, -mu), mask_D, low_D, top_D, spread_D, depth_D, MODE_D, NEAREST_D, FLUSH_D)
        mu = mu * 0.0
    if MODE == NONE:
        h = ((v - mu) * r).to(x.dtype.element_ty).to(tl.float64)
        v = tl.load(scale + c) * h + tl.load(shift + c)
    else:
        h = rounded(scaled_difference(v, mu, r), mask, low, top, spread, depth, MODE, NEAREST, FLUSH)
        v = odd_sum(tl.load(scale + c) * h, tl.load(shift + c))
        v = rounded(v, mask, low, top, spread, depth, MODE, NEAREST, FLUSH)
    tl.store(xhat + at, h.to(x.dtype.element_ty), mask=inside)
    tl.store(y + at, v.to(x.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_PLAIN[:4] + _PLAIN[5:])
def gradient_kernel(
    g, dx, mean, slope, rows, channels, places, tiles, mask, low, top, spread, depth,
    MODE: tl.constexpr, NEAREST: tl.constexpr, FLUSH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dx = F'((g - m) slope)."""
    at, inside, c = _tile(rows, channels, places, tiles, ROWS, COLUMNS)
    v = tl.load(g + at, mask=inside, other=0.0).to(tl.float64)
    if MODE == NONE:
        v = (v - tl.load(mean + c)) * tl.load(slope + c)
    else:
        v = scaled_difference(v, tl.load(mean + c), tl.load(slope + c))
        v = rounded(v, mask, low, top, spread, depth, MODE, NEAREST, FLUSH)
    tl.store(dx + at, v.to(g.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["size", *_PLAIN[1:3], *_PLAIN[4:]])
def extrema_kernel(
    g, dx, mean, slope, amounts, indices, size, channels, places, chunks, mask, low, top, spread, depth,
    MODE: tl.constexpr, NEAREST: tl.constexpr, FLUSH: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """dx of the chunks' first maxima and minima, ``size`` = C K of each; after `gradient_kernel`."""
    pair = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    inside = pair < size
    c = pair // chunks
    highest = tl.load(indices + pair * 2, mask=inside, other=0)
    lowest = tl.load(indices + pair * 2 + 1, mask=inside, other=0)
    amount = tl.load(amounts + pair, mask=inside, other=0.0)
    m, a = tl.load(mean + c, mask=inside, other=0.0), tl.load(slope + c, mask=inside, other=0.0)
    inside = inside & (highest != lowest)
    for side in tl.static_range(2):
        i = lowest if side == 1 else highest
        at = _address(i, c, channels, places)
        v = tl.load(g + at, mask=inside, other=0.0).to(tl.float64)
        change = amount if side == 1 else -amount
        if MODE == NONE:
            v = (v - m) * a + change
        else:
            v = odd_sum(scaled_difference(v, m, a), change)
            v = rounded(v, mask, low, top, spread, depth, MODE, NEAREST, FLUSH)
        tl.store(dx + at, v.to(g.dtype.element_ty), mask=inside)
