"""What a network costs on an NB-SMT systolic array: cycles, operations and memory traffic, in closed form.

All of this is our model [our definition]; the papers publish ratios, not a cycle formula. One layer is a matrix product
of M output positions by N output channels with a reduction over C channels and the kernel's taps. Legend: T threads.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from recoup.errors import RecoupError
from recoup.nbsmt.observe import Layer
from recoup.network.batches import call, device_of, prepared
from recoup.network.checks import is_module
from recoup.network.derived import is_conv1d
from recoup.network.emulated import emulated_layers
from recoup.network.modes import evaluating
from recoup.network.reached import watching
from recoup.network.sites import float_class
from recoup.network.systolic import Array, array_of, layer_cycles
from recoup.network.uncounted import Uncounted, watching_uncounted


@dataclass(frozen=True, slots=True)
class LayerCost:
    """The cost of one layer for one batch.

    Attributes:
        name: within the model.
        emulated: whether it is an NB-SMT layer; a float layer is counted as 8-bit arithmetic with one thread.
        threads: as really run.
        M, C, N, taps, groups: the matrix product, as in `layer_cycles`.
        cycles: with ``threads``.
        single: cycles with one thread.
        macs: multiply-accumulates, M N C taps groups, zero padding included.
        activation_bytes, weight_bytes, output_bytes: 8-bit codes moved between memory and the array, each once, as
            with buffers that hold a layer's operands. They do not depend on the threads; the bandwidth does, as the
            same bytes move in fewer cycles.
    """

    name: str
    emulated: bool
    threads: int
    M: int
    C: int
    N: int
    taps: int
    groups: int
    cycles: int
    single: int
    macs: int
    activation_bytes: int
    weight_bytes: int
    output_bytes: int

    @property
    def speedup(self) -> float:
        """Over one thread on the same array."""
        return self.single / self.cycles if self.cycles else 1.0

    @property
    def traffic(self) -> int:
        """All bytes moved."""
        return self.activation_bytes + self.weight_bytes + self.output_bytes

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values, for tables and JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Cost:
    """The cost of a network for one batch: its layers in order of execution, and totals of what is counted.

    Attributes:
        array: the array.
        layers: what runs on it.
        uncounted: what else multiplies, beside the array: neither in the cycles nor in the speedup.
    """

    array: Array
    layers: tuple[LayerCost, ...]
    uncounted: tuple[Uncounted, ...] = ()

    @property
    def cycles(self) -> int:
        """Of all layers, one after the other."""
        return sum(layer.cycles for layer in self.layers)

    @property
    def single(self) -> int:
        """Of all layers with one thread."""
        return sum(layer.single for layer in self.layers)

    @property
    def speedup(self) -> float:
        """Of what is counted over one thread; layers left in float run one thread in both."""
        return self.single / self.cycles if self.cycles else 1.0

    @property
    def macs(self) -> int:
        """Multiply-accumulates of what is counted."""
        return sum(layer.macs for layer in self.layers)

    @property
    def uncounted_macs(self) -> int | None:
        """Of what is not counted; None where a class among it does not tell."""
        parts = [part.macs for part in self.uncounted]
        return None if None in parts else sum(part or 0 for part in parts)

    @property
    def traffic(self) -> int:
        """Bytes moved between memory and the array."""
        return sum(layer.traffic for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Array, layers and totals as plain values."""
        totals = {name: getattr(self, name) for name in ("cycles", "single", "speedup", "macs", "traffic")}
        lists = {name: [part.to_dict() for part in getattr(self, name)] for name in ("layers", "uncounted")}
        return {"array": asdict(self.array), **lists, **totals, "uncounted_macs": self.uncounted_macs}


@torch.no_grad()
def cycles(model: nn.Module, inputs: Any, array: Array | None = None) -> Cost:
    """The cost of running a model once.

    Every Conv1d, Conv2d, Linear and Conv1D of transformers counts, emulated or not: what is left in float (the first
    convolution and the classifier, by default) must run somewhere, and is taken to run on the same array as 8-bit
    arithmetic with one thread [our definition]. Everything else is not on the array: what multiplies (recurrent layers,
    transposed convolutions, attention, modules of any class that own weights or in whose forward a product of torch's
    runs) is listed in ``uncounted``, with its multiply-accumulates where they can be known.

    Args:
        model: any module; it runs once, in eval mode, to learn the sizes.
        inputs: a batch as in `recoup.network.batches`, or the shape of one image, such as (3, 32, 32), for a batch of
            one.
        array: the array; None is 16 x 16.

    Returns:
        Costs per call of a layer, in order of execution, with totals. Of the whole batch.

    Raises:
        RecoupError: a shape that is none, a bad batch, or a model that runs none of these layers.

    Warns:
        RecoupWarning: emulated layers that the batch did not reach.
    """
    is_module(model, "cycles")
    array = array_of(array, "cycles")
    if isinstance(inputs, Sequence) and not any(isinstance(value, Tensor) for value in inputs):
        if not inputs or not all(isinstance(size, int) and size > 0 for size in inputs):
            raise RecoupError(f"cycles: a shape has positive whole sizes, such as (3, 32, 32); got {inputs!r}")
        inputs = torch.zeros(1, *inputs, device=device_of(model))
    found: list[LayerCost] = []
    kinds = (nn.Conv1d, nn.Conv2d, nn.Linear)
    named = model.named_modules()
    layers = {n: module for n, module in named if isinstance(module, kinds) or is_conv1d(float_class(module))}

    def record(name: str) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
            found.append(_cost(name, module, args[0] if args else next(iter(kwargs.values())), output, array))

        return hook

    hooks = [
        module.register_forward_hook(record(name), with_kwargs=True, prepend=True) for name, module in layers.items()
    ]
    try:
        reached = watching(emulated_layers(model), "cycles", refuse=False)
        with watching_uncounted(model, layers) as uncounted, reached, evaluating(model):
            for batch, _ in prepared(model, [inputs], "cycles"):
                call(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    if not found:
        raise RecoupError("cycles: the model ran no Conv1d, Conv2d or Linear")
    return Cost(array, tuple(found), tuple(uncounted))


def _cost(name: str, module: Any, x: Tensor, y: Tensor, array: Array) -> LayerCost:
    groups = getattr(module, "groups", 1)
    weight = module.weight.t() if is_conv1d(float_class(module)) else module.weight
    N, C = weight.shape[0] // groups, weight.shape[1]
    taps = weight[0, 0].numel()
    M = y.numel() // weight.shape[0]
    emulated = isinstance(module, Layer)
    threads = module.active_config.threads if emulated and module.mode != "float" else 1
    size = {"taps": taps, "groups": groups}
    return LayerCost(
        name=name,
        emulated=emulated,
        threads=threads,
        M=M,
        C=C,
        N=N,
        taps=taps,
        groups=groups,
        cycles=layer_cycles(M, C, N, threads, array, **size),
        single=layer_cycles(M, C, N, 1, array, **size),
        macs=M * N * C * taps * groups,
        activation_bytes=x.numel(),
        weight_bytes=weight.numel(),
        output_bytes=y.numel(),
    )
