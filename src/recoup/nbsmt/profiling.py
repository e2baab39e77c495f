"""What NB-SMT does to each layer of a network, on real data."""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from recoup.nbsmt.attention_layers import NBSMTAttention
from recoup.nbsmt.config import NBSMT
from recoup.nbsmt.observe import (
    Layer,
    Seen,
    SeenProduct,
    attentions,
    hooked,
    in_mode,
    nbsmt_units,
    see_product,
)
from recoup.nbsmt.ports import WEIGHT, activation_port
from recoup.nbsmt.slots import layer_statistics
from recoup.network.attention import PRODUCTS
from recoup.network.batches import call, count, prepared
from recoup.network.modes import evaluating
from recoup.network.operands import observing_operands
from recoup.network.reached import watching


@dataclass(frozen=True, slots=True)
class LayerProfile:
    """One NB-SMT layer over all batches; rates and shares lie in 0..1.

    Attributes:
        name: within the model.
        kind: the torch layer it stands in for.
        weight_shape: of the weight; of an attention's product the [N, K] of what plays it in the last call.
        output_shape: of the output of the last call, without the batch dimension.
        threads: as really run (1 where the layer is grouped).
        policy: of the configuration.
        macs: multiply-accumulates per image, zero padding included.
        collisions: slots with two or more active threads / slots.
        lossy: thread products that came out changed / active thread products.
        utilization: slots with at least one active thread / slots.
        error: relative squared error, sum (y - y8)^2 / sum y8^2, where y is the output without bias and y8 the
            8-bit result for the same input.
        mean_shift: the part of ``error`` that is one constant per output channel, which `correct_bias_` removes; 0 of
            an attention's product, which has no channels of its own.
        zero_activations, wide_activations, saturated: shares of the input that have value 0, do not fit the port
            (unsigned codes above 15; signed ones, see `NBSMT`), and would leave the codes' range (before clipping).
        zero_weights, wide_weights: shares of the weights with code 0, and with a code outside -8..7.
        overflowed: share of the outputs that the accumulator changed: as scaled float32 they differ from exact sums of
            the same shared products (a change above 2^24 that rounds to the same float32 is none).
    """

    name: str
    kind: str
    weight_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    threads: int
    policy: str
    macs: int
    collisions: float
    lossy: float
    utilization: float
    error: float
    mean_shift: float
    zero_activations: float
    wide_activations: float
    saturated: float
    zero_weights: float
    wide_weights: float
    overflowed: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values, for tables and JSON."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


@torch.no_grad()
def profile(model: nn.Module, batches: Iterable[Any], *, progress: bool = False) -> list[LayerProfile]:
    """Measure every NB-SMT layer of an emulated model on data: collisions, losses and errors, per layer.

    One pass in eval mode; every layer sees the inputs that emulation produces, and its error is measured against
    8-bit arithmetic on the same input, so errors of earlier layers do not count twice. An attention has two rows,
    ``name (q k^T)`` and ``name (p v)``, with q and the probabilities for activations and k and v for weights.

    Args:
        model: a model after `emulate_`; it is left as it was.
        batches: the data; labels are not needed.
        progress: whether to show a progress bar.

    Returns:
        One profile per NB-SMT layer and attention product that ran, in order of first execution.

    Raises:
        RecoupError: no NB-SMT layer or none that ran, no or bad batches.

    Warns:
        RecoupWarning: NB-SMT layers that no batch reached.
    """
    units = nbsmt_units(model, "profile")
    products, images = attentions(units), 0
    layers = {name: unit for name, unit in units.items() if isinstance(unit, Layer)}
    seen: dict[str, _Sums] = {}

    def observe(name: str, layer: Seen, output: Tensor) -> None:
        seen.setdefault(name, _Sums()).add(layer, tuple(output.shape[1:]))

    def watch(name: str, layer: NBSMTAttention) -> Callable[[str, Tensor, Tensor], None]:
        def multiplied(names: str, x: Tensor, w: Tensor) -> None:
            shape = (*torch.broadcast_shapes(x.shape[:-2], w.shape[:-2]), x.shape[-2], w.shape[-1])
            if x.numel() and w.numel():
                row = seen.setdefault(f"{name} ({PRODUCTS[names]})", _Sums())
                row.add(see_product(layer, names, x, w), shape[1:] if len(shape) > 2 else shape)

        return multiplied

    watched = observing_operands(products, _no_hook, watch)
    with (
        watching(units, "profile"),
        evaluating(model),
        in_mode(units, "emulate"),
        hooked(layers, observe, "profile"),
        watched,
    ):
        for inputs, _ in prepared(model, batches, "profile", progress):
            call(model, inputs)
            images += count(inputs)
        return [sums.profile(name, images) for name, sums in seen.items()]


