"""What wins accuracy back without training: gains, and chunks that fit the layer."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from torch import nn

from recoup.errors import RecoupError
from recoup.fields import boolean
from recoup.formats import Float
from recoup.gains import Per, Weigh, fit_gains_, gain_repairs
from recoup.lba.attention_layers import LBAAttention
from recoup.lba.config import LBA
from recoup.lba.layers import LBALayer
from recoup.network import ledger
from recoup.network.emulated import emulated_layers
from recoup.network.wing import Repair

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
    model: M, batches: Iterable[Any], per: Per = "channel", *, weigh: Weigh = "outputs", progress: bool = False
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
        weigh: ``outputs``, every output's square counts; ``rows``, every row counts alike (a token, a place, with all
            its channels): for transformers, a few of whose tokens are far larger than the others (`recoup.gains`).
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
    return fit_gains_(model, lba_layers(model, "correct_gain_"), batches, per, weigh, progress)


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


LAYER_GAIN, GAIN, ROWS_GAIN, GAIN_PAIRED = gain_repairs(correct_gain_)
CHUNKS = Repair(
    "chunk near sqrt(K)",
    "structure",
    "Chunks of a power of two near the square root of the sum's length: inner and outer sums are alike.",
    "a chunk near sqrt(K)",
    lambda model, _: choose_chunks_(model),
    needs_images=False,
    records=True,
)
