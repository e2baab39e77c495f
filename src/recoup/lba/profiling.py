"""What a narrow accumulator does inside each layer: how often it loses what, and how far the output is off."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from recoup.fields import integer
from recoup.lba import reference
from recoup.lba.config import LBA
from recoup.lba.layers import LBALayer, LBARows
from recoup.lba.repair import lba_layers
from recoup.network.batches import call, prepared
from recoup.network.modes import evaluating
from recoup.network.reached import watching

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

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def profile(
    model: nn.Module, batches: Iterable[Any], *, outputs: int = 2048, seed: int = 0, progress: bool = False
) -> list[LayerProfile]:
    """Look into every LBA layer of a model, in the order of their first run.

    The outputs are drawn at random from a layer's first call; their sums are computed again by the reference, step by
    step, with the layer's own inputs, so upstream error is part of those inputs and not of the figures.

    Args:
        model: with LBA layers.
        batches: only the first is used.
        outputs: how many a layer; the time is proportional to outputs times K.
        seed: of the draw.
        progress: whether to show a progress bar.

    Raises:
        RecoupError: no LBA layer or none that ran, no or bad batches, outputs not an integer of at least 1.
    """
    integer("lba.profile", "outputs", outputs, (1, MAX_OUTPUTS))
    layers = lba_layers(model, "lba.profile")
    names = {layer: name for name, layer in layers.items()}
    rows: dict[str, LayerProfile] = {}

    def observe(layer: nn.Module, args: tuple, kwargs: dict) -> None:
        assert isinstance(layer, LBALayer)
        name = names[layer]
        if name not in rows:
            x = args[0] if args else kwargs["input"]
            rows[name] = _measured(name, layer, *(part.cpu() for part in sample(layer, x, outputs, seed)[:2]))

    hooks = [layer.register_forward_pre_hook(observe, with_kwargs=True) for layer in layers.values()]
    try:
        with watching(layers, "lba.profile"), evaluating(model), torch.no_grad():
            for inputs, _ in prepared(model, batches, "lba.profile", progress):
                call(model, inputs)
                break
    finally:
        for hook in hooks:
            hook.remove()
    return list(rows.values())


def sample(layer: LBALayer, x: Tensor, outputs: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """The operands of randomly drawn outputs.

    Returns:
        Activations and weights [S, K], as the unit multiplies them; the outputs' flat indices in [O, positions], where
        positions run over images and pixels, or over rows.
    """
    x, w, _ = layer._operands(x.detach())
    generator = torch.Generator().manual_seed(seed)
    if isinstance(layer, LBARows):
        columns, groups = x.reshape(-1, x.shape[-1]).t().unsqueeze(0), 1
    else:
        x, geometry = layer.in_2d(x)  # type: ignore[attr-defined]
        columns, groups = geometry.columns(x), geometry.groups
    channels, positions = w.shape[0], columns.shape[2]
    index = torch.randint(channels * positions, (outputs,), generator=generator)
    channel, position = index // positions, index % positions
    group = channel // (channels // groups)
    return columns[group, :, position].contiguous(), w.reshape(channels, -1)[channel].contiguous(), index


def _measured(name: str, layer: LBALayer, x_SK: Tensor, w_SK: Tensor) -> LayerProfile:
    config, (count, terms) = layer.config, x_SK.shape
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
    return LayerProfile(
        name=name,
        kind=layer.float_class.__name__,
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


def sampled(x_SK: Tensor, w_SK: Tensor, config: LBA) -> Any:
    """The reference's steps for S sums of K terms, each with its exact product (None for an outer step)."""
    x_KS, w_KS = x_SK.double().t().contiguous(), w_SK.double().t().contiguous()
    base = reference.random_base(1, x_SK.shape[0], 0)[0]
    for step in reference.run(lambda k: x_KS[k] * w_KS[k], x_KS.shape[0], base, config):
        yield step, None if step.outer else x_KS[step.index] * w_KS[step.index]
