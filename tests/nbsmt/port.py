"""A second, independent model of the NB-SMT multiplier: Python integers, one slot at a time, written from the spec.

It shares no code with recoup. Every function takes plain integers.
"""

from fractions import Fraction
from math import floor

PORTS = {"unsigned": (0, 15, 16), 5: (-16, 15, 8), 4: (-8, 7, 16)}
"""Activations: what fits, from and to, and the step of what does not: unsigned, signed on 5 and on 4 bits."""


def rounded(v: int, rounding: str, low: int, high: int, step: int) -> int:
    part = Fraction(v, step)
    if rounding == "nearest":
        steps = round(part)  # Python rounds ties to even
    elif rounding == "half_up":
        steps = floor(part + Fraction(1, 2))
    else:
        steps = abs(v) // step * (1 if v >= 0 else -1)
    return step * min(max(steps, low), high)


def narrow_activation(x: int, policy: str, rounding: str, port: str | int = "unsigned") -> int:
    low, high, step = PORTS[port]
    if low <= x <= high and policy != "S":
        return x
    return rounded(x, rounding, low, high, step)


def narrow_weight(w: int, policy: str, rounding: str) -> int:
    if -8 <= w <= 7 and policy != "S":
        return w
    return rounded(w, rounding, -8, 7, 16)


def slot(pairs: list[tuple[int, int]], policy: str, rounding: str, port: str | int = "unsigned") -> list[int]:
    """What each thread adds in one cycle, given its (activation, weight)."""
    if len(pairs) == 1:
        return [x * w for x, w in pairs]
    zero_test = policy.startswith("S")
    busy = [t for t, (x, w) in enumerate(pairs) if not zero_test or (x != 0 and w != 0)]
    out = []
    for t, (x, w) in enumerate(pairs):
        if t not in busy or len(busy) == 1:
            out.append(x * w)
            continue
        r, q = narrow_activation(x, policy, rounding, port), narrow_weight(w, policy, rounding)
        if len(busy) >= 3:
            out.append(r * q)
            continue
        prefer = policy.replace("S+", "")
        if prefer in ("S", "A"):
            out.append(r * w)
        elif prefer == "W":
            out.append(x * q)
        elif prefer == "Aw":  # a narrow weight frees the activation
            out.append(x * w if -8 <= w <= 7 else r * w)
        else:  # aW: a narrow activation frees the weight
            low, high, _ = PORTS[port]
            out.append(x * w if low <= x <= high else x * q)
    return out


def thread_indices(size: int, threads: int, pairing: str) -> list[list[int | None]]:
    """Per slot, which index of K each thread works on (None: padding)."""
    slots = -(-size // threads)
    table = []
    for s in range(slots):
        row = [t * slots + s if pairing == "halves" else s * threads + t for t in range(threads)]
        table.append([k if k < size else None for k in row])
    return table


def added(total: int, value: int, bits: int | None, overflow: str) -> int:
    """A register after an addition."""
    total += value
    if bits is None:
        return total
    least, most = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    if overflow == "saturate":
        return min(max(total, least), most)
    while total > most:
        total -= 2**bits
    while total < least:
        total += 2**bits
    return total


def matmul(
    x: list[list[int]],
    w: list[list[int]],
    threads: int,
    policy: str,
    rounding: str,
    pairing: str,
    port: str | int = "unsigned",
    bits: int | None = None,
    overflow: str = "saturate",
):
    """(Y, counts): Y as nested lists, counts as in `recoup.nbsmt.statistics`."""
    size, columns = len(w), len(w[0])
    table = thread_indices(size, threads, pairing)
    counts = {"slots": 0, "collisions": 0, "lossy": 0, "active": 0, "busy": 0}
    result = []
    for row in x:
        out = []
        for n in range(columns):
            total = 0
            for indices in table:
                pairs = [(row[k], w[k][n]) if k is not None else (0, 0) for k in indices]
                products = slot(pairs, policy, rounding, port)
                total = added(total, sum(products), bits, overflow)
                active = sum(a != 0 and b != 0 for a, b in pairs)
                counts["slots"] += 1
                counts["collisions"] += active >= 2
                counts["active"] += active
                counts["busy"] += active >= 1
                counts["lossy"] += sum(p != a * b for p, (a, b) in zip(products, pairs, strict=True))
            out.append(total)
        result.append(out)
    return result, counts
