"""The random bits of stochastic rounding in lanes: a hash of seed, output and step, the same as `reference`'s.

They depend on nothing else, so a tile of any shape, on any thread, draws the same bits for an output.
"""

from collections.abc import Callable
from typing import Any

from recoup.kernels.llvm import I32, I64
from recoup.lba.emit_code import Code

GOLDEN = 0x9E3779B9  # 2^32 / the golden ratio, odd: steps that follow each other start far apart
# Wellons' "lowbias32": of the multiply-and-shift hashes of this length, the one found to spread a bit's change best.
ROUNDS, LAST_SHIFT = ((16, 0x7FEB352D), (15, 0x846CA68B)), 16
UNUSED = 8  # of 32 bits: 24 are drawn


def random_base(code: Code, row: int, vector: int) -> Any:
    """`reference.random_base` of the outputs at one place of the tile, as 32-bit lanes."""
    b, v, words, wide = code.b, code.v, code.of(I32), code.of(I64)
    start = b.add(v["index"], b.mul(I64(row), v["index_row"]))
    lanes = code.numbers(I64, vector * code.lanes)
    index = b.add(code.everywhere(start), b.mul(lanes, code.everywhere(v["index_column"])))
    high = b.trunc(b.lshr(index, code.constant(32, wide)), words)
    seed = code.everywhere(b.trunc(v["seed_base"], I32))
    return _mix(code, b.xor(b.trunc(index, words), _mix(code, b.xor(high, seed))))


def draws(code: Code, bases: list[Any], place: int, counter: Any) -> Callable[[int], Any] | None:
    """A function that gives 24 random bits per lane for the counter's rounding or, with 1, the next; None if unused."""
    if not bases:
        return None

    def draw(offset: int) -> Any:
        b = code.b
        spread = b.mul(b.add(counter, I32(offset)), I32(GOLDEN))
        mixed = _mix(code, b.add(bases[place], code.everywhere(spread)))
        return b.lshr(mixed, code.constant(UNUSED, mixed.type))

    return draw


def _mix(code: Code, x: Any) -> Any:
    """`reference.mix` on 32-bit lanes."""
    b = code.b
    for shift, factor in ROUNDS:
        x = b.mul(b.xor(x, b.lshr(x, code.constant(shift, x.type))), code.constant(factor, x.type))
    return b.xor(x, b.lshr(x, code.constant(LAST_SHIFT, x.type)))
