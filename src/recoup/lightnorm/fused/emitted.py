"""LightNorm's fused passes on the CPU by emitted kernels: float32 without formats, and formats that truncate and have
no subnormals (FP10 among them), with or without blocks.

They hold for values up to their format's largest: kernels note the largest magnitude that they meet, and what a pass
has written that met a larger one, nobody reads.

Legend: x [N, C, P]; K chunks.
"""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from recoup.kernels.signature import Bound
from recoup.kernels.threads import over_rows
from recoup.kernels.vector import FOUND
from recoup.lightnorm.config import LightNorm
from recoup.lightnorm.fused.build import Recipe, kernel, recipes
from recoup.lightnorm.fused.sequence import Doubles, FusedPasses, Indices
from recoup.lightnorm.fused.tile_ir import LANES
from recoup.lightnorm.tiling import Limits, Tiling, tiling

# A tile is 32 KiB. Without blocks it is one row, which need not be long: an extremum is looked for in all of it.
LIMITS = Limits(elements=8192, shortest=64, longest=1024, lanes=LANES)
STREAM = 1 << 25  # bytes of a result that the caches would not keep for its reader
DEPTH = 4  # vectors of float64 that a channel's sums take: two sums, each with its errors
SCALES = 2  # rows of scratch for the blocks' powers of two


class EmittedPasses(FusedPasses):
    """The passes by emitted kernels.

    Args:
        config: the formats; at least one of them has a recipe.
        chunks: K; 0 where there are no batch statistics.
        cut: how x is cut.

    Attributes:
        fore, back: how to build for activations and for gradients; None where the kernels do not hold.
        additions: ways to add up gradients, the fastest first, and the largest magnitude, as bits, up to which each
            holds.
    """

    def __init__(self, config: LightNorm, chunks: int, cut: Tiling) -> None:
        super().__init__(config, chunks, torch.float32, cut)
        size = cut.samples * cut.channels * cut.places * torch.float32.itemsize
        whole = not cut.places % LANES and not (cut.tiles[:, 1:3] % LANES).any()
        options = torch.float32, cut.channels, cut.elements, whole and size >= STREAM
        self.fore, self.back, self.additions = recipes(config, *options)
        addresses = {"tiles": cut.tiles.ctypes.data, "offsets": cut.offsets.ctypes.data}
        self._constants = cut._asdict() | addresses | {"count": len(cut.tiles), "chunks": chunks}
        rows = (cut.block + SCALES) * cut.pitch + FOUND  # a search in the last row may read so far beyond it
        self._memory = {"scratch": (rows, torch.float32)}
        self._memory_of_sums = self._memory | {"lanes": (cut.panel * DEPTH * LANES, torch.float64)}
        self._bound: dict[tuple[str, Recipe], Bound] = {}

    def moments(self, x: Tensor, sums: Doubles, ends: Doubles, indices: Indices) -> bool:
        if self.fore is None:
            return False
        return self._add("moments", self.fore, x=x, sums=sums, ends=ends, indices=indices) <= self.fore.top

    def normalize(self, x: Tensor, y: Tensor, xhat: Tensor, factors: Doubles, ordinary: bool) -> bool:
        if self.fore is None or not ordinary:
            return False
        return self._write("normalize", self.fore, x=x, xhat=xhat, y=y, factors=factors) <= self.fore.top

    def products(self, grad: Tensor, xhat: Tensor, plain: Doubles, cross: Doubles) -> bool:
        arrays = {"g": grad, "xhat": xhat, "plain": plain, "cross": cross}
        return any(self._add("products", recipe, **arrays) <= top for recipe, top in self.additions)

    def gradient(
        self, grad: Tensor, dx: Tensor, factors: Doubles, amounts: Doubles, indices: Tensor, ordinary: bool
    ) -> bool:
        if self.back is None or not ordinary:
            return False
        arrays = {"g": grad, "dx": dx, "factors": factors, "amounts": amounts, "indices": indices}
        return self._write("gradient", self.back, **arrays) <= self.back.top

    def _add(self, name: str, recipe: Recipe, **arrays: Tensor | np.ndarray) -> int:
        """Run a pass with sums; the largest magnitude that it met, as bits."""
        return self._peak(self._kernel(name, recipe), self.tiling.of_panels, self._memory_of_sums, arrays)

    def _write(self, name: str, recipe: Recipe, **arrays: Tensor | np.ndarray) -> int:
        """Run a pass with results; the largest magnitude that it met, as bits."""
        return self._peak(self._kernel(name, recipe), self.tiling.of_blocks, self._memory, arrays)

    def _kernel(self, name: str, recipe: Recipe) -> Bound:
        """A pass with what this shape fixes."""
        bound = self._bound.get((name, recipe))
        if bound is None:
            made = kernel(name, recipe)
            given = {key: value for key, value in self._constants.items() if key in made.names}
            bound = self._bound[name, recipe] = made.bind(**given)
        return bound

    def _peak(
        self,
        call: Bound,
        work: tuple[int, int],
        memory: dict[str, tuple[int, torch.dtype]],
        arrays: dict[str, Tensor | np.ndarray],
    ) -> int:
        """Run a pass over threads, each with memory of its own."""
        addresses, peaks = {name: _address(array) for name, array in arrays.items()}, []

        def part(first: int, last: int) -> None:
            peak = np.empty(1, np.int32)
            held = {name: torch.empty(size, dtype=kind, device="cpu") for name, (size, kind) in memory.items()}
            own = {name: array.data_ptr() for name, array in held.items()}
            call(first=first, last=last, peak=_address(peak), **own, **addresses)
            peaks.append(int(peak[0]))

        over_rows(part, *work)
        return max(peaks)


def _address(array: Tensor | np.ndarray) -> int:
    return array.data_ptr() if isinstance(array, Tensor) else array.__array_interface__["data"][0]


@lru_cache(maxsize=256)
def plan(config: LightNorm, chunks: int, dtype: torch.dtype, N: int, C: int, P: int) -> EmittedPasses | None:
    """The passes for a shape, or None where formats do not allow them; ``chunks`` 0 where there are no batch
    statistics."""
    if dtype != torch.float32 or config.difference is not None:
        return None
    passes = EmittedPasses(config, chunks, tiling(N, C, P, chunks, config.block, LIMITS))
    return None if passes.fore is None and passes.back is None else passes
