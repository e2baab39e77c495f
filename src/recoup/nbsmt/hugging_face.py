"""Hugging Face transformers on NB-SMT: attention as a layer, and Conv1D, GPT-2's linear layer whose weight lies the
other way round. Nothing of transformers is imported.
"""

from typing import ClassVar

from torch import Tensor, nn

from recoup.nbsmt.attention_layers import NBSMTAttention
from recoup.nbsmt.layers import NBSMTRows
from recoup.network.derived import derived, is_conv1d
from recoup.network.hugging_face import InterfaceAttention, asks_interface

__all__ = ["NBSMTConv1D", "NBSMTInterfaceAttention", "adapted"]


class NBSMTConv1D(NBSMTRows):
    """transformers' Conv1D, y = x W + b with W [in, out], on the shared multiplier."""

    pure = True

    @property
    def matrix(self) -> Tensor:
        """The weight as [out, in]."""
        return self.weight.t()


class NBSMTInterfaceAttention(InterfaceAttention, NBSMTAttention):
    """An attention module of transformers whose products run on the shared multiplier; ``config`` is an `NBSMT`."""

    extras: ClassVar[tuple[str, ...]] = InterfaceAttention.extras


def adapted(kind: type[nn.Module]) -> type[nn.Module] | None:
    """The class for an attention module that asks transformers' interface, or for its Conv1D; None for any other."""
    if is_conv1d(kind):
        return derived(NBSMTConv1D, kind)
    return derived(NBSMTInterfaceAttention, kind) if asks_interface(kind) else None
