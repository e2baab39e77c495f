"""Drop-in layers on a tensor core: TensorCoreLinear, TensorCoreConv1d and TensorCoreConv2d.

Each is its torch counterpart with the same constructor, parameters and state_dict keys, plus a config.
`recoup.emulate_` turns the layers of a model into these, in place.

    y = gain * s_x s_w unit(Q(x / s_x), Q(w / s_w)) + bias

8-bit operands are scaled, activations per tensor and weights per output channel; float16, bfloat16 and TF32 are not.
Scales, gain and bias are float32, outside the unit. An activation's scale is that of the call, or calibrated:

    s_x = max|x| / amax    or    s_x = fl32(activation_scale steps / amax),  steps = 255 for unsigned codes, else 127

where activation_scale steps is what `recoup.calibrate_` measured: the mean over its images of the largest magnitude.

On a unit with block scales Q is `recoup.tensorcore.quantize_blocks`: every row of activations and of weights in blocks
along its reduction, of a convolution along the columns of im2col in the unit's order, and the blocks' scales are part
of the unit. s_x and s_w are then 1 (MX), or of the whole tensor, weights' too (NVFP4).
"""

from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recoup.errors import RecoupError
from recoup.gains import Gained
from recoup.network.checks import as_float32, float32_products, float32_weights, one_device, strided
from recoup.network.convolution import Geometry, Padded, as_2d
from recoup.network.scales import Scaled
from recoup.tensorcore import block_ops
from recoup.tensorcore.blocks import Blocks, in_blocks
from recoup.tensorcore.config import TensorCore
from recoup.tensorcore.ops import EMULATION, checked_config, product
from recoup.tensorcore.quantizers import quantize_operand, scaled_operand

FLOAT16_ENDS = 65504.0
COLUMNS_BYTES = 1 << 27  # of im2col, where no gradient asks for the whole


