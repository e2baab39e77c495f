"""The tensor core on the CPU: operands prepared once, then all groups over the thread pool.

Legend: B matrices of a batch, M rows, N columns, K terms.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import reduce
from operator import or_

import torch
import torch.nn.functional as F
from torch import Tensor

from recoup.formats import Float
from recoup.kernels.llvm import Target, host
from recoup.kernels.magnitudes import magnitudes
from recoup.kernels.memory import fresh
from recoup.kernels.signature import Bound
from recoup.kernels.threads import over_rows
from recoup.tensorcore.config import TensorCore
from recoup.tensorcore.emit import steps
from recoup.tensorcore.emit_form import (
    BIAS,
    INFINITE,
    WORD_BIAS,
    Form,
    Pair,
    Reach,
    cut_offset,
    folded_offset,
    form_of,
    lowest_product,
)
from recoup.tensorcore.emit_prepare import LANES, prepare_columns, prepare_rows

__all__ = ["Prepared", "products", "target"]

MINIMUM_WORK = 1 << 18  # multiply-adds that pay for one more thread
LEAST = -24  # lowest bit of formats whose values always reach less than bytes hold
INFINITY = 0x7F800000  # as bits
LINE = 64  # bytes of the caches'
KEPT = 1 << 20  # bytes from which one allocation pays

_target: ContextVar[Target | None] = ContextVar("target", default=None)


@contextmanager
def target(level: str) -> Iterator[None]:
    """Build for another processor within a block: see `Target.named`."""
    token = _target.set(Target.named(level))
    try:
        yield
    finally:
        _target.reset(token)


Part = tuple[int, torch.dtype]
"""How many elements, and of what."""


def row_parts(form: Form, M: int, K: int) -> list[Part]:
    """What `rows` fills: values, exponents, lowest bits and signs."""
    size = (-(-M // form.rows) * K + LANES) * form.rows
    short = torch.int32 if form.repeated else torch.int8
    return [(size, _value(form)), (size, short), (size, short), (0 if form.folded else size, torch.int32)]


def column_parts(form: Form, N: int, K: int) -> list[Part]:
    """What `columns` fills: values, exponents and lowest bits."""
    size = -(-N // form.columns) * form.columns * K
    short = torch.int8 if form.short else torch.int16
    return [(size, _value(form)), (size, short), (form.copies * size, short)]


def _value(form: Form) -> torch.dtype:
    return torch.float64 if form.wide else torch.float32


class Memory:
    """One allocation for all that is prepared: of several the C library gives some back after every product, and a
    fresh page costs as much as preparing 1,000 numbers."""

    def __init__(self, form: Form, M: int, K: int, N: int) -> None:
        self.rows, self.columns = row_parts(form, M, K), column_parts(form, N, K)
        size = sum(_lines(count * dtype.itemsize) for count, dtype in self.rows + self.columns)
        self.rest = fresh(torch.empty(size, dtype=torch.uint8, device="meta")) if size > KEPT else None

    def take(self, part: Part) -> Tensor:
        """The next of the parts, from the beginning of a cache's line on."""
        count, dtype = part
        if self.rest is None:
            return torch.empty(count, dtype=dtype)
        size = count * dtype.itemsize
        found = self.rest[:size].view(dtype)
        self.rest = self.rest[_lines(size) :]
        return found


