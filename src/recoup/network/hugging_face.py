"""Attention modules of Hugging Face transformers on emulated hardware: what any wing needs.

Nothing of transformers is patched or imported before a model of its own is met.
"""

import copy
import inspect
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from recoup.errors import RecoupError
from recoup.network.attention import AttentionUnit

__all__ = ["UNDERSTOOD", "InterfaceAttention", "asks_interface", "in_words_of_the_interface", "overheard", "tells"]

UNIT, OVERHEARD = "recoup_unit", "recoup_overheard"
"""What an emulated attention module asks transformers' interface for, and one whose operands are listened to."""
UNDERSTOOD = ("sdpa", "eager")
"""Attention implementations of transformers whose masks `recoup.network.attention.attend` reads."""
CHANGING = ("softcap", "s_aux", "head_mask")
"""What an attention may be given that `attend` does not compute."""


def asks_interface(kind: type[nn.Module]) -> bool:
    """Whether a class computes its attention products with what transformers' interface holds under a name."""
    forward = inspect.getattr_static(kind, "forward", None)  # of a scripted module it is no function
    if "transformers" not in sys.modules or not inspect.isfunction(forward):
        return False
    code = getattr(inspect.unwrap(forward), "__code__", None)  # what is wrapped need be no function of Python
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


class InterfaceAttention(AttentionUnit):
    """An attention module of transformers whose products run on hardware; ``config`` is the wing's.

    The module's own config, which the model shares, stays as it is, masks included: what runs is a view of the module
    whose config asks the interface for `UNIT`. A wing's class has this one before its own attention.

    Attributes:
        float_config: the module's config of transformers, given back by `recoup.restore_`.
    """

    # Not taken away but put back.
    extras: ClassVar[tuple[str, ...]] = (*(name for name in AttentionUnit.extras if name != "config"), "float_config")
    float_config: Any

    def chosen(self, implementation: str, config: Any) -> Any:
        """The unit of an attention implementation that is set: the config that was asked for, or another; None: it is
        not understood."""
        return config if implementation in UNDERSTOOD else None

    def floating(self, implementation: str) -> str:
        """The implementation that stands in float for the one that is set."""
        return implementation

    def convert(self, config: Any, layer: str) -> None:
        own = self.config
        implementation = getattr(own, "_attn_implementation", None)
        unit = None if implementation is None else self.chosen(implementation, config)
        if unit is None:
            raise RecoupError(
                f"layer '{layer}' ({self.float_class.__name__}): its attention implementation is {implementation!r}; "
                f"{self.hardware} take the place of {' and '.join(UNDERSTOOD)}: model.set_attn_implementation("
                f'"sdpa") first, or leave the layer in float with layers={{"{layer}": None}}'
            )
        super().convert(unit, layer)
        self.float_config = own
        _register_unit()

    def release(self) -> None:
        self.config = self.float_config

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the float module, with its products on the unit."""
        own = self.float_config
        name = self.floating(own._attn_implementation) if self.floats else UNIT
        if name != own._attn_implementation:
            own = copy.copy(own)
            own._attn_implementation_internal = name
        view = self.float_class.__new__(self.float_class)
        vars(view).update(vars(self), config=own, unit_of=self)
        if name == UNIT:
            _register_unit()
        return self.float_class.forward(view, *args, **kwargs)


def _register_unit(name: str = UNIT) -> None:
    """Make `UNIT`, or `OVERHEARD`, known, also in a process that unpickled its model."""
    from transformers import AttentionInterface

    if name not in AttentionInterface._global_mapping:
        AttentionInterface.register(name, _unit if name == UNIT else _overheard)


def _unit(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any) -> Any:
    """The interface's function for a view of `InterfaceAttention`."""
    owner: Any = module.unit_of
    return in_words_of_the_interface(module, query, key, value, mask, owner.run_on_unit, owner.title, **options)


def tells(module: nn.Module) -> bool:
    """Whether an attention module of transformers, in float or emulated, can be listened to by `overheard`."""
    kind = module.float_class if isinstance(module, InterfaceAttention) else type(module)
    own = getattr(module, _config_of(module), None)
    return asks_interface(kind) and getattr(own, "_attn_implementation", None) in UNDERSTOOD


@contextmanager
def overheard(module: nn.Module, tell: Callable[..., Tensor], refuse: Callable[[list[str]], object]) -> Iterator[None]:
    """Call ``tell`` with what an attention module that runs in float multiplies, which computes what it computed.

    Args:
        module: one that `tells`; only its own view of the config changes, so that masks stay as they are.
        tell: is given q, k, v and the options of `AttentionUnit.run_on_unit`, and its result is not used.
        refuse: is given in its place what the attention has that is not emulated.
    """
    _register_unit(OVERHEARD)
    name = _config_of(module)
    own = getattr(module, name)
    view = copy.copy(own)
    view._attn_implementation_internal = OVERHEARD
    setattr(module, name, view)
    module.__dict__["overheard_by"] = (own._attn_implementation, tell, refuse)
    try:
        yield
    finally:
        setattr(module, name, own)
        del module.__dict__["overheard_by"]


def _config_of(module: nn.Module) -> str:
    return "float_config" if isinstance(module, InterfaceAttention) else "config"


def _overheard(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
) -> Any:
    """The interface's function for a module within `overheard`: tell, then the function that it asked for."""
    from transformers import AttentionInterface

    told_by: Any = module.overheard_by
    implementation, tell, refuse = told_by
    if unknown := _unknown(options):
        refuse(unknown)
    else:
        in_words_of_the_interface(module, query, key, value, mask, tell, type(module).__name__, **options)
    function = AttentionInterface._global_mapping.get(implementation)
    if function is None:  # eager, which every file of models has its own of
        function = inspect.unwrap(type(module).forward).__globals__["eager_attention_forward"]
    return function(module, query, key, value, mask, **options)


def in_words_of_the_interface(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    attention: Callable[..., Tensor],
    title: str,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """An attention, `AttentionUnit.run_on_unit`, in the words of transformers' interface; the output: [B, T, H, d]."""
    if unknown := _unknown(options):
        raise RecoupError(
            f"{title}: the attention has {', '.join(unknown)}, which is not emulated: leave it in float with a layer "
            "map's None"
        )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = bool(causal and mask is None and query.shape[2] > 1)
    if mask is not None:
        mask = mask[..., : key.shape[-2]]
    if position_bias is not None:
        mask = _added(mask, position_bias)
    y = attention(query, key, value, mask=mask, causal=causal, scale=scaling, dropout=dropout)
    return y.transpose(1, 2).contiguous(), None


def _unknown(options: dict[str, Any]) -> list[str]:
    return [name for name in CHANGING if options.get(name) is not None]


def _added(mask: Tensor | None, bias: Tensor) -> Tensor:
    """A bias of the scores under a mask, boolean or added to them as well."""
    if mask is None:
        return bias
    return bias.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else bias + mask
