"""What a narrow accumulator does inside each layer: how often it loses what, and how far the output is off."""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from recoup.fields import integer
from recoup.lba import reference
from recoup.lba.attention_layers import LBAAttention
from recoup.lba.bounds import bound
from recoup.lba.config import LBA
from recoup.lba.layers import LBALayer
from recoup.lba.repair import lba_modules
from recoup.network import ledger
from recoup.network.attention import PRODUCTS
from recoup.network.batches import call, prepared
from recoup.network.modes import evaluating
from recoup.network.operands import drawn_products, drawn_sums, observing_operands
from recoup.network.reached import watching
from recoup.network.saturation import say_saturated

MAX_OUTPUTS = 2**31 - 1


@dataclass(frozen=True, slots=True)
class LayerProfile:
    """One layer on a random sample of its outputs. Shares are in 0 .. 1.

    Attributes:
        name, kind: of the layer.
        terms: K, products a sum has.
        chunk: of its config; K where there are no chunks.
        bits: of the accumulator.
        outputs: how many were sampled.
        underflowed: products that were not zero and became zero, of all that were not.
        swamped: products that were not zero after Q_prod and left the sum as it was, of all those.
        saturated: products that reached the product format's largest value, of all products.
        overflowed: sums, inner and outer, that left the accumulator's range, of all sums.
        slope: least-squares factor from the exact output to the emulated one; truncation makes it less than 1.
        residual: root mean square of what the slope leaves, relative to the exact output's.
        error: root mean square of the whole error, relative to the exact output's.
        cannot_saturate: whether no input within the range of the batch's can make a sum or product leave its format,
            by the weights alone (`recoup.lba.bound`); None for an attention, which has no weights.
    """

    name: str
    kind: str
    terms: int
    chunk: int
    bits: int
    outputs: int
    underflowed: float
    swamped: float
    saturated: float
    overflowed: float
    slope: float
    residual: float
    error: float
    cannot_saturate: bool | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def profile(
    model: nn.Module, batches: Iterable[Any], *, outputs: int = 2048, seed: int = 0, progress: bool = False
) -> list[LayerProfile]:
    """Look into every LBA layer and attention product of a model, in the order of their first run.

    The outputs are drawn at random from a layer's first call; their sums are computed again by the reference, step by
    step, with the layer's own inputs, so upstream error is part of those inputs and not of the figures. An attention
    has two rows, ``name (q k^T)`` and ``name (p v)``, its products' operands in place of activations and weights.

    Args:
        model: with LBA layers.
        batches: only the first is used.
        outputs: how many a layer; the time is proportional to outputs times K.
        seed: of the draw.
        progress: whether to show a progress bar.

    Raises:
        RecoupError: no LBA layer or none that ran, no or bad batches, outputs not an integer of at least 1.

    Warns:
        RecoupWarning: repairs that were fitted for other weights; layers of which more than 1 % of the sums end at the
            largest value.
    """
    integer("lba.profile", "outputs", outputs, (1, MAX_OUTPUTS))
    integer("lba.profile", "seed", seed, (0, (1 << 63) - 1))
    ledger.warn_stale(model, "lba.profile")
    modules = lba_modules(model, "lba.profile")
    drawn = _Drawn(outputs, seed)
    observed = observing_operands(modules, drawn.hook, drawn.watch)
    with watching(modules, "lba.profile"), observed, evaluating(model), torch.no_grad():
        for inputs, _ in prepared(model, batches, "lba.profile", progress):
            call(model, inputs)
            break
    say_saturated(drawn.shares, "lba.profile")
    return list(drawn.rows.values())


