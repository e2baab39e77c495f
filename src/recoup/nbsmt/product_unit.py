"""The product unit's gates: what a slot of T operand pairs adds, x_t unsigned or signed and w_t signed, 8 bits each.

Three things in a row:

    decode    which threads are active, each operand's reduced form once, and what goes to which multiplier
    multiply  T small multipliers: narrow x wide with two threads, 4 bits unsigned x 5 bits signed with four
    add       their products, shifted where an operand was reduced, summed exactly

A signed activation takes 5 bits signed, and is cut, and halved where it is alone, 3 places up (port=4: as a weight, 4).
"""

from typing import Any

from recoup.gates.module import amaranth
from recoup.nbsmt.config import NBSMT
from recoup.nbsmt.ports import UNSIGNED, WEIGHT, Port, activation_port


class Gates:
    """The product unit's gates, written with Amaranth into a module ``m``."""

    def __init__(self, m: Any, config: NBSMT, zero: int = UNSIGNED) -> None:
        self.hdl = amaranth("hdl")
        self.m = m
        self.config = config
        self.base = config.policy.removeprefix("S+")
        self.narrow_test = config.policy != "S"
        self.port = activation_port(config, zero)
        # What the shifts of a multiplier's operands are, in places; both operands are cut alike, or each has its own.
        one = (4,) if self.base == "W" else (self.port.shift,)
        mixed = self.base in ("Aw", "aW") and self.port.shift != WEIGHT.shift
        self.places = (self.port.shift, 4) if config.threads == 4 or mixed else one

    def signal(self, value: Any, name: str) -> Any:
        """A named wire that carries a value."""
        wire = self.hdl.Signal(value.shape(), name=name)
        self.m.d.comb += wire.eq(value)
        return wire

    def rounded(self, v: Any, port: Port, collision: Any = None) -> Any:
        """The high bits of v that a port takes, in a collision rounded by the config; carry-out saturates."""
        cut = port.shift
        low, high = v[:cut], v[cut:]
        if self.config.rounding == "nearest":
            up = low[-1] & (low[:-1].any() | high[0])
        elif self.config.rounding == "half_up":
            up = low[-1]
        else:
            up = v[7] & low.any() if port.low else self.hdl.Const(0, 1)
        top = high == port.high
        up = up & ~top if collision is None else up & ~top & collision
        return (high + up)[: 8 - cut]

    def reduced(self, v: Any, port: Port, collision: Any = None) -> tuple[Any, Any]:
        """A reduced operand's bits, as many as the port has, and whether it stands for ``step`` times them."""
        rounded = self.rounded(v, port, collision)
        if not self.narrow_test:
            return rounded, self.hdl.Const(1, 1)
        wide = self.wide(v, port)
        return self.hdl.Mux(wide, rounded, v[: 8 - port.shift]), wide

    def wide(self, v: Any, port: Port) -> Any:
        """Whether v does not fit the port's bits."""
        sign = v[7 - port.shift :]
        return ~((sign == 0) | sign.all()) if port.low else v[8 - port.shift :].any()

    def small(self, bits: Any) -> Any:
        """A reduced activation's bits as a number."""
        return bits.as_signed() if self.port.low else bits

    def half(self, v: Any, port: Port, upper: bool) -> Any:
        """The high or the low half of an operand of 8 bits, which is the high half times ``step`` and the low half."""
        cut = port.shift
        if not port.low:
            return v[cut:] if upper else v[:cut]
        return v[cut:].as_signed() if upper else self.hdl.Cat(v[:cut], self.hdl.Const(0, 1)).as_signed()

    # two threads: multipliers (narrow, wide, shifts): narrow and wide are signed, a shift is 1 bit for its places

    def two(self, x: list[Any], w: list[Any]) -> list[tuple[Any, ...]]:
        """Operands of the two multipliers: an inactive thread's multiplier serves its partner.

        Where neither is active both products are zero whatever is chosen, as each has a factor of zero.
        """
        hdl = self.hdl
        if self.config.policy == "S+A":
            return self.settled(x, w)
        if not self.config.zero_test:
            return [self.colliding(x[t], w[t], x[t], w[t]) for t in range(2)]
        active = [self.signal(x[t].any() & w[t].any(), f"active{t}") for t in range(2)]
        collision = self.signal(active[0] & active[1], "collision")
        found = []
        for t in range(2):
            own_x = self.signal(hdl.Mux(active[t], x[t], x[1 - t]), f"x_of{t}")
            own_w = self.signal(hdl.Mux(active[t], w[t], w[1 - t]), f"w_of{t}")
            narrow, wide, *shifts = self.colliding(x[t], w[t], own_x, own_w)
            alone, whole, *uppers = self.alone(own_x, own_w, upper=t == 0)
            same = self.base in ("S", "A", "W")  # the wide operand does not depend on the collision
            chosen = whole if same else hdl.Mux(collision, wide, whole)
            both = [hdl.Mux(collision, shift, upper) for shift, upper in zip(shifts, uppers, strict=True)]
            found.append((hdl.Mux(collision, narrow, alone), chosen, *both))
        return found

    def settled(self, x: list[Any], w: list[Any]) -> list[tuple[Any, ...]]:
        """The same of S+A, where little waits for a collision; with weights that may be cut this takes more gates.

        A thread's own multiplier takes the same alone as in a collision, but for the rounding up: what fits the port,
        or the high half of what does not. The low half is its inactive partner's. A multiplier that nobody needs stands
        still, at a factor of zero.
        """
        hdl = self.hdl
        # w in halves: mapped to gates so, the element needs 1 % less energy.
        active = [self.signal(x[t].any() & (w[t][:4].any() | w[t][4:].any()), f"active{t}") for t in range(2)]
        own = [self.reduced(x[t], self.port, active[1 - t]) for t in range(2)]
        found = []
        for t in range(2):
            (narrow, shift), (_, cut) = own[t], own[1 - t]
            low = self.signed(self.half(x[1 - t], self.port, upper=False))
            serves = self.signal(cut & ~active[t], f"serves{t}")
            factor = hdl.Mux(active[t], self.signed(self.small(narrow)), low & cut.replicate(len(low)))
            found.append((factor, hdl.Mux(serves, w[1 - t], w[t]), shift & active[t]))
        return found

    def signed(self, bits: Any) -> Any:
        """A number as a signed one."""
        return bits if bits.shape().signed else self.hdl.Cat(bits, self.hdl.Const(0, 1)).as_signed()

    def alone(self, x: Any, w: Any, upper: bool) -> tuple[Any, ...]:
        """One thread on both multipliers: the high and the low half of the operand that is reduced otherwise."""
        shift, rest = self.hdl.Const(int(upper), 1), [self.hdl.Const(0, 1)] * (len(self.places) - 1)
        if self.base == "W":
            return self.half(w, WEIGHT, upper), x, shift
        return self.half(x, self.port, upper), w, shift, *rest

    def colliding(self, x: Any, w: Any, own_x: Any, own_w: Any) -> tuple[Any, ...]:
        """A thread's operands on its own multiplier; ``own``: the same values where it is active."""
        hdl = self.hdl
        if self.base in ("S", "A"):
            r, reduced = self.reduced(x, self.port)
            return self.small(r), own_w, reduced
        q, w_reduced = self.reduced(w, WEIGHT)
        if self.base == "W":
            return q.as_signed(), own_x, w_reduced
        r, x_reduced = self.reduced(x, self.port)
        by_x = self.wide(w, WEIGHT) if self.base == "Aw" else ~self.wide(x, self.port)  # the activation cut, w whole
        wide, narrow = hdl.Mux(by_x, own_w, own_x), hdl.Mux(by_x, self.small(r), q.as_signed())
        if len(self.places) == 2:
            return narrow, wide, by_x & x_reduced, ~by_x & w_reduced
        return narrow, wide, hdl.Mux(by_x, x_reduced, w_reduced)

    # four threads: multipliers (4 bits unsigned or 5 signed, 5 bits signed, shift of the first, of the second)

    def four(self, x: list[Any], w: list[Any]) -> list[tuple[Any, Any, Any, Any]]:
        """Operands of the four multipliers."""
        r, q = [self.reduced(v, self.port) for v in x], [self.reduced(v, WEIGHT) for v in w]
        home = [(self.small(r[t][0]), q[t][0].as_signed(), r[t][1], q[t][1]) for t in range(4)]
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

        plain = [v.as_unsigned() for v in x] if self.port.low else x
        operands = {"x": pick(plain, "x"), "w": pick([v.as_unsigned() for v in w], "w")}
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
        halves = self.half(v["x"], self.port, x_up), self.half(v["w"], WEIGHT, w_up)
        alone = (*halves, one if x_up else ~one, one if w_up else ~one)
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
            by_x = (self.small(v["r"]), self.half(v["w"], WEIGHT, upper), v["rs"], shift)
        if self.base not in ("S", "A"):
            by_w = (self.half(v["x"], self.port, upper), v["q"].as_signed(), shift, v["qs"])
        if by_x is None or by_w is None:
            return by_x or by_w  # type: ignore[return-value]
        choose = self.wide(v["w"], WEIGHT) if self.base == "Aw" else ~self.wide(v["x"], self.port)
        return tuple(hdl.Mux(choose, a, b) for a, b in zip(by_x, by_w, strict=True))  # type: ignore[return-value]

    # what is added

    def operands(self, x: list[Any], w: list[Any], exact: bool) -> list[tuple[Any, ...]]:
        """What the multipliers take: (factor, factor, shifts of `places` ...)."""
        if exact or self.config.threads == 1:
            return list(zip(x, w, strict=True))
        return list(self.two(x, w)) if self.config.threads == 2 else list(self.four(x, w))

    def product(self, operands: tuple[Any, ...]) -> Any:
        """One multiplier with its shifts."""
        value = operands[0] * operands[1]
        for shift, places in zip(operands[2:], self.places, strict=False):
            value = self.hdl.Mux(shift, value << places, value)
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
