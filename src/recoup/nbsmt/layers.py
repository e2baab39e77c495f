"""Drop-in layers on the shared multiplier: NBSMTConv1d, NBSMTConv2d and NBSMTLinear.

Each is its torch counterpart with the same constructor, parameters and state_dict keys, plus a config and, once
calibrated, an activation scale. `recoup.emulate_` turns the layers of a model into these, in place.
"""

from collections.abc import Hashable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from recoup.errors import RecoupError
from recoup.nbsmt.config import NBSMT
from recoup.nbsmt.ops import convolution
from recoup.nbsmt.ports import UNSIGNED
from recoup.nbsmt.prepare import forget
from recoup.network.checks import float32_weights, instance, strided
from recoup.network.convolution import POINTWISE, Geometry, Padded
from recoup.network.scales import Scaled, is_scale, is_zero


class NBSMTLayer(Scaled):
    """What the three layers share.

    Attributes:
        activation_scale, activation_zero: what `recoup.calibrate_` measured; see `recoup.network.scales.Scaled`.
        bias_correction: float32 [O] added to the output by `recoup.correct_bias_`, or None.
        order: int64 [C], the permutation of the input channels among the threads by `reorder_`, or None.
    """

    tells_baseline = True

    weight: Tensor
    bias: Tensor | None
    config: NBSMT
    bias_correction: Tensor | None
    order: Tensor | None

    extras: ClassVar[tuple[str, ...]] = (*Scaled.extras, "bias_correction", "order")
    travelling: ClassVar[tuple[str, ...]] = (*Scaled.travelling, "order", "bias_correction")
    fitted: ClassVar[tuple[str, ...]] = ("bias_correction",)

    def convert(self, config: NBSMT, layer: str) -> None:
        super().convert(config, layer)
        scale = getattr(self, "activation_scale", None)
        if scale is None:
            raise RecoupError(f"{self.title} has no activation scale: run calibrate_(model, batches) first")
        if not is_scale(scale):
            raise RecoupError(f"{self.title} has the activation scale {scale!r}; it must be a number above 0")
        if self.activation_zero is not None:
            if not is_zero(self.activation_zero):
                raise RecoupError(f"{self.title} has the activation zero {self.activation_zero!r}; it must be 0 or 128")
            self.activation_zero = int(self.activation_zero)  # 128.0 and tensors of one element are legal
        float32_weights(self.weight, self.title, "NB-SMT emulation")
        self._add_extras()

    def _begin(self, config: NBSMT | None) -> None:
        """What the constructors of the drop-ins share."""
        name = type(self).__name__
        config = NBSMT() if config is None else instance(config, NBSMT, name, "config", "NBSMT(threads=2)")
        super().convert(config, name)
        self.activation_scale = None
        self._add_extras()

    def _add_extras(self) -> None:
        self.register_buffer("bias_correction", None, persistent=False)
        self.register_buffer("order", None, persistent=False)

    @property
    def matrix(self) -> Tensor:
        """The weight, output channels first."""
        return self.weight

    @property
    def active_config(self) -> NBSMT:
        """The configuration this layer really runs: one thread where it is grouped; in ``baseline`` mode exact too."""
        if self.mode == "baseline":
            return self.config.eight_bit
        return self.config.single if getattr(self, "groups", 1) > 1 else self.config

    def order_decides(self, config: NBSMT) -> bool:
        """Whether an order changes a number: by which channels share a multiplier, or by when a register saturates."""
        saturates = config.accumulator is not None and config.accumulator.overflow == "saturate"
        return getattr(self, "groups", 1) == 1 and (config.threads > 1 or saturates)

    def acts_as(self) -> Hashable:
        if self.mode == "float":
            return super().acts_as()
        extras = [*Scaled.travelling, *(["bias_correction"] if self.mode == "emulate" else [])]
        extras += ["order"] if self.order_decides(self.active_config) else []
        return repr(self.active_config), self.extras_digest(extras)

    def caveat(self) -> str | None:
        grouped = getattr(self, "groups", 1) > 1 and self.config.threads > 1
        return "are grouped convolutions and run one thread" if grouped else None

    def note(self) -> str:
        return "one thread because grouped" if self.caveat() else ""

    def _product(self, x: Tensor, geometry: Geometry) -> Tensor:
        """The scaled sums of a 2-d convolution without bias: x [N, C, H, W] -> [N, O, h, w]."""
        if self.activation_scale is None:
            raise RecoupError(f"{self.title} has no activation scale: run calibrate_(model, batches) first")
        config = self.active_config
        order = self.order if self.order_decides(config) else None
        arguments = (*geometry.arguments, self.title, self.activation_zero or UNSIGNED)
        return convolution(x, self.matrix, order, self.activation_scale, config.code, *arguments)

    def _offset(self, y: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Add bias and bias correction, each [O], broadcast to ``shape``."""
        if self.bias is not None:
            y = y + self.bias.view(shape)
        if self.bias_correction is not None and self.mode == "emulate":
            y = y + self.bias_correction.view(shape)
        return y

    def extra_repr(self) -> str:
        text = super().extra_repr()
        config = self.__dict__.get("config")
        if config is None:
            return text
        told = [", signed activations"] if self.activation_zero else []
        told += [f", {note}"] if (note := self.note()) else []
        return f"{text}, {config!r}" + "".join(told)

    def rescaled(self) -> None:
        self.bias_correction = None  # it belonged to the old scale

    def fault(self, name: str, value: Any) -> str | None:
        channels = self.matrix.shape[1] * getattr(self, "groups", 1)
        if name == "order" and value.sort().values.tolist() != list(range(channels)):
            return f"is no permutation of {channels} channels"
        if name == "bias_correction" and value.shape != self.matrix.shape[:1]:
            return f"has shape {list(value.shape)}"
        if name == "bias_correction" and not bool(value.isfinite().all()):
            return "holds NaN or infinity"
        return super().fault(name, value)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Refuse to replace the weight under a bias correction, as folding a batch norm does: it would stay behind."""
        if name == "weight" and self.__dict__.get("_buffers", {}).get("bias_correction") is not None:
            raise RecoupError(
                f"{self.title}: its weight is being replaced (a batch norm folded?), but it has a bias correction that "
                "belongs to the old one: fold before calibrate_, or set bias_correction = None and correct_bias_ anew"
            )
        super().register_parameter(name, param)

    def release(self) -> None:
        forget(self.weight)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._forget_before_swap()
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._forget_before_swap()
        super()._load_from_state_dict(*args, **kwargs)

    def _forget_before_swap(self) -> None:
        """torch exchanges what two parameters hold only where nothing refers weakly to either."""
        if torch.__future__.get_swap_module_params_on_conversion():
            forget(self.weight)


class _Convolution(NBSMTLayer, Padded):
    weight: Tensor

    def __init__(self, *args: Any, config: NBSMT | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._begin(config)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        if self.mode == "float":
            return super().forward(input)  # type: ignore[misc]
        strided(input, self.title, "the input")
        y = self._product(*self.in_2d(input))
        return self.from_2d(self._offset(y, (1, -1, 1, 1)), input)


class NBSMTConv2d(_Convolution, nn.Conv2d):
    """torch.nn.Conv2d on the shared multiplier; ``config`` is an `NBSMT`. Grouped convolutions run one thread."""

    float_class = nn.Conv2d
    pure = True


class NBSMTConv1d(_Convolution, nn.Conv1d):
    """torch.nn.Conv1d on the shared multiplier; ``config`` is an `NBSMT`. Grouped convolutions run one thread."""

    float_class = nn.Conv1d
    pure = True


class NBSMTRows(NBSMTLayer):
    """A layer that multiplies rows [..., in] by a matrix [out, in]."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        if self.mode == "float":
            return super().forward(input)  # type: ignore[misc]
        strided(input, self.title, "the input")
        outputs, inputs = self.matrix.shape
        if input.dim() == 0 or input.shape[-1] != inputs:
            raise RecoupError(f"{self.title}: the input {list(input.shape)} must have {inputs} features")
        y_PO11 = self._product(input.reshape(-1, inputs, 1, 1), POINTWISE)
        return self._offset(y_PO11.view(*input.shape[:-1], outputs), (-1,))


class NBSMTLinear(NBSMTRows, nn.Linear):
    """torch.nn.Linear on the shared multiplier; ``config`` is an `NBSMT`."""

    float_class = nn.Linear
    pure = True

    def __init__(self, *args: Any, config: NBSMT | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._begin(config)


LAYERS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: NBSMTConv1d,
    nn.Conv2d: NBSMTConv2d,
    nn.Linear: NBSMTLinear,
}
"""The float layers NB-SMT stands in for."""
