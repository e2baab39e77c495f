"""What multiplies in a network, whatever its class: modules that own weights, in parameters, buffers or packed, told
from norms and tables."""

import re
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import ParametrizationList

from recoup.network.emulated import Emulated

NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
TABLE_MODULES = (nn.Embedding, nn.EmbeddingBag)
NORM_NAME = re.compile(r"Norm(\d[dD])?$")
POSITIONS = "pos|positions?|positional|pos(enc|emb)|pes?|encodings?|rope|rotary"
"""What tables of positions are called, whether they are learned, in parameters, or computed, in buffers."""
DATA_NAME = re.compile(
    r"(^|_)(mask|bias|causal|tri[lu]|index|indices|idx|ids?|grid|anchors?|priors?|boxes|coords?|inv|freqs?|cos|sin"
    r"|cached?|past|queue|memory|running|states?|stats?|means?|stds?|vars?|noise|targets?|labels?)(_|$)"
)
"""Buffers that are no weights: masks, places, tables of angles, statistics, what a module remembers."""
PACKED = (torch.int8, torch.uint8, torch.int16, torch.int32)
TABLE_NAME = re.compile(rf"(^|_)({POSITIONS}|embed\w*|tokens?|table)(_|$)")
"""Parameters and buffers that are added or looked up."""


@dataclass(frozen=True, slots=True)
class Multiplier:
    """A module that owns weights and may multiply with them.

    Attributes:
        name: within the model.
        module: the module.
        weights: how many values its own weights have; what torch packs counts one.
        share: of all parameters of the model, and all other weights, 0..1.
    """

    name: str
    module: nn.Module
    weights: int
    share: float

    @property
    def kind(self) -> str:
        """Its class with the module path."""
        return f"{type(self.module).__module__}.{type(self.module).__qualname__}"

    def __str__(self) -> str:
        return f"{self.name or 'the model itself'} ({self.kind}, {100 * self.share:.3g} % of all weights)"


def multipliers(model: nn.Module) -> dict[str, Multiplier]:
    """The modules of a model that may multiply, by name.

    A module counts if it owns a parameter of two or more dimensions (the weight of a linear layer, a convolution, a
    recurrent layer, experts; not of its children), is no norm and no embedding, and the parameter is no table by its
    name, such as ``pe`` or ``relative_position_bias_table``, and no scale that is broadcast. Of buffers, as
    quantised layers pack their weights in, those of floats or of packed integers count whose name is not that of a
    mask, an index or the like; of a module without children and parameters also a plain tensor, and what torch packs.
    """
    sizes = {name: (module, own_weights(module), _held(module)) for name, module in model.named_modules()}
    total = sum(_size(parameter) for parameter in model.parameters()) + sum(held for *_, held in sizes.values())
    return {
        name: Multiplier(name, module, own + held, (own + held) / (total or 1))
        for name, (module, own, held) in sizes.items()
        if own + held
    }


def own_weights(module: nn.Module) -> int:
    """How many values a module's own weights have, with which it may multiply; 0 where it does not."""
    if _weightless(module):
        return 0
    weights = sum(
        _size(parameter)
        for name, parameter in module.named_parameters(recurse=False)
        if _is_weight(parameter) and not TABLE_NAME.search(name)
    )
    parametrized = getattr(module, "parametrizations", None)  # its weights lie in children that never run themselves
    if isinstance(parametrized, nn.ModuleDict):
        weights += sum(_size(parameter) for parameter in parametrized.parameters() if _is_weight(parameter))
    return weights


def _held(module: nn.Module) -> int:
    """How many values of its own that are no parameters a module may multiply with; what is packed counts one."""
    if isinstance(module, Emulated) or _weightless(module):
        return 0
    values = dict(module._buffers)
    if not module._modules and not module._parameters:
        values |= {name: value for name, value in vars(module).items() if isinstance(value, Tensor)}
    packed = sum(isinstance(value, torch.ScriptObject) for value in vars(module).values())
    return packed + sum(x.numel() for name, x in values.items() if x is not None and _multiplies(name, x))


def _multiplies(name: str, x: Tensor) -> bool:
    """Whether a tensor that is no parameter may be a weight."""
    kind = x.is_floating_point() or x.is_quantized or x.dtype in PACKED
    return (
        kind and sum(size > 1 for size in x.shape) >= 2 and not DATA_NAME.search(name) and not TABLE_NAME.search(name)
    )


def _weightless(module: nn.Module) -> bool:
    return _of_no_weights(type(module))


@lru_cache(1024)
def _of_no_weights(kind: type[nn.Module]) -> bool:
    return issubclass(kind, (*NORMS, *TABLE_MODULES, ParametrizationList)) or bool(NORM_NAME.search(kind.__name__))


def _is_weight(parameter: nn.Parameter) -> bool:
    if isinstance(parameter, UninitializedParameter):
        return True
    wide = sum(size > 1 for size in parameter.shape)
    return parameter.dim() >= 2 and (wide >= 2 or parameter.dim() == 2)


def _size(parameter: nn.Parameter) -> int:
    return 1 if isinstance(parameter, UninitializedParameter) else parameter.numel()
