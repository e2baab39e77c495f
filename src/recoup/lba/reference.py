"""Every bit of the narrow accumulator, readable: float64 over a loop of K steps, slow.

A product of two float32 numbers is exact in float64. A sum is rounded *to odd* (`exact_sum`): quantising that to at
most 32 bits gives what quantising the infinitely precise sum gives; for integers that wrap see `added`.

Legend: M rows of a, N columns of b, K terms.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from recoup.formats import Float, Int
from recoup.formats import reference as formats
from recoup.formats.spec import MIN_EXPONENT
from recoup.lba.config import LBA

__all__ = ["Step", "added", "exact_sum", "gradients", "matmul", "run", "steps"]

PRODUCT, SUM = 0, 1  # which rounding of a step draws random bits
RANDOM_BITS = 24


@dataclass(frozen=True, slots=True)
class Step:
    """What one multiply-add, or one addition of a chunk sum, did to every output; in the sums' shape.

    Attributes:
        index: the term k, or the number of the chunk.
        outer: whether a chunk sum is added.
        before, after: the sum, float64.
        added: the quantised product, or the chunk's sum.
        saturated: the product left its format's range: |x w| >= its largest value.
        overflow: the sum did: |exact sum| >= the largest value; of an `Int`: beyond its ends.
    """

    index: int
    outer: bool
    before: Tensor
    after: Tensor
    added: Tensor
    saturated: Tensor
    overflow: Tensor


def matmul(a: Tensor, b: Tensor, config: LBA, seed: int = 0, first: int = 0) -> Tensor:
    """``a b`` on the unit: float32 [M, K] times [K, N], finite; float32 [M, N].

    ``first`` is the index of the first output, which its random bits depend on: in a batch the matrices follow each
    other.

    Float64 sums become float32 by rounding to nearest even (exact for every accumulator within float32), saturating.
    """
    y_MN = torch.zeros(a.shape[0], b.shape[1], dtype=torch.float64, device=a.device)
    for step in steps(a, b, config, seed, first):
        if step.outer:
            y_MN = step.after
    top = torch.finfo(torch.float32).max
    return y_MN.clamp(-top, top).float() + 0.0


def steps(a: Tensor, b: Tensor, config: LBA, seed: int = 0, first: int = 0) -> Iterator[Step]:
    """All steps in their order: the terms of a chunk, then the addition of its sum."""
    (M, K), N = a.shape, b.shape[1]
    a_MK, b_KN = a.double(), b.double()
    base = random_base(M, N, seed, first).to(a.device)
    return run(lambda k: a_MK[:, k, None] * b_KN[None, k, :], K, base, config)


def run(product: Callable[[int], Tensor], K: int, base: Tensor, config: LBA) -> Iterator[Step]:
    """The steps of sums of any shape, whose exact k-th terms ``product`` gives in float64.

    ``base``: per sum, what its random bits derive from; it has the sums' shape and device.
    """
    chunk = min(config.chunk or K, K)
    y = torch.zeros(base.shape, dtype=torch.float64, device=base.device)
    none = torch.zeros_like(y, dtype=torch.bool)
    draws = (lambda counter: random_bits(base, counter)) if config.stochastic else (lambda _: base)  # else unread
    for number, start in enumerate(range(0, K, max(chunk, 1))):
        s = torch.zeros_like(y)
        for k in range(start, min(start + chunk, K)):
            exact = p = product(k)
            saturated = none
            if config.product is not None:
                p = quantize(exact, config.product, config, draws(2 * k + PRODUCT))
                saturated = exact.abs() >= config.product.largest_value
            total = exact_sum(p, s)
            after = added(p, s, config.accumulator, config, draws(2 * k + SUM))
            yield Step(k, False, s, after, p, saturated, overflows(total, config.accumulator, config))
            s = after
        total = exact_sum(s, y)
        after = added(s, y, config.outer, config, draws(2 * K + number))
        yield Step(number, True, y, after, s, none, overflows(total, config.outer, config))
        y = after


def quantize(x: Tensor, format: Float | Int, config: LBA, random: Tensor) -> Tensor:  # noqa: A002
    """Q of an exact product or sum: the format's own rounding, without its underflow if the config says so."""
    if isinstance(format, Int):
        return formats.quantize(x / config.scale, format) * config.scale
    if not config.underflow:
        format = format.replace(min_exponent=MIN_EXPONENT, subnormals=False)  # noqa: A001
    return formats.quantize(x, format, random if format.rounding == "stochastic" else None)


