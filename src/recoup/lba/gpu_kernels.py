"""The Triton kernels: all steps of a tile of sums in their order; the same with indicators kept; the way back.

A program owns BLOCK_M x BLOCK_N sums of one matrix of the batch and walks over k alone, so that the order of every
sum is the unit's.

Legend: M rows, N columns, K terms; element (k, n) of the right operand lies at ``b + terms[k] + columns[n]``.
"""

# Triton's language is typed for its own compiler:
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportIndexIssue=false, reportAttributeAccessIssue=false

import triton
import triton.language as tl

from recoup.lba.gpu_steps import AT_OUTER, AT_PRODUCT, AT_SUM, add, inside, random_base, term

PASSED, OWN = tl.constexpr(1), tl.constexpr(2)  # bits of a step's indicators


@triton.jit
def product_kernel(
    a,  # [B, M, K] float32, scaled
    b,
    terms,  # [K] int64
    columns,  # [N] int64
    y,  # [B, M, N]: float32, or float64 if WIDE
    floats,
    integers,
    M,
    N,
    K,
    chunk,
    b_matrix,
    b_scale,
    b_least,
    seed_base,
    index,
    index_matrix,
    index_row,
    FORM: tl.constexpr,
    WIDE: tl.constexpr,
    RANDOM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The sums of all terms of one tile."""
    batch = tl.program_id(1).to(tl.int64)
    m = tl.program_id(0) // tl.cdiv(N, BLOCK_N) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) % tl.cdiv(N, BLOCK_N) * BLOCK_N + tl.arange(0, BLOCK_N)
    number = tl.float64 if WIDE else tl.float32
    base = tl.full((BLOCK_M, BLOCK_N), 0, tl.uint32)
    if RANDOM:
        outputs = index + batch * index_matrix + m[:, None].to(tl.int64) * index_row + n[None, :]
        base = random_base(seed_base, outputs)
    row = a + (batch * M + m) * K
    column = b + batch * b_matrix + tl.load(columns + n, mask=n < N, other=0)
    outer = tl.full((BLOCK_M, BLOCK_N), 0.0, number)
    for start in range(0, K, chunk):
        s = tl.full((BLOCK_M, BLOCK_N), 0.0, number)
        for k in range(start, tl.minimum(start + chunk, K)):
            x = tl.load(row + k, mask=m < M, other=0.0).to(number)
            w = tl.load(column + tl.load(terms + k), mask=n < N, other=0.0)
            w = (tl.where(tl.abs(w) < b_least, 0.0, w) * b_scale).to(number)
            s, _total, _p = term(x[:, None], w[None, :], s, base, k, floats, integers, FORM)
        outer, _total = add(s, outer, base, 2 * K + start // chunk, floats, integers, FORM)
    place = y + (batch * M + m[:, None]) * N + n[None, :]
    tl.store(place, outer, mask=(m[:, None] < M) & (n[None, :] < N))


@triton.jit
def steps_kernel(
    a,
    b,
    terms,
    columns,
    flags,  # [K, M, N] uint8
    outer_flags,  # [chunks, M, N] uint8
    floats,
    integers,
    M,
    N,
    K,
    chunk,
    b_scale,
    b_least,
    seed_base,
    index,
    index_row,
    FORM: tl.constexpr,
    WIDE: tl.constexpr,
    RANDOM: tl.constexpr,
    OVERFLOW: tl.constexpr,
    ROUNDED_PRODUCT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """What every step of one tile did; bit PASSED: no overflow (or: the sum changed); OWN: nor did the product."""
    m = tl.program_id(0) // tl.cdiv(N, BLOCK_N) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) % tl.cdiv(N, BLOCK_N) * BLOCK_N + tl.arange(0, BLOCK_N)
    number = tl.float64 if WIDE else tl.float32
    base = tl.full((BLOCK_M, BLOCK_N), 0, tl.uint32)
    if RANDOM:
        base = random_base(seed_base, index + m[:, None].to(tl.int64) * index_row + n[None, :])
    row = a + m.to(tl.int64) * K
    column = b + tl.load(columns + n, mask=n < N, other=0)
    place, within = m[:, None].to(tl.int64) * N + n[None, :], (m[:, None] < M) & (n[None, :] < N)
    size = tl.full((), 1, tl.int64) * M * N
    outer = tl.full((BLOCK_M, BLOCK_N), 0.0, number)
    for start in range(0, K, chunk):
        s = tl.full((BLOCK_M, BLOCK_N), 0.0, number)
        for k in range(start, tl.minimum(start + chunk, K)):
            x = tl.load(row + k, mask=m < M, other=0.0).to(number)
            w = tl.load(column + tl.load(terms + k), mask=n < N, other=0.0)
            w = (tl.where(tl.abs(w) < b_least, 0.0, w) * b_scale).to(number)
            after, total, p = term(x[:, None], w[None, :], s, base, k, floats, integers, FORM)
            if OVERFLOW:
                passed, own = inside(total, floats, AT_SUM, FORM), within
                if ROUNDED_PRODUCT:
                    own = inside(p, floats, AT_PRODUCT, FORM)
            else:
                passed, own = after != s, within
            found = tl.where(passed, PASSED, 0) | tl.where(own, OWN, 0)
            tl.store(flags + k * size + place, found.to(tl.uint8), mask=within)
            s = after
        after, total = add(s, outer, base, 2 * K + start // chunk, floats, integers, FORM)
        passed = inside(total, floats, AT_OUTER, FORM) if OVERFLOW else after != outer
        tl.store(outer_flags + start // chunk * size + place, passed.to(tl.uint8), mask=within)
        outer = after


@triton.jit
def back_kernel(
    a,  # [M, K] float32
    b,
    terms,
    columns,
    grad,  # [M, N] float32
    flags,
    outer_flags,
    grad_a,  # [blocks of N, M, K]
    grad_b,  # [blocks of M, K, N]
    M,
    N,
    K,
    chunk,
    RECURSIVE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Walk back over the steps of one tile: what still reaches the output adds to both gradients."""
    block_m, block_n = tl.program_id(0) // tl.cdiv(N, BLOCK_N), tl.program_id(0) % tl.cdiv(N, BLOCK_N)
    m, n = block_m * BLOCK_M + tl.arange(0, BLOCK_M), block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    place, within = m[:, None].to(tl.int64) * N + n[None, :], (m[:, None] < M) & (n[None, :] < N)
    size = tl.full((), 1, tl.int64) * M * N
    g = tl.load(grad + place, mask=within, other=0.0)
    column = b + tl.load(columns + n, mask=n < N, other=0)
    to_a = grad_a + (block_n.to(tl.int64) * M + m) * K
    to_b = grad_b + block_m.to(tl.int64) * K * N + n
    later = within
    last = (K - 1) // chunk
    for back in range(last + 1):
        start = (last - back) * chunk
        reach = tl.load(outer_flags + (last - back) * size + place, mask=within, other=0) != 0
        if RECURSIVE:
            reach = reach & later
        live = reach
        stop = tl.minimum(start + chunk, K)
        for step in range(stop - start):
            k = stop - 1 - step
            found = tl.load(flags + k * size + place, mask=within, other=0)
            passed = (found & PASSED) != 0
            live = (live if RECURSIVE else reach) & passed
            part = tl.where(live & ((found & OWN) != 0), g, 0.0)
            x = tl.load(a + m.to(tl.int64) * K + k, mask=m < M, other=0.0)
            w = tl.load(column + tl.load(terms + k), mask=n < N, other=0.0)
            tl.store(to_a + k, tl.sum(part * w[None, :], 1), mask=m < M)
            tl.store(to_b + k.to(tl.int64) * N, tl.sum(part * x[:, None], 0), mask=n < N)
        later = reach
