"""Hugging Face transformers on narrow accumulators: attention as a layer, Conv1D, and attention chosen by name."""

import functools
from typing import Any, ClassVar

from torch import Tensor, nn

from recoup.errors import RecoupError
from recoup.lba.attention_layers import LBAAttention, attention
from recoup.lba.config import LBA
from recoup.lba.layers import LBARows
from recoup.lba.ops import checked_config
from recoup.network.derived import derived, is_conv1d
from recoup.network.hugging_face import UNDERSTOOD, InterfaceAttention, asks_interface, in_words_of_the_interface

HUGGING_FACE = "recoup_lba"
"""What `register_transformers` calls its attention: ``model.set_attn_implementation("recoup_lba")``."""

_by_hand: dict[str, LBA] = {}


def adapted(kind: type[nn.Module]) -> type[nn.Module] | None:
    """The class for an attention module that asks transformers' interface, or for its Conv1D; None for any other."""
    if is_conv1d(kind):
        return derived(LBAConv1D, kind)
    return derived(LBAInterfaceAttention, kind) if asks_interface(kind) else None


class LBAConv1D(LBARows):
    """transformers' Conv1D, y = x W + b with W [in, out], on a narrow accumulator."""

    @property
    def matrix(self) -> Tensor:
        """The weight as [out, in]."""
        return self.weight.t()


class LBAInterfaceAttention(InterfaceAttention, LBAAttention):
    """An attention module of transformers whose products run on a narrow accumulator; ``config`` is an `LBA`."""

    extras: ClassVar[tuple[str, ...]] = (*(name for name in LBAAttention.extras if name != "config"), "float_config")

    def chosen(self, implementation: str, config: LBA) -> LBA | None:
        """What was chosen by hand keeps its unit."""
        return _by_hand.get(implementation, config if implementation in UNDERSTOOD else None)

    def floating(self, implementation: str) -> str:
        """What is chosen by hand runs as what it stands in for."""
        return "sdpa" if implementation in _by_hand else implementation


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
        unit = functools.partial(attention, config=config, layer=title)
        return in_words_of_the_interface(module, query, key, value, attention_mask, unit, title, **options)

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
