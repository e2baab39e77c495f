"""Bit patterns: `encode` gives the codes that hardware stores for values of a format, `decode` the values of codes.

Everything happens in integers, so that subnormals count whatever the processor's flush-to-zero mode.
"""

# ruff: noqa: A002 - format is the word of the contract and of the field

import math
from dataclasses import replace
from typing import Any, overload

import torch
from torch import Tensor

from recoup.errors import RecoupError
from recoup.formats.block_codes import BlockCodes, decode_blocks, encode_blocks
from recoup.formats.float_codes import FloatFields, decode_float, encode_float
from recoup.formats.pieces import in_units, place, take_apart
from recoup.formats.spec import BlockFloat, Float, Int
from recoup.network.checks import strided

__all__ = ["BlockCodes", "FloatFields", "code_bits", "decode", "encode"]

Format = Float | Int | BlockFloat


def code_bits(format: Format) -> int:
    """Bits of one code; of a `BlockFloat`, of one full block with its exponents and index.

    >>> [code_bits(format) for format in (Float.parse("e4m3fn"), Float.lba(4, 7, bias=10), Int(8), BlockFloat())]
    [8, 13, 8, 36]
    """
    if isinstance(format, Float):
        return FloatFields(format).bits
    if isinstance(format, Int):
        return format.bits
    _check_format("code_bits", format)
    outlier = format.exponent + (format.block - 1).bit_length() if format.shared == "outlier" else 0
    return format.block * (1 + format.significand) + format.exponent + outlier


@overload
def encode(x: Tensor, format: Float | Int) -> Tensor: ...
@overload
def encode(x: Tensor, format: BlockFloat) -> BlockCodes: ...
def encode(x: Tensor, format: Format) -> Tensor | BlockCodes:
    """The bit patterns of values that lie in ``format``.

    A `Float`: fraction, exponent and sign from bit 0 up, and above them a non-zero flag where the format has no code
    for zero; `FloatFields` tells positions, bias and special codes. An `Int`: two's complement, or unsigned, in the low
    ``bits`` bits. A `BlockFloat`: `BlockCodes`, a tensor for each field. Rounding and overflow play no part.

        decode(encode(x, format), format) = x,   the sign of zero included; any NaN gives a NaN

    Args:
        x: float32 or float64, on the CPU or a CUDA device.
        format: a `Float`, an `Int` or a `BlockFloat`, which x was rounded to (`quantize`).

    Returns:
        int64 of x's shape, ``code_bits(format)`` bits from bit 0 on, the others 0 (codes of 64 bits fill the int64,
        its sign included); of a `BlockFloat`, `BlockCodes`.

    Raises:
        RecoupError: a value that is none of the format's, by its index: round it with `quantize` first. That includes
            infinities and NaN without a code, -0 in an `Int`, and a block's outlier, which `quantize` keeps as it is,
            if it needs more than ``significand`` bits or exponents beyond the block's. Another dtype or device; a
            `BlockFloat` whose dim x lacks.

    Source: see `FloatFields` and `BlockCodes`.

    >>> encode(torch.tensor([1.0, -448.0, 0.0]), Float.parse("e4m3fn")).tolist()
    [56, 254, 0]
    >>> encode(torch.tensor([1.0, -63.75, 0.0]), Float.lba(4, 7, bias=10)).tolist()  # the flag is bit 12
    [5376, 8191, 0]
    >>> encode(torch.tensor([-1.0, 7.0]), Int(4)).tolist()
    [15, 7]
    >>> encode(torch.tensor([[100.0, 3.5, -1.0, 0.5]]), BlockFloat())
    BlockCodes(elements=tensor([[25, 28, 40,  4]]), shared=tensor([[16]]), outlier=tensor([[21]]), index=tensor([[0]]))
    """
    _check_format("encode", format)
    if not isinstance(x, Tensor) or x.dtype not in (torch.float32, torch.float64) or x.device.type == "meta":
        raise RecoupError(f"encode: x is {_kind(x)}; it must be a float32 or float64 tensor on cpu or cuda")
    strided(x, "encode", "x")
    if isinstance(format, BlockFloat):
        _check_dim("encode", "x", x, format)
        flat = x.reshape(1) if x.dim() == 0 else x  # torch's convention: a scalar has one dimension of one element
        codes, legal = encode_blocks(flat, format)
        codes = replace(codes, elements=codes.elements.reshape(x.shape))
        legal = legal.reshape(x.shape)
    elif isinstance(format, Float):
        codes, legal = encode_float(x, format)
    else:
        codes, legal = _encode_int(x, format)
    if not legal.all():
        raise _unencodable(x, legal, format)
    return codes


