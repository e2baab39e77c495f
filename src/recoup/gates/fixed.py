"""Integer and fixed-point arithmetic in gates: integers as numbers, and sums of numbers in a fixed-point register."""

from typing import Any

from recoup.gates import arithmetic
from recoup.gates.arithmetic import Bits, Number, any_of, named
from recoup.gates.module import amaranth

__all__ = ["add_integer", "fixed_point", "unpack_integer"]

hdl = amaranth("hdl")


def unpack_integer(m: Any, code: Bits, signed: bool, name: str) -> Number:
    """The number of an integer's code: its magnitude, and a sign."""
    if not signed:
        return Number(hdl.Const(0, 1), hdl.Const(0, 1), code, 0, 0, len(code) - 1)
    sign = code[-1]
    magnitude = named(m, f"{name}_magnitude", ((code ^ sign.replicate(len(code))) + sign)[: len(code)])
    return Number(sign, hdl.Const(0, 1), magnitude, 0, 0, len(code) - 1)


def add_integer(m: Any, n: Number, total: Bits, unit: int, wraps: bool, name: str) -> Bits:
    """n + total in units of 2^unit, rounded to nearest even, in as many bits as ``total``, in two's complement.

    A magnitude of 2^bits or more decides the sum's end by itself, so no more bits of it are made.
    """
    bits, below = len(total), max(unit - n.low, 0)
    value, room = hdl.Cat(hdl.Const(0, max(n.low - unit, 0)), n.significand), bits + below
    lost = [any_of(value[room:])]
    value = hdl.Cat(value, hdl.Const(0, room))[:room]
    for stage in range(len(n.exponent) if n.most else 0):
        size, chosen = min(1 << stage, room), n.exponent[stage]
        lost.append(chosen & any_of(value[room - size :]))
        moved = hdl.Cat(hdl.Const(0, size), value)[:room]
        value = named(m, f"{name}_scaled_{size}", hdl.Mux(chosen, moved, value))
    far = named(m, f"{name}_far", any_of(hdl.Cat(*lost)))
    extended = hdl.Cat(hdl.Const(0, below), total, total[-1].replicate(2))
    wide = room + 2
    result = extended + hdl.Cat(value ^ n.sign.replicate(room), n.sign.replicate(2)) + n.sign
    result = named(m, f"{name}_total", result[:wide])
    if below:
        half, rest = result[below - 1], any_of(result[: below - 1])
        result = result[below:]
        result = named(m, f"{name}_rounded", (result + arithmetic.rounds_up(half, rest, result[0]))[: wide - below])
    if wraps:
        return result[:bits]
    ends = result[bits - 1 :]
    over = named(m, f"{name}_over", far | (any_of(ends) & ~ends.all()))
    negative = hdl.Mux(far, n.sign, result[-1])
    end = hdl.Cat((~negative).replicate(bits - 1), negative)
    return named(m, f"{name}_saturated", hdl.Mux(over, end, result[:bits]))


def fixed_point(m: Any, n: Number, unit: int, width: int, name: str) -> Bits:
    """The magnitude of a number in units of 2^unit, of which it is a multiple, in ``width`` bits that hold it."""
    significand, low = n.significand, n.low
    value = hdl.Cat(hdl.Const(0, low - unit), significand, hdl.Const(0, width))[:width]
    for stage in range(len(n.exponent) if n.most else 0):
        size = 1 << stage
        moved = hdl.Cat(hdl.Const(0, min(size, width)), value)[:width]
        value = named(m, f"{name}_{size}", hdl.Mux(n.exponent[stage], moved, value))
    return value
