"""The codes of a `BlockFloat`: shared exponents, outliers and the signed significands that hang on them."""

# ruff: noqa: A002 - format is the word of the contract and of the field

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from recoup.errors import RecoupError
from recoup.formats.pieces import NO_EXPONENT, in_units, place, put_together, take_apart
from recoup.formats.spec import BlockFloat

__all__ = ["BlockCodes", "decode_blocks", "encode_blocks"]


@dataclass(frozen=True, slots=True, eq=False)
class BlockCodes:
    """The codes of a tensor in a `BlockFloat` format, int64: one an element, and one or three a block.

    With the code c of an exponent meaning ``E(c) = c + min_exponent - 1`` (`Float.ieee`'s, 1 to 2^exponent - 2), an
    element is

        x_i = +-m 2^(E - significand + 1),   E = E(outlier) where i = index, otherwise E(shared)

    Blocks lie along the format's dim, as `quantize` counts them; the last one may be shorter. A block's exponent is the
    one that `quantize` shares: the clamped largest floor(log2|x_i|), or the second largest beside an outlier; of
    nothing but zeros, the smallest. A block without an outlier has ``outlier = shared`` and ``index = 0``. A full
    block is thus ``block * BlockFloat.bits`` wide.

    Attributes:
        elements: m of ``significand`` bits, the hidden bit among them, below a sign bit; x's shape.
        shared: exponent codes, ``exponent`` bits; x's shape, the dim counting blocks.
        outlier: for ``shared="outlier"``, the outlier's exponent code, never below the shared one; else None.
        index: its place in the block, from 0, of ``ceil(log2 block)`` bits; else None.

    Raises:
        RecoupError: a field that is no int64 tensor.

    Source: our definition.
    """

    elements: Tensor
    shared: Tensor
    outlier: Tensor | None = None
    index: Tensor | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            tensor = getattr(self, field.name)
            optional = tensor is None and field.name in ("outlier", "index")
            if not optional and not (isinstance(tensor, Tensor) and tensor.dtype == torch.int64):
                found = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
                raise RecoupError(f"BlockCodes: {field.name} is a {found}; it must be an int64 tensor")


def encode_blocks(x: Tensor, format: BlockFloat) -> tuple[BlockCodes, Tensor]:
    """The codes of ``x``, which has the format's dim, and where its elements have one: infinities and NaN have none."""
    pieces, low, high = take_apart(_split(x, format)), format.min_exponent, format.max_exponent
    first = pieces.exponent.amax(-1, keepdim=True)
    shared, kept = first, torch.zeros_like(pieces.nan)
    if format.shared == "outlier":
        at_first = pieces.exponent == first
        alone = at_first.sum(-1, keepdim=True) == 1
        second = pieces.exponent.masked_fill(at_first, NO_EXPONENT).amax(-1, keepdim=True)
        shared, kept = torch.where(alone, second, first), at_first & alone
    shared, outlier = shared.clamp(low, high), first.clamp(low, high)
    own = torch.where(kept, outlier, shared)
    units, exact = in_units(pieces, own - format.significand + 1)
    legal = exact & (pieces.exponent <= own) & ~pieces.infinite & ~pieces.nan
    elements = torch.where(pieces.negative, units + (1 << format.significand), units)
    codes = BlockCodes(_join(elements, x, format), _join(shared - low + 1, x, format))
    if format.shared == "outlier":
        kept &= outlier > shared  # both may be the smallest exponent: then the element is like the others
        index = kept.long().argmax(-1, keepdim=True)
        outlier = own.gather(-1, index) - low + 1
        codes = replace(codes, outlier=_join(outlier, x, format), index=_join(index, x, format))
    return codes, _join(legal, x, format)


def decode_blocks(codes: BlockCodes, format: BlockFloat) -> Tensor:
    """The float64 values of int64 ``codes`` whose elements have the format's dim.

    Raises:
        RecoupError: fields, shapes or ranges other than `BlockCodes` gives them.
    """
    _check(codes, format)
    elements, exponent = _split(codes.elements, format), _per_block(codes.shared, format)
    if codes.outlier is not None and codes.index is not None:
        places = torch.arange(elements.shape[-1], device=elements.device)
        at_outlier = places == _per_block(codes.index, format)
        exponent = torch.where(at_outlier, _per_block(codes.outlier, format), exponent)
    power = (exponent + format.min_exponent - format.significand).expand(elements.shape)
    negative, units = elements >> format.significand == 1, elements & ((1 << format.significand) - 1)
    return _join(put_together(negative, units, power), codes.elements, format)


def _check(codes: BlockCodes, format: BlockFloat) -> None:
    """An error unless every field is there, of its shape and within its range."""
    outlier = format.shared == "outlier"
    if (codes.outlier is not None, codes.index is not None) != (outlier, outlier):
        wanted = ", ".join(field.name for field in fields(BlockCodes)[: 4 if outlier else 2])
        raise RecoupError(f"decode: {format!r}: codes must have the fields {wanted} and no others")
    elements = codes.elements
    size, exponents = elements.shape[format.dim], format.max_exponent - format.min_exponent + 1
    shape, along = list(elements.shape), [1] * elements.dim()
    along[format.dim] = shape[format.dim] = -(-size // format.block)
    firsts = torch.arange(0, size, format.block, device=elements.device)
    lengths = (size - firsts).clamp(max=format.block).reshape(along)
    _check_field("elements", elements, list(elements.shape), (0, (2 << format.significand) - 1), format)
    _check_field("shared", codes.shared, shape, (1, exponents), format)
    if codes.outlier is not None and codes.index is not None:
        _check_field("outlier", codes.outlier, shape, (codes.shared, exponents), format)
        _check_field("index", codes.index, shape, (0, lengths - 1), format)


def _check_field(
    name: str, codes: Tensor, shape: list[int], limits: tuple[int | Tensor, int | Tensor], format: BlockFloat
) -> None:
    if list(codes.shape) != shape:
        raise RecoupError(f"decode: {format!r}: codes.{name} has shape {list(codes.shape)}; it must be {shape}")
    low, high = (torch.as_tensor(limit, device=codes.device).expand(codes.shape) for limit in limits)
    wrong = (codes < low) | (codes > high)
    if wrong.any():
        index, where = place(wrong)
        raise RecoupError(
            f"decode: codes.{name}{where} is {codes[index].item()}; "
            f"in {format!r} it must be from {low[index].item()} to {high[index].item()}"
        )


def _split(x: Tensor, format: BlockFloat) -> Tensor:
    """``x`` as blocks [..., blocks, elements of a block], zeros after the last element."""
    lines = x.movedim(format.dim, -1)
    size = lines.shape[-1]
    width = max(min(format.block, size), 1)
    blocks = -(-size // width)
    return F.pad(lines, (0, blocks * width - size)).reshape(*lines.shape[:-1], blocks, width)


def _join(blocks: Tensor, x: Tensor, format: BlockFloat) -> Tensor:
    """The inverse of `_split` for what came from ``x``; [..., blocks, 1] become one entry a block."""
    return blocks.flatten(-2)[..., : x.shape[format.dim]].movedim(-1, format.dim).contiguous()


def _per_block(codes: Tensor, format: BlockFloat) -> Tensor:
    return codes.movedim(format.dim, -1).unsqueeze(-1)
