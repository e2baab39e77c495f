"""What layers and attention products multiply: watched as they run, and sums of theirs drawn at random."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from recoup.network.attention import AttentionUnit

__all__ = ["drawn_products", "drawn_sums", "observing_operands"]


@contextmanager
def observing_operands(
    modules: Mapping[str, Any],
    hook: Callable[[str], Callable[..., Any]],
    watch: Callable[[str, Any], Callable[[str, Tensor, Tensor], None]],
) -> Iterator[None]:
    """A forward pre-hook on each layer and a watch on each attention's products; then none."""
    hooks = []
    try:
        for name, module in modules.items():
            if isinstance(module, AttentionUnit):
                module.watch = watch(name, module)
            else:
                hooks.append(module.register_forward_pre_hook(hook(name), with_kwargs=True))
        yield
    finally:
        for handle in hooks:
            handle.remove()
        for module in modules.values():
            module.__dict__.pop("watch", None)


def drawn_products(x: Tensor, y: Tensor, outputs: int, seed: int) -> tuple[Tensor, Tensor]:
    """The operands [S, K] of randomly drawn outputs of x [..., M, K] y [..., K, N]."""
    batch = torch.broadcast_shapes(x.shape[:-2], y.shape[:-2])
    x, y = (t.detach().expand(*batch, *t.shape[-2:]).reshape(-1, *t.shape[-2:]) for t in (x, y))
    (B, M, _), N = x.shape, y.shape[2]
    index = torch.randint(B * M * N, (outputs,), generator=torch.Generator().manual_seed(seed))
    b, m, n = index // (M * N), index // N % M, index % N
    return x[b, m], y[b, :, n]


def drawn_sums(layer: nn.Module, x: Tensor, w: Tensor, outputs: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """The operands of randomly drawn outputs of a layer.

    Args:
        layer: with ``of_rows``, or a convolution (`recoup.network.convolution.Padded`).
        x, w: activations and weights as the unit multiplies them.
        outputs: how many.
        seed: of the draw.

    Returns:
        Activations and weights [S, K]; the outputs' flat indices in [O, positions], where positions run over images and
        pixels, or over rows.
    """
    generator = torch.Generator().manual_seed(seed)
    if layer.of_rows:
        columns, groups = x.reshape(-1, x.shape[-1]).t().unsqueeze(0), 1
    else:
        x, geometry = layer.in_2d(x)  # type: ignore[operator]
        columns, groups = geometry.columns(x), geometry.groups
    channels, positions = w.shape[0], columns.shape[2]
    index = torch.randint(channels * positions, (outputs,), generator=generator)
    channel, position = index // positions, index % positions
    group = channel // (channels // groups)
    return columns[group, :, position].contiguous(), w.reshape(channels, -1)[channel].contiguous(), index