class _Drawn:
    """The rows of layers and attention products as they run, from outputs drawn at random, each once."""

    def __init__(self, outputs: int, seed: int) -> None:
        self.outputs, self.seed = outputs, seed
        self.rows: dict[str, LayerProfile] = {}
        self.shares: dict[str, tuple[Any, float]] = {}

    def hook(self, name: str) -> Callable[..., None]:
        """For a layer, before its forward."""

        def observe(layer: LBALayer, args: tuple, kwargs: dict) -> None:
            if name not in self.rows:
                given = args[0] if args else kwargs["input"]
                x, w, _ = sample(layer, given, self.outputs, self.seed)
                self._measure(name, layer, layer.unit, x, w)
                self.rows[name] = replace(self.rows[name], cannot_saturate=_bounded(layer, given))

        return observe

    def watch(self, name: str, module: LBAAttention) -> Callable[[str, Tensor, Tensor], None]:
        """For an attention's products."""

        def see(product: str, x: Tensor, y: Tensor) -> None:
            row = f"{name} ({PRODUCTS[product]})"
            if row not in self.rows:
                unit = module.config.shifted(module.shifts[product] or 0)
                self._measure(row, module, unit, *drawn_products(x, y, self.outputs, self.seed))

        return see

    def _measure(self, name: str, module: Any, unit: LBA, x_SK: Tensor, w_SK: Tensor) -> None:
        row, share = _measured(name, module.float_class.__name__, unit, x_SK.cpu(), w_SK.cpu())
        self.rows[name], self.shares[name] = row, (module, share)


def sample(layer: LBALayer, x: Tensor, outputs: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """The operands of randomly drawn outputs.

    Returns:
        Activations and weights [S, K], as the unit multiplies them; the outputs' flat indices in [O, positions], where
        positions run over images and pixels, or over rows.
    """
    x, w, _ = layer._operands(x.detach())
    return drawn_sums(layer, x, w, outputs, seed)


def _bounded(layer: LBALayer, x: Tensor) -> bool | None:
    """Whether inputs within the range of x cannot saturate the unit; None where there is no such range."""
    if not x.numel() or not bool(x.isfinite().all()) or not bool(layer.matrix.isfinite().all()):
        return None
    low, high = (float(end) for end in x.detach().float().aminmax())
    return bound(layer, (low, high)).cannot_saturate


def _measured(name: str, kind: str, config: LBA, x_SK: Tensor, w_SK: Tensor) -> tuple[LayerProfile, float]:
    """A row, and the share of the sums that ended at the largest value."""
    count, terms = x_SK.shape
    tally = dict.fromkeys(("nonzero", "underflowed", "kept", "swamped", "saturated", "overflowed", "sums"), 0)
    y = torch.zeros(count, dtype=torch.float64)
    for step, exact in sampled(x_SK, w_SK, config):
        tally["overflowed"] += int(step.overflow.sum())
        tally["sums"] += count
        if step.outer:
            y = step.after
            continue
        assert exact is not None
        kept = step.added != 0
        tally["nonzero"] += int((exact != 0).sum())
        tally["underflowed"] += int(((exact != 0) & ~kept).sum())
        tally["kept"] += int(kept.sum())
        tally["swamped"] += int((kept & (step.after == step.before)).sum())
        tally["saturated"] += int(step.saturated.sum())
    truth = (x_SK.double() * w_SK.double()).sum(1)
    power = float((truth * truth).sum()) or 1.0
    slope = float((truth * y).sum()) / power
    residual = float(((y - slope * truth) ** 2).sum() / power) ** 0.5
    low, high = config.ends
    ended = float(((y >= high) | (y <= low)).double().mean())
    row = LayerProfile(
        name=name,
        kind=kind,
        terms=terms,
        chunk=min(config.chunk or terms, terms),
        bits=config.accumulator.bits,
        outputs=count,
        underflowed=tally["underflowed"] / max(tally["nonzero"], 1),
        swamped=tally["swamped"] / max(tally["kept"], 1),
        saturated=tally["saturated"] / max(count * terms, 1),
        overflowed=tally["overflowed"] / max(tally["sums"], 1),
        slope=slope,
        residual=residual,
        error=float(((y - truth) ** 2).sum() / power) ** 0.5,
    )
    return row, ended


def sampled(x_SK: Tensor, w_SK: Tensor, config: LBA) -> Any:
    """The reference's steps for S sums of K terms, each with its exact product (None for an outer step)."""
    x_KS, w_KS = x_SK.double().t().contiguous(), w_SK.double().t().contiguous()
    base = reference.random_base(1, x_SK.shape[0], 0)[0]
    for step in reference.run(lambda k: x_KS[k] * w_KS[k], x_KS.shape[0], base, config):
        yield step, None if step.outer else x_KS[step.index] * w_KS[step.index]