def _no_hook(_: str) -> Callable[..., Any]:
    raise AssertionError("attentions are watched, not hooked")


@dataclass(slots=True)
class _Sums:
    """Running sums of one layer; floating-point ones in float64."""

    unit: Any = None
    weight_shape: tuple[int, ...] = ()
    output_shape: tuple[int, ...] = ()
    counts: dict[str, int] = field(default_factory=dict)
    busy: float = 0.0
    outputs: int = 0
    error: float = 0.0
    signal: float = 0.0
    shift: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))

    def add(self, seen: Seen | SeenProduct, output_shape: tuple[int, ...]) -> None:
        self.unit, self.output_shape = seen.layer, output_shape
        code, config = seen.codes(), seen.layer.active_config
        order, (weight, _) = seen.ordered(config), seen.weight_codes()
        self.weight_shape = _weight_shape(seen)
        ordered = order is not None
        found = layer_statistics(
            code[:, order] if ordered else code, weight[:, order] if ordered else weight, config, seen.geometry
        )
        self.busy += found.pop("utilization") * found["slots"]
        y8 = seen.product(config.eight_bit, None)
        y = seen.product(config, order)  # type: ignore[arg-type]
        difference = y - y8
        positions = difference.numel() // difference.shape[1]
        unclipped = torch.round(seen.x / seen.x.new_tensor(seen.scale))
        found |= {
            "inputs": code.numel(),
            "zero": int((code == 0).sum()),
            "wide": int(activation_port(config, seen.zero).wide(code).sum()),
            "saturated": int((unclipped != unclipped.clamp(-seen.zero, 255 - seen.zero)).sum()),
            "overflowed": _overflowed(seen, config, order, y),
            "macs": positions * weight.numel(),
            "outputs": difference.numel(),
            "weights": weight.numel(),
            "zero_weights": int((weight == 0).sum()),
            "wide_weights": int(WEIGHT.wide(weight).sum()),
        }
        for key, value in found.items():
            self.counts[key] = self.counts.get(key, 0) + int(value)
        self.outputs += positions
        self.error += float(difference.square().sum(dtype=torch.float64))
        self.signal += float(y8.square().sum(dtype=torch.float64))
        if seen.corrected:
            self.shift = self.shift.to(difference.device) + difference.sum((0, 2, 3), dtype=torch.float64)

    def profile(self, name: str, images: int) -> LayerProfile:
        c, layer = self.counts, self.unit
        shift = float(self.shift.square().sum()) / max(1, self.outputs)
        return LayerProfile(
            name=name,
            kind=layer.float_class.__name__,
            weight_shape=self.weight_shape,
            output_shape=self.output_shape,
            threads=layer.active_config.threads,
            policy=layer.config.policy,
            macs=c["macs"] // images,
            collisions=_share(c["collisions"], c["slots"]),
            lossy=_share(c["lossy"], c["active"]),
            utilization=_share(self.busy, c["slots"]),
            error=_share(self.error, self.signal),
            mean_shift=_share(shift, self.signal),
            zero_activations=_share(c["zero"], c["inputs"]),
            wide_activations=_share(c["wide"], c["inputs"]),
            saturated=_share(c["saturated"], c["inputs"]),
            zero_weights=_share(c["zero_weights"], c["weights"]),
            wide_weights=_share(c["wide_weights"], c["weights"]),
            overflowed=_share(c["overflowed"], c["outputs"]),
        )


def _weight_shape(seen: Seen | SeenProduct) -> tuple[int, ...]:
    if isinstance(seen, SeenProduct):
        return seen.w_BKN.shape[2], seen.w_BKN.shape[1]
    return tuple(seen.layer.matrix.shape)


def _overflowed(seen: Seen | SeenProduct, config: NBSMT, order: Tensor | None, y: Tensor) -> int:
    """How many outputs the accumulator changed."""
    if config.accumulator is None:
        return 0
    return int((seen.product(config.replace(accumulator=None), order) != y).sum())  # type: ignore[arg-type]


def _share(part: float, whole: float) -> float:
    """part / whole; 0 of nothing is nothing."""
    return part / whole if whole else 0.0
