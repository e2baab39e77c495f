"""What one NB-SMT layer sees: any of the three kinds of layer and its input as the 2-d convolution that runs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from recoup.errors import RecoupError
from recoup.nbsmt.config import NBSMT
from recoup.nbsmt.layers import NBSMTConv1d, NBSMTConv2d, NBSMTRows
from recoup.nbsmt.ops import convolution
from recoup.nbsmt.ports import UNSIGNED
from recoup.nbsmt.reference import quantize_activation
from recoup.nbsmt.weights import quantize_weight
from recoup.network.convolution import POINTWISE, Geometry, as_2d
from recoup.network.emulated import Mode, emulated_layers

Layer = NBSMTConv1d | NBSMTConv2d | NBSMTRows


@dataclass(frozen=True, slots=True)
class Seen:
    """A layer's input as that of a 2-d convolution.

    Attributes:
        layer: the layer.
        x: float input [N, C, H, W]; a padding mode other than zeros is applied already, so that its values count as
            the layer's input.
        geometry: what is left for the convolution to do.
    """

    layer: Layer
    x: Tensor
    geometry: Geometry

    @property
    def scale(self) -> float:
        """The activation scale; the layer has one, or it would not have run."""
        return float(self.layer.activation_scale or 0)

    @property
    def zero(self) -> int:
        """The byte of value 0 among its activation codes."""
        return self.layer.activation_zero or UNSIGNED

    def codes(self) -> Tensor:
        """Activation codes [N, C, H, W]: uint8 unsigned, or int8 signed values."""
        return quantize_activation(self.x, self.scale, self.zero)

    def weight_codes(self) -> tuple[Tensor, Tensor]:
        """int8 weight codes [O, C / groups, kh, kw] and their scales [O]."""
        code, scale_O = quantize_weight(self.layer.matrix)
        return as_2d(code), scale_O

    def product(self, config: NBSMT, order: Tensor | None) -> Tensor:
        """The layer's output without bias or correction, under a configuration: float32 [N, O, h, w]."""
        layer, geometry = self.layer, self.geometry.arguments
        order = order if layer.order_decides(config) else None
        return convolution(self.x, layer.matrix, order, self.scale, config.code, *geometry, layer.title, self.zero)


def see(layer: Layer, x: Tensor) -> Seen:
    """A layer and the input of one call, as a 2-d convolution."""
    x = x.detach()
    if isinstance(layer, NBSMTRows):
        return Seen(layer, x.reshape(-1, x.shape[-1], 1, 1), POINTWISE)
    return Seen(layer, *layer.in_2d(x))


def nbsmt_layers(model: nn.Module, purpose: str) -> dict[str, Layer]:
    """The NB-SMT layers of a model by name; an error where there are none."""
    layers = {name: layer for name, layer in emulated_layers(model, purpose).items() if isinstance(layer, Layer)}
    if not layers:
        raise RecoupError(
            f"{purpose}: the model has no NB-SMT layer; run calibrate_ and emulate_(model, NBSMT(...)) first"
        )
    return layers


@contextmanager
def hooked(layers: dict[str, Layer], hook: Callable[[str, Seen, Tensor], Tensor | None]) -> Iterator[None]:
    """Call ``hook(name, seen, output)`` after each call of a layer; what it returns replaces the output.

    The layer ran before, so its input is known to be legal.
    """

    def register(name: str, layer: Layer) -> Any:
        def forward_hook(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor | None:  # noqa: ARG001
            return hook(name, see(layer, args[0] if args else kwargs["input"]), output)

        return layer.register_forward_hook(forward_hook, with_kwargs=True)

    hooks = []
    try:
        for name, layer in layers.items():
            hooks.append(register(name, layer))
        yield
    finally:
        for handle in hooks:
            handle.remove()


@contextmanager
def in_mode(layers: dict[str, Layer], mode: Mode) -> Iterator[None]:
    """These layers in one mode, the rest of the model as it is; then each as before."""
    before: dict[str, Mode] = {name: layer.mode for name, layer in layers.items()}
    try:
        for layer in layers.values():
            layer.mode = mode
        yield
    finally:
        for name, layer in layers.items():
            layer.mode = before[name]
