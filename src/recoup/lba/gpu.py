"""The narrow accumulator on CUDA: runs the Triton kernels of gpu_kernels.py; the same bits as the CPU.

Legend: B matrices of a batch, M rows, N columns, K terms.
"""

# Triton's arguments are typed as its own compiler sees them:
# pyright: reportArgumentType=false

from dataclasses import astuple
from typing import Any

import torch
import triton
from torch import Tensor

from recoup.errors import RecoupError
from recoup.kernels.operators import check_capability
from recoup.lba.config import LBA
from recoup.lba.driver import Columns, Index, scaled
from recoup.lba.emit_integer import Whole
from recoup.lba.emit_narrow import Narrow
from recoup.lba.emit_wide import Quantiser, Wide
from recoup.lba.gpu_kernels import back_kernel, product_kernel, steps_kernel
from recoup.lba.plan import Extent, Plan

FLAG_BYTES = 1 << 29  # of the indicators of a block of rows
MAGNITUDE = 0x7FFFFFFF
OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": False}


class Gpu:
    """A CUDA device, as `driver` speaks to it; or Triton's interpreter, on CPU tensors.

    Args:
        assembly: round float32 toward zero by PTX instructions (on a GPU only), or in float64, to the same bits.
        block: rows and columns of a tile; powers of two.
    """

    lanes, fma = 16, True

    def __init__(self, assembly: bool | None = None, block: tuple[int, int] = (32, 64)) -> None:
        self.assembly, self.block = assembly, block

    def extent(self, x: Tensor) -> Extent:
        """Of the numbers' bits; waits for the device once."""
        bits = x.detach().contiguous().view(torch.int32) & MAGNITUDE
        none = torch.iinfo(torch.int32).max
        ends = torch.stack([bits.amax(), torch.where(bits == 0, none, bits).amin()]).tolist()
        return Extent.of(*ends)

    def product(self, x: Tensor, columns: Columns, chosen: Plan, config: LBA, index: Index) -> Tensor:
        """See `driver.Machine`."""
        B, M, K = x.shape
        N = len(columns.columns)
        y = x.new_empty(B, M, N, dtype=torch.float64 if chosen.form.wide else torch.float32)
        x, (block_m, block_n) = x.contiguous(), self._block(M, N)
        grid = (triton.cdiv(M, block_m) * triton.cdiv(N, block_n), B)
        self._check(x, grid)
        with _device_of(x):
            product_kernel[grid](
                x,
                columns.source,
                columns.terms,
                columns.columns,
                y,
                *_tables(chosen, x.device),
                M,
                N,
                K,
                min(config.chunk or K, K),
                columns.matrix,
                2.0**chosen.b_scale,
                chosen.b_least,
                index.base,
                index.first,
                index.matrix,
                index.row,
                *self._form(chosen, x),
                block_m,
                block_n,
                **OPTIONS,
            )
        return y

    def gradients(
        self, x: Tensor, columns: Columns, grad: Tensor, chosen: Plan, config: LBA, index: Index
    ) -> tuple[Tensor, Tensor]:
        """See `driver.Machine`. Partial sums of tiles are added in their order, so that results do not vary."""
        B, M, K = x.shape
        N = grad.shape[2]
        rows = max(1, min(M, FLAG_BYTES // (2 * K * N)))
        grad_a, grad_b = x.new_zeros(B, M, K), x.new_zeros(B, K, N)
        for batch in range(B):
            right = _matrix_of(columns, batch)
            for first in range(0, M, rows):
                part = slice(first, first + rows)
                start = index.first + batch * index.matrix + first * index.row
                spot = Index(index.seed, start, 0, index.row)
                found_a, found_b = self._matrix(x[batch, part], right, grad[batch, part], chosen, config, spot)
                grad_a[batch, part] = found_a
                grad_b[batch] += found_b
        return grad_a, grad_b

    def _matrix(
        self, x: Tensor, columns: Columns, grad: Tensor, chosen: Plan, config: LBA, index: Index
    ) -> tuple[Tensor, Tensor]:
        """x [M, K], grad [M, N] -> gradients [M, K] and [K, N]."""
        (M, K), N = x.shape, grad.shape[1]
        x, grad, chunk, (block_m, block_n) = (
            x.contiguous(),
            grad.contiguous(),
            min(config.chunk or K, K),
            self._block(M, N),
        )
        flags = torch.empty(K, M, N, dtype=torch.uint8, device=x.device)
        outer_flags = torch.empty(-(-K // chunk), M, N, dtype=torch.uint8, device=x.device)
        down, across = triton.cdiv(M, block_m), triton.cdiv(N, block_n)
        grad_a, grad_b = x.new_empty(across, M, K), x.new_empty(down, K, N)
        right = (columns.source, columns.terms, columns.columns)
        overflow, recursive = config.gradient.endswith("_of"), config.gradient.startswith("recursive")
        self._check(x, (down * across, 1))
        with _device_of(x):
            steps_kernel[(down * across,)](
                scaled(x, chosen),
                *right,
                flags,
                outer_flags,
                *_tables(chosen, x.device),
                M,
                N,
                K,
                chunk,
                2.0**chosen.b_scale,
                chosen.b_least,
                index.base,
                index.first,
                index.row,
                *self._form(chosen, x),
                overflow,
                config.product is not None,
                block_m,
                block_n,
                **OPTIONS,
            )
            kept = (flags, outer_flags, grad_a, grad_b)
            back_kernel[(down * across,)](
                x, *right, grad, *kept, M, N, K, chunk, recursive, block_m, block_n, **OPTIONS
            )
        return grad_a.sum(0), grad_b.sum(0)

    def _block(self, M: int, N: int) -> tuple[int, int]:
        """Smaller tiles where rows or columns are few."""
        return min(self.block[0], triton.next_power_of_2(M)), min(self.block[1], max(16, triton.next_power_of_2(N)))

    def _form(self, chosen: Plan, x: Tensor) -> tuple[Any, bool, bool]:
        """The kernels' FORM, WIDE and RANDOM."""
        assembly = x.is_cuda if self.assembly is None else self.assembly
        return form_of(chosen, assembly), chosen.form.wide, chosen.form.random

    def _check(self, x: Tensor, grid: tuple[int, int]) -> None:
        if grid[0] >= 2**31 or grid[1] >= 2**16:
            raise RecoupError(
                f"LBA on CUDA computes at most 2^31 tiles of {self.block[0]} x {self.block[1]} sums and 65,535 "
                f"matrices in a call; got {grid[0]} and {grid[1]}: use smaller batches"
            )
        check_capability(x, "LBA's")


def form_of(chosen: Plan, assembly: bool) -> tuple:
    """What the kernels are compiled for, as plain values.

    ("narrow", fused, limit product, limit sum, assembly), ("whole",), or ("wide", kind and flush of the quantisers of
    product, sum and outer sum, whether sums are rounded to odd).
    """
    form = chosen.form
    if isinstance(form, Narrow):
        return "narrow", form.fused, form.limit_product, form.limit_sum, assembly
    if isinstance(form, Whole):
        return ("whole",)
    assert isinstance(form, Wide)
    quantisers = [value for q in (form.product, form.sum, form.outer) for value in _quantiser(q)]
    return "wide", *quantisers, form.rounding != "nearest"


def _quantiser(quantiser: Quantiser | None) -> tuple[str, bool]:
    return ("none", False) if quantiser is None else astuple(quantiser)  # type: ignore[return-value]


def _matrix_of(columns: Columns, batch: int) -> Columns:
    """The columns of one matrix. Kernels take an address; terms and columns count from it by the source's strides."""
    start = columns.source.storage_offset() + batch * columns.matrix
    return Columns(columns.source.as_strided((1,), (1,), start), columns.terms, columns.columns, 0)


def _tables(chosen: Plan, device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(chosen.floats).to(device), torch.from_numpy(chosen.integers).to(device)


def _device_of(x: Tensor) -> Any:
    return torch.cuda.device_of(x)
