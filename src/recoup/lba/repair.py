"""What wins accuracy back without training: gains, and chunks that fit the layer."""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from recoup.errors import RecoupError, RecoupWarning
from recoup.fields import boolean
from recoup.formats import Float
from recoup.lba.attention_layers import LBAAttention
from recoup.lba.config import LBA
from recoup.lba.layers import LBALayer, LBARows
from recoup.network import ledger
from recoup.network.batches import call, prepared
from recoup.network.batches import count as images_in
from recoup.network.emulated import emulated_layers
from recoup.network.modes import evaluating
from recoup.network.reached import watching
from recoup.network.wing import Repair
from recoup.recalibrate import PAIRED

M = TypeVar("M", bound=nn.Module)


def lba_layers(model: nn.Module, purpose: str) -> dict[str, LBALayer]:
    """The LBA layers of a model by name; an error if there is none."""
    layers = {name: layer for name, layer in emulated_layers(model, purpose).items() if isinstance(layer, LBALayer)}
    _check_any(layers, purpose)
    return layers


def lba_modules(model: nn.Module, purpose: str) -> dict[str, LBALayer | LBAAttention]:
    """The same and the attention products: everything that has an LBA config."""
    kinds = (LBALayer, LBAAttention)
    modules = {name: module for name, module in emulated_layers(model, purpose).items() if isinstance(module, kinds)}
    _check_any(modules, purpose)
    return modules


def _check_any(found: Mapping[str, nn.Module], purpose: str) -> None:
    if not found:
        raise RecoupError(f"{purpose}: the model has no layer on a narrow accumulator: emulate_(model, LBA()) first")


def correct_gain_(
    model: M, batches: Iterable[Any], per: Literal["channel", "layer"] = "channel", *, progress: bool = False
) -> M:
    """Undo the shrink of truncated sums by one factor per output channel, or per layer, in closed form.

        gain_o = <z_o, y_o> / <y_o, y_o>

    with y the unit's output and z that of the same operands summed in float32, both before the bias: the factor that
    leaves the least squared error. One pass over the batches: a layer's gain is in force as soon as it is known, so
    the layers behind it see repaired inputs, and it is refined with every batch.

    Args:
        model: with LBA layers; it runs in eval mode. Gains of an earlier call are replaced.
        batches: inputs as the network will see them.
        per: ``channel`` or ``layer``.
        progress: whether to show a progress bar.

    Returns:
        The same model; ``layer.gain = None`` takes a gain back.

    Raises:
        RecoupError: no LBA layer, none that ran, no or bad batches, batch norm statistics that were repaired without
            the gain. Gains are then as they were.

    Warns:
        RecoupWarning: channels whose output was zero throughout; they keep gain 1. Layers that never ran.

    Source: our own; truncation's systematic shrink is measured in docs/lba.md.
    """
    if per not in ("channel", "layer"):
        raise RecoupError(f"correct_gain_(per={per!r}): per must be 'channel' or 'layer'")
    layers = lba_layers(model, "correct_gain_")
    ledger.refuse_after_statistics(model, "correct_gain_")
    before = {name: {"gain": layer.gain} for name, layer in layers.items()}
    fits = {name: _Fit(layer, per) for name, layer in layers.items()}
    images = 0
    with ledger.whole(model), observing(layers, {name: fit.observe for name, fit in fits.items()}):
        for layer in layers.values():
            layer.gain = None
        with watching(layers, "correct_gain_"), evaluating(model), torch.no_grad():
            for inputs, _ in prepared(model, batches, "correct_gain_", progress):
                call(model, inputs)
                images += images_in(inputs)
        fitted = {name: layer for name, layer in layers.items() if layer.gain is not None}
        _say_dead({name: fits[name].dead for name in fitted if fits[name].dead})
        ledger.record(model, fitted, "gain", "correct_gain_", before, images=images)
    return model


def _say_dead(dead: Mapping[str, int]) -> None:
    if dead:
        shown = ", ".join(f"{name} ({count})" for name, count in list(dead.items())[:6])
        warnings.warn(
            f"correct_gain_: {sum(dead.values())} channels of {len(dead)} layers gave only zeros, keep gain 1: {shown}",
            RecoupWarning,
            stacklevel=3,
        )


