"""Hugging Face transformers on narrow accumulators: attention as a layer, Conv1D, and attention chosen by name.

Nothing of transformers is patched or imported before a model of its own is met.
"""

import copy
import inspect
import math
import sys
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from recoup.errors import RecoupError
from recoup.lba.attention_layers import LBAAttention, attention
from recoup.lba.config import LBA
from recoup.lba.layers import LBARows
from recoup.lba.ops import checked_config
from recoup.network.derived import derived, is_conv1d

HUGGING_FACE = "recoup_lba"
"""What `register_transformers` calls its attention: ``model.set_attn_implementation("recoup_lba")``."""
UNIT = "recoup_lba_layer"
"""What an emulated attention module asks transformers' interface for."""
UNDERSTOOD = ("sdpa", "eager")
"""Attention implementations of transformers whose masks `attention` reads."""
CHANGING = ("softcap", "s_aux", "head_mask")
"""What an attention may be given that `attention` does not compute."""

_by_hand: dict[str, LBA] = {}


def adapted(kind: type[nn.Module]) -> type[nn.Module] | None:
    """The class for an attention module that asks transformers' interface, or for its Conv1D; None for any other."""
    if is_conv1d(kind):
        return derived(LBAConv1D, kind)
    return derived(LBAInterfaceAttention, kind) if asks_interface(kind) else None


def asks_interface(kind: type[nn.Module]) -> bool:
    """Whether a class computes its attention products with what transformers' interface holds under a name."""
    forward = inspect.getattr_static(kind, "forward", None)  # of a scripted module it is no function
    if "transformers" not in sys.modules or not inspect.isfunction(forward):
        return False
    return "ALL_ATTENTION_FUNCTIONS" in inspect.unwrap(forward).__code__.co_names


class LBAConv1D(LBARows):
    """transformers' Conv1D, y = x W + b with W [in, out], on a narrow accumulator."""

    @property
    def matrix(self) -> Tensor:
        """The weight as [out, in]."""
        return self.weight.t()


class LBAInterfaceAttention(LBAAttention):
    """An attention module of transformers whose products run on a narrow accumulator; ``config`` is an `LBA`.

    The module's own config, which the model shares, stays as it is, masks included: what runs is a view of the module
    whose config asks the interface for `UNIT`.

    Attributes:
        float_config: the module's config of transformers, given back by `recoup.restore_`.
    """

    # Not taken away but put back.
    extras: ClassVar[tuple[str, ...]] = (*(name for name in LBAAttention.extras if name != "config"), "float_config")
    float_config: Any

    def convert(self, config: LBA, layer: str) -> None:
        own = self.config
        implementation = getattr(own, "_attn_implementation", None)
        if implementation not in (*UNDERSTOOD, *_by_hand):
            raise RecoupError(
                f"layer '{layer}' ({self.float_class.__name__}): its attention implementation is {implementation!r}; "
                f"narrow accumulators take the place of {' and '.join(UNDERSTOOD)}: model.set_attn_implementation("
                f'"sdpa") first, or leave the layer in float with layers={{"{layer}": None}}'
            )
        super().convert(_by_hand.get(implementation, config), layer)
        self.float_config = own
        _register_unit()

    def release(self) -> None:
        self.config = self.float_config

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the float module, with its products on the unit."""
        own = self.float_config
        narrow = self.narrow_config()
        name = UNIT if narrow is not None else own._attn_implementation
        if name in _by_hand:
            name = "sdpa"  # in float, what is chosen by hand runs as what it stands in for
        if name != own._attn_implementation:
            own = copy.copy(own)
            own._attn_implementation_internal = name
        view = self.float_class.__new__(self.float_class)
        vars(view).update(vars(self), config=own, narrow_config=narrow, unit_of=self)
        if narrow is not None:
            _register_unit()
        return self.float_class.forward(view, *args, **kwargs)


def _register_unit() -> None:
    """Make `UNIT` known, also in a process that unpickled its model."""
    from transformers import AttentionInterface

    if UNIT not in AttentionInterface._global_mapping:
        AttentionInterface.register(UNIT, _unit)


def _unit(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any) -> Any:
    """The interface's function for a view of `LBAInterfaceAttention`."""
    config, title, owner = module.narrow_config, module.title, module.unit_of
    return _products(module, query, key, value, mask, config, title, owner=owner, **options)  # type: ignore[arg-type]


def _products(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    config: LBA,
    title: str,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    owner: LBAAttention | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """`attention` in the words of transformers' interface: the output is [B, T, H, d]."""
    unknown = [name for name in CHANGING if options.get(name) is not None]
    if unknown:
        raise RecoupError(
            f"{title}: the attention has {', '.join(unknown)}, which narrow accumulators do not emulate: leave it in "
            "float with a layer map's None"
        )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = bool(causal and mask is None and query.shape[2] > 1)
    if mask is not None:
        mask = mask[..., : key.shape[-2]]
    if position_bias is not None:
        mask = _added(mask, position_bias)
    y = attention(
        query,
        key,
        value,
        config,
        mask=mask,
        causal=causal,
        scale=scaling,
        dropout=dropout,
        layer=title,
        module=owner,
    )
    return y.transpose(1, 2).contiguous(), None


def _added(mask: Tensor | None, bias: Tensor) -> Tensor:
    """A bias of the scores under a mask, boolean or added to them as well."""
    if mask is None:
        return bias
    return bias.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else bias + mask


def register_transformers(config: LBA, name: str = HUGGING_FACE) -> str:
    """Make ``name`` an attention implementation of Hugging Face transformers that runs on ``config``.

    `recoup.emulate_` puts the attention of such models on the unit itself, each module with its own config; this is the
    way to choose it by hand, for models that are not emulated otherwise: afterwards
    ``AutoModel.from_pretrained(..., attn_implementation=name)`` or ``model.set_attn_implementation(name)``. Several
    names may stand for several units. `recoup.emulate_` keeps what was chosen by hand, and `recoup.restore_` gives the
    model transformers' own choice of implementation back.

    The unit is fixed with the name: `set_underflow_` does not reach it in a model that is not emulated, so a first
    stage of training takes a name of its own, for ``config.replace(underflow=False)``.

    Returns:
        The name.

    Raises:
        RecoupError: transformers is not installed, or older than its attention interface (4.53); no LBA config.
    """
    config = checked_config(config, "lba.register_transformers")
    if not isinstance(name, str) or not name:
        raise RecoupError(f"lba.register_transformers(name={name!r}): name must be a word")
    try:
        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
    except ImportError as error:
        raise RecoupError(
            "lba.register_transformers: needs transformers 4.53 or newer (pip install transformers)"
        ) from error

    def forward(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, None]:
        title = f"{type(module).__name__} {getattr(module, 'layer_idx', '')}".strip()
        return _products(module, query, key, value, attention_mask, config, title, **options)

    AttentionInterface.register(name, forward)
    AttentionMaskInterface.register(name, sdpa_mask)
    _by_hand[name] = config
    return name


def take_back(model: nn.Module) -> None:
    """Give models whose attention was chosen by `register_transformers` their own implementation back."""
    if not _by_hand:
        return
    from transformers import PreTrainedModel

    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module.config._attn_implementation in _by_hand:
            module.set_attn_implementation(module.get_correct_attn_implementation(None))
