"""What multiplies in a network, whatever its class: modules that own weights, told from norms and tables."""

import re
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import ParametrizationList

NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
TABLE_MODULES = (nn.Embedding, nn.EmbeddingBag)
NORM_NAME = re.compile(r"Norm(\d[dD])?$")
TABLE_NAME = re.compile(r"(^|_)(pos|positions?|positional|embed\w*|tokens?|table)(_|$)")


@dataclass(frozen=True, slots=True)
class Multiplier:
    """A module that owns weights and may multiply with them.

    Attributes:
        name: within the model.
        module: the module.
        weights: how many values its own weights have.
        share: of all parameters of the model, 0..1.
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
    name, such as ``pos_embed`` or ``relative_position_bias_table``, and no scale that is broadcast.
    """
    total = sum(_size(parameter) for parameter in model.parameters()) or 1
    found = {}
    for name, module in model.named_modules():
        weights = own_weights(module)
        if weights:
            found[name] = Multiplier(name, module, weights, weights / total)
    return found


def own_weights(module: nn.Module) -> int:
    """How many values a module's own weights have, with which it may multiply; 0 where it does not."""
    if isinstance(module, (*NORMS, *TABLE_MODULES, ParametrizationList)) or NORM_NAME.search(type(module).__name__):
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


def _is_weight(parameter: nn.Parameter) -> bool:
    if isinstance(parameter, UninitializedParameter):
        return True
    wide = sum(size > 1 for size in parameter.shape)
    return parameter.dim() >= 2 and (wide >= 2 or parameter.dim() == 2)


def _size(parameter: nn.Parameter) -> int:
    return 1 if isinstance(parameter, UninitializedParameter) else parameter.numel()
