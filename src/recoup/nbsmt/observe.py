"""What one NB-SMT layer sees: any of the three kinds of layer and its input as the 2-d convolution that runs; an
attention's product as a grouped one."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from recoup.errors import RecoupError
from recoup.nbsmt.attention_layers import ZEROS, AttentionScales, NBSMTAttention
from recoup.nbsmt.config import NBSMT
from recoup.nbsmt.layers import NBSMTConv1d, NBSMTConv2d, NBSMTRows
from recoup.nbsmt.ops import convolution
from recoup.nbsmt.ports import SIGNED, UNSIGNED
from recoup.nbsmt.product_ops import batched
from recoup.nbsmt.reference import quantize_activation
from recoup.nbsmt.weights import quantize_weight
from recoup.network.attention import PRODUCTS
from recoup.network.convolution import POINTWISE, Geometry, as_2d
from recoup.network.emulated import Mode, emulated_layers
from recoup.network.matrices import one_batch
from recoup.network.own import Watch, watching_forward

Layer = NBSMTConv1d | NBSMTConv2d | NBSMTRows
Unit = Layer | NBSMTAttention


@dataclass(frozen=True, slots=True)
class Seen:
    """A layer's input as that of a 2-d convolution.

    Attributes:
        layer: the layer.
        x: float input [N, C, H, W]; a padding mode other than zeros is applied already, so that its values count as
            the layer's input.
        geometry: what is left for the convolution to do.
    """

    corrected: ClassVar[bool] = True
    """Whether it has output channels of its own, which a bias corrects."""

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

    def ordered(self, config: NBSMT) -> Tensor | None:
        """The order of the input channels where it changes a number."""
        return self.layer.order if self.layer.order_decides(config) else None

    def product(self, config: NBSMT, order: Tensor | None) -> Tensor:
        """The layer's output without bias or correction, under a configuration: float32 [N, O, h, w]."""
        layer, geometry = self.layer, self.geometry.arguments
        order = order if layer.order_decides(config) else None
        return convolution(self.x, layer.matrix, order, self.scale, config.code, *geometry, layer.title, self.zero)


@dataclass(frozen=True, slots=True)
class SeenProduct:
    """One product of an attention as a grouped convolution of single pixels, a group for each of the batch.

    Attributes:
        layer: the attention.
        names: of the operands, ``q k`` or ``p v``.
        x_BMK, w_BKN: the operands.
    """

    corrected: ClassVar[bool] = False

    layer: NBSMTAttention
    names: str
    x_BMK: Tensor
    w_BKN: Tensor

    @property
    def x(self) -> Tensor:
        """The operand that plays the activations, [M, B * K, 1, 1]."""
        return self.x_BMK.transpose(0, 1).flatten(1)[..., None, None]

    @property
    def geometry(self) -> Geometry:
        """A group for each of the batch."""
        return replace(POINTWISE, groups=len(self.x_BMK))

    @property
    def scales(self) -> tuple[float, float]:
        """Of both operands; the attention has them, or it would not have run."""
        assert self.layer.operand_scales is not None
        return AttentionScales(*self.layer.operand_scales).of(self.names)

    @property
    def scale(self) -> float:
        """Of the activations' codes."""
        return self.scales[0]

    @property
    def zero(self) -> int:
        """The byte of value 0 among the activations' codes."""
        return ZEROS[self.names]

    def codes(self) -> Tensor:
        """Activation codes [M, B * K, 1, 1]."""
        return quantize_activation(self.x, self.scale, self.zero)

    def weight_codes(self) -> tuple[Tensor, Tensor]:
        """int8 codes [B * N, K, 1, 1] of the operand that plays the weights, and its scale for each of them."""
        code = quantize_activation(self.w_BKN, self.scales[1], SIGNED).transpose(1, 2).flatten(0, 1)
        return code[..., None, None], torch.full((len(code),), self.scales[1], dtype=torch.float32)

    def ordered(self, config: NBSMT) -> None:
        """No order: what meets in a slot is new in every call."""

    def product(self, config: NBSMT, order: None) -> Tensor:  # noqa: ARG002 -- as `Seen`
        """The product under a configuration: float32 [M, B * N, 1, 1]."""
        title = f"{self.layer.title}: {PRODUCTS[self.names]}"
        y_BMN = batched(self.x_BMK, self.w_BKN, self.scales, config, self.zero, title, self.names)
        return y_BMN.transpose(0, 1).flatten(1)[..., None, None]


def see_product(layer: NBSMTAttention, names: str, x: Tensor, w: Tensor) -> SeenProduct:
    """An attention and the operands of one of its products, [..., M, K] and [..., K, N]."""
    x_BMK, w_BKN, _ = one_batch(x.detach(), w.detach())
    return SeenProduct(layer, names, x_BMK, w_BKN)


def see(layer: Layer, x: Tensor) -> Seen:
    """A layer and the input of one call, as a 2-d convolution."""
    x = x.detach()
    if isinstance(layer, NBSMTRows):
        return Seen(layer, x.reshape(-1, x.shape[-1], 1, 1), POINTWISE)
    return Seen(layer, *layer.in_2d(x))


def nbsmt_layers(model: nn.Module, purpose: str) -> dict[str, Layer]:
    """The NB-SMT layers of a model by name; an error where there are none."""
    units = nbsmt_units(model, purpose)
    layers = {name: layer for name, layer in units.items() if isinstance(layer, Layer)}
    if not layers:
        raise RecoupError(
            f"{purpose}: the model has attention's products alone on NB-SMT ({', '.join(units)}), which have no "
            "weights: it is for layers"
        )
    return layers


def nbsmt_units(model: nn.Module, purpose: str) -> dict[str, Unit]:
    """The NB-SMT layers and attentions of a model by name; an error where there are none."""
    units = {name: layer for name, layer in emulated_layers(model, purpose).items() if isinstance(layer, Unit)}
    if not units:
        raise RecoupError(
            f"{purpose}: the model has no NB-SMT layer; run calibrate_ and emulate_(model, NBSMT(...)) first"
        )
    return units


def attentions(units: Mapping[str, Unit]) -> dict[str, NBSMTAttention]:
    """The attentions among them."""
    return {name: unit for name, unit in units.items() if isinstance(unit, NBSMTAttention)}


def hooked(
    layers: dict[str, Layer], hook: Callable[[str, Seen, Tensor], Tensor | None], purpose: str
) -> AbstractContextManager[None]:
    """Call ``hook(name, seen, output)`` after each forward of a layer, before hooks on the layer have the output; what
    it returns replaces that.

    The layer ran before, so its input is known to be legal.
    """

    def watch(name: str, layer: Layer) -> Watch:
        def watched(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor | None:  # noqa: ARG001
            return hook(name, see(layer, args[0] if args else kwargs["input"]), output)

        return watched

    return watching_forward(layers, {name: watch(name, layer) for name, layer in layers.items()}, purpose)


@contextmanager
def in_mode(layers: Mapping[str, Unit], mode: Mode) -> Iterator[None]:
    """These layers in one mode, the rest of the model as it is; then each as before."""
    before: dict[str, Mode] = {name: layer.mode for name, layer in layers.items()}
    try:
        for layer in layers.values():
            layer.mode = mode
        yield
    finally:
        for name, layer in layers.items():
            layer.mode = before[name]