def decode(codes: Tensor | BlockCodes, format: Format) -> Tensor:
    """The values of bit patterns: the inverse of `encode`.

    Every NaN code gives NaN. A block's exponents need not be the ones that `encode` would choose.

    Args:
        codes: int64, of any shape, on any device, and 0 above the format's bits; of a `BlockFloat`, `BlockCodes`.
        format: a `Float`, an `Int` or a `BlockFloat`.

    Returns:
        float64 of the codes' shape, which holds every value of every format exactly.

    Raises:
        RecoupError: a code that stands for nothing, by its index: bits above the format's, an exponent field that is
            neither a binade nor reserved, a fraction above ``largest`` or below the smallest normal of a format
            without subnormals, anything but 0 and a sign under a non-zero flag of 0; a block's exponents or index
            outside `BlockCodes`' ranges. Another dtype or shape.

    >>> decode(torch.tensor([56, 254, 0, 128, 127]), Float.parse("e4m3fn")).tolist()
    [1.0, -448.0, 0.0, -0.0, nan]
    >>> decode(torch.tensor([0x1500, 0x0800]), Float.lba(4, 7, bias=10)).tolist()
    [1.0, -0.0]
    """
    _check_format("decode", format)
    if isinstance(format, BlockFloat):
        if not isinstance(codes, BlockCodes):
            raise RecoupError(f"decode: the codes are {_kind(codes)}; those of {format!r} are a BlockCodes")
        elements = codes.elements
        _check_dim("decode", "codes.elements", elements, format)
        flat = replace(codes, elements=elements.reshape(1)) if elements.dim() == 0 else codes
        return decode_blocks(flat, format).reshape(elements.shape)
    if not isinstance(codes, Tensor) or codes.dtype != torch.int64 or codes.device.type == "meta":
        raise RecoupError(f"decode: the codes are {_kind(codes)}; they must be an int64 tensor on cpu or cuda")
    strided(codes, "decode", "codes")
    bits = code_bits(format)
    x, legal = decode_float(codes, format) if isinstance(format, Float) else _decode_int(codes, format)
    if bits < 64:
        legal = legal & (codes >> bits == 0)
    if not legal.all():
        index, where = place(~legal)
        raise RecoupError(f"decode: codes{where} is {codes[index].item():#x}, which is no code of {format!r}")
    return x


def _encode_int(x: Tensor, format: Int) -> tuple[Tensor, Tensor]:
    pieces = take_apart(x)
    units, exact = in_units(pieces, 0)
    values = torch.where(pieces.negative, -units, units)
    low, high = int(format.smallest_value), int(format.largest_value)
    legal = exact & (pieces.exponent <= format.bits) & (values >= low) & (values <= high)
    legal &= ~(pieces.negative & (units == 0)) & ~pieces.infinite & ~pieces.nan
    return values & ((1 << format.bits) - 1), legal


def _decode_int(codes: Tensor, format: Int) -> tuple[Tensor, Tensor]:
    values = torch.where(codes > int(format.largest_value), codes - (1 << format.bits), codes)
    return values.double(), torch.ones_like(codes, dtype=torch.bool)


def _unencodable(x: Tensor, legal: Tensor, format: Format) -> RecoupError:
    index, where = place(~legal)
    value = x[index].item()
    if not math.isfinite(value):
        return RecoupError(f"encode: x{where} is {value!r}, for which {format!r} has no code")
    outlier = ""
    if isinstance(format, BlockFloat) and format.shared == "outlier":
        outlier = f" (outliers, which that keeps, to Float.ieee({format.exponent}, {format.significand - 1}) before)"
    return RecoupError(f"encode: x{where} is {value!r}, which is no value of {format!r}; quantize x first{outlier}")


def _check_format(verb: str, format: Any) -> None:
    if not isinstance(format, Format):
        raise RecoupError(
            f"{verb}: format is {format!r}; it must be a Float, an Int or a BlockFloat, such as Float.parse('e5m2')"
        )


def _check_dim(verb: str, name: str, x: Tensor, format: BlockFloat) -> None:
    if not -max(x.dim(), 1) <= format.dim < max(x.dim(), 1):
        raise RecoupError(f"{verb}: {format!r}: dim must be a dimension of {name}, whose shape is {list(x.shape)}")


def _kind(x: Any) -> str:
    if not isinstance(x, Tensor):
        return f"a {type(x).__name__}"
    dtype = str(x.dtype).removeprefix("torch.")
    return f"{'an' if dtype.startswith('int') else 'a'} {dtype} tensor on {x.device.type}"