def added(term: Tensor, before: Tensor, format: Float | Int, config: LBA, random: Tensor) -> Tensor:  # noqa: A002
    """Q(term + before). Of integers that wrap the term is first reduced by whole ranges: a sum of more than 53 bits,
    rounded to odd, is no longer the same modulo their range."""
    if isinstance(format, Int) and format.overflow == "wrap":
        term = torch.fmod(term, config.scale * 2.0**format.bits)
    return quantize(exact_sum(term, before), format, config, random)


def overflows(total: Tensor, format: Float | Int, config: LBA) -> Tensor:  # noqa: A002
    """Where an exact sum leaves the format's range."""
    if isinstance(format, Int):
        units = (total / config.scale).round()
        return (units > format.largest_value) | (units < format.smallest_value)
    return total.abs() >= format.largest_value


def exact_sum(x: Tensor, y: Tensor) -> Tensor:
    """x + y in float64, rounded to odd: an inexact result is the one of its two neighbours with an odd significand."""
    total = x + y
    part = total - x
    error = (x - (total - part)) + (y - part)
    bits = total.view(torch.int64)
    outward = (error > 0) == (total > 0)
    moved = torch.where(outward, bits + 1, bits - 1)
    return torch.where((error != 0) & (bits & 1 == 0), moved, bits).view(torch.float64)


def random_base(M: int, N: int, seed: int, first: int = 0) -> Tensor:
    """A 32-bit number per output (row by row from index ``first``) that its random bits derive from."""
    index = torch.arange(first, first + M * N, dtype=torch.int64).view(M, N)
    return mix((index & _MASK) ^ mix((index >> 32) ^ mix(torch.tensor(seed & _MASK))))


def random_bits(base: Tensor, counter: int) -> Tensor:
    """24 random bits per output for one rounding, as the random integers of `formats.reference` (62 bits).

    They depend on seed, output and step only, so results do not depend on tiling, threads or device. A magnitude is
    rounded up where its fraction is at least 1 - u / 2^24 with u uniform in 0 .. 2^24 - 1.
    """
    return (mix((base + counter * 0x9E3779B9) & _MASK) >> (32 - RANDOM_BITS)) << (62 - RANDOM_BITS)


_MASK = 0xFFFFFFFF


def mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit integers (held in int64) without visible pattern: Wellons' lowbias32."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _MASK
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


def gradients(a: Tensor, b: Tensor, grad: Tensor, config: LBA, seed: int = 0, first: int = 0) -> tuple[Tensor, Tensor]:
    """The gradients of ``sum(grad * matmul(a, b))`` by ``config.gradient``, as float64 [M, K] and [K, N].

        dy/dx_i = w_i I_i,   dy/dw_i = x_i I_i

    with the indicator I_i of term i, whose chunk is c:

        identity        1
        immediate_of    [no overflow at step i] [none at the outer step of c] [product i not saturated]
        recursive_of    [no overflow at any step >= i of c] [none at any outer step >= c] [product i not saturated]
        immediate_diff  [step i changed s] [the outer step of c changed y]
        recursive_diff  [every step >= i of the chunk changed s] [every outer step >= c changed y]

    Source: the paper's fine-grained gradients; the exact indicators are our definition.
    """
    a_MK, b_KN, g_MN = a.double(), b.double(), grad.double()
    if config.gradient == "identity":
        return g_MN @ b_KN.t(), a_MK.t() @ g_MN
    live_KMN = indicators(a, b, config, seed, first).double()
    grad_a = torch.einsum("mn,kn,kmn->mk", g_MN, b_KN, live_KMN)
    return grad_a, torch.einsum("mn,mk,kmn->kn", g_MN, a_MK, live_KMN)


def indicators(a: Tensor, b: Tensor, config: LBA, seed: int = 0, first: int = 0) -> Tensor:
    """The indicators I of `gradients`, bool [K, M, N]."""
    overflow, recursive = config.gradient.endswith("_of"), config.gradient.startswith("recursive")
    K = a.shape[1]
    chunk = min(config.chunk or K, K)
    passes_KMN = torch.ones(K, a.shape[0], b.shape[1], dtype=torch.bool, device=a.device)
    if config.gradient == "identity":
        return passes_KMN
    own_KMN, outer = passes_KMN.clone(), []
    for step in steps(a, b, config, seed, first):
        passes = ~step.overflow if overflow else step.after != step.before
        if step.outer:
            outer.append(passes)
        else:
            passes_KMN[step.index] = passes
            own_KMN[step.index] = ~step.saturated if overflow else own_KMN[step.index]
    later = torch.ones_like(passes_KMN[0]) if K else None
    for number in reversed(range(len(outer))):
        later = outer[number] & later if recursive else outer[number]
        live = later
        for k in reversed(range(number * chunk, min(number * chunk + chunk, K))):
            live = passes_KMN[k] & (live if recursive else later)
            passes_KMN[k] = live
    return passes_KMN & own_KMN