def _lines(size: int) -> int:
    """Bytes in whole lines of a cache."""
    return -(-size // LINE) * LINE


@dataclass(frozen=True, slots=True)
class Prepared:
    """An operand as kernels take it.

    Attributes:
        tensors: values, exponents, lowest bits and, of rows, signs.
        count: blocks of rows or tiles of columns.
        faults: `emit_prepare.NOT_IN_FORMAT` and `emit_prepare.NOT_FINITE`.
    """

    tensors: tuple[Tensor, ...]
    count: int
    faults: int


def reach_of(x: Tensor, number: Float) -> Reach:
    """What an operand's values reach; of one that is no value of its format, something."""
    if number.min_exponent - number.mantissa >= LEAST:
        return Reach(number.min_exponent - number.mantissa, number.max_exponent)
    largest, smallest = magnitudes(x)
    if not 0 < smallest <= largest < INFINITY:
        return Reach(0, 0)
    return Reach(max(_exponent(smallest), number.min_exponent) - number.mantissa, _exponent(largest))


def _exponent(bits: int) -> int:
    """Of a float32's magnitude: in integers, which no processor flushes."""
    return (bits >> 23) - BIAS if bits >> 23 else bits.bit_length() - 150


def bases(form: Form, reach: Pair) -> tuple[dict[str, int], dict[str, int], int]:
    """What exponents and lowest bits are measured from, of rows and of columns, and the offset of cuts."""
    if form.folded:
        nothing = lowest_product(reach)  # so that a zero's sums with others lie between 0 and that
        base = {"exponent_base": reach[0].high, "nothing": nothing}
        first, second = (base | {"lowest_base": each.low} for each in reach)
        return first, second | {"exponent_base": BIAS + reach[0].high}, folded_offset(form.fraction, reach)
    if form.short:
        top = reach[0].high
        first = {"exponent_base": top, "lowest_base": top, "nothing": 255}
        second = {"exponent_base": BIAS + top, "lowest_base": reach[1].high, "nothing": 0}
        return first, second, cut_offset(form.fraction, reach)
    top = INFINITE
    first = {"exponent_base": top, "lowest_base": 0, "nothing": 0}
    return first, {"exponent_base": WORD_BIAS + top, "lowest_base": 0, "nothing": 0}, WORD_BIAS + form.fraction


def _of_format(form: Float) -> dict[str, float]:
    return {"mantissa": form.mantissa, "min_exponent": form.min_exponent, "largest": form.largest_value}


def _scales(x: Tensor | None, block: int) -> dict[str, int]:
    """Exponents of block scales, int32, as kernels take them."""
    return {
        "scales": 0 if x is None else x.data_ptr(),
        "scales_stride": 0 if x is None else x.stride(0),
        "block": block,
    }


def rows(
    a: Tensor,
    number: Float,
    form: Form,
    processor: Target,
    base: dict[str, int],
    memory: Memory,
    scales: Tensor | None = None,
    block: int = 1,
) -> Prepared:
    """a [M, K] -> [blocks][K][rows]; ``scales`` [M, ceil(K / block)]."""
    M, K = a.shape
    blocks = -(-M // form.rows)
    x = a if a.stride(1) == 1 else a.contiguous()
    values, exponents, lowest, signs = map(memory.take, memory.rows)
    faults = torch.zeros((), dtype=torch.int32)
    prepare_rows(form, processor, scales is not None)(
        M=M,
        K=K,
        blocks=blocks,
        x=x.data_ptr(),
        stride=x.stride(0),
        values=values.data_ptr(),
        exponents=exponents.data_ptr(),
        lowest=lowest.data_ptr(),
        signs=signs.data_ptr(),
        faults=faults.data_ptr(),
        **_of_format(number),
        **base,
        **_scales(scales, block),
    )
    return Prepared((values, exponents, lowest, signs), blocks, int(faults))


def columns(
    b: Tensor,
    number: Float,
    form: Form,
    processor: Target,
    base: dict[str, int],
    memory: Memory,
    scales: Tensor | None = None,
    block: int = 1,
) -> Prepared:
    """b [K, N] -> [tiles][K][columns]; ``scales`` [ceil(K / block), N]."""
    K, N = b.shape
    tiles = -(-N // form.columns)
    x = _padded(b, tiles * form.columns)
    scales = None if scales is None else _padded(scales, tiles * form.columns)
    values, exponents, lowest = map(memory.take, memory.columns)
    faults = torch.zeros((tiles,), dtype=torch.int32)
    constants = {"K": K, "stride": x.stride(0)} | _of_format(number) | base | _scales(scales, block)
    kernel = prepare_columns(form, processor, scales is not None)

    def run(first: int, last: int) -> None:
        place = first * K * form.columns
        moved = {"scales": constants["scales"] + 4 * first * form.columns} if scales is not None else {}
        kernel(
            tiles=last - first,
            x=x.data_ptr() + 4 * first * form.columns,
            values=values[place:].data_ptr(),
            exponents=exponents[place:].data_ptr(),
            lowest=lowest[form.copies * place :].data_ptr(),
            faults=faults[first:].data_ptr(),
            **constants | moved,
        )

    over_rows(run, tiles, K * form.columns)
    return Prepared((values, exponents, lowest), tiles, reduce(or_, faults.tolist(), 0))


def _padded(x: Tensor, width: int) -> Tensor:
    """x [..., N] with zeros up to a width, and rows that lie together."""
    x = F.pad(x, [0, width - x.shape[1]]) if x.shape[1] < width else x
    return x if x.stride(1) == 1 else x.contiguous()


@dataclass(frozen=True, slots=True)
class Scales:
    """Exponents of the powers of two that ``block`` consecutive k of an operand have been multiplied by: int32 [M, S]
    and [S, N]."""

    a: Tensor
    b: Tensor
    block: int

    def reach(self, formats: tuple[Float, Float]) -> Pair:
        """What any values of the formats reach."""
        found = [
            Reach(f.min_exponent - f.mantissa + int(s.min()), f.max_exponent + int(s.max()))
            for f, s in zip(formats, (self.a, self.b), strict=True)
        ]
        return found[0], found[1]


def products(a: Tensor, b: Tensor, config: TensorCore, scales: Scales | None = None) -> tuple[Tensor, int]:
    """a [M, K] b [K, N], float32, finite where it matters -> float32 [M, N], and the faults of both operands.

    ``scales``: of operands that have been multiplied by them, exactly.
    """
    (M, K), N = a.shape, b.shape[1]
    processor, (first, second) = _target.get() or host(), config.formats
    reach = scales.reach(config.formats) if scales else (reach_of(a, first), reach_of(b, second))
    form = form_of(config, processor, reach, K)
    row, column, offset = bases(form, reach)
    block = {"block": scales.block} if scales else {}
    memory = Memory(form, M, K, N)
    left = rows(a, first, form, processor, row, memory, scales and scales.a, **block)
    right = columns(b, second, form, processor, column, memory, scales and scales.b, **block)
    c = torch.zeros(left.count * form.rows, right.count * form.columns, dtype=torch.float32)
    result = torch.zeros_like(c) if config.promotion else c
    part = config.promotion or K
    strides = {"a_block": form.rows * K, "b_tile": form.columns * K, "c_row": c.shape[1]}
    bound = steps(form, processor).bind(cut_offset=offset, **strides)
    for start in range(0, K, part):
        if start:
            c.zero_()
        _steps(bound, left, right, c, (start, min(start + part, K)), form)
        if config.promotion:
            result += c  # float32, to nearest even
    return result[:M, :N].contiguous(), left.faults | right.faults


def _steps(kernel: Bound, left: Prepared, right: Prepared, c: Tensor, terms: tuple[int, int], form: Form) -> None:
    """All steps of some terms, over the pool: tiles of columns, or blocks of rows where there are few tiles."""
    first, last = terms
    a, a_exponents, a_lowest, a_signs = (t[form.rows * first :] for t in left.tensors)
    b, b_exponents = (t[form.columns * first :] for t in right.tensors[:2])
    b_lowest = right.tensors[2][form.copies * form.columns * first :]
    a_block, b_tile = kernel.constants["a_block"], kernel.constants["b_tile"]

    def run(tiles: tuple[int, int], blocks: tuple[int, int]) -> None:
        row, tile = a_block * blocks[0], b_tile * tiles[0]
        kernel(
            tiles=tiles[1] - tiles[0],
            blocks=blocks[1] - blocks[0],
            K=last - first,
            a=a[row:].data_ptr(),
            a_exponents=a_exponents[row:].data_ptr(),
            a_lowest=a_lowest[row:].data_ptr(),
            a_signs=a_signs[row:].data_ptr(),
            b=b[tile:].data_ptr(),
            b_exponents=b_exponents[tile:].data_ptr(),
            b_lowest=b_lowest[form.copies * tile :].data_ptr(),
            c=c[form.rows * blocks[0] :, form.columns * tiles[0] :].data_ptr(),
        )

    def over_blocks(begin: int, end: int) -> None:
        for tile in range(right.count):
            run((tile, tile + 1), (begin, end))

    work = form.rows * form.columns * (last - first)
    if right.count < 2 * torch.get_num_threads() and left.count > right.count:
        over_rows(over_blocks, left.count, work * right.count, MINIMUM_WORK)
    else:
        over_rows(lambda begin, end: run((begin, end), (0, left.count)), right.count, work * left.count, MINIMUM_WORK)
