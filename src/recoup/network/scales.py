"""Emulated layers whose inputs have a scale from calibration."""

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any, ClassVar

from torch import Tensor, nn

from recoup.fields import is_number
from recoup.network.emulated import Emulated

__all__ = ["MEASURED", "SIGNED", "UNSIGNED", "Scaled", "is_calibrated", "is_scale", "is_zero", "was_seen"]

MEASURED = ("activation_scale", "activation_zero", "operand_scales")
"""What `recoup.calibrate_` leaves on a module: a layer's scale and zero; of an attention the scales of q, k, the
probabilities p and v."""

UNSIGNED, SIGNED = 0, 128
"""Zeros of unsigned and of signed codes."""


class Scaled(Emulated):
    """An emulated layer that may work on an activation scale.

    Attributes:
        activation_scale: the step of the activation codes, a float32 value; `recoup.calibrate_` sets it.
        activation_zero: the byte of value 0: 0 or None, unsigned codes; 128, signed ones. `recoup.calibrate_` sets it.
    """

    activation_scale: float | None = None
    activation_zero: int | None = None

    travelling: ClassVar[tuple[str, ...]] = ("activation_scale", "activation_zero")
    measured: ClassVar[tuple[str, ...]] = ("activation_scale", "activation_zero")

    @property
    def without_sign(self) -> bool:
        """Whether the hardware takes unsigned codes alone, so that negative inputs cannot be calibrated."""
        return False

    def take_extras(self, values: Mapping[str, Any]) -> None:
        """A scale that comes without a zero is of unsigned codes: state dicts of before knew no others."""
        zero = values.get("activation_zero")
        if zero is None and values.get("activation_scale") is not None:
            zero = UNSIGNED
        super().take_extras(values if zero is None else {**values, "activation_zero": int(zero)})

    def fault(self, name: str, value: Any) -> str | None:
        """As `Emulated.fault`."""
        if name == "activation_scale":
            return None if is_scale(value) else f"is {value!r}; a scale is a number above 0"
        if name == "activation_zero":
            return None if is_zero(value) else f"is {value!r}; it is 0 (unsigned codes) or 128 (signed)"
        return super().fault(name, value)


def is_scale(value: Any) -> bool:
    """Whether a value, or a tensor of one, can be an activation scale: a finite number above 0."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    return isinstance(value, Real) and 0.0 < float(value) < math.inf


def is_zero(value: Any) -> bool:
    """Whether a value, or a tensor of one, can be the zero of activation codes."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    return is_number(value) and value in (UNSIGNED, SIGNED)


def is_calibrated(module: nn.Module) -> bool:
    """Whether a layer has its activation scale, or an attention those of its operands."""
    return any(getattr(module, name, None) is not None for name in ("activation_scale", "operand_scales"))


def was_seen(module: nn.Module) -> bool:
    """Whether `recoup.calibrate_` decided about a module, also if it left it in float."""
    return any(name in module.__dict__ for name in MEASURED)
