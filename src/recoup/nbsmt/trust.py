"""Which convolutions oneDNN's 8-bit kernel may do: those of geometries where it is right.

oneDNN 3 is wrong on some geometries, and on some it reads outside its operand, which ends the process. Measured on
264,539 random geometries with AVX-512 VNNI: with the rules of `sound` there was no crash and no wrong result. Other
processors take other kernels, so a geometry that is new to the process is compared with the exact convolution once.
"""

import warnings

import torch
from torch import Tensor

from recoup.errors import RecoupWarning
from recoup.nbsmt.cpu import Int8Convolution, Pair, exact_convolution

__all__ = ["distrusted", "packed", "plain_dilation", "sound", "survey"]

CHECK_WEIGHTS = 15
"""Magnitude of the weights of a check: sums stay in float32 for long, and fit the 16 bits of CPUs without VNNI."""

ROWS = 32
"""Of an image that is one column of them, at either end, which are compared."""

Key = tuple[torch.Size, Pair, Pair, Pair, int, tuple[int, ...]]

_right: dict[Key, bool] = {}


def packed(
    weight: Tensor, stride: Pair, padding: Pair, dilation: Pair, groups: int, shape: tuple[int, ...], layer: str
) -> Int8Convolution | None:
    """The 8-bit convolution of a weight, packed for an input shape; None where `exact_convolution` has to do the work.

    That is where the geometry is not `sound`, and where the kernel's result for random operands of these shapes is not
    the exact one: a RecoupWarning then names the layer and the geometry, once.

    Args:
        weight: int8 [O, C / groups, kh, kw].
        stride, padding, dilation, groups: as in torch.nn.functional.conv2d.
        shape: of the input.
        layer: what the warning calls the layer.
    """
    kernel = (weight.shape[2], weight.shape[3])
    dilation = plain_dilation(kernel, dilation)
    if not sound(weight.shape, stride, padding, dilation, shape[3]):
        return None
    geometry = (stride, padding, dilation, groups)
    key = (weight.shape, *geometry, tuple(shape))
    if key not in _right:
        _right[key] = _is_right(*key)
        if not _right[key]:
            warnings.warn(
                f"{layer}: oneDNN's 8-bit convolution is wrong for weight {list(weight.shape)}, stride {list(stride)}, "
                f"padding {list(padding)}, dilation {list(dilation)}, groups {groups} on input {list(shape)}; float32 "
                "does the work there, with the exact result, slower",
                RecoupWarning,
                stacklevel=2,
            )
    return Int8Convolution(weight, *geometry, shape) if _right[key] else None


def plain_dilation(kernel: Pair, dilation: Pair) -> Pair:
    """The dilation, 1 along an axis of one tap: it has no meaning there, and oneDNN reads outside the image by it."""
    return 1 if kernel[0] == 1 else dilation[0], 1 if kernel[1] == 1 else dilation[1]


def sound(weight_shape: torch.Size, stride: Pair, padding: Pair, dilation: Pair, width: int | None = None) -> bool:
    """Whether oneDNN's 8-bit convolution neither crashes nor errs, as far as the geometry, and the input's width, tell.

    Not sound are
    - padding of the kernel's whole extent or more, dilation (k - 1) + 1, along either axis: some outputs then see
      nothing but padding, and the kernel reads outside the image for them;
    - one input channel per group (depthwise, with any multiplier) with a horizontal stride alone: results are wrong;
    - a horizontal stride alone that leaves a single column of outputs: with AMX results are wrong.
    """
    extents = [spread * (taps - 1) + 1 for spread, taps in zip(dilation, weight_shape[2:], strict=True)]
    inside = all(pad < extent for pad, extent in zip(padding, extents, strict=True))
    column = width is not None and width + 2 * padding[1] - extents[1] < stride[1]
    return inside and not ((weight_shape[1] == 1 or column) and stride[0] == 1 and stride[1] > 1)


# What networks are made of: output and input channels, kernel, stride, size of the input, groups.
_COMMON: dict[str, tuple[int, int, Pair, int, int, int]] = {
    "3x3": (16, 16, (3, 3), 1, 8, 1),
    "3x3, stride 2": (32, 16, (3, 3), 2, 8, 1),
    "3x3 on images": (16, 3, (3, 3), 1, 8, 1),
    "7x7, stride 2": (16, 3, (7, 7), 2, 14, 1),
    "1x1": (32, 16, (1, 1), 1, 8, 1),
    "1x1, stride 2": (32, 16, (1, 1), 2, 8, 1),
    "5x5": (16, 8, (5, 5), 1, 8, 1),
    "1x3": (16, 8, (1, 3), 1, 8, 1),
    "3x3 in 4 groups": (16, 16, (3, 3), 1, 8, 4),
    "3x3 depthwise": (16, 16, (3, 3), 1, 8, 16),
    "3x3 depthwise, stride 2": (16, 16, (3, 3), 2, 8, 16),
    "linear": (10, 64, (1, 1), 1, 1, 1),
}


def survey() -> dict[str, bool]:
    """Convolutions of the common kinds, tried on this processor: whether the 8-bit kernel may do them here.

    What it finds counts in `distrusted`.
    """
    found = {}
    for name, (filters, channels, kernel, stride, size, groups) in _COMMON.items():
        weight = torch.ones(filters, channels // groups, *kernel, dtype=torch.int8)
        padding = kernel[0] // 2, kernel[1] // 2
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RecoupWarning)  # the caller says it
            shape = (2, channels, size, size)
            found[name] = packed(weight, (stride, stride), padding, (1, 1), groups, shape, name) is not None
    return found


def distrusted() -> int:
    """How many of this process's geometries the 8-bit kernel failed, so that float32 does them."""
    return sum(not right for right in _right.values())


def _is_right(
    weight_shape: torch.Size, stride: Pair, padding: Pair, dilation: Pair, groups: int, shape: tuple[int, ...]
) -> bool:
    """Whether the first and the last image of a batch come out exact, of one image of rows the first and the last rows.
    These are random, and no code is 0, so that every tap counts; nobody looks at what is between them."""
    random = torch.Generator().manual_seed(0)
    rows = shape[0] == shape[3] == 1 and weight_shape[2:] == (1, 1) and (stride, padding) == ((1, 1), (0, 0))
    axis, count = (2, shape[2]) if rows else (0, shape[0])
    some = min(ROWS, -(-count // 2)) if rows else 1
    ends = torch.tensor(sorted({*range(some), *range(count - some, count)}))
    operand = torch.ones(shape, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    looked_at = [len(ends) if i == axis else size for i, size in enumerate(shape)]
    operand.index_copy_(axis, ends, torch.randint(1, 256, looked_at, dtype=torch.uint8, generator=random))
    weight = torch.randint(1, CHECK_WEIGHTS + 1, weight_shape, dtype=torch.int8, generator=random)
    weight *= torch.randint(0, 2, weight_shape, dtype=torch.int8, generator=random) * 2 - 1
    geometry = (stride, padding, dilation, groups)
    found = Int8Convolution(weight, *geometry, shape)(operand)
    bound = 255 * CHECK_WEIGHTS * weight[0].numel()
    exact = exact_convolution(operand.index_select(axis, ends), weight, *geometry, bound)
    return torch.equal(found.index_select(axis, ends), exact)
