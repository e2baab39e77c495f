"""What NB-SMT does to each layer of a network, on real data."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from recoup.nbsmt.config import NBSMT
from recoup.nbsmt.observe import Layer, Seen, hooked, in_mode, nbsmt_layers
from recoup.nbsmt.ports import activation_port
from recoup.nbsmt.slots import layer_statistics
from recoup.nbsmt.weights import quantize_weight
from recoup.network.batches import call, count, prepared
from recoup.network.modes import evaluating
from recoup.network.reached import watching


@dataclass(frozen=True, slots=True)
class LayerProfile:
    """One NB-SMT layer over all batches; rates and shares lie in 0..1.

    Attributes:
        name: within the model.
        kind: the torch layer it stands in for.
        weight_shape: of the weight.
        output_shape: of the output of the last call, without the batch dimension.
        threads: as really run (1 where the layer is grouped).
        policy: of the configuration.
        macs: multiply-accumulates per image, zero padding included.
        collisions: slots with two or more active threads / slots.
        lossy: thread products that came out changed / active thread products.
        utilization: slots with at least one active thread / slots.
        error: relative squared error, sum (y - y8)^2 / sum y8^2, where y is the output without bias and y8 the
            8-bit result for the same input.
        mean_shift: the part of ``error`` that is one constant per output channel, which `correct_bias_` removes.
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
    8-bit arithmetic on the same input, so errors of earlier layers do not count twice.

    Args:
        model: a model after `emulate_`; it is left as it was.
        batches: the data; labels are not needed.
        progress: whether to show a progress bar.

    Returns:
        One profile per NB-SMT layer that ran, in order of first execution.

    Raises:
        RecoupError: no NB-SMT layer or none that ran, no or bad batches.

    Warns:
        RecoupWarning: NB-SMT layers that no batch reached.
    """
    layers = nbsmt_layers(model, "profile")
    seen: dict[str, _Sums] = {}
    images = 0

    def observe(name: str, layer: Seen, output: Tensor) -> None:
        seen.setdefault(name, _Sums()).add(layer, tuple(output.shape[1:]))

    with watching(layers, "profile"), evaluating(model), in_mode(layers, "emulate"), hooked(layers, observe):
        for inputs, _ in prepared(model, batches, "profile", progress):
            call(model, inputs)
            images += count(inputs)
        return [sums.profile(name, layers[name], images) for name, sums in seen.items()]


@dataclass(slots=True)
class _Sums:
    """Running sums of one layer; floating-point ones in float64."""

    output_shape: tuple[int, ...] = ()
    counts: dict[str, int] = field(default_factory=dict)
    busy: float = 0.0
    outputs: int = 0
    error: float = 0.0
    signal: float = 0.0
    shift: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))

    def add(self, seen: Seen, output_shape: tuple[int, ...]) -> None:
        self.output_shape = output_shape
        code, config, order = seen.codes(), seen.layer.active_config, seen.layer.order
        weight, _ = seen.weight_codes()
        ordered = order is not None and seen.layer.order_decides(config)
        found = layer_statistics(
            code[:, order] if ordered else code, weight[:, order] if ordered else weight, config, seen.geometry
        )
        self.busy += found.pop("utilization") * found["slots"]
        y8 = seen.product(config.eight_bit, None)
        y = seen.product(config, order)
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
        }
        for key, value in found.items():
            self.counts[key] = self.counts.get(key, 0) + int(value)
        self.outputs += positions
        self.error += float(difference.square().sum(dtype=torch.float64))
        self.signal += float(y8.square().sum(dtype=torch.float64))
        self.shift = self.shift.to(difference.device) + difference.sum((0, 2, 3), dtype=torch.float64)

    def profile(self, name: str, layer: Layer, images: int) -> LayerProfile:
        c = self.counts
        weight, _ = quantize_weight(layer.matrix)
        shift = float(self.shift.square().sum()) / max(1, self.outputs)
        return LayerProfile(
            name=name,
            kind=layer.float_class.__name__,
            weight_shape=tuple(layer.matrix.shape),
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
            zero_weights=_share(int((weight == 0).sum()), weight.numel()),
            overflowed=_share(c["overflowed"], self.outputs * weight.shape[0]),
            wide_weights=_share(int(((weight < -8) | (weight > 7)).sum()), weight.numel()),
        )


def _overflowed(seen: Seen, config: NBSMT, order: Tensor | None, y: Tensor) -> int:
    """How many outputs the accumulator changed."""
    if config.accumulator is None:
        return 0
    return int((seen.product(config.replace(accumulator=None), order) != y).sum())


def _share(part: float, whole: float) -> float:
    """part / whole; 0 of nothing is nothing."""
    return part / whole if whole else 0.0
