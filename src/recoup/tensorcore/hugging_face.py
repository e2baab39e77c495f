"""Hugging Face transformers on tensor cores: attention as a layer, and Conv1D."""

from typing import ClassVar

from torch import Tensor, nn

from recoup.network.derived import derived, is_conv1d
from recoup.network.hugging_face import InterfaceAttention, asks_interface
from recoup.tensorcore.attention_layers import TensorCoreAttention
from recoup.tensorcore.layers import TensorCoreRows

__all__ = ["TensorCoreConv1D", "TensorCoreInterfaceAttention", "adapted"]


def adapted(kind: type[nn.Module]) -> type[nn.Module] | None:
    """The class for an attention module that asks transformers' interface, or for its Conv1D; None for any other."""
    if is_conv1d(kind):
        return derived(TensorCoreConv1D, kind)
    return derived(TensorCoreInterfaceAttention, kind) if asks_interface(kind) else None


class TensorCoreConv1D(TensorCoreRows):
    """transformers' Conv1D, y = x W + b with W [in, out], on a tensor core."""

    @property
    def matrix(self) -> Tensor:
        """The weight as [out, in]."""
        return self.weight.t()


class TensorCoreInterfaceAttention(InterfaceAttention, TensorCoreAttention):
    """An attention module of transformers whose products run on a tensor core; ``config`` is a `TensorCore`."""

    extras: ClassVar[tuple[str, ...]] = InterfaceAttention.extras
