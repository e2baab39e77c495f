"""Hugging Face transformers on NB-SMT: Conv1D, the linear layer of GPT-2 whose weight lies the other way round.

Nothing of transformers is imported; its attention products stay in float, and `emulate_` says so.
"""

from torch import Tensor, nn

from recoup.nbsmt.layers import NBSMTRows
from recoup.network.derived import derived, is_conv1d


class NBSMTConv1D(NBSMTRows):
    """transformers' Conv1D, y = x W + b with W [in, out], on the shared multiplier."""

    @property
    def matrix(self) -> Tensor:
        """The weight as [out, in]."""
        return self.weight.t()


def adapted(kind: type[nn.Module]) -> type[nn.Module] | None:
    """The class for transformers' Conv1D; None for any other."""
    return derived(NBSMTConv1D, kind) if is_conv1d(kind) else None
