"""From 8-bit codes to the operands of NB-SMT's groups: the emitted kernel, in vector code.

64 codes at a time. Up to 64 channels a vector holds whole pixels and a partner is a constant shuffle, so there is one
kernel per number of channels; wider rows are cut into vectors, and one kernel serves them all.

Legend: P pixels, C channels, Cp = C padded to whole slots, T threads, H = Cp/T, G groups.
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from llvmlite import ir

from recoup.kernels import llvm
from recoup.nbsmt.codes import BYTE, COUNT, FLOAT, LANES, SIGNATURE
from recoup.nbsmt.config import NBSMT
from recoup.nbsmt.groups import Activation, ActivationValue
from recoup.nbsmt.ports import UNSIGNED, activation_port

SLACK = 2 * LANES
"""Bytes that whole vectors may reach behind the last code of the scratch memory."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a kernel is specialised for.

    Attributes:
        config: threads, pairing, rounding, and whether narrow activations are reduced too (policy S).
        activations: the operands.
        width: Cp where that is at most 64; 0: any Cp above.
        floats: float32 operands rather than uint8.
        zero: the byte of value 0; floats are values, not bytes.
    """

    config: NBSMT
    activations: tuple[Activation, ...]
    width: int
    floats: bool
    zero: int = UNSIGNED

    @property
    def pixels(self) -> int:
        """Pixels per vector; at most 4, since each pixel of each group is a store of its own."""
        return min(4, LANES // self.width) if self.width else 1

    @property
    def lanes(self) -> int:
        """Lanes per vector: a power of two that holds the pixels."""
        return max(16, 1 << (self.pixels * self.width - 1).bit_length()) if self.width else LANES

    @property
    def copies(self) -> int:
        """How often rows of codes are stored: twice where a partner lies at ``c + u H`` modulo Cp, beyond a vector."""
        partners = any(activation.partners for activation in self.activations)
        return 2 if not self.width and partners and self.config.pairing == "halves" else 1


@lru_cache(256)
def combine_kernel(recipe: Recipe, target: llvm.Target | None = None) -> llvm.Native:
    """``combine(x, out, first, last, C, Cp, scale, quantise, codes, rows, block) -> faults``; see `combine_module`."""
    p, n = ctypes.c_void_p, ctypes.c_int64
    types = [p, p, n, n, n, n, ctypes.c_float, p, p, p, n]
    return llvm.Native(combine_module(recipe), "combine", ctypes.c_int32, types, target)


def combine_module(recipe: Recipe) -> ir.Module:
    """Code for the whole pass over pixels ``first .. last``, ``block`` at a time: the codes stay in the nearest cache.

    ``quantise`` is the address of a `codes.quantise_kernel`; ``codes`` (block * C bytes) and ``rows`` (block * Cp *
    copies bytes, used where rows differ from codes) are scratch memory, each with `SLACK` behind. Returns the faults.
    """
    pointer, G = BYTE.as_pointer(), len(recipe.activations)
    arguments = {"x": FLOAT.as_pointer(), "out": FLOAT.as_pointer() if recipe.floats else pointer}
    arguments |= dict.fromkeys(("first", "last", "C", "Cp"), COUNT)
    arguments |= {"scale": FLOAT, "quantise": SIGNATURE.as_pointer(), "codes": pointer, "rows": pointer, "block": COUNT}
    module, b, arg = llvm.function("combine", SIGNATURE.return_type, arguments)
    C, Cp = arg["C"], COUNT(recipe.width) if recipe.width else arg["Cp"]
    rearrange = b.icmp_signed("!=", b.mul(Cp, COUNT(recipe.copies)), C)
    rows = b.select(rearrange, arg["rows"], arg["codes"])
    with llvm.loop(b, arg["first"], arg["last"], arg["block"], [SIGNATURE.return_type(0)]) as turn:
        left = b.sub(arg["last"], turn.index)
        count = b.select(b.icmp_signed("<", left, arg["block"]), left, arg["block"])
        source = b.gep(arg["x"], [b.mul(turn.index, C)])
        faults = b.call(arg["quantise"], [source, arg["codes"], b.mul(count, C), arg["scale"]])
        turn.carry(b.or_(turn.values[0], faults))
        with b.if_then(rearrange):
            _arrange(b, recipe, arg["codes"], arg["rows"], count, C, Cp)
        out = b.gep(arg["out"], [b.mul(turn.index, b.mul(Cp, COUNT(G)))])
        (_whole_pixels if recipe.width else _cut_rows)(b, recipe, rows, out, count, Cp)
    b.ret(turn.values[0])
    return module


def _arrange(b: ir.IRBuilder, recipe: Recipe, codes: Any, rows: Any, count: Any, C: Any, Cp: Any) -> None:
    """Rows of C codes -> rows of Cp codes, padded with value 0, each ``copies`` times.

    Whole vectors are stored, in ascending order: what spills over the end of a row is overwritten by the next.
    """
    with llvm.loop(b, COUNT(0), count) as pixel:
        source = b.gep(codes, [b.mul(pixel.index, C)])
        for copy in range(recipe.copies):
            number = b.add(b.mul(pixel.index, COUNT(recipe.copies)), COUNT(copy))
            to = b.gep(rows, [b.mul(number, Cp)])
            with llvm.loop(b, COUNT(0), C, LANES) as c:
                vector = _load(b, b.gep(source, [c.index]), LANES)
                b.store(vector, b.bitcast(b.gep(to, [c.index]), vector.type.as_pointer()), align=1)
            with llvm.loop(b, C, Cp) as c:
                b.store(BYTE(recipe.zero), b.gep(to, [c.index]))


def _whole_pixels(b: ir.IRBuilder, recipe: Recipe, rows: Any, out: Any, count: Any, Cp: Any) -> None:
    """The last vector may hold fewer pixels than it has room for: each is stored if it exists."""
    width, G = recipe.width, len(recipe.activations)
    with llvm.loop(b, COUNT(0), count, recipe.pixels) as turn:
        x = _load(b, b.gep(rows, [b.mul(turn.index, Cp)]), recipe.lanes)
        groups = group_values(b, recipe, x, lambda offset: llvm.shuffle(b, x, _partner_lanes(recipe, offset)))
        for pixel in range(recipe.pixels):
            place = b.add(turn.index, COUNT(pixel))
            with b.if_then(b.icmp_signed("<", place, count)):
                to = b.gep(out, [b.mul(place, COUNT(G * width))])
                for g, value in enumerate(groups):
                    part = llvm.shuffle(b, value, range(pixel * width, (pixel + 1) * width))
                    _store(b, recipe, part, b.gep(to, [COUNT(g * width)]))


def _cut_rows(b: ir.IRBuilder, recipe: Recipe, rows: Any, out: Any, count: Any, Cp: Any) -> None:
    """A row's last vector overlaps the one before it, as Cp need not be a multiple of 64."""
    G, H = len(recipe.activations), b.udiv(Cp, COUNT(recipe.config.threads))
    final = b.sub(Cp, COUNT(LANES))
    with llvm.loop(b, COUNT(0), count) as pixel:
        row = b.gep(rows, [b.mul(pixel.index, b.mul(Cp, COUNT(recipe.copies)))])
        to = b.gep(out, [b.mul(pixel.index, b.mul(Cp, COUNT(G)))])
        with llvm.loop(b, COUNT(0), Cp, LANES) as turn:
            c = b.select(b.icmp_signed("<", turn.index, final), turn.index, final)
            here = b.gep(row, [c])
            x = _load(b, here, LANES)

            def partner(offset: int, x: Any = x, here: Any = here) -> Any:
                if recipe.config.pairing == "adjacent":
                    return llvm.shuffle(b, x, _partner_lanes(recipe, offset))
                return _load(b, b.gep(here, [b.mul(H, COUNT(offset))]), LANES)

            for g, value in enumerate(group_values(b, recipe, x, partner)):
                _store(b, recipe, value, b.gep(to, [b.add(b.mul(Cp, COUNT(g)), c)]))


