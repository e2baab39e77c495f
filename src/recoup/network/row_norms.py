"""Norms over the features of a sample: torch's layer norm and RMS norm, and classes that compute an RMS norm by name of
their own, as most language models of transformers do.

Such a class is told by its code, not by its name: its forward compiles to what one of the functions below does.
"""

import inspect
import math
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from recoup.network.emulated import Emulated

__all__ = ["features_of", "is_row_norm", "like_rms_norm", "looks_like_row_norm"]

NAME = re.compile(r"(Layer|RMS)_?Norm(\d[dD])?$")


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


RMS_NORMS: tuple[Callable[..., Any], ...] = (
    _scaled_in_the_inputs_dtype,
    _scaled_in_float32,
    _scaled_in_the_weights_dtype,
)


def like_rms_norm(kind: type[nn.Module]) -> bool:
    """Whether a class that is none of torch's computes x / sqrt(mean x^2 + variance_epsilon) weight on the last axis.

    In float32; how they round to half precision differs.
    """
    forward = inspect.getattr_static(kind, "forward", None)  # of a scripted module it is no function
    if not inspect.isfunction(forward):
        return False
    return any(_compiled(inspect.unwrap(forward)) == _compiled(known) for known in RMS_NORMS)


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


def looks_like_row_norm(module: nn.Module) -> bool:
    """Whether a module is one by its class's name, with weights of its own: Gemma's, with 1 + weight, is another."""
    named = NAME.search(type(module).__name__) is not None
    return named and next(module.children(), None) is None and not isinstance(module, Emulated)
