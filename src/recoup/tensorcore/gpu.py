"""The tensor core on CUDA: runs the Triton kernels of gpu_kernels.py; the same bits as the CPU.

Legend: B matrices of a batch, M rows, N columns, K terms.
"""

# Triton's arguments are typed as its own compiler sees them:
# pyright: reportArgumentType=false

import math
import struct
from typing import Any

import torch
import triton
from torch import Tensor

from recoup.errors import RecoupError
from recoup.formats import Float
from recoup.kernels.operators import check_capability
from recoup.tensorcore.config import TensorCore
from recoup.tensorcore.gpu_kernels import prepare_kernel, product_kernel

__all__ = ["OPTIONS", "constants_of", "format_of", "products"]

LANES = 1024  # elements that a program of `prepare_kernel` takes
BLOCK = (32, 64)  # rows and columns of a tile: each of 128 threads keeps 16 sums
NARROW_TERMS = 28  # bits kept with which a term, below 2^(n + 2) q, is an int32
OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": False}


def products(a: Tensor, b: Tensor, config: TensorCore, block: tuple[int, int] = BLOCK) -> tuple[Tensor, int]:
    """a [B, M, K] b [B, K, N], float32 of any strides, finite where it matters -> float32 [B, M, N], and the faults of
    both operands; waits for the device once.

    Args:
        a: no dimension is 0.
        b: the right operand.
        config: the unit.
        block: rows and columns of a tile, powers of two.

    Raises:
        RecoupError: more tiles or matrices than a launch has, a GPU that Triton does not support.
    """
    (B, M, K), N = a.shape, b.shape[2]
    block_m, block_n = min(block[0], triton.next_power_of_2(M)), min(block[1], max(16, triton.next_power_of_2(N)))
    grid = (triton.cdiv(M, block_m) * triton.cdiv(N, block_n), B)
    _check(a, grid, triton.cdiv(K * max(M, N), LANES))
    first, second = config.formats
    with _device_of(a):
        (left, left_faults), (right, right_faults) = _prepared(a.mT, first), _prepared(b, second)
        y = torch.empty(B, M, N, dtype=torch.int32, device=a.device)
        product_kernel[grid](
            a=left,
            b=right,
            y=y,
            M=M,
            N=N,
            K=K,
            part=min(config.promotion or K, K),
            **constants_of(config),
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            **OPTIONS,
        )
        faults = torch.cat([left_faults, right_faults])
        found = torch.stack([(faults & bit).amax() for bit in (1, 2)]).tolist()
    return y.view(torch.float32), sum(found)


def constants_of(config: TensorCore) -> dict[str, Any]:
    """What a unit fixes of `product_kernel`'s arguments."""
    first, second = config.formats
    return {
        "GROUP": config.group,
        "FRACTION": config.fraction,
        "PRODUCT_FRACTION": first.mantissa + second.mantissa,
        "OUTPUT": config.output,
        "PROMOTED": config.promotion is not None,
        "WIDE_TERMS": config.fraction > NARROW_TERMS,
        "WIDE_SUMS": config.fraction + config.sum_bits > 31,
    }


def format_of(form: Float) -> dict[str, int]:
    """What an operand's format fixes of `prepare_kernel`'s arguments."""
    (largest,) = struct.unpack("<i", struct.pack("<f", form.largest_value))
    return {"MANTISSA": form.mantissa, "MIN_EXPONENT": form.min_exponent, "LARGEST": largest}


def _prepared(x: Tensor, form: Float) -> tuple[Tensor, Tensor]:
    """[B, K, C] -> its parts [B, K, C] and faults."""
    B, K, C = x.shape
    programs = triton.cdiv(K * C, LANES)
    parts = torch.empty(B, K, C, dtype=torch.int32, device=x.device)
    faults = torch.empty(B * programs, dtype=torch.int32, device=x.device)
    batch, k, c = x.stride()
    prepare_kernel[programs, B](
        x=x.detach().view(torch.int32),
        parts=parts,
        faults=faults,
        C=C,
        size=K * C,
        batch_stride=batch,
        k_stride=k,
        stride=c,
        **format_of(form),
        BLOCK=min(LANES, triton.next_power_of_2(K * C)),
        **OPTIONS,
    )
    return parts, faults


def _check(x: Tensor, grid: tuple[int, int], programs: int) -> None:
    if max(grid[0], programs) >= 2**31 or grid[1] >= 2**16:
        raise RecoupError(
            f"tensor cores on CUDA compute at most 2^31 tiles of {math.prod(BLOCK)} sums and 65,535 matrices in a "
            f"call; got {grid[0]} and {grid[1]}: use smaller batches"
        )
    check_capability(x, "the tensor core's")


def _device_of(x: Tensor) -> Any:
    return torch.cuda.device_of(x)
