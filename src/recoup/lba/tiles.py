"""The tiles that a product is computed in: for which processor, of which shape, over which columns.

Legend: M rows, N columns.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache

import numpy as np

from recoup.errors import RecoupError
from recoup.kernels.llvm import Target, host
from recoup.kernels.memory import address
from recoup.lba.driver import Columns, Index
from recoup.lba.emit import IN_COLUMNS, SIDE_BY_SIDE
from recoup.lba.emit_code import Form, Shape
from recoup.lba.plan import Plan

FLOAT32 = 4  # bytes of an operand's element

_target: ContextVar[Target | None] = ContextVar("recoup_lba_target", default=None)


@contextmanager
def target(level: str | None) -> Iterator[None]:
    """Emulate with the instructions of ``x86-64`` (SSE2), ``haswell`` (AVX2, FMA) or ``skylake-avx512``; None: all.

    The processor must have them. The bits are the same.
    """
    wanted = None if level is None else Target.named(level)
    if wanted is not None and not wanted.features <= host().features:
        missing = ", ".join(sorted(wanted.features - host().features))
        raise RecoupError(f"lba.cpu.target({level!r}): this processor lacks {missing}")
    token = _target.set(wanted)
    try:
        yield
    finally:
        _target.reset(token)


def current_target() -> Target:
    """The processor that kernels are built for."""
    return _target.get() or host()


def padded(columns: Columns, tile: Shape) -> tuple[np.ndarray, np.ndarray]:
    """Columns up to a multiple of the tile's (the last repeated); how each vector of them lies (`emit.packing`)."""
    if columns.regular is not None:
        return _regular(*columns.regular, tile)
    known: dict = {} if columns.known is None else columns.known
    if tile not in known:
        known[tile] = laid(columns.terms.numpy(), columns.columns.numpy(), tile)
    return known[tile]


@lru_cache(maxsize=64)
def _regular(K: int, N: int, down: int, across: int, tile: Shape) -> tuple[np.ndarray, np.ndarray]:
    """`padded`, of a matrix with these strides: calls with operands of the same shape share it."""
    return laid(np.arange(K) * down, np.arange(N) * across, tile)


def laid(terms: np.ndarray, places: np.ndarray, tile: Shape) -> tuple[np.ndarray, np.ndarray]:
    """`padded`, of offsets of terms and columns."""
    short = -len(places) % tile.columns
    places = np.concatenate([places, np.repeat(places[-1:], short)]) if short else places
    vectors = places.reshape(-1, tile.lanes)
    straight = (vectors[:, 1:] - vectors[:, :-1] == 1).all(1).view(np.uint8)
    if not straight.all() and (terms[1:] - terms[:-1] == 1).all():
        straight = np.where(straight, np.uint8(SIDE_BY_SIDE), np.uint8(IN_COLUMNS))
    return places, straight


def shared_arguments(
    columns: Columns, places: np.ndarray, straight: np.ndarray, chosen: Plan, index: Index
) -> dict[str, float]:
    """What the kernels of products and of gradients take alike: B as `padded` has it, the plan, the random bits.

    Addresses among them are those of the arguments' arrays.
    """
    return {
        "b_terms": columns.terms.data_ptr(),
        "b_columns": address(places),
        "b_straight": address(straight),
        "b_scale": 2.0**chosen.b_scale,
        "b_least": chosen.b_least_bits,
        "floats": address(chosen.floats),
        "integers": address(chosen.integers),
        "seed_base": index.base,
        "index_row": index.row,
        "index_column": 1,
    }


def shape(form: Form, target: Target) -> Shape:
    """Lanes, rows and vectors of a tile: what the registers hold.

    Several sums at once, so that their steps hide each other's latency; two vectors a row, so that each element of A
    that is broadcast serves twice; and no more rows than leave the sums in registers while k runs:

    - 32 registers (AVX-512). The full float32 step takes them all at 8 x 2: 16 sums, 5 constants, 2 vectors of B, the
      rest at work. From 6 x 2 to 10 x 2 the speed is the same, and 8 divides the usual numbers of channels. Float64
      quantisers have more at work: 4 x 2 takes 25 to 32.
    - 16 registers. At 3 x 2 the full step reads 3 constants from the stack, and 4 x 2 is slower; by comparison, without
      multiply-add, a step has more at work, and so have float64's: 2 x 2.
    """
    if "avx512f" in target.features:
        return Shape(8, 4, 2) if form.wide else Shape(16, 8, 2)
    if "avx2" in target.features:
        return Shape(4, 2, 2) if form.wide else Shape(8, 3, 2)
    return Shape(2, 2, 2) if form.wide else Shape(4, 2, 2)


def fitted(whole: Shape, M: int, N: int) -> Shape:
    """A smaller tile where rows or columns are few: as many tiles as before, of rows as equal as can be."""
    tiles = -(-M // whole.rows)
    return Shape(whole.lanes, -(-M // tiles), 1 if whole.lanes >= N else whole.vectors)
