"""A convolution as emulated hardware sees it: one geometry in two dimensions, and a matrix product over its columns.

    y [O, N P] = weight [O, K] columns [K, N P],   K in the order (c, kh, kw)

Legend: N images, P = h w output pixels, O output channels, C input channels of one group, K = C kh kw.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from recoup.errors import RecoupError

__all__ = ["POINTWISE", "Geometry", "Padded", "Pair", "as_2d", "in_every_dimension", "memory_format"]

Pair = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Geometry:
    """The arguments of a two-dimensional convolution besides its tensors; padding is with zeros.

    Linear layers are convolutions of one pixel, one-dimensional convolutions those of images of one row.
    """

    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int

    @classmethod
    def of(
        cls, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int
    ) -> "Geometry":
        """From an operator's arguments, two numbers each; weight [O, C], [O, C, k] or [O, C, kh, kw]."""
        kernel = weight.shape[2:]
        down, across = (1, *kernel) if len(kernel) == 1 else kernel or (1, 1)
        return cls((down, across), (stride[0], stride[1]), (padding[0], padding[1]), (dilation[0], dilation[1]), groups)

    @property
    def arguments(self) -> tuple[Pair, Pair, Pair, int]:
        """Stride, padding, dilation and groups, in the order in which operators and torch take them."""
        return self.stride, self.padding, self.dilation, self.groups

    def size(self, x: Tensor) -> Pair:
        """Height and width of the output for x [N, C, H, W]."""
        return self.outputs(x.shape[2:])

    def outputs(self, image: Sequence[int]) -> Pair:
        """Height and width of the output for images of such a height and width."""
        (height, width), (down, across) = image, self.padding
        return (
            (height + 2 * down - self.dilation[0] * (self.kernel[0] - 1) - 1) // self.stride[0] + 1,
            (width + 2 * across - self.dilation[1] * (self.kernel[1] - 1) - 1) // self.stride[1] + 1,
        )

    def of_rows(self, shape: Sequence[int]) -> bool:
        """Whether images of such a shape [N, C, H, W] are rows of a product: of one pixel, each multiplied once."""
        return self == POINTWISE and shape[2] == shape[3] == 1

    def check(self, x: Tensor, layer: str) -> None:
        """Refuse an input [N, C, H, W] that the kernel does not fit into."""
        if min(self.size(x)) < 1:
            raise RecoupError(
                f"{layer}: kernel {list(self.kernel)} with dilation {list(self.dilation)} is larger than the padded "
                f"input {list(x.shape)}, padding {list(self.padding)}"
            )

    def empty(self, x: Tensor, outputs: int) -> Tensor:
        """An output [N, O, h, w] for x, in x's dtype and memory format, not filled in."""
        return x.new_empty(x.shape[0], outputs, *self.size(x)).contiguous(memory_format=memory_format(x))

    def columns(self, x: Tensor) -> Tensor:
        """im2col: [N, C, H, W] -> [groups, K, N P]."""
        columns_NKP = F.unfold(x, self.kernel, self.dilation, self.padding, self.stride)
        N, K, P = columns_NKP.shape
        return columns_NKP.view(N, self.groups, K // self.groups, P).permute(1, 2, 0, 3).reshape(self.groups, -1, N * P)

    def image(self, columns: Tensor, shape: torch.Size) -> Tensor:
        """The transpose of `columns`: [groups, K, N P] -> [N, C, H, W], overlaps summed."""
        N = shape[0]
        columns_NKP = columns.view(self.groups, columns.shape[1], N, -1).permute(2, 0, 1, 3)
        columns_NKP = columns_NKP.reshape(N, prod(columns.shape[:2]), -1)
        return F.fold(columns_NKP, (shape[2], shape[3]), self.kernel, self.dilation, self.padding, self.stride)

    def adjoint(self, grad: Tensor, weight: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor, "Geometry"]:
        """What to convolve for the input's gradient: spread gradient, mirrored weight, geometry.

        The gradient's pixels stand ``stride`` apart with zeros between, and after them as many rows and columns as the
        stride left unread; the result has the input's height and width.
        """
        G, reach = self.groups, [self.dilation[i] * (self.kernel[i] - 1) for i in range(2)]
        spread_size = [(grad.shape[2 + i] - 1) * self.stride[i] + 1 for i in range(2)]
        spread = grad.new_zeros(*grad.shape[:2], *spread_size)
        spread[:, :, :: self.stride[0], :: self.stride[1]] = grad
        before = [reach[i] - self.padding[i] for i in range(2)]
        after = [shape[2 + i] - spread_size[i] - before[i] + reach[i] for i in range(2)]
        spread = F.pad(spread, [before[1], after[1], before[0], after[0]])  # negative: cropped
        outputs, C, kh, kw = weight.shape
        mirrored = (
            weight.view(G, outputs // G, C, kh, kw)
            .transpose(1, 2)
            .flip(3, 4)
            .reshape(G * C, outputs // G, kh, kw)
            .contiguous()
        )
        return spread, mirrored, Geometry(self.kernel, (1, 1), (0, 0), self.dilation, G)


POINTWISE = Geometry((1, 1), (1, 1), (0, 0), (1, 1), 1)
"""Of a linear layer."""


def as_2d(weight: Tensor) -> Tensor:
    """The weight of a linear layer or a 1-d convolution as that of a 2-d convolution, [O, C, kh, kw]."""
    return weight.view(*weight.shape[:2], *[1] * (4 - weight.dim()), *weight.shape[2:])


def memory_format(x: Tensor) -> torch.memory_format:
    """channels_last where x is that and not also contiguous."""
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def in_every_dimension(layer: Any, name: str, title: str, least: int = 1) -> tuple[int, ...]:
    """A convolution's ``stride``, ``padding`` or ``dilation`` as a number for each dimension; see `Padded.numbers`."""
    return _spread(getattr(layer, name), layer.weight.dim() - 2, name, title, least)


def _spread(value: Any, dims: int, name: str, title: str, least: int) -> tuple[int, ...]:
    # As torch's constructor leaves it, three times a call: taken as it is, for what is below takes longer.
    # Nothing is kept on the layer, for its attributes may be set at any time.
    if type(value) is tuple and len(value) == dims:
        for number in value:
            if type(number) is not int or number < least:
                break
        else:
            return value
    several: list[Any] = list(value) if isinstance(value, list | tuple) else [value]
    if not all(_is_whole(number) and number >= least for number in several) or len(several) not in (1, dims):
        words = ", 'same' or 'valid'" if name == "padding" else ""
        raise RecoupError(
            f"{title}: {name}={value!r}: it must be a whole number from {least} on, {dims} of them{words}"
        )
    return tuple(several) if len(several) == dims else (*several,) * dims


def _is_whole(number: Any) -> bool:
    return isinstance(number, int) and not isinstance(number, bool)


class Padded:
    """Mixed into emulated convolutions, before the torch layer: they run as two-dimensional ones, padded with zeros."""

    title: str = "convolution"
    weight: Tensor
    stride: int | Sequence[int]
    padding: str | int | Sequence[int]
    dilation: int | Sequence[int]
    groups: int
    padding_mode: Literal["zeros", "reflect", "replicate", "circular"]
    _reversed_padding_repeated_twice: list[int]

    def padded(self, x: Tensor) -> tuple[Tensor, list[int]]:
        """The input, padded where the operator cannot do it, and what padding is left for the operator."""
        return self._padded(x, self.weight.dim() - 2)

    def _padded(self, x: Tensor, dims: int) -> tuple[Tensor, list[int]]:
        none = [0] * dims
        if self.padding_mode != "zeros":  # what the constructor saw, as in torch, whatever padding was set to since
            return F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode), none
        if self.padding == "same":  # torch pads by what the layer is now
            if any(step != 1 for step in self.numbers("stride")):
                raise RecoupError(f"{self.title}: padding='same' goes with stride 1; got stride={self.stride!r}")
            return F.pad(x, self._same), none
        return x, none if self.padding == "valid" else list(_spread(self.padding, dims, "padding", self.title, 0))

    def numbers(self, name: Literal["stride", "padding", "dilation"], least: int = 1) -> tuple[int, ...]:
        """One of the layer's attributes in every dimension: as in torch it may have been set to one number for all.

        Raises:
            RecoupError: anything but whole numbers from ``least`` on, one or as many as there are dimensions.
        """
        return in_every_dimension(self, name, self.title, least)

    @property
    def _same(self) -> list[int]:
        """What ``same`` adds, the last dimension first, before and after it: the larger half behind."""
        totals = [d * (k - 1) for d, k in zip(self.numbers("dilation"), self.weight.shape[2:], strict=True)]
        return [half for total in reversed(totals) for half in (total // 2, total - total // 2)]

    def in_2d(self, x: Tensor) -> tuple[Tensor, Geometry]:
        """The input, batched or not, as [N, C, H, W] padded where the operator cannot do it; and what is left to do."""
        weight, title = self.weight, self.title  # torch looks up a parameter in half a microsecond
        dims = weight.dim() - 2
        x, padding = self._padded(x if x.dim() == dims + 2 else x.unsqueeze(0), dims)
        stride = _spread(self.stride, dims, "stride", title, 1)
        dilation = _spread(self.dilation, dims, "dilation", title, 1)
        if dims == 2:
            return x, Geometry.of(weight, stride, padding, dilation, self.groups)
        return x.unsqueeze(2), Geometry.of(weight, (1, *stride), (0, *padding), (1, *dilation), self.groups)

    def from_2d(self, y: Tensor, like: Tensor) -> Tensor:
        """An output [N, O, h, w] in the layer's own dimensions, batched as the input ``like`` is."""
        y = y.squeeze(2) if self.weight.dim() == 3 else y
        return y if y.dim() == like.dim() else y.squeeze(0)
