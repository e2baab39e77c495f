"""Exact counts of what meets what in an NB-SMT layer, without laying out its im2col matrix.

What a thread loses depends on its own operands and on which partners have non-zero ones, and the activation side of
that never mixes with the weight side. So it is enough to count, per slot channel and kernel tap, how often every
*label* occurs: a label is which partners are non-zero (a bit mask) and the class of the thread's own value. Totals over
output positions and output channels are then products of an activation count and a weight count.

Taps of one convolution see almost the same positions: positions that serve the same set of taps (the interior; each
border) are counted together, once, and added up per tap afterwards.

Legend: N images, G groups of the convolution, T threads, S slots per group, U = G*T*S units, k l kernel rows and
columns, L labels = 2^(T-1) masks times the classes.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from recoup.errors import RecoupError
from recoup.nbsmt import reference
from recoup.nbsmt.config import NBSMT
from recoup.nbsmt.ports import zero_of
from recoup.network.convolution import Geometry, Pair

CELLS = 1 << 22
"""Counters, or elements, in flight at once: 32 MiB of 64-bit integers."""


@dataclass(frozen=True, slots=True)
class Axis:
    """One spatial axis of a convolution: which kernel taps read which input positions.

    Attributes:
        outputs: output positions along the axis.
        kind: int64 [size]; positions of the same kind serve the same taps.
        serves: float64 [kinds, kernel], 1 where positions of that kind serve the tap, else 0.
    """

    outputs: int
    kind: Tensor
    serves: Tensor

    @classmethod
    def of(cls, size: int, kernel: int, stride: int, padding: int, dilation: int) -> "Axis":
        outputs = (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        if outputs < 1:
            raise RecoupError(
                f"a kernel of {kernel} with dilation {dilation} does not fit an input of {size} with padding {padding}"
            )
        read = torch.arange(outputs)[:, None] * stride + torch.arange(kernel) * dilation - padding
        serves = torch.zeros(size, kernel, dtype=torch.float64)
        for tap in range(kernel):
            inside = read[:, tap][(read[:, tap] >= 0) & (read[:, tap] < size)]
            serves[inside, tap] = 1
        kinds, kind = serves.unique(dim=0, return_inverse=True)
        return cls(outputs, kind, kinds)


@dataclass(frozen=True, slots=True)
class Taps:
    """Both spatial axes of a convolution over inputs of one size."""

    rows: Axis
    columns: Axis

    @classmethod
    def of(cls, size: Pair, geometry: Geometry) -> "Taps":
        g = geometry
        rows, columns = (Axis.of(size[i], g.kernel[i], g.stride[i], g.padding[i], g.dilation[i]) for i in (0, 1))
        return cls(rows, columns)

    @property
    def outputs(self) -> int:
        """Output positions per image."""
        return self.rows.outputs * self.columns.outputs

    def sums(self, x_HWJ: Tensor) -> Tensor:
        """What channels add up to per tap, of numbers by input position: [J, k, l], exact of whole ones."""
        serves = [axis.serves[axis.kind].to(x_HWJ.device) for axis in (self.rows, self.columns)]
        return torch.einsum("hwj,hk,wl->jkl", x_HWJ, *serves)

    def count(self, labels_NUHW: Iterable[Tensor], units: int, labels: int, device: torch.device) -> Tensor:
        """How often each label occurs per unit and tap over all output positions, float64 [U, k, l, labels], exact.

        Takes the labels in chunks of images. Positions in the zero padding are not counted.
        """
        rows, columns = self.rows, self.columns
        kind_HW = (rows.kind[:, None] * len(columns.serves) + columns.kind).to(device)
        cell_UHW = (kind_HW * units + torch.arange(units, device=device)[:, None, None]).int()  # half the traffic
        counts = torch.zeros(len(rows.serves) * len(columns.serves) * units * labels, dtype=torch.int64, device=device)
        for label_NUHW in labels_NUHW:
            counts += torch.bincount((cell_UHW * labels + label_NUHW).flatten(), minlength=len(counts))
        counts = counts.view(len(rows.serves), len(columns.serves), units, labels).double()
        return torch.einsum("abux,ak,bl->uklx", counts, rows.serves.to(device), columns.serves.to(device))


def masked(class_T: Tensor, zero: int, classes: int, dim: int) -> Tensor:
    """Labels: the own class, plus ``classes`` times the mask of the partners that are not of class ``zero``.

    Bit u - 1 of the mask stands for partner offset u, thread (t + u) modulo T, as in `recoup.nbsmt.groups`.
    """
    mask = torch.zeros_like(class_T)
    for offset in range(1, class_T.shape[dim]):
        mask |= (class_T != zero).to(class_T.dtype).roll(-offset, dim) << (offset - 1)
    return mask * classes + class_T


def activation_counts(code: Tensor, table: Tensor, config: NBSMT, geometry: Geometry) -> Iterator[tuple[slice, Tensor]]:
    """Count activation labels in blocks of slots that fit the memory.

    Args:
        code: uint8 [N, C, H, W], or int8 with signed values.
        table: int64 [256], the class of value v at v + zero; value 0 has a class of its own.
        config: threads and pairing.
        geometry: of the convolution.

    Yields:
        The block's slots, and float64 [G, T, slots, k, l, 2^(T-1), classes]: exact counts over images and output
        positions.
    """
    taps = Taps.of((code.shape[2], code.shape[3]), geometry)
    zero = zero_of(code)
    classes, idle = int(table.max()) + 1, int(table[zero])
    table, masks = table.to(code.device, torch.int32), 1 << (config.threads - 1)
    x_NGTSHW = reference.split_threads(code.unflatten(1, (geometry.groups, -1)), config, 2)
    _, groups, threads, slots, height, width = x_NGTSHW.shape
    per_slot = groups * threads * masks * classes * math.prod(geometry.kernel)
    for part in _blocks(slots, per_slot):
        units = groups * threads * (part.stop - part.start)
        chunks = x_NGTSHW[:, :, :, part].split(max(1, CELLS // max(1, units * height * width)))
        labels = (masked(table[chunk.int() + zero], idle, classes, 2).flatten(1, 3) for chunk in chunks)
        counts = taps.count(labels, units, masks * classes, code.device)
        yield part, counts.view(groups, threads, -1, *geometry.kernel, masks, classes)


def weight_counts(code: Tensor, table: Tensor, config: NBSMT, groups: int, part: slice) -> Tensor:
    """Count weight labels of some slots over the output channels: float64 [G, T, slots, k, l, 2^(T-1), classes].

    Args:
        code: int8 [O, I, kh, kw].
        table: int64 [256], the class of code w at w + 128; code 0 has a class of its own.
        config: threads and pairing.
        groups: of the convolution.
        part: which slots.
    """
    classes, masks = int(table.max()) + 1, 1 << (config.threads - 1)
    w_GOTSkl = reference.split_threads(code.unflatten(0, (groups, -1)), config, 2)[:, :, :, part]
    label = masked(table.to(code.device)[w_GOTSkl.long() + 128], int(table[128]), classes, 2).movedim(1, 0)
    cell = torch.arange(label.shape[1:].numel(), device=code.device).view(label.shape[1:])
    flat = (cell * (masks * classes) + label).flatten()
    counts = torch.bincount(flat, minlength=cell.numel() * masks * classes)
    return counts.view(*label.shape[1:], masks, classes).double()


def _blocks(slots: int, per_slot: int) -> Iterator[slice]:
    step = max(1, CELLS // max(1, per_slot))
    for first in range(0, slots, step):
        yield slice(first, min(first + step, slots))
