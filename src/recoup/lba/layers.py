"""Drop-in layers on a narrow accumulator: LBALinear, LBAConv1d and LBAConv2d.

Each is its torch counterpart with the same constructor, parameters and state_dict keys, plus a config and, once
repaired, a gain and a shift. `recoup.emulate_` turns the layers of a model into these, in place.

    y = gain * unit(Q_x(x), Q_w(weight) 2^shift) 2^-shift + bias

with the operands' quantisers outside the unit, where the config asks for any; bias and gain are float32. With
``activation_scale="calibrated"`` the largest magnitude that Q_x goes by is that of calibration,

    max|x| = activation_scale steps,   steps = 255 for unsigned codes, else 127

where activation_scale is the step of 8-bit codes that `recoup.calibrate_` measured. The shift
moves the unit's exponents instead of the weight (`recoup.lba.config.LBA.shifted`): the same bits, and no operand
overflows.
"""

import math
from collections.abc import Hashable, Mapping
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from recoup.errors import RecoupError
from recoup.gains import Gained
from recoup.lba.config import LBA
from recoup.lba.ops import EMULATION, batched, checked_config, convolution, draw_seed, shifted_code
from recoup.lba.quantizers import product_scale, quantize_operand
from recoup.network.checks import as_float32, float32_products, float32_weights, strided
from recoup.network.convolution import Padded, as_2d
from recoup.network.scales import Scaled, is_zero

RANGE_REMEDY = "; rc.lba.choose_exponents_(model, batches) moves each layer's range to where its sums are"


