"""The walks of tiling.py in LLVM IR: over panels for passes with sums, over samples' blocks for passes with results.

Legend: ``v`` the kernel's arguments by name: ``first`` and ``last`` bound the panels or the samples' blocks of this
call, ``count`` is the number of tiles, and the others are fields of a `tiling.Tiling`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llvmlite import ir

from recoup.kernels.llvm import I64, P
from recoup.kernels.signature import Definition
from recoup.lightnorm.fused.tile_ir import Tile

_PART = {"first": I64, "last": I64, "scratch": P, "peak": P}
_SHAPE = {"channels": I64, "places": I64, "block": I64, "pitch": I64, "tiles": P}
PANELS = {**_PART, **_SHAPE, "count": I64, "panel": I64, "lanes": P}
BLOCKS = {**_PART, **_SHAPE, "blocks": I64, "offsets": P}


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a tile: the places of one channel.

    Attributes:
        channel: c. chunk: its index.
        at: the index in memory of its first element.
        origin: that element's index among its channel's.
        length: n.
    """

    channel: Any
    chunk: Any
    at: Any
    origin: Any
    length: Any


def over_panels(tile: Tile, v: Definition, x: Any, begin: Callable, each: Callable, end: Callable) -> None:
    """The kernel's body: ``begin(slot, c)`` for all channels of a panel, ``each(slot, row)`` for all rows of all tiles,
    and ``end(slot, c)``, with ``slot`` the channel's place in the panel."""
    b = tile.b
    with tile.counted(v["first"], v["last"]) as panel:
        origin = b.mul(panel.index, v["panel"])
        width = least(b, b.sub(v["channels"], origin), v["panel"])
        with tile.counted(I64(0), width) as turn:
            begin(turn.index, b.add(origin, turn.index))
        with tile.counted(I64(0), v["count"]) as turn:
            sample, start, stop, chunk = _piece(tile, v, turn.index)
            n, place = b.sub(stop, start), b.add(b.mul(sample, v["places"]), start)
            first = b.add(b.mul(sample, v["channels"]), origin)
            with tile.counted(I64(0), width, v["block"]) as block:
                at = b.add(b.mul(b.add(first, block.index), v["places"]), start)
                last = least(b, width, b.add(block.index, v["block"]))
                if tile.recipe.block:
                    tile.find_scales(tile.at(x, at), v["places"], b.sub(last, block.index), n)
                with tile.counted(block.index, last) as w:
                    shift = b.mul(b.sub(w.index, block.index), v["places"])
                    each(w.index, Row(b.add(origin, w.index), chunk, b.add(at, shift), place, n))
        with tile.counted(I64(0), width) as turn:
            end(turn.index, b.add(origin, turn.index))
    tile.report(v["peak"])
    b.ret_void()


def over_blocks(tile: Tile, v: Definition, x: Any, y: Any, each: Callable) -> None:
    """The kernel's body: ``each(row, out)`` for all rows, with ``out`` where results go: to ``y``, or where there are
    blocks to scratch, until their exponents are known."""
    b, shared = tile.b, tile.recipe.block > 0
    waiting = tile.at(v["scratch"], b.mul(v["pitch"], I64(2)))
    with tile.counted(v["first"], v["last"]) as turn:
        sample, block = b.sdiv(turn.index, v["blocks"]), b.srem(turn.index, v["blocks"])
        begin = b.mul(block, v["block"])
        width = least(b, v["block"], b.sub(v["channels"], begin))
        first = b.add(b.mul(sample, v["channels"]), begin)
        bounds = [tile.get(v["offsets"], b.add(sample, I64(i)), I64) for i in range(2)]
        with tile.counted(*bounds) as t:
            _, start, stop, chunk = _piece(tile, v, t.index)
            n, at = b.sub(stop, start), b.add(b.mul(first, v["places"]), start)
            origin = b.add(b.mul(sample, v["places"]), start)
            if shared:
                tile.find_scales(tile.at(x, at), v["places"], width, n)
            with tile.counted(I64(0), width) as w:
                here = b.add(at, b.mul(w.index, v["places"]))
                out = tile.at(waiting, b.mul(w.index, v["pitch"])) if shared else tile.at(y, here)
                each(Row(b.add(begin, w.index), chunk, here, origin, n), out)
            if shared:
                _share_results(tile, v, waiting, tile.at(y, at), width, n)
    if tile.recipe.stream:
        b.fence("seq_cst")  # stores past the caches come in no order; other threads read y when this call is over
    tile.report(v["peak"])
    b.ret_void()


def _piece(tile: Tile, v: Definition, index: Any) -> tuple[Any, ...]:
    """A tile's sample, first place, end and chunk."""
    b = tile.b
    return tuple(tile.get(v["tiles"], b.add(b.mul(index, I64(4)), I64(i)), I64) for i in range(4))


def _share_results(tile: Tile, v: Definition, waiting: Any, y: Any, width: Any, n: Any) -> None:
    """Rows in scratch, rounded to blocks, to memory."""
    b = tile.b
    tile.find_scales(waiting, v["pitch"], width, n)
    with tile.counted(I64(0), width) as w:
        row, out = tile.at(waiting, b.mul(w.index, v["pitch"])), tile.at(y, b.mul(w.index, v["places"]))

        def body(index: Any, inside: Any) -> list[Any]:
            tile.write(tile.shared(tile.load(row, index), index), out, index, inside)
            return []

        tile.along(n, body)


def least(b: ir.IRBuilder, x: Any, y: Any) -> Any:
    """The smaller of two sizes."""
    return b.select(b.icmp_signed("<", x, y), x, y)