def _partner_lanes(recipe: Recipe, offset: int) -> list[int]:
    """For every lane the lane of its partner in the same vector; lanes behind the last pixel stay."""
    T, width = recipe.config.threads, recipe.width or LANES
    order = list(range(recipe.lanes))
    for lane in range(recipe.pixels * width):
        pixel, c = divmod(lane, width)
        slot, thread = divmod(c, T)
        halves = recipe.config.pairing == "halves"
        partner = (c + offset * (width // T)) % width if halves else slot * T + (thread + offset) % T
        order[lane] = pixel * width + partner
    return order


def group_values(b: ir.IRBuilder, recipe: Recipe, x: Any, partner: Callable[[int], Any]) -> list[Any]:
    """Every group's operand for one vector of codes; ``partner(u)`` gives the codes of the threads u further."""
    port = activation_port(recipe.config, recipe.zero)
    zero, lowest = _all(x, recipe.zero), _all(x, recipe.zero + port.low)
    fits = b.icmp_unsigned("<", b.sub(x, lowest), _all(x, port.high - port.low + 1))
    values: dict[ActivationValue, Any] = {
        "0": zero,
        "x": x,
        "r": _reduce(b, recipe, x, fits),
        "narrow": b.select(fits, x, zero),
        "wide": b.select(fits, zero, x),
    }
    offsets = sorted({u for activation in recipe.activations for u in activation.partners})
    active = {u: b.icmp_unsigned("!=", partner(u), zero) for u in offsets}
    out = []
    for activation in recipe.activations:
        value, one, several = (values[name] for name in activation.values)
        at_least_1, at_least_2 = _count(b, [active[u] for u in activation.partners])
        if at_least_1 is not None:
            value = b.select(at_least_1, one, value)
        if at_least_2 is not None:
            value = b.select(at_least_2, several, value)
        out.append(value)
    return out


def _count(b: ir.IRBuilder, active: list[Any]) -> tuple[Any, Any]:
    """Whether at least one and at least two are active; None: never."""
    one = two = None
    for a in active:
        if one is None:
            one = a
            continue
        both = b.and_(one, a)
        two = both if two is None else b.or_(two, both)
        one = b.or_(one, a)
    return one, two


def _reduce(b: ir.IRBuilder, recipe: Recipe, x: Any, fits: Any) -> Any:
    """r(x) in bytes. Codes above the last that rounds without a carry-out give what that one gives.

    The zero is a multiple of the step, so a byte's multiples are its value's; and an even one, so are their parities.
    """
    config, step = recipe.config, activation_port(recipe.config, recipe.zero).step
    r = x
    if config.rounding == "zero":
        if recipe.zero:
            below = b.icmp_unsigned("<", x, _all(x, recipe.zero))
            r = b.select(below, b.add(x, _all(x, step - 1)), x)
    else:
        top = _all(x, 255 - step // 2)
        r = b.select(b.icmp_unsigned("<", x, top), x, top)
        # Half to even adds one less than half a step, and one more where the bit that stays is odd.
        odd = b.and_(b.lshr(r, _all(x, step.bit_length() - 1)), _all(x, 1))
        half = _all(x, step // 2)
        r = b.add(r, half) if config.rounding == "half_up" else b.add(b.add(r, _all(x, step // 2 - 1)), odd)
    r = b.and_(r, _all(x, 256 - step))
    return r if config.policy == "S" else b.select(fits, x, r)


def _all(like: Any, value: int) -> Any:
    return ir.Constant(like.type, [value] * like.type.count)


def _load(b: ir.IRBuilder, address: Any, lanes: int) -> Any:
    return b.load(b.bitcast(address, ir.VectorType(BYTE, lanes).as_pointer()), align=1)


def _store(b: ir.IRBuilder, recipe: Recipe, codes: Any, address: Any) -> None:
    if recipe.floats:
        wide = ir.VectorType(FLOAT, codes.type.count)
        codes = b.sitofp(b.sub(codes, _all(codes, recipe.zero)), wide) if recipe.zero else b.uitofp(codes, wide)
    b.store(codes, b.bitcast(address, codes.type.as_pointer()), align=1)
