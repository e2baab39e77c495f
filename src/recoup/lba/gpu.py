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
from recoup.lba.driver import Columns, Index, finished, scaled
from recoup.lba.emit_integer import Whole
from recoup.lba.emit_narrow import Narrow
from recoup.lba.emit_wide import Quantiser, Wide
from recoup.lba.gpu_kernels import back_kernel, product_kernel, steps_kernel
from recoup.lba.plan import Extent, Plan

FLAG_BYTES = 1 << 29  # of the indicators of a block of rows
MAGNITUDE = 0x7FFFFFFF
# Of 32 x 64 sums (see `Gpu`) each of 128 threads keeps 16 in registers, as many as the CPU's tile has. Product and sum
# round separately, so the compiler must not fuse them.
OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": False}


class Gpu:
    """A CUDA device, as `driver` speaks to it; or Triton's interpreter, on CPU tensors.

    Args:
        assembly: round float32 toward zero by PTX instructions (on a GPU only), or in float64, to the same bits.
        block: rows and columns of a tile; powers of two.
    """

    fma, resident = True, None

    def __init__(self, assembly: bool | None = None, block: tuple[int, int] = (32, 64)) -> None:
        self.assembly, self.block = assembly, block

    def extent(self, x: Tensor) -> Extent:
        """Of the numbers' bits; waits for the device once."""
        bits = x.detach().contiguous().view(torch.int32) & MAGNITUDE
        none = torch.iinfo(torch.int32).max
        ends = torch.stack([bits.amax(), torch.where(bits == 0, none, bits).amin()]).tolist()
        return Extent.of(*ends)

    def product(
        self,
        x: Tensor,
        columns: Columns,
        chosen: Plan,
        config: LBA,
        index: Index,
        images: Tensor | None = None,  # noqa: ARG002 -- a copy costs little here
    ) -> Tensor:
        """See `driver.Machine`."""
        B, M, K = x.shape
        N = len(columns.columns)
        y = x.new_empty(B, M, N, dtype=torch.float64 if chosen.form.wide else torch.float32)
        x, (block_m, block_n) = scaled(x, chosen), self._block(M, N)
        grid = (triton.cdiv(M, block_m) * triton.cdiv(N, block_n), B)
        self._check(x, grid)
        with _device_of(x):
            product_kernel[grid](
                a=x,
                **_right(columns),
                y=y,
                M=M,
                N=N,
                K=K,
                chunk=min(config.chunk or K, K),
                b_matrix=columns.matrix,
                seed_base=index.base,
                index=index.first,
                index_matrix=index.matrix,
                index_row=index.row,
                **self._constants(chosen, x),
                BLOCK_M=block_m,
                BLOCK_N=block_n,
                **OPTIONS,
            )
        return finished(y, chosen)

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
                start = Index(index.seed, index.first + batch * index.matrix + first * index.row, 0, index.row)
                found_a, found_b = self._matrix(x[batch, part], right, grad[batch, part], chosen, config, start)
                grad_a[batch, part] = found_a
                grad_b[batch] += found_b
        return grad_a, grad_b

    def _matrix(
        self, x: Tensor, columns: Columns, grad: Tensor, chosen: Plan, config: LBA, index: Index
    ) -> tuple[Tensor, Tensor]:
        """x [M, K], grad [M, N] -> gradients [M, K] and [K, N]."""
        (M, K), N = x.shape, grad.shape[1]
        x, grad, chunk, block = x.contiguous(), grad.contiguous(), min(config.chunk or K, K), self._block(M, N)
        flags = torch.empty(K, M, N, dtype=torch.uint8, device=x.device)
        outer_flags = torch.empty(-(-K // chunk), M, N, dtype=torch.uint8, device=x.device)
        down, across = triton.cdiv(M, block[0]), triton.cdiv(N, block[1])
        grad_a, grad_b = x.new_empty(across, M, K), x.new_empty(down, K, N)
        self._check(x, (down * across, 1))
        sizes = {"M": M, "N": N, "K": K, "chunk": chunk, "BLOCK_M": block[0], "BLOCK_N": block[1]}
        shared = {**_right(columns), "flags": flags, "outer_flags": outer_flags, **sizes, **OPTIONS}
        with _device_of(x):
            steps_kernel[(down * across,)](
                a=scaled(x, chosen),
                seed_base=index.base,
                index=index.first,
                index_row=index.row,
                **self._constants(chosen, x),
                OVERFLOW=config.gradient.endswith("_of"),
                ROUNDED_PRODUCT=config.product is not None,
                **shared,
            )
            back_kernel[(down * across,)](
                a=x,
                grad=grad,
                grad_a=grad_a,
                grad_b=grad_b,
                RECURSIVE=config.gradient.startswith("recursive"),
                **shared,
            )
        return grad_a.sum(0), grad_b.sum(0)

    def _block(self, M: int, N: int) -> tuple[int, int]:
        """Smaller tiles where rows or columns are few."""
        return min(self.block[0], triton.next_power_of_2(M)), min(self.block[1], max(16, triton.next_power_of_2(N)))

    def _constants(self, chosen: Plan, x: Tensor) -> dict[str, Any]:
        """What a plan fixes of the kernels' arguments."""
        return {
            "floats": torch.from_numpy(chosen.floats).to(x.device),
            "integers": torch.from_numpy(chosen.integers).to(x.device),
            "b_scale": 2.0**chosen.b_scale,
            "b_least": chosen.b_least,
            "FORM": form_of(chosen, x.is_cuda if self.assembly is None else self.assembly),
            "WIDE": chosen.form.wide,
            "RANDOM": chosen.form.random,
        }

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
    product, sum and outer sum, whether sums are rounded to odd, whether products are reduced).
    """
    form = chosen.form
    if isinstance(form, Narrow):
        return "narrow", form.fused, form.limit_product, form.limit_sum, assembly
    if isinstance(form, Whole):
        return ("whole",)
    assert isinstance(form, Wide)
    quantisers = [value for q in (form.product, form.sum, form.outer) for value in _quantiser(q)]
    return "wide", *quantisers, form.rounding != "nearest", form.far


def _quantiser(quantiser: Quantiser | None) -> tuple[str, bool]:
    return ("none", False) if quantiser is None else astuple(quantiser)  # type: ignore[return-value]


def _matrix_of(columns: Columns, batch: int) -> Columns:
    """The columns of one matrix. Kernels take an address; terms and columns count from it by the source's strides."""
    start = columns.source.storage_offset() + batch * columns.matrix
    return Columns(columns.source.as_strided((1,), (1,), start), columns.terms, columns.columns, 0)


def _right(columns: Columns) -> dict[str, Tensor]:
    """The right operand, as the kernels' arguments."""
    return {"b": columns.source, "terms": columns.terms, "columns": columns.columns}


def _device_of(x: Tensor) -> Any:
    return torch.cuda.device_of(x)