class LBALayer(Scaled, Gained):
    """What the three layers share.

    Attributes:
        gain: float32 [O], what the accumulator's output is multiplied by (`recoup.lba.correct_gain_`), or None.
        shift: by how many binades the weight is larger to the unit (`recoup.lba.choose_exponents_`), or None.
        activation_scale, activation_zero: what `recoup.calibrate_` measured, for ``activation_scale="calibrated"``.
    """

    tells_baseline = True

    config: LBA
    shift: int | None = None

    extras: ClassVar[tuple[str, ...]] = (*Gained.extras, "shift")
    range_remedy = RANGE_REMEDY

    @property
    def travelling(self) -> tuple[str, ...]:  # type: ignore[override]
        """Scales travel with the units that have them."""
        scaled = self.config.activation_scale == "calibrated"
        return (*Gained.travelling, "shift", *(Scaled.travelling if scaled else ()))

    @property
    def without_sign(self) -> bool:
        """As `Scaled`."""
        return self.config.unsigned

    def convert(self, config: LBA, layer: str) -> None:
        super().convert(config, layer)
        float32_weights(self.weight, self.title, EMULATION)
        self.begin_without_gain()

    def _begin(self, config: LBA | None) -> None:
        """What the constructors of the drop-ins share."""
        super().convert(checked_config(config, type(self).__name__), type(self).__name__)
        self.begin_without_gain()

    @property
    def emulates(self) -> bool:
        """Whether sums run on the narrow accumulator, and not in float32."""
        return self.mode == "emulate"

    def acts_as(self) -> Hashable:
        """As of every emulated layer; without the unit there is neither gain nor shift."""
        if self.mode != "baseline":
            return super().acts_as()
        return self.mode, repr(self.config), self.extras_digest(Scaled.travelling)

    @property
    def code(self) -> str:
        """The unit as the operators take it, shifted."""
        return shifted_code(self.config.code, self.shift) if self.shift else self.config.code

    @property
    def unit(self) -> LBA:
        """The config, shifted."""
        return LBA.from_code(self.code)

    def take_extras(self, values: Mapping[str, Any]) -> None:
        """As `Gained`; the shift is a plain number, which compilers take as a constant."""
        shift = values.get("shift")
        super().take_extras({**values, "shift": None if shift is None else int(shift)})

    def _operands(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Input and weight as the unit multiplies them, and what its output is to be multiplied by."""
        x = as_float32(x, self.title, EMULATION)
        form = self.config.pair[0]
        if form is None:
            return x, self.matrix, None
        x, x_scale = quantize_operand(x, form, largest=self.largest_input(), layer=self.title)
        w, w_scale = self.quantized_weight()
        return x, w, product_scale(x_scale, w_scale)

    def largest_input(self) -> float | None:
        """The largest magnitude of calibration, which the activations' scale goes by; None: each call's own."""
        if self.config.activation_scale == "call":
            return None
        if self.activation_scale is None:
            raise RecoupError(
                f"{self.title} has no activation scale, which LBA(activation_scale='calibrated') needs: run "
                "calibrate_(model, batches) once the model is emulated, or before it with "
                f"layers={{{self.layer!r}: True}}"
            )
        if self.config.unsigned and self.activation_zero:
            raise RecoupError(
                f"{self.title} was calibrated with negative inputs, and its operands {self.config.pair[0]!r} have no "
                "sign: calibrate_ it anew once it is emulated, or give it signed operands"
            )
        return float(self.activation_scale) * (127 if self.activation_zero else 255)

    def rescaled(self) -> None:
        if self.config.activation_scale == "calibrated":
            self.gain = self.shift = None  # they belonged to the old scale

    def quantized_weight(self) -> tuple[Tensor, Tensor | None]:
        """The weight as the unit multiplies it, and its scale, [O] or a number, where it has one."""
        form = self.config.pair[1]
        if form is None:
            return self.matrix, None
        each = self.config.weight_scale == "channel"
        dims = tuple(range(1, self.matrix.dim())) if each else None
        w, scale = quantize_operand(self.matrix, form, dims, layer=self.title)
        return w, scale.flatten() if each and scale is not None else scale

    def _finished(self, y: Tensor, scale: Tensor | None, shape: tuple[int, ...]) -> Tensor:
        """Scale, gain and bias, each [O] or a number, on an output whose channels ``shape`` says."""
        if self.sums is not None and self.emulates and not self.sums.in_float:
            self.sums.add(y, *self.unit.ends)
        if scale is not None:
            y = y * (scale.view(shape) if scale.dim() else scale)
        if self.gain is not None and self.emulates:
            y = y * self.gain.view(shape)
        return y if self.bias is None else y + self.bias.view(shape)

    def _in_float(self, y: Tensor) -> Tensor:
        """An output of the float layer; what its sums would do on the unit is counted, if operands stay as they are."""
        if self.sums is not None and self.sums.in_float and self.config.operands is None:
            plain = y if self.bias is None else y - self.bias.view(-1, *[1] * (self.weight.dim() - 2))
            self.sums.add(plain, *self.unit.ends)
        return y

    def extra_repr(self) -> str:
        config = self.__dict__.get("config")
        text = super().extra_repr()
        return text if config is None else f"{text}, {config!r}" + self._extras_repr()

    def _extras_repr(self) -> str:
        return (", gain" if self.gain is not None else "") + (f", shift {self.shift}" if self.shift else "")

    def fault(self, name: str, value: Any) -> str | None:
        if name == "shift":
            low, high = self.config.shift_range
            return None if low <= int(value) <= high else f"is {int(value)}, not from {low} to {high}"
        if name == "activation_zero" and self.config.unsigned and is_zero(value) and value:
            return f"is {int(value)}, of signed codes, and operands {self.config.pair[0]!r} have no sign"
        return super().fault(name, value)


class LBARows(LBALayer):
    """Layers that multiply rows [..., I] by a matrix [O, I]."""

    of_rows = True

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        if self.mode == "float":
            return self._in_float(super().forward(input))  # type: ignore[misc]
        strided(input, self.title, "the input")
        outputs, inputs = self.matrix.shape
        if input.dim() == 0 or input.shape[-1] != inputs:
            raise RecoupError(f"{self.title}: the input {list(input.shape)} must have {inputs} features")
        x, w, scale = self._operands(input)
        if not self.emulates:
            with float32_products(x):
                return self._finished(F.linear(x, w), scale, (-1,))
        rows = x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), inputs)  # matrices go the shorter way
        y = batched(rows, w.t(), self.code, draw_seed(self.config), self.title, "input weight")
        return self._finished(y.reshape(*input.shape[:-1], outputs), scale, (-1,))


class LBALinear(LBARows, nn.Linear):
    """torch.nn.Linear on a narrow accumulator; ``config`` is an `LBA`."""

    float_class = nn.Linear

    def __init__(self, *args: Any, config: LBA | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._begin(config)


class _Convolution(LBALayer, Padded):
    dims: ClassVar[int]
    weight: Tensor

    def __init__(self, *args: Any, config: LBA | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._begin(config)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        if self.mode == "float":
            return self._in_float(super().forward(input))  # type: ignore[misc]
        strided(input, self.title, "the input")
        if input.dim() not in (self.dims + 1, self.dims + 2):
            raise RecoupError(f"{self.title}: the input {list(input.shape)} must have {self.dims + 2} dimensions")
        unbatched = input.dim() == self.dims + 1
        x, w, scale = self._operands(input.unsqueeze(0) if unbatched else input)
        if self.emulates:
            y = self._emulated(x, w)
        else:
            x, padding = self.padded(x)
            run = F.conv2d if self.dims == 2 else F.conv1d
            with float32_products(x):
                y = run(x, w, None, self.numbers("stride"), padding, self.numbers("dilation"), self.groups)  # type: ignore[arg-type]
        y = self._finished(y, scale, (1, -1, *[1] * self.dims))
        return y.squeeze(0) if unbatched else y

    def _emulated(self, x: Tensor, w: Tensor) -> Tensor:
        x_NCHW, geometry = self.in_2d(x)
        y = convolution(x_NCHW, as_2d(w), self.code, *geometry.arguments, draw_seed(self.config), self.title)
        return self.from_2d(y, x)


class LBAConv1d(_Convolution, nn.Conv1d):
    """torch.nn.Conv1d on a narrow accumulator; ``config`` is an `LBA`. The sum runs in the order (c, k)."""

    float_class = nn.Conv1d
    dims = 1


class LBAConv2d(_Convolution, nn.Conv2d):
    """torch.nn.Conv2d on a narrow accumulator; ``config`` is an `LBA`. The sum runs in the order (c, kh, kw)."""

    float_class = nn.Conv2d
    dims = 2


LAYERS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: LBAConv1d,
    nn.Conv2d: LBAConv2d,
    nn.Linear: LBALinear,
}
"""The float layers LBA stands in for."""