class TensorCoreLayer(Scaled, Gained):
    """What the layers share.

    Attributes:
        gain: float32 [O], what the unit's output is multiplied by (`recoup.tensorcore.correct_gain_`), or None.
        activation_scale, activation_zero: what `recoup.calibrate_` measured, for ``scale="calibrated"``.
    """

    extras: ClassVar[tuple[str, ...]] = Gained.extras

    tells_baseline = True
    range_remedy = "; TensorCore(amax=16) keeps sums of scaled operands within float16"

    config: TensorCore

    @property
    def travelling(self) -> tuple[str, ...]:  # type: ignore[override]
        """Scales travel with the units that have them."""
        scaled = self.config.scale == "calibrated"
        return (*Gained.travelling, *Scaled.travelling) if scaled else Gained.travelling

    def convert(self, config: TensorCore, layer: str) -> None:
        super().convert(checked_config(config, f"layer {layer!r}"), layer)
        float32_weights(self.weight, self.title, EMULATION)
        self.begin_without_gain()

    def _begin(self, config: TensorCore | None) -> None:
        """What the constructors of the drop-ins share."""
        super().convert(checked_config(config, type(self).__name__), type(self).__name__)
        self.begin_without_gain()

    def _operands(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Input and weight as the unit multiplies them, before block scales where it has them, and what its output is
        to be multiplied by, [O] or [1]."""
        x = as_float32(x, self.title, EMULATION)
        one_device(self.title, x, self.weight)
        first, second = self.config.pair
        if self.config.block is not None:
            x, x_scale = scaled_operand(x, self.config.amax_of(first), self._calibrated())
            w, w_scale = scaled_operand(self.matrix, self.config.amax_of(second))
            return x, w, x_scale.flatten() * w_scale.flatten()
        every = tuple(range(1, self.weight.dim()))
        x, x_scale = quantize_operand(x, first, self.config.amax_of(first), None, scale=self._calibrated())
        w, w_scale = quantize_operand(self.matrix, second, self.config.amax_of(second), every)
        return x, w, x_scale.flatten() * w_scale.flatten()

    def _calibrated(self) -> float | None:
        """The activations' calibrated scale; None: the call's own."""
        if self.config.scale == "call":
            return None
        if self.activation_scale is None:
            raise RecoupError(
                f"{self.title} has no activation scale, which TensorCore(scale='calibrated') needs: run "
                "calibrate_(model, batches) once the model is emulated, or before it with "
                f"layers={{{self.layer!r}: True}}"
            )
        amax = self.config.amax_of(self.config.pair[0])
        assert amax is not None  # the config sees to it
        steps = 127 if self.activation_zero else 255
        return max(float(np.float32(float(self.activation_scale) * steps / amax)), float(np.finfo(np.float32).tiny))

    def rescaled(self) -> None:
        if self.config.scale == "calibrated":
            self.gain = None  # it belonged to the old scale

    @property
    def emulates(self) -> bool:
        """Whether products run on the unit, and not in float32."""
        return self.mode == "emulate"

    def _in_blocks(self, left: Blocks, right: Blocks, unit: TensorCore, names: str) -> Tensor:
        """A product of operands with block scales, in the present mode."""
        if self.emulates:
            return block_ops.multiplied(left, right, unit, self.title, names)
        with float32_products(left[0]):
            return block_ops.exact(left, right, unit)

    def _finished(self, y: Tensor, scale: Tensor, shape: tuple[int, ...]) -> Tensor:
        if self.sums is not None and self.emulates and not self.sums.in_float and self.config.overflows:
            self.sums.add(y, -FLOAT16_ENDS, FLOAT16_ENDS)
        y = y * scale.view(shape)
        if self.gain is not None and self.emulates:
            y = y * self.gain.view(shape)
        return y if self.bias is None else y + self.bias.view(shape)

    def extra_repr(self) -> str:
        config = self.__dict__.get("config")
        text = super().extra_repr()
        return text if config is None else f"{text}, {config!r}" + (", gain" if self.gain is not None else "")


class TensorCoreRows(TensorCoreLayer):
    """Layers that multiply rows [..., I] by a matrix [O, I]."""

    of_rows = True

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        if self.mode == "float":
            return super().forward(input)  # type: ignore[misc]
        strided(input, self.title, "the input")
        outputs, inputs = self.matrix.shape
        if input.shape[-1:] != (inputs,):
            raise RecoupError(f"{self.title}: the input {list(input.shape)} must have {inputs} features")
        x, w, scale = self._operands(input)
        if self.config.block is not None:
            left = in_blocks(x.reshape(-1, inputs), self.config, "a", self.title)
            right = in_blocks(w.t(), self.config, "b", self.title)
            y = self._in_blocks(left, right, self.config, "input weight")
            return self._finished(y.view(*input.shape[:-1], outputs), scale, (-1,))
        if not self.emulates:
            with float32_products(x):
                return self._finished(F.linear(x, w), scale, (-1,))
        y = product(x.reshape(1, -1, inputs), w.t()[None], self.config.code, self.title, "input weight")
        return self._finished(y.view(*input.shape[:-1], outputs), scale, (-1,))


class TensorCoreLinear(TensorCoreRows, nn.Linear):
    """torch.nn.Linear on a tensor core; ``config`` is a `TensorCore`."""

    float_class = nn.Linear

    def __init__(self, *args: Any, config: TensorCore | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._begin(config)


class _Convolution(TensorCoreLayer, Padded):
    dims: ClassVar[int]
    weight: Tensor

    def __init__(self, *args: Any, config: TensorCore | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._begin(config)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        if self.mode == "float":
            return super().forward(input)  # type: ignore[misc]
        strided(input, self.title, "the input")
        if input.dim() not in (self.dims + 1, self.dims + 2):
            raise RecoupError(f"{self.title}: the input {list(input.shape)} must have {self.dims + 2} dimensions")
        x, w, scale = self._operands(input)
        x_NCHW, geometry = self.in_2d(x)
        w_OCHW = as_2d(w)
        if x_NCHW.shape[1] != w_OCHW.shape[1] * geometry.groups:
            raise RecoupError(
                f"{self.title}: the input {list(input.shape)} must have {w_OCHW.shape[1] * geometry.groups} channels"
            )
        geometry.check(x_NCHW, self.title)
        if self.emulates or self.config.block is not None:
            y = self._by_columns(x_NCHW, w_OCHW, geometry)
        else:
            with float32_products(x):
                y = F.conv2d(x_NCHW, w_OCHW, None, *geometry.arguments)
        return self.from_2d(self._finished(y, scale, (1, -1, 1, 1)), input)

    def _by_columns(self, x: Tensor, w: Tensor, geometry: Geometry) -> Tensor:
        """In blocks of images where nothing is differentiated, so that im2col stays small."""
        if x.shape[0] == 0:
            return F.conv2d(x, w, None, *geometry.arguments)  # of no images: nothing to add
        rows = w.reshape(geometry.groups, w.shape[0] // geometry.groups, -1)
        rows = self._kkc(rows.mT, w, 1).mT if self.config.order == "kkc" else rows
        left = rows if self.config.block is None else in_blocks(rows, self._weights_first, "a", self.title)
        if torch.is_grad_enabled() and (x.requires_grad or w.requires_grad):
            return self._columns(x, w, left, geometry)
        h_w = geometry.size(x)
        bytes_an_image = 4 * geometry.groups * w[0].numel() * h_w[0] * h_w[1]
        images = max(1, COLUMNS_BYTES // max(1, bytes_an_image))
        parts = [self._columns(part, w, left, geometry) for part in x.split(images)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @property
    def _weights_first(self) -> TensorCore:
        """The unit with its pair, of activations and weights, as a convolution's product has them."""
        first, second = self.config.pair
        return self.config if first == second else self.config.replace(operands=(second, first), scale="call")

    def _columns(self, x: Tensor, w: Tensor, left: Tensor | Blocks, geometry: Geometry) -> Tensor:
        """The product of the weights' rows [G, O / G, K], ``left``, with the columns of some images."""
        N, (h, width), unit = x.shape[0], geometry.size(x), self._weights_first
        columns = geometry.columns(x)
        columns = self._kkc(columns, w, 1) if self.config.order == "kkc" else columns
        if isinstance(left, Tensor):
            y = product(left, columns, unit.code, self.title, "weight input")
        else:
            y = self._in_blocks(left, in_blocks(columns, unit, "b", self.title), unit, "weight input")
        return y.reshape(w.shape[0], N, h, width).transpose(0, 1).contiguous()

    @staticmethod
    def _kkc(x: Tensor, w: Tensor, dim: int) -> Tensor:
        """K in the order (row, column, channel)."""
        return x.unflatten(dim, (w.shape[1], -1)).transpose(dim, dim + 1).flatten(dim, dim + 1)


class TensorCoreConv1d(_Convolution, nn.Conv1d):
    """torch.nn.Conv1d on a tensor core; ``config`` is a `TensorCore`."""

    float_class = nn.Conv1d
    dims = 1


class TensorCoreConv2d(_Convolution, nn.Conv2d):
    """torch.nn.Conv2d on a tensor core; ``config`` is a `TensorCore`."""

    float_class = nn.Conv2d
    dims = 2


LAYERS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: TensorCoreConv1d,
    nn.Conv2d: TensorCoreConv2d,
    nn.Linear: TensorCoreLinear,
}
"""The float layers that a tensor core stands in for."""
