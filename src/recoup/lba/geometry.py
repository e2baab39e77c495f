"""A convolution as a matrix product: y [O, N P] = weight [O, K] columns [K, N P], K in the order (c, kh, kw).

Legend: N images, P = h w output pixels, O output channels, C input channels of one group, K = C kh kw.
"""

from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from recoup.errors import RecoupError

Pair = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Geometry:
    """The arguments of a two-dimensional convolution besides its tensors; padding is with zeros."""

    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int

    @classmethod
    def of(cls, weight: Tensor, stride: list[int], padding: list[int], dilation: list[int], groups: int) -> "Geometry":
        """From an operator's arguments; weight [O, C, kh, kw]."""
        kernel, step, pad, spread = ((v[0], v[1]) for v in (list(weight.shape[2:]), stride, padding, dilation))
        return cls(kernel, step, pad, spread, groups)

    def size(self, x: Tensor) -> Pair:
        """Height and width of the output."""
        h, w = (
            (x.shape[2 + i] + 2 * self.padding[i] - self.dilation[i] * (self.kernel[i] - 1) - 1) // self.stride[i] + 1
            for i in range(2)
        )
        return h, w

    def check(self, x: Tensor, weight: Tensor, layer: str) -> None:
        """Refuse shapes that do not fit."""
        if x.dim() != 4 or weight.dim() != 4 or x.shape[1] != weight.shape[1] * self.groups:
            raise RecoupError(
                f"{layer}: the input {list(x.shape)} must have {weight.shape[1] * self.groups} channels "
                f"(weight {list(weight.shape)}, {self.groups} groups)"
            )
        if min(self.size(x)) < 1:
            raise RecoupError(
                f"{layer}: kernel {list(self.kernel)} with dilation {list(self.dilation)} is larger than the padded "
                f"input {list(x.shape)}, padding {list(self.padding)}"
            )

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
