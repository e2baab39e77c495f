"""The product unit's gates: what a slot of T operand pairs adds, x_t unsigned and w_t signed, 8 bits each.

Three things in a row:

    decode    which threads are active, each operand's reduced form once, and what goes to which multiplier
    multiply  T small multipliers: narrow x wide with two threads, 4 bits unsigned x 5 bits signed with four
    add       their products, shifted where an operand was reduced, summed exactly
"""

from typing import Any

from recoup.gates.module import amaranth
from recoup.nbsmt.config import NBSMT


class Gates:
    """The product unit's gates, written with Amaranth into a module ``m``."""

    def __init__(self, m: Any, config: NBSMT) -> None:
        self.hdl = amaranth("hdl")
        self.m = m
        self.config = config
        self.base = config.policy.removeprefix("S+")
        self.narrow_test = config.policy != "S"

    def signal(self, value: Any, name: str) -> Any:
        """A named wire that carries a value."""
        wire = self.hdl.Signal(value.shape(), name=name)
        self.m.d.comb += wire.eq(value)
        return wire

    def rounded(self, v: Any, is_signed: bool) -> Any:
        """The 4 high bits of v, rounded by the config; carry-out saturates. 4 bits."""
        low, high = v[:4], v[4:]
        if self.config.rounding == "nearest":
            up = low[3] & (low[:3].any() | high[0])
        elif self.config.rounding == "half_up":
            up = low[3]
        else:
            up = v[7] & low.any() if is_signed else self.hdl.Const(0, 1)
        top = high == (7 if is_signed else 15)
        return (high + (up & ~top))[:4]

    def reduced(self, v: Any, is_signed: bool) -> tuple[Any, Any]:
        """A reduced operand's 4 bits, and whether it stands for 16 times them."""
        rounded = self.rounded(v, is_signed)
        if not self.narrow_test:
            return rounded, self.hdl.Const(1, 1)
        wide = self.wide(v, is_signed)
        return self.hdl.Mux(wide, rounded, v[:4]), wide

    def wide(self, v: Any, is_signed: bool) -> Any:
        """Whether v does not fit its 4 low bits."""
        return ~((v[3:] == 0) | v[3:].all()) if is_signed else v[4:].any()

    # two threads: multipliers (narrow, wide, shift): narrow and wide are signed, shift is 1 bit for 4 places

    def two(self, x: list[Any], w: list[Any]) -> list[tuple[Any, Any, Any]]:
        """Operands of the two multipliers: an inactive thread's multiplier serves its partner.

        Where neither is active both products are zero whatever is chosen, as each has a factor of zero.
        """
        hdl = self.hdl
        if not self.config.zero_test:
            return [self.colliding(x[t], w[t], x[t], w[t]) for t in range(2)]
        active = [self.signal(x[t].any() & w[t].any(), f"active{t}") for t in range(2)]
        collision = self.signal(active[0] & active[1], "collision")
        found = []
        for t in range(2):
            own_x = self.signal(hdl.Mux(active[t], x[t], x[1 - t]), f"x_of{t}")
            own_w = self.signal(hdl.Mux(active[t], w[t], w[1 - t]), f"w_of{t}")
            narrow, wide, shift = self.colliding(x[t], w[t], own_x, own_w)
            alone, whole, upper = self.alone(own_x, own_w, upper=t == 0)
            same = self.base in ("S", "A", "W")  # the wide operand does not depend on the collision
            chosen = whole if same else hdl.Mux(collision, wide, whole)
            found.append((hdl.Mux(collision, narrow, alone), chosen, hdl.Mux(collision, shift, upper)))
        return found

    def alone(self, x: Any, w: Any, upper: bool) -> tuple[Any, Any, Any]:
        """One thread on both multipliers: the high and the low half of the operand that is reduced otherwise."""
        hdl = self.hdl
        if self.base == "W":
            half = w[4:].as_signed() if upper else hdl.Cat(w[:4], hdl.Const(0, 1)).as_signed()
            return half, x, hdl.Const(int(upper), 1)
        return (x[4:] if upper else x[:4]), w, hdl.Const(int(upper), 1)

    def colliding(self, x: Any, w: Any, own_x: Any, own_w: Any) -> tuple[Any, Any, Any]:
        """A thread's operands on its own multiplier; ``own``: the same values where it is active."""
        hdl = self.hdl
        if self.base in ("S", "A"):
            r, reduced = self.reduced(x, False)
            return r, own_w, reduced
        q, w_reduced = self.reduced(w, True)
        if self.base == "W":
            return q.as_signed(), own_x, w_reduced
        r, x_reduced = self.reduced(x, False)
        by_x = self.wide(w, True) if self.base == "Aw" else ~self.wide(x, False)  # the activation's 4 bits, w whole
        wide = hdl.Mux(by_x, own_w, own_x)
        return hdl.Mux(by_x, r, q.as_signed()), wide, hdl.Mux(by_x, x_reduced, w_reduced)

    # four threads: multipliers (4 bits unsigned, 5 bits signed, shift of the first, of the second)

    def four(self, x: list[Any], w: list[Any]) -> list[tuple[Any, Any, Any, Any]]:
        """Operands of the four multipliers."""
        r, q = [self.reduced(v, False) for v in x], [self.reduced(v, True) for v in w]
        home = [(r[t][0], q[t][0].as_signed(), r[t][1], q[t][1]) for t in range(4)]
        if not self.config.zero_test:
            return home
        hdl = self.hdl
        active = [self.signal(x[t].any() & w[t].any(), f"active{t}") for t in range(4)]
        first = [self.signal(active[t] & ~hdl.Cat(*active[:t]).any(), f"first{t}") for t in range(4)]
        last = [self.signal(active[t] & ~hdl.Cat(*active[t + 1 :]).any(), f"last{t}") for t in range(4)]
        many = self.signal(self.three_of(active), "many")
        pair = self.signal(hdl.Cat(*(f & ~s for f, s in zip(first, last, strict=True))).any() & ~many, "pair")
        f, s = self.routed(first, x, w, r, q, "f"), self.routed(last, x, w, r, q, "s")
        return [self.shared(k, f if k < 2 else s, home[k], pair, many) for k in range(4)]

    def three_of(self, bits: list[Any]) -> Any:
        """Whether three or more of four bits are set."""
        a, b, c, d = bits
        return (a & b & (c | d)) | (c & d & (a | b))

    def routed(self, chosen: list[Any], x: Any, w: Any, r: Any, q: Any, name: str) -> dict[str, Any]:
        """The chosen thread's operands by one-hot AND-OR; zeros where none is."""

        def pick(values: list[Any], what: str) -> Any:
            total = None
            for one, value in zip(chosen, values, strict=True):
                masked = value & one.replicate(len(value))
                total = masked if total is None else total | masked
            return self.signal(total, f"{name}_{what}")

        operands = {"x": pick(x, "x"), "w": pick([v.as_unsigned() for v in w], "w")}
        if self.base != "W":
            operands |= {"r": pick([v for v, _ in r], "r"), "rs": pick([v for _, v in r], "rs")}
        if self.base not in ("S", "A"):
            operands |= {"q": pick([v for v, _ in q], "q"), "qs": pick([v for _, v in q], "qs")}
        return operands

    def shared(self, k: int, v: Any, home: Any, pair: Any, many: Any) -> tuple[Any, Any, Any, Any]:
        """Multiplier k: one active thread on all four, each of two active ones on two, or its own thread.

        ``v``: the first active thread for the multipliers 0 and 1, the last one, which may be the same, for 2 and 3.
        """
        hdl = self.hdl
        x_up, w_up = k < 2, k % 2 == 0
        one = hdl.Const(1, 1)
        w_half = v["w"][4:].as_signed() if w_up else hdl.Cat(v["w"][:4], hdl.Const(0, 1)).as_signed()
        alone = (v["x"][4:] if x_up else v["x"][:4], w_half, one if x_up else ~one, one if w_up else ~one)
        paired = self.paired(v, upper=w_up)
        out = [hdl.Mux(pair, p, a) for p, a in zip(paired, alone, strict=True)]
        return tuple(hdl.Mux(many, h, o) for h, o in zip(home, out, strict=True))  # type: ignore[return-value]

    def paired(self, v: Any, upper: bool) -> tuple[Any, Any, Any, Any]:
        """One of a thread's two products while two are active; ``upper``: that of the high half."""
        hdl = self.hdl
        one = hdl.Const(1, 1)
        shift = one if upper else ~one
        by_x = by_w = None
        if self.base != "W":
            w_half = v["w"][4:].as_signed() if upper else hdl.Cat(v["w"][:4], hdl.Const(0, 1)).as_signed()
            by_x = (v["r"], w_half, v["rs"], shift)
        if self.base not in ("S", "A"):
            by_w = (v["x"][4:] if upper else v["x"][:4], v["q"].as_signed(), shift, v["qs"])
        if by_x is None or by_w is None:
            return by_x or by_w  # type: ignore[return-value]
        choose = self.wide(v["w"].as_signed(), True) if self.base == "Aw" else ~self.wide(v["x"], False)
        return tuple(hdl.Mux(choose, a, b) for a, b in zip(by_x, by_w, strict=True))  # type: ignore[return-value]

    # what is added

    def operands(self, x: list[Any], w: list[Any], exact: bool) -> list[tuple[Any, ...]]:
        """What the multipliers take: (factor, factor, shifts of 4 places ...)."""
        if exact or self.config.threads == 1:
            return list(zip(x, w, strict=True))
        return list(self.two(x, w)) if self.config.threads == 2 else list(self.four(x, w))

    def product(self, operands: tuple[Any, ...]) -> Any:
        """One multiplier with its shifts."""
        value = operands[0] * operands[1]
        for shift in operands[2:]:
            value = self.hdl.Mux(shift, value << 4, value)
        return value


def halves(port: Any, threads: int, is_signed: bool) -> list[Any]:
    """A port's elements."""
    parts = [port[8 * t : 8 * t + 8] for t in range(threads)]
    return [part.as_signed() for part in parts] if is_signed else parts


def total_of(values: list[Any]) -> Any:
    """Their sum."""
    total = values[0]
    for value in values[1:]:
        total = total + value
    return total
