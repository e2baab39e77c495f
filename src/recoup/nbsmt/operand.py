"""The activation operand of an NB-SMT layer, from floats in one pass at the speed of memory.

Legend: P pixels, C channels, Cp = C padded to whole slots, G groups.
"""

from dataclasses import dataclass
from functools import lru_cache, reduce
from math import gcd
from operator import or_

import numpy as np
import torch
from torch import Tensor

from recoup.errors import RecoupError
from recoup.kernels import llvm
from recoup.kernels.threads import over_rows
from recoup.nbsmt.codes import LANES, SAFE_SCALES, quantise_kernel
from recoup.nbsmt.combine import SLACK, Recipe, combine_kernel
from recoup.nbsmt.config import NBSMT
from recoup.nbsmt.groups import Activation
from recoup.nbsmt.ports import UNSIGNED

BLOCK = 4096
"""Codes in flight: with their re-arranged copies well inside a first-level cache of 32 KiB."""

SMALLEST, LARGEST = 2.0**-149, torch.finfo(torch.float32).max

WORK = 1 << 18
"""Elements read and written that pay for one more thread."""


def operands(
    x_PC: Tensor,
    scale: float,
    config: NBSMT,
    activations: tuple[Activation, ...],
    dtype: torch.dtype = torch.uint8,
    out: Tensor | None = None,
    *,
    zero: int = UNSIGNED,
    target: llvm.Target | None = None,
) -> tuple[Tensor, int]:
    """Quantise activations and lay out the operands of all groups side by side.

        code[p, c] = clip(round half even(x[p, c] / scale) + zero, 0, 255), the quotient rounded to float32
        operand[p, g * Cp + c] = values[min(n, 2)] of activation g, where n of its partners of channel c are not 0

    Args:
        x_PC: float32 [P, C], contiguous (the memory of a channels_last tensor), on the CPU.
        scale: the step of the codes, taken as float32.
        config: threads, pairing, rounding and policy, and the port of signed codes.
        activations: the G operands, see `recoup.nbsmt.groups`.
        dtype: uint8 for the codes u, or float32 for their values u - zero.
        out: where to write them, contiguous; None: new memory.
        zero: the byte of value 0: 0 where activations are unsigned, 128 where they are signed.
        target: another processor to generate code for, to test its form of the kernels.

    Returns:
        The operands [P, G * Cp], where Cp is C rounded up to whole slots and what pads it has value 0, and what was
        wrong with x, as bits: 1 some x < 0 under unsigned codes (also one that rounds to 0; -0.0 is not), 2 some NaN or
        infinity. Values below the range and NaN are given the code 0, +infinity 255.

    Raises:
        RecoupError: another dtype, layout or device, or a scale that is not a positive float32.
    """
    plan = _plan(config, x_PC.shape[-1], activations, dtype, target, zero)
    out = _check(x_PC, scale, plan, dtype, out)
    (P, C), Cp = x_PC.shape, plan.padded
    if x_PC.numel() == 0:
        return out, 0
    fast = plan.fma and SAFE_SCALES[0] <= scale <= SAFE_SCALES[1]
    quantise, combine = quantise_kernel(fast, target, zero), plan.combine
    x, to = x_PC.data_ptr(), out.data_ptr()
    faults: list[int] = []

    def rows(first: int, last: int) -> None:
        if combine is None:
            faults.append(quantise(x + 4 * C * first, to + C * first, C * (last - first), scale))
            return
        scratch = np.empty(plan.scratch, dtype=np.uint8)
        at = scratch.ctypes.data
        faults.append(combine(x, to, first, last, C, Cp, scale, quantise.address, at, at + plan.codes, plan.block))

    over_rows(rows, P, C + len(activations) * Cp, WORK)
    return out, reduce(or_, faults)


@dataclass(frozen=True, slots=True)
class _Plan:
    """How operands for one kind of layer are made.

    Attributes:
        padded: Cp.
        width: G * Cp.
        combine: the kernel; None where the operand is just the codes.
        block: pixels in flight.
        codes, scratch: bytes of scratch memory for the codes, and in all.
        fma: whether the processor has fused multiply-add.
    """

    padded: int
    width: int
    combine: llvm.Native | None
    block: int
    codes: int
    scratch: int
    fma: bool


@lru_cache(256)
def _plan(
    config: NBSMT,
    C: int,
    activations: tuple[Activation, ...],
    dtype: torch.dtype,
    target: llvm.Target | None,
    zero: int,
) -> _Plan:
    Cp = -(-C // config.threads) * config.threads
    recipe = Recipe(alike(config, zero), activations, Cp if Cp <= LANES else 0, dtype == torch.float32, zero)
    plain = activations == (Activation(),) and Cp == C and dtype == torch.uint8
    unit = LANES // gcd(C, LANES)  # so many pixels fill whole vectors
    block = max(1, BLOCK // max(C, 1))
    block -= block % unit if block > unit else 0
    codes = block * C + SLACK
    kernel = None if plain or C == 0 else combine_kernel(recipe, target)
    scratch = codes + block * Cp * recipe.copies + SLACK
    return _Plan(Cp, len(activations) * Cp, kernel, block, codes, scratch, (target or llvm.host()).fma)


def alike(config: NBSMT, zero: int) -> NBSMT:
    """One of the configurations with the same reduced activations: policies but S reduce alike, and unsigned codes know
    one port."""
    return config.replace(policy="S" if config.policy == "S" else "S+A", port=config.port if zero else 5)


def _check(x_PC: Tensor, scale: float, plan: _Plan, dtype: torch.dtype, out: Tensor | None) -> Tensor:
    """Refuse what the kernels cannot take, whose arguments are bare addresses; the output."""
    if x_PC.dtype != torch.float32 or x_PC.dim() != 2 or not x_PC.is_contiguous() or not x_PC.is_cpu:
        kind = f"{x_PC.dtype} {list(x_PC.shape)}, strides {list(x_PC.stride())}, on {x_PC.device}"
        raise RecoupError(f"operands: x must be float32 [P, C], contiguous, on the CPU; got {kind}")
    if dtype not in (torch.uint8, torch.float32):
        raise RecoupError(f"operands(dtype={dtype}): must be torch.uint8 or torch.float32")
    if not SMALLEST <= scale <= LARGEST:
        raise RecoupError(f"operands(scale={scale}): must be a positive float32")
    shape = (x_PC.shape[0], plan.width)
    if out is None:
        return torch.empty(shape, dtype=dtype)
    if out.shape != shape or out.dtype != dtype or not out.is_contiguous() or not out.is_cpu:
        raise RecoupError(
            f"operands: out must be {dtype} {list(shape)}, contiguous, on the CPU; got {out.dtype} {list(out.shape)}"
        )
    return out
