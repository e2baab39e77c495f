"""Weights made ready for the CPU, once per weight and configuration, and never stale.

The 8-bit convolution takes bytes u of signed codes too, whose value is v = u - z. What that adds is the same for every
image, a map of its border and of the weights:  conv(v, B) = conv0(u, B) - z conv0(1, sum of B over its channels), where
conv0 pads with the byte 0, which stands for nothing in either term.

A prepared weight belongs to the content it was made from: every call compares a 64-bit hash of the bytes (1-2 % of the
layer's time), because writes through ``.data`` leave a tensor's version counter alone. Shape and strides are part of
its key: a tied layer may read the same bytes transposed.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce

import torch
import torch.nn.functional as F
import xxhash
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from recoup.formats import Int
from recoup.kernels import llvm
from recoup.kernels.arrays import array
from recoup.nbsmt import cpu, reference
from recoup.nbsmt.config import NBSMT
from recoup.nbsmt.lists import Lists, divided
from recoup.nbsmt.ports import UNSIGNED
from recoup.nbsmt.saturate import Saturating
from recoup.nbsmt.shapes import MISSING, Shapes
from recoup.nbsmt.trust import packed
from recoup.nbsmt.weights import WeightOperand, quantize_weight, weight_operand
from recoup.network.convolution import POINTWISE, Geometry, as_2d

KEPT = 4
"""Configurations kept per weight: enough to switch between a few."""

QUADS, SUMS = 192, 1 << 20
"""Instructions a sum takes slot by slot, of four products or of one, from which it is asked whether any leaves the
register; and bytes of sums that are at a time: memory of many more may go back to the system after every call."""

SIZES = 4
"""Bits of numbers of rows that are told apart: an eighth more at most."""


@dataclass(slots=True)
class Prepared:
    """A layer's weight operand and its 8-bit convolutions by input shape; None where float32 does the work.

    Attributes:
        content: what it was made from.
        config: of the unit.
        zero: the byte of value 0 among the activation codes.
        fits_int8: whether sums over bytes, which come as float32, are exact. Unsigned codes are their bytes, and their
            sum need not be subtracted from: it may be rounded.
        parts: weights of channels from one to another, by which they are where all do not fit; empty where no part
            would.
        dense, sparse: the groups by how they are summed, once it was ``looked`` whether that differs; else None.
        lists: of the sparse ones, by image size and geometry; None where planes do not stay in a cache.
        signs: the positive weights and the negative ones, see `_within`; empty where they did not tell.
    """

    content: int
    config: NBSMT
    operand: WeightOperand
    scale_O: Tensor
    zero: int
    fits_int8: bool
    convolutions: Shapes = field(default_factory=Shapes)
    maps: Shapes = field(default_factory=Shapes)
    saturating: Saturating | None = None
    dense: "Prepared | None" = None
    sparse: WeightOperand | None = None
    looked: bool = False
    lists: Shapes = field(default_factory=Shapes)
    signs: "tuple[Prepared, ...] | None" = None
    parts: "tuple[tuple[int, int, Prepared], ...] | None" = None

    @property
    def register(self) -> Int | None:
        """The accumulator where sums may leave it; no sum leaves any other."""
        register = self.config.accumulator
        return register if register is not None and self.operand.bound > register.largest_value else None

    def operand_type(self, backend: str) -> torch.dtype:
        """What `accumulate` takes: bytes for integers' kernels, values for floats'."""
        saturates = self.register is not None and self.register.overflow == "saturate"
        return torch.uint8 if saturates or backend == "int8" else torch.float32

    def divided(self, shape: Sequence[int], geometry: Geometry, backend: str) -> "tuple[Prepared, Lists] | None":
        """What sums the groups, where those of few weights are summed apart: the others, and these; else None.

        Args:
            shape: of the input [N, C, H, W].
            geometry: of the convolution.
            backend: as in `accumulate`.
        """
        if backend != "int8" or geometry.groups > 1 or self.register is not None or cpu.probe().isa == "AMX":
            return None  # AMX multiplies zeros faster than lists leave them out
        if shape[1] * len(self.operand.activations) != self.operand.weight_OGJkk.shape[1]:
            return None  # channels that fill up slots
        if not self.looked:
            self.looked = True
            division = divided(self.operand, self.config, self.zero, llvm.host())
            if division is not None:
                others = (self.scale_O, self.zero, self.fits_int8)
                self.dense, self.sparse = Prepared(self.content, self.config, division.dense, *others), division.sparse
        if self.dense is None or self.sparse is None:
            return None
        key = ((shape[2], shape[3]), geometry)
        made = self.lists.get(key, MISSING)
        if made is MISSING:
            made = Lists(self.sparse, self.config, geometry, key[0])
            made = made if made.fits else None  # 16 bytes a pixel, which nothing would read
            self.lists.keep(key, made, 0 if made is None else made.bytes)
        return None if made is None else (self.dense, made)

    def accumulate(self, operand: Tensor, geometry: Geometry, backend: str, layer: str) -> Tensor:
        """What the accumulators hold, as float32 [N, O, h, w] channels_last; ``operand`` [N, G*J, H, W] channels_last.

        Whole numbers, rounded once to float32.
        """
        register = self.register
        if register is None:
            return self._sums(operand, geometry, backend, layer)
        if register.overflow == "saturate":
            within = self._within(operand, geometry, backend, layer, register)
            if within is not None:
                return within
            if self.saturating is None:
                self.saturating = Saturating(self.operand.weight_OGJkk, self.config, len(self.operand.activations))
            held = self.saturating(operand.permute(0, 2, 3, 1), geometry, self.zero, floats=True)
        elif self.operand.bound < 2**24:
            held = reference.register(self._sums(operand, geometry, backend, layer).long(), register)
        else:
            values = operand.float().sub_(self.zero) if operand.dtype == torch.uint8 else operand
            arguments = (self.operand.weight_OGJkk, *geometry.arguments, self.operand.bound)
            held = reference.register(cpu.whole_convolution(values, *arguments).long(), register)
        return held.float().contiguous(memory_format=torch.channels_last)

    def _within(self, operand: Tensor, geometry: Geometry, backend: str, layer: str, register: Int) -> Tensor | None:
        """The sums, if it is certain that none leaves a register that saturates, on its way or at the end; else None.

        Values that are not negative have products of their weights' signs, so that no sum is ever above that of its
        positive products, or below that of its negative ones. Those are two matrix products, which take less time than
        adding slots one by one where these have a single product, or AMX multiplies. Once they do not tell they are not
        asked again.
        """
        signs, pays = self.signs, self.config.threads == 1 or cpu.probe().isa == "AMX"
        products = len(self.operand.activations) * self.config.threads
        pays = pays and self.operand.weight_OGJkk[0].numel() // products * -(-products // 4) >= QUADS
        if backend != "int8" or self.zero or register.bits > 24 or signs == () or not pays:
            return None
        if self.operand.bound >= 2**31:
            return None  # oneDNN's sums of all products may leave 32 bits, and look as if they had stayed
        if signs is None:
            weight, others = self.operand.weight_OGJkk, (self.scale_O, self.zero, self.fits_int8)
            parts = (replace(self.operand, weight_OGJkk=weight.clamp(*ends)) for ends in ((0, 127), (-128, 0)))
            self.signs = signs = tuple(Prepared(self.content, self.config, part, *others) for part in parts)
        shape = (len(operand), self.operand.weight_OGJkk.shape[0], *geometry.outputs(operand.shape[2:]))
        found = torch.empty(shape, dtype=torch.float32, memory_format=torch.channels_last)
        few = _piece(len(operand), SUMS // max(1, found[:1].nbytes))
        for x, sums in zip(operand.split(few), found.split(few), strict=True):
            up, down = (part._sums(x, geometry, backend, layer) for part in signs)
            if up.numel() and (up.amax() > register.largest_value or down.amin() < register.smallest_value):
                self.signs = ()
                return None
            torch.add(up, down, out=sums)
        return found

    def _sums(self, operand: Tensor, geometry: Geometry, backend: str, layer: str) -> Tensor:
        """Exact sums of products as float32, [N, O, h, w] channels_last; ``operand`` [N, G*J, H, W] channels_last.

        The operand is of bytes (uint8) or of values (float32). On ``int8`` oneDNN sums where it is right
        (`trust.packed`); `cpu.exact_convolution` does elsewhere, and under any other backend.
        """
        if geometry.of_rows(operand.shape) and len(operand) > 1:
            return self._sums_of_rows(operand, backend, layer)
        whole = operand.dtype == torch.uint8
        if whole and backend == "int8" and not self.fits_int8 and geometry.groups == 1 and self._cuts():
            return self._sums_of_parts(operand, geometry, backend, layer)
        bytes_fit = whole and backend == "int8" and self.fits_int8
        convolution = self._packed(operand, geometry, layer) if bytes_fit else None
        if convolution is None:
            if self.zero and whole:
                operand = operand.float().sub_(self.zero)
            return cpu.exact_convolution(operand, self.operand.weight_OGJkk, *geometry.arguments, self.operand.bound)
        sums = convolution(operand)
        return sums.sub_(self._of_zeros(operand, geometry)) if self.zero else sums

    def _sums_of_rows(self, operand: Tensor, backend: str, layer: str) -> Tensor:
        """The same of images of one pixel, as a linear layer has them: oneDNN is some ten times as fast on one image of
        as many rows. Sizes are rounded up, so that a weight is not packed anew for every length of a sentence."""
        P, J = operand.shape[:2]
        more = -P % (1 << max(0, P.bit_length() - SIZES))
        rows = F.pad(operand, (0, 0, 0, 0, 0, 0, 0, more)) if more else operand
        image = rows.reshape(1, P + more, 1, J).permute(0, 3, 1, 2)
        sums = self._sums(image, POINTWISE, backend, layer).permute(0, 2, 3, 1).reshape(P + more, -1, 1, 1)
        return sums[:P] if more else sums

    def _sums_of_parts(self, operand: Tensor, geometry: Geometry, backend: str, layer: str) -> Tensor:
        """The same where a sum over bytes may leave 24 bits: those over fewer channels do not, and are added, which is
        rounded once."""
        last = torch.channels_last
        sums = (
            part._sums(operand[:, first:end].contiguous(memory_format=last), geometry, backend, layer)
            for first, end, part in self._cuts()
        )
        if self.operand.bound < 2**24:
            return reduce(Tensor.add_, sums)
        return reduce(Tensor.add_, (some.double() for some in sums)).float()

    def _cuts(self) -> "tuple[tuple[int, int, Prepared], ...]":
        """The parts; none where a single channel has so many taps that its own sum does not fit."""
        if self.parts is None:
            channels = self.operand.weight_OGJkk.transpose(0, 1).flatten(0, 1)  # each for itself, by each output
            able = _most_on_bytes(replace(self.operand, weight_OGJkk=channels)) < 2**24
            self.parts = tuple(self._cut(0, self.operand.weight_OGJkk.shape[1])) if able else ()
        return self.parts

    def _cut(self, first: int, end: int) -> "Iterator[tuple[int, int, Prepared]]":
        """Weights of channels ``first .. end``, cut where half of them lies on either side until all fit."""
        own = replace(self.operand, weight_OGJkk=self.operand.weight_OGJkk[:, first:end].contiguous())
        if _fits(own, self.zero):
            yield first, end, Prepared(self.content, self.config, own, self.scale_O, self.zero, fits_int8=True)
            return
        sums_J = own.weight_OGJkk.to(torch.int32).abs().sum((0, 2, 3)).cumsum(0)
        middle = first + 1 + int((2 * sums_J < sums_J[-1]).sum())
        yield from self._cut(first, min(middle, end - 1))
        yield from self._cut(min(middle, end - 1), end)

    def _packed(self, operand: Tensor, geometry: Geometry, layer: str) -> cpu.Int8Convolution | None:
        key = (tuple(operand.shape), geometry)
        made = self.convolutions.get(key, MISSING)
        if made is not MISSING:
            return made
        arguments = (geometry.stride, geometry.padding, geometry.dilation, geometry.groups)
        made = packed(self.operand.weight_OGJkk, *arguments, key[0], layer)
        self.convolutions.keep(key, made, 0 if made is None else self.operand.weight_OGJkk.numel())
        return made

    def _of_zeros(self, operand: Tensor, geometry: Geometry) -> Tensor:
        """What an image of zeros gives on bytes: float32 [1, O, h, w], of one pixel where there is no border."""
        key = (tuple(operand.shape[2:]) if any(geometry.padding) else (), geometry)
        found = self.maps.get(key)
        if found is None:
            taps_O1kk = self.operand.weight_OGJkk.sum(1, keepdim=True, dtype=torch.int32).double() * self.zero
            if key[0]:
                image = torch.ones((1, 1, *key[0]), dtype=torch.float64)
                sums = F.conv2d(image, taps_O1kk, None, geometry.stride, geometry.padding, geometry.dilation)
            else:
                sums = taps_O1kk.sum((2, 3), keepdim=True).permute(1, 0, 2, 3)
            found = sums.float().contiguous(memory_format=torch.channels_last)
            self.maps.keep(key, found, found.nbytes)
        return found


_prepared: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def prepare(weight: Tensor, config: NBSMT, order: Tensor | None = None, zero: int = UNSIGNED) -> Prepared:
    """The prepared form of a weight; made on first use and whenever the weight's content changes.

    Args:
        weight: float32 [O, I], [O, I, k] or [O, I, kh, kw].
        config: the NB-SMT configuration.
        order: permutation of the I input channels, or None.
        zero: of the activation codes.
    """
    owner = _owner(weight)
    kept: dict[tuple, Prepared] = _prepared.get(owner) or {}
    _prepared[owner] = kept
    layout = (weight.shape, weight.stride())
    content, key = _hash(weight), (config, None if order is None else _hash(order), zero, *layout)
    found = kept.get(key)
    if found is None or found.content != content:
        code, scale = quantize_weight(weight)
        code = as_2d(code if order is None else code[:, order])
        operand = weight_operand(code, config, zero)
        found = Prepared(content, config, operand, scale, zero, _fits(operand, zero))
        kept.pop(key, None)  # of another content
        while len(kept) >= KEPT:
            kept.pop(next(iter(kept), key), None)  # another thread may have been faster
        kept[key] = found
    return found


def _piece(number: int, most: int) -> int:
    """How many of a number to take at once, at least 1 and else at most so many.

    A divisor, so that weights are packed for one size; where all of these are small, as a prime's, the last piece is
    ragged: one by one, rows take some thirty times as long.
    """
    most = max(1, min(number, most))
    divisor = next(size for size in range(most, 0, -1) if number % size == 0) if number else 1
    return divisor if 2 * divisor > most else -(-number // -(-number // most))


def _fits(operand: WeightOperand, zero: int) -> bool:
    """Whether sums over bytes are exact in float32, or may be rounded."""
    return not zero or _most_on_bytes(operand) < 2**24


def _most_on_bytes(operand: WeightOperand) -> int:
    """What no sum over bytes 0..255 exceeds: of all groups together, as the byte of a zero is none."""
    weight = operand.weight_OGJkk.flatten(1)
    sums = [weight.clamp(*ends).sum(1, dtype=torch.int64).abs() for ends in ((0, 127), (-128, 0))]
    return 255 * int(torch.maximum(*sums).amax()) if weight.numel() else 0


def forget(weight: Tensor) -> None:
    """Free what was prepared for a weight."""
    _prepared.pop(_owner(weight), None)


def _owner(weight: Tensor) -> Tensor:
    """The tensor that lives on, where a weight is all of it in another order, made anew in every call (transposed)."""
    whole = weight._base is not None and weight._base.numel() == weight.numel()
    return weight._base if whole else weight  # type: ignore[return-value]


def _hash(tensor: Tensor) -> int:
    plain = tensor.detach()
    if plain.dim() == 2 and plain.t().is_contiguous():
        plain = plain.t()  # strides are part of the key
    if not plain.is_contiguous():
        last = plain.dim() == 4 and plain.is_contiguous(memory_format=torch.channels_last)
        plain = plain.permute(0, 2, 3, 1) if last else plain.contiguous()
    return xxhash.xxh3_64_intdigest(array(plain.view(-1)).data)
