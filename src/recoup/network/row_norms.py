"""Norms over the features of a sample: torch's layer norm and RMS norm, and classes that compute an RMS norm by name of
their own, as most language models of transformers do.

Such a class is told by its code, not by its name: its forward compiles to what one of the functions below does. A
decorated forward is none of them, since what wraps it may do something else.
"""

import inspect
import math
import re
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from recoup.network.emulated import Emulated

__all__ = ["OutputDtype", "features_of", "is_row_norm", "like_rms_norm", "looks_like_norm", "output_dtype_of"]

NAMED = re.compile(r"([Ll]ayer|[Rr][Mm][Ss]|[Bb]atch)_?[Nn]orm(?:ali[sz]ation)?(?![a-z])")
"""What the class of a norm is called; convolutions and whole networks are too, but have modules of their own."""
STEERED = re.compile(r"(?<![A-Z])Ada(?![a-z])|Adapt|Gated|Zero|Single|Continuous|Modulat|Condition")
"""And that of a norm which does more than the modules it has: it scales what they give by a second input."""

OutputDtype = Callable[[torch.dtype, torch.dtype], torch.dtype]
"""The dtype of a norm's output, of those of its weight and its input."""


def _scaled_in_the_inputs_dtype(self: Any, hidden_states: Tensor):  # Llama, Mistral, Qwen
    input_dtype = hidden_states.dtype
    hidden_states = hidden_states.to(torch.float32)
    variance = hidden_states.pow(2).mean(-1, keepdim=True)
    hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
    return self.weight * hidden_states.to(input_dtype)


def _scaled_in_float32(self: Any, hidden_states: Tensor):  # OLMo 2
    input_dtype = hidden_states.dtype
    hidden_states = hidden_states.to(torch.float32)
    variance = hidden_states.pow(2).mean(-1, keepdim=True)
    hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
    return (self.weight * hidden_states).to(input_dtype)


def _scaled_in_the_weights_dtype(self: Any, hidden_states: Tensor):  # T5
    variance = hidden_states.to(torch.float32).pow(2).mean(-1, keepdim=True)
    hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)

    if self.weight.dtype in [torch.float16, torch.bfloat16]:
        hidden_states = hidden_states.to(self.weight.dtype)

    return self.weight * hidden_states


def _promoted(weight: torch.dtype, given: torch.dtype) -> torch.dtype:
    return torch.promote_types(weight, given)


def _given(weight: torch.dtype, given: torch.dtype) -> torch.dtype:  # noqa: ARG001 -- the signature of OutputDtype
    return given


def _half_as_the_weight(weight: torch.dtype, given: torch.dtype) -> torch.dtype:
    if weight in (torch.float16, torch.bfloat16):
        return weight
    return torch.promote_types(weight, torch.promote_types(given, torch.float32))


RMS_NORMS: dict[Callable[..., Any], OutputDtype] = {
    _scaled_in_the_inputs_dtype: _promoted,
    _scaled_in_float32: _given,
    _scaled_in_the_weights_dtype: _half_as_the_weight,
}

_known: WeakKeyDictionary[type, tuple[Any, OutputDtype | None]] = WeakKeyDictionary()
"""Class -> its forward, and what that was found to be."""


def like_rms_norm(kind: type[nn.Module]) -> bool:
    """Whether a class that is none of torch's computes x / sqrt(mean x^2 + variance_epsilon) weight on the last axis.

    In float32; how they round to half precision differs.
    """
    return output_dtype_of(kind) is not None


def output_dtype_of(kind: type[nn.Module]) -> OutputDtype | None:
    """What the output's dtype is of a class that computes an RMS norm by its code; None for any other class."""
    forward = next((vars(base)["forward"] for base in kind.__mro__ if "forward" in vars(base)), None)
    known = _known.get(kind)
    if known is None or known[0] is not forward:  # a forward may be replaced
        known = _known[kind] = forward, _told(forward)
    return known[1]


def _told(forward: Any) -> OutputDtype | None:
    if not inspect.isfunction(forward):  # of a scripted module, for one
        return None
    found = _compiled(forward)
    return next((dtype for known, dtype in RMS_NORMS.items() if _compiled(known) == found), None)


def _compiled(function: Callable[..., Any]) -> tuple[Any, ...]:
    """What a function does, without its name, docstring and annotations."""
    code = function.__code__
    constants = [None if value == function.__doc__ else value for value in code.co_consts]
    return code.co_code, code.co_names, constants, code.co_argcount, code.co_freevars


def is_row_norm(module: nn.Module) -> bool:
    """Whether a module normalizes samples over their features, in float or on hardware."""
    kind = module.float_class if isinstance(module, Emulated) else type(module)
    return issubclass(kind, nn.LayerNorm | nn.RMSNorm) or like_rms_norm(kind)


def features_of(module: Any) -> int:
    """How many features such a norm normalizes together."""
    return math.prod(getattr(module, "normalized_shape", None) or module.weight.shape)


def looks_like_norm(module: nn.Module) -> bool:
    """Whether a module is a norm over features or channels by its class's name, and none of torch's: Gemma's with 1 +
    weight, gated and adaptive ones, frozen batch norms.

    One that has modules of its own is called so only where its name says that it also scales what they give.
    """
    name = type(module).__name__
    if isinstance(module, Emulated) or NAMED.search(name) is None:
        return False
    return next(module.children(), None) is None or STEERED.search(name) is not None
