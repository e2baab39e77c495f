"""SCALE-Sim's files: the topology of any model as CSV, and the array size of its configuration file.

Source: the examples in SCALE-Sim's own folders topologies/conv_nets, topologies/GEMM_mnk and configs.
"""

import configparser
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from recoup.errors import RecoupError
from recoup.fields import choice
from recoup.network.batches import call, count, prepared
from recoup.network.convolution import in_every_dimension
from recoup.network.modes import evaluating

KINDS = ("conv", "gemm")
_HEADS = {
    "conv": "Layer name, IFMAP Height, IFMAP Width, Filter Height, Filter Width, Channels, Num Filter, Strides,",
    "gemm": "Layer, M, N, K,",
}
_SECTION, _HEIGHT, _WIDTH = "architecture_presets", "ArrayHeight", "ArrayWidth"


@torch.no_grad()
def topology(model: nn.Module, inputs: Any, kind: Literal["conv", "gemm"] = "conv") -> str:
    """A model's convolutions and linear layers in order of execution, as SCALE-Sim's topology CSV.

    ``conv``: one image of the batch; input sizes hold the padding, as SCALE-Sim knows none; a linear layer is a 1 x 1
    convolution of as many pixels as it has rows for an image. ``gemm``: the whole batch; M output positions, N output
    channels, K the reduction. A grouped convolution is a row a group.

    Args:
        model: any module; it runs once, in eval mode.
        inputs: a batch as in `recoup.network.batches`.
        kind: which of the two formats.

    Raises:
        RecoupError: a kind that is none, a model without such layers, or a layer that the format cannot say (``conv``:
            dilation, strides that differ, a layer that sees more or fewer images than the batch has).
    """
    choice("silicon.scalesim.topology", "kind", kind, KINDS)
    rows: list[str] = []
    images = 0
    kinds = (nn.Conv1d, nn.Conv2d, nn.Linear)

    def record(name: str) -> Any:
        def hook(module: Any, args: tuple, kwargs: dict, output: Tensor) -> None:
            x = args[0] if args else kwargs["input"]
            row = _conv(name, module, x, images) if kind == "conv" else _gemm(module, output)
            groups = getattr(module, "groups", 1)
            labels = [name] if groups == 1 else [f"{name}_{g}" for g in range(groups)]
            rows.extend(f"{label.replace('.', '_')}, {', '.join(map(str, row))}," for label in labels)

        return hook

    hooks = [
        module.register_forward_hook(record(name or "model"), with_kwargs=True, prepend=True)
        for name, module in model.named_modules()
        if isinstance(module, kinds)
    ]
    try:
        with evaluating(model):
            for batch, _ in prepared(model, [inputs], "silicon.scalesim"):
                images = count(batch)
                call(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    if not rows:
        raise RecoupError("silicon.scalesim.topology: the model ran no Conv1d, Conv2d or Linear")
    return "\n".join([_HEADS[kind], *rows]) + "\n"


def _conv(name: str, module: Any, x: Tensor, images: int) -> list[int]:
    """IFMAP height and width, filter height and width, channels, filters, stride, of one group and image."""
    linear = isinstance(module, nn.Linear)
    spatial = 0 if linear else module.weight.dim() - 2
    seen = x.numel() // x.shape[-1] if linear else (x.shape[0] if x.dim() == spatial + 2 else 1)
    if seen % images if linear else seen != images:
        raise RecoupError(
            f"silicon.scalesim.topology: {name!r} sees {seen} {'rows' if linear else 'images'} (input "
            f"{list(x.shape)}) of a batch of {images}: the conv format says one image; take kind='gemm'"
        )
    if linear:
        return [seen // images, 1, 1, 1, module.in_features, module.out_features, 1]
    title = f"silicon.scalesim.topology: {name!r}"
    strides, dilations = (in_every_dimension(module, each, title) for each in ("stride", "dilation"))
    if len(set(strides)) > 1 or set(dilations) != {1}:
        raise RecoupError(
            f"{title}: stride {strides}, dilation {dilations}: the conv format has one stride and no dilation; take "
            "kind='gemm'"
        )
    kernel = list(module.weight.shape[2:])
    if isinstance(module.padding, str):
        total = [0 if module.padding == "valid" else k - 1 for k in kernel]
    else:
        total = [2 * p for p in in_every_dimension(module, "padding", title, 0)]
    sizes = [size + more for size, more in zip(x.shape[-spatial:], total, strict=True)]
    if spatial == 1:
        sizes, kernel = [1, *sizes], [1, *kernel]
    groups = module.groups
    return [*sizes, *kernel, module.in_channels // groups, module.out_channels // groups, strides[0]]


def _gemm(module: Any, output: Tensor) -> list[int]:
    """M, N and K of one group; all images of the batch."""
    out = module.weight.shape[0]
    return [output.numel() // out, out // getattr(module, "groups", 1), module.weight[0].numel()]


def read_array(path: Path) -> tuple[int, int]:
    """Rows and columns (ArrayHeight, ArrayWidth) of a SCALE-Sim configuration file.

    Raises:
        RecoupError: no such file, or one without these lines.
    """
    parser = configparser.ConfigParser()
    try:
        with path.open() as file:
            parser.read_file(file)
        section = parser[_SECTION]
        return int(section[_HEIGHT]), int(section[_WIDTH])
    except OSError as error:
        raise RecoupError(f"array: {str(path)!r} cannot be read: {error}") from error
    except (configparser.Error, KeyError, ValueError) as error:
        raise RecoupError(
            f"array: {str(path)!r}: no {_HEIGHT} and {_WIDTH} as whole numbers under [{_SECTION}]: {error}"
        ) from error
