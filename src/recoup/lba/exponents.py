"""Where on the number line a layer's sums lie: a shift of its unit's exponents, chosen on calibration data.

Legend: B matrices of a batch (a convolution's groups), M rows, N columns, K terms.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from recoup.errors import RecoupError
from recoup.formats import Int
from recoup.lba.attention_layers import LBAAttention
from recoup.lba.config import LBA
from recoup.lba.layers import LBALayer, LBARows
from recoup.lba.repair import lba_modules
from recoup.network import ledger
from recoup.network.batches import call, prepared
from recoup.network.batches import count as images_in
from recoup.network.emulated import running
from recoup.network.modes import evaluating
from recoup.network.operands import observing_operands
from recoup.network.reached import watching
from recoup.network.wing import Repair

M = TypeVar("M", bound=nn.Module)
BLOCK = 1 << 16  # sums that stay in a core's cache


@dataclass(slots=True)
class Reach:
    """The largest magnitudes of a layer's products, of its partial sums within chunks, and of its sums of chunks."""

    product: float = 0.0
    inner: float = 0.0
    outer: float = 0.0

    def see(self, x: Tensor, y: Tensor, config: LBA) -> None:
        """Add x [B, M, K] y [B, K, N]: exact products, added up in float64 in the unit's order."""
        if 0 in (*x.shape, *y.shape):
            return
        x, y = x.detach().double(), y.detach().double()
        self.product = max(self.product, float((x.abs().amax(1) * y.abs().amax(2)).amax()))
        columns = max(1, BLOCK // (x.shape[0] * x.shape[1]))
        for block in y.split(columns, 2):
            self._sums(x, block, config.chunk or x.shape[2])

    def _sums(self, x_BMK: Tensor, y_BKN: Tensor, chunk: int) -> None:
        total = x_BMK.new_zeros(*x_BMK.shape[:2], y_BKN.shape[2])
        inner = outer = total.new_zeros(())
        for start in range(0, x_BMK.shape[2], chunk):
            s = torch.zeros_like(total)
            for k in range(start, min(start + chunk, x_BMK.shape[2])):
                s.addcmul_(x_BMK[:, :, k : k + 1], y_BKN[:, k : k + 1])
                inner = torch.maximum(inner, largest(s))
            total += s
            outer = torch.maximum(outer, largest(total))
        self.inner, self.outer = max(self.inner, float(inner)), max(self.outer, float(outer))

    def shift(self, config: LBA) -> int | None:
        """The largest at which products stay below the product format's largest value, and sums below half of theirs.

        None where nothing but zeros was seen, and for integers that wrap, which no sum saturates.
        """
        if isinstance(config.outer, Int) and config.outer.overflow == "wrap":
            return None
        inner = config.accumulator.largest_value * (config.scale if isinstance(config.accumulator, Int) else 1)
        outer = config.outer.largest_value * (config.scale if isinstance(config.outer, Int) else 1)
        pairs = [(self.inner, inner / 2), (self.outer, outer / 2)]
        if config.product is not None:
            pairs.append((self.product, config.product.largest_value))
        found = [below(seen, bound) for seen, bound in pairs if seen > 0]
        if not found:
            return None
        if config.integers:
            found.append(0)  # whole numbers have no products to save from underflow
        low, high = config.shift_range
        return max(low, min(high, *found))


def largest(x: Tensor) -> Tensor:
    """The largest magnitude, in one pass."""
    low, high = x.aminmax()
    return torch.maximum(-low, high)


def below(value: float, bound: float) -> int:
    """The largest shift with value 2^shift < bound.

    >>> below(3.0, 24.0), below(3.0, 25.0), below(100.0, 16.0)
    (2, 3, -3)
    """
    shift = math.frexp(bound)[1] - math.frexp(value)[1]
    return shift if math.ldexp(value, shift) < bound else shift - 1


def choose_exponents_(model: M, batches: Iterable[Any], *, progress: bool = False) -> M:
    """Give every LBA layer and attention product an integer shift that puts its sums where the unit's range is.

        y = unit(Q(x), Q(w) 2^shift) 2^-shift

    with the largest shift for which, over the calibration batches, every partial sum, within chunks and of chunks,
    stays below half of its format's largest value R, and every product below the product format's. So nothing
    saturates, and as few products as possible underflow. Products and sums are those of the float network (operands
    quantised where the config asks for it), exact; R / 2 leaves room for what other images and the hardware add.

    A power of two per layer costs no multiplier. Integer operands are never shifted up, integers that wrap not at all.

    Args:
        model: with LBA layers; choose chunks before (`recoup.lba.choose_chunks_`), which the sums depend on.
        batches: inputs as the network will see them; one pass, which looks at every partial sum: as many steps as the
            network has multiply-accumulates, about 5 * 10^8 a second. Some dozens of images do to begin with.
        progress: whether to show a progress bar.

    Returns:
        The same model, with ``shift`` on its layers (``score_shift`` and ``value_shift`` on attention), which
        `recoup.undo_(model, "structure")`, `recoup.restore_` and ``layer.shift = None`` take back exactly.

    Raises:
        RecoupError: no LBA layer or none that ran, no or bad batches. Nothing is changed then.

    Warns:
        RecoupWarning: repairs that were fitted for the exponents as they were, which are taken back; layers that never
            ran, which keep what they had.

    Source: our own; that products be held too is our addition, since a saturated product is a wrong sum.
    """
    modules = lba_modules(model, "choose_exponents_")
    with ledger.whole(model):
        ledger.begin_structure(model, "choose_exponents_")  # it looks at the network as no repair has changed it
        reaches, images = _reaches(model, modules, batches, progress)
        chosen = {
            name: {extra: reach.shift(modules[name].config) for extra, reach in seen.items()}
            for name, seen in reaches.items()
            if seen
        }
        if not chosen:
            raise RecoupError("choose_exponents_: no layer on a narrow accumulator multiplied anything")
        before = {name: {extra: getattr(modules[name], extra) for extra in shifts} for name, shifts in chosen.items()}
        for name, shifts in chosen.items():
            for extra, shift in shifts.items():
                setattr(modules[name], extra, shift)
        done = {name: modules[name] for name in chosen}
        ledger.record(model, done, "structure", "choose_exponents_", before, slot="exponents", images=images)
    return model


def _reaches(
    model: nn.Module, modules: dict[str, Any], batches: Iterable[Any], progress: bool
) -> tuple[dict[str, dict[str, Reach]], int]:
    """How far the sums of every layer's products reach on the baseline, and of how many images."""
    reaches: dict[str, dict[str, Reach]] = {name: {} for name in modules}
    images = 0
    watched = watching(modules, "choose_exponents_")
    seen = observing_operands(
        modules,
        lambda name: _layer_watch(reaches[name]),
        lambda name, module: _attention_watch(module, reaches[name]),
    )
    with watched, seen, running(model, "baseline"), evaluating(model), torch.no_grad():
        for inputs, _ in prepared(model, batches, "choose_exponents_", progress):
            call(model, inputs)
            images += images_in(inputs)
    return reaches, images


def _layer_watch(seen: dict[str, Reach]) -> Callable[..., None]:
    def hook(layer: LBALayer, args: tuple, kwargs: dict) -> None:
        x, w, _ = layer._operands((args[0] if args else kwargs["input"]).detach())
        reach = seen.setdefault("shift", Reach())
        for rows, columns in operands(layer, x, w):
            reach.see(rows, columns, layer.config)

    return hook


def operands(layer: LBALayer, x: Tensor, w: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """A layer's product as matrices [B, M, K] and [B, K, N], so many images at a time that they fill a block."""
    if isinstance(layer, LBARows):
        yield w.detach()[None], x.reshape(-1, x.shape[-1]).t()[None]
        return
    images, geometry = layer.in_2d(x)  # type: ignore[attr-defined]
    rows = w.detach().reshape(geometry.groups, w.shape[0] // geometry.groups, -1)
    sums = w.shape[0] * math.prod(geometry.size(images))
    for some in images.split(max(1, BLOCK // max(1, sums))):
        yield rows, geometry.columns(some)


def _attention_watch(module: LBAAttention, seen: dict[str, Reach]) -> Callable[[str, Tensor, Tensor], None]:
    def watch(names: str, x: Tensor, y: Tensor) -> None:
        batch = torch.broadcast_shapes(x.shape[:-2], y.shape[:-2])
        x, y = (t.expand(*batch, *t.shape[-2:]).reshape(-1, *t.shape[-2:]) for t in (x, y))
        reach = seen.setdefault({"q k": "score_shift", "p v": "value_shift"}[names], Reach())
        some = max(1, BLOCK // max(1, x.shape[1] * y.shape[2]))
        for rows, columns in zip(x.split(some), y.split(some), strict=True):
            reach.see(rows, columns, module.config)

    return watch


EXPONENTS = Repair(
    "own exponents",
    "structure",
    "Every layer's range is moved by a power of two to where its sums are, chosen on the calibration images: none "
    "saturates, and as few products as possible underflow.",
    "exponents of its own for every layer",
    choose_exponents_,
    records=True,
)