@contextmanager
def observing(layers: Mapping[str, LBALayer], watch: Mapping[str, Callable[..., Tensor]]) -> Iterator[None]:
    """A forward hook on each layer; then none."""
    hooks = [layers[name].register_forward_hook(hook, with_kwargs=True) for name, hook in watch.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def observing_operands(
    modules: Mapping[str, LBALayer | LBAAttention],
    hook: Callable[[str], Callable[..., Any]],
    watch: Callable[[str, LBAAttention], Callable[[str, Tensor, Tensor], None]],
) -> Iterator[None]:
    """A forward pre-hook on each layer and a watch on each attention's products; then none."""
    hooks = []
    try:
        for name, module in modules.items():
            if isinstance(module, LBAAttention):
                module.watch = watch(name, module)
            else:
                hooks.append(module.register_forward_pre_hook(hook(name), with_kwargs=True))
        yield
    finally:
        for handle in hooks:
            handle.remove()
        for module in modules.values():
            module.__dict__.pop("watch", None)


class _Fit:
    """Running sums of one layer, in float64."""

    def __init__(self, layer: LBALayer, per: str) -> None:
        self.layer, self.per = layer, per
        self.cross = self.square = torch.zeros(layer.matrix.shape[0], dtype=torch.float64, device=layer.weight.device)

    def observe(self, layer: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
        assert isinstance(layer, LBALayer)
        mode, layer.mode = layer.mode, "baseline"
        try:
            exact = layer.forward(*args, **kwargs)
        finally:
            layer.mode = mode
        dim = output.dim() - 1 if isinstance(layer, LBARows) else output.dim() - layer.weight.dim() + 1
        shape = [-1 if i == dim else 1 for i in range(output.dim())]
        offset = 0.0 if layer.bias is None else layer.bias.view(shape)
        plain = output - offset  # with the gain of the batches before
        raw = plain if layer.gain is None else plain / layer.gain.view(shape)
        others = [i for i in range(output.dim()) if i != dim]
        y, z = raw.double(), (exact - offset).double()
        self.cross = self.cross + (y * z).sum(others)
        self.square = self.square + (y * y).sum(others)
        layer.gain = self.gain
        return raw * layer.gain.view(shape) + offset

    @property
    def gain(self) -> Tensor:
        cross, square = self.cross, self.square
        if self.per == "layer":
            cross, square = cross.sum().expand_as(cross), square.sum().expand_as(square)
        return torch.where(square > 0, cross / square, 1.0).float()

    @property
    def dead(self) -> int:
        """Channels that never gave anything but zero."""
        return int((self.square == 0).sum())


def fitted_chunk(terms: int) -> int:
    """The power of two nearest to the square root of a sum's length, on a logarithmic scale.

    >>> fitted_chunk(144), fitted_chunk(576), fitted_chunk(4608)
    (16, 32, 64)
    """
    return 1 << round(math.log2(max(terms, 1)) / 2)


def choose_chunks_(model: M, *, rescale: bool = True) -> M:
    """Give every LBA layer a chunk near sqrt(K): the inner and the outer sum are then equally long.

    Args:
        model: with LBA layers.
        rescale: also move the product's exponents by the paper's rule b_prod = b_acc + log2(chunk) / 2, where product
            and accumulator are `Float` formats as wide as each other.

    Returns:
        The same model.

    Raises:
        RecoupError: no LBA layer.

    Warns:
        RecoupWarning: repairs that were fitted for the chunks as they were; they are taken back.

    Source: that the chunk near sqrt(K) truncates least is our own observation (docs/lba.md).
    """
    layers = lba_layers(model, "choose_chunks_")
    boolean("choose_chunks_", "rescale", rescale)
    chosen = {name: _with_fitted_chunk(layer, rescale) for name, layer in layers.items()}
    ledger.begin_structure(model, "choose_chunks_")
    before = {name: {"config": layer.config} for name, layer in layers.items()}
    for name, layer in layers.items():
        layer.config = chosen[name]
    ledger.record(model, layers, "structure", "choose_chunks_", before, slot="chunks")
    return model


def _with_fitted_chunk(layer: LBALayer, rescale: bool) -> LBA:
    """A layer's config with the chunk that fits it; an earlier choice is replaced, not built on."""
    config, earlier = layer.config, ledger.entries(layer).get("chunks")
    if earlier is not None:
        config = config.replace(product=earlier.before["config"].product)
    return with_chunk(config, fitted_chunk(layer.matrix[0].numel()), rescale=rescale)


def with_chunk(config: LBA, chunk: int, *, rescale: bool = True) -> LBA:
    """A config with another chunk; see `choose_chunks_`."""
    product, total = config.product, config.accumulator
    if rescale and product is not None and isinstance(total, Float):
        spans = [f.max_exponent - f.min_exponent for f in (product, total)]
        if spans[0] == spans[1]:
            low = total.min_exponent - round(math.log2(chunk) / 2)
            product = product.replace(min_exponent=low, max_exponent=low + spans[0])
    return config.replace(chunk=chunk, product=product)


def set_underflow_(model: M, on: bool) -> M:
    """Switch underflow on or off in every LBA layer and attention product, for fine-tuning in a loop of your own.

    Attention that `register_transformers` gave its unit by hand keeps the config it was registered with.

    Raises:
        RecoupError: no LBA layer.
    """
    modules = lba_modules(model, "set_underflow_")
    boolean("set_underflow_", "on", on)
    for module in modules.values():
        module.config = module.config.replace(underflow=on)
    return model


LAYER_GAIN = Repair(
    "gain per layer",
    "gain",
    "Every layer's accumulator output times one factor, fitted in closed form: truncation shrinks sums.",
    "a gain per layer",
    lambda model, batches: correct_gain_(model, batches, "layer"),
    records=True,
)
GAIN = Repair(
    "gain per channel",
    "gain",
    "Every output channel's sum times a factor of its own, fitted in closed form on the calibration images: it "
    "undoes the shrink of truncated sums, and also serves networks without BatchNorm.",
    "a gain per channel",
    lambda model, batches: correct_gain_(model, batches, "channel"),
    short="gain",
    records=True,
)
GAIN_PAIRED = Repair.combined(
    "gain + paired",
    "A gain per channel first, then paired recalibration of what remains.",
    "a gain per channel with paired recalibration",
    (GAIN, PAIRED),
)
CHUNKS = Repair(
    "chunk near sqrt(K)",
    "structure",
    "Chunks of a power of two near the square root of the sum's length: inner and outer sums are alike.",
    "a chunk near sqrt(K)",
    lambda model, _: choose_chunks_(model),
    needs_images=False,
    records=True,
)
