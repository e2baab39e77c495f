"""SGD with momentum and all its mitigations in one pass over memory, as machine code; bits as of `update.Update`.

An element takes the gradient, the newest weight and the velocity, and leaves the next of each, the weight that coming
forward passes will use, and whether the gradient was finite. Nothing that the coming step needs is overwritten, so that
an update counts only when its number does.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from torch import Tensor

from recoup.kernels.llvm import I1, I32, I64, P, declared, loop
from recoup.kernels.memory import address
from recoup.kernels.signature import Kernel, Signature
from recoup.kernels.threads import over_rows
from recoup.kernels.vector import Vector
from recoup.pipeline.layout import Layout
from recoup.pipeline.optimizers import SGDM
from recoup.pipeline.update import Update

CHUNK = 1 << 15  # elements of an entry of the table: what threads share out
# Trained elements from which results pass the caches by: what the next step reads of them it would not find there, and
# a line that is stored to without having been read is fetched first, a third of an update's traffic.
STREAMED = 1 << 17
# A table's entry: addresses of its first element in slot 0 of the ring, in both of two buffers of whatever is kept
# twice (0: is not) and of the live weights (0: they are in place); bytes of a row, elements, the stage and its delay.
ENTRY = ("ring", "row", "depth", "w0", "w1", "v0", "v1", "back0", "back1", "live", "count", "stage", "delay")
COEFFICIENTS = ("size", "shrink", "decay", "momentum", "a", "b", "late", "rate", "ahead", "back", "next")
SHOW = Signature.of(table=P, entries=I64, version=I64)
UPDATE = Signature.of(table=P, gradients=P, coefficients=P, flags=P, version=I64, first=I64, last=I64)


@dataclass(frozen=True, slots=True)
class Form:
    """What an update has to do: a kernel has no branches for what it has not."""

    double: bool
    divided: bool
    shrink: bool
    decay: bool
    compensated: bool
    annealed: bool
    prediction: str  # none, velocity or weight
    back: bool
    streamed: bool


class Native:
    """The update of all stages.

    Args:
        layout: of the parameters, float32 or float64 on the CPU.
        form: what there is to do.
        delays: of every stage.
        rings: every stage's rows.
        newest: both buffers of the newest weights, where the rows hold predictions; else none.
        velocity: both buffers.
        back: both buffers of the backward pass's weights, or none.

    Attributes:
        show: version -> leave the weights of a forward pass begun at it where parameters are copies.
        show_returning: updates -> leave there those of a backward pass after so many.
    """

    def __init__(
        self,
        layout: Layout,
        form: Form,
        delays: Sequence[int],
        rings: Sequence[Tensor],
        newest: Sequence[Sequence[Tensor]],
        velocity: Sequence[Sequence[Tensor]],
        back: Sequence[Sequence[Tensor]],
    ) -> None:
        self.form, self._kernel = form, update_kernel(form)
        size = 8 if form.double else 4
        pieces = [
            (index, place, at, min(CHUNK, place.count - at))
            for index, place in enumerate(layout.places)
            for at in range(0, place.count, CHUNK)
        ]
        table = np.zeros((len(pieces), len(ENTRY)), np.int64)
        for entry, (_, place, at, count) in zip(table, pieces, strict=True):
            s, offset = place.stage, (place.start + at) * size
            ring = rings[s]
            entry[:3] = ring.data_ptr() + offset, ring.shape[1] * size, ring.shape[0]
            for column, pair in ((3, newest), (5, velocity), (7, back)):
                entry[column : column + 2] = [buffer[s].data_ptr() + offset for buffer in pair] or [0, 0]
            entry[10:] = count, s, delays[s]
        self._table = table
        self._owner = np.array([index for index, *_ in pieces], np.int64)
        self._offsets = np.array([at * size for _, _, at, _ in pieces], np.int64)
        self._gradients = np.zeros(len(pieces), np.int64)
        self._flags = np.zeros(len(pieces), np.int32)
        self._coefficients = np.zeros((len(layout.sizes), len(COEFFICIENTS)), np.float64 if form.double else np.float32)
        self._work = len(pieces), sum(count for *_, count in pieces) // max(1, len(pieces))  # entries, elements of one
        self._bound = self._kernel.bind(
            table=address(table),
            gradients=address(self._gradients),
            coefficients=address(self._coefficients),
            flags=address(self._flags),
        )

        self.show, self.show_returning = (
            show_kernel(form, returning).prepare(table=address(table), entries=len(pieces))
            for returning in (False, True)
        )

    def copied(self, index: int, address: int) -> None:
        """Leave the newest weights of a parameter at an address too."""
        mine = self._owner == index
        self._table[mine, ENTRY.index("live")] = address + self._offsets[mine]

    def set(self, name: str, values: float | Sequence[float]) -> None:
        """A coefficient of all stages."""
        self._coefficients[:, COEFFICIENTS.index(name)] = values

    def __call__(self, version: int, gradients: Sequence[Tensor]) -> bool:
        """From a version to the next; whether the gradient, a contiguous tensor a parameter, is finite."""
        where = np.array([g.data_ptr() for g in gradients], np.int64)
        np.add(where[self._owner], self._offsets, out=self._gradients)
        over_rows(lambda first, last: self._bound(version=version, first=first, last=last), *self._work)
        return not self._flags.any()


@cache
def update_kernel(form: Form) -> Kernel:
    """The machine code for what there is to do."""
    module = ir.Module("pipeline_update")
    function = UPDATE.define(module, "update")
    b = function.b
    code = Vector(b, 8 if form.double else 16, form.double)
    with loop(b, function["first"], function["last"]) as entries:
        entry = _entry(code, function["table"], entries.index)
        gradient = b.inttoptr(code.get(function["gradients"], entries.index, I64), P)
        coefficients = b.gep(
            function["coefficients"], [b.mul(entry["stage"], I64(len(COEFFICIENTS)))], source_etype=code.scalar
        )
        scalars = {name: code.get(coefficients, I64(i), code.scalar) for i, name in enumerate(COEFFICIENTS)}
        step = _Step(form, code, {name: code.everywhere(value) for name, value in scalars.items()})
        places = _places(form, b, entry, function["version"])
        nothing = ir.Constant(code.integers, None)
        (broken,) = code.along(
            entry["count"], lambda i, inside, bad: [step(i, inside, bad, gradient, places)], [nothing]
        )
        found = b.zext(code.any(b.icmp_unsigned("!=", broken, nothing)), I32)
        code.put(found, function["flags"], entries.index)
    b.ret_void()
    return Kernel(module, "update", UPDATE)


@cache
def show_kernel(form: Form, returning: bool) -> Kernel:
    """The machine code that copies a version's weights to where parameters are copies."""
    module = ir.Module("pipeline_show")
    function = SHOW.define(module, "show")
    b, version = function.b, function["version"]
    code = Vector(b, 8 if form.double else 16, form.double)
    with loop(b, I64(0), function["entries"]) as entries:
        entry = _entry(code, function["table"], entries.index)
        live = b.inttoptr(entry["live"], P)
        if returning:
            source = _places(form, b, entry, version)["back" if form.back else "w"]
        else:
            late = b.sub(version, entry["delay"])
            source = _row(b, entry, b.select(b.icmp_signed(">", late, I64(0)), late, I64(0)))
        with b.if_then(b.icmp_unsigned("!=", entry["live"], I64(0))):
            code.along(entry["count"], lambda i, inside: _copied(code, source, live, i, inside))
    b.ret_void()
    return Kernel(module, "show", SHOW, varying=("version",))


def _copied(code: Vector, source: Any, live: Any, index: Any, inside: Any) -> list[Any]:
    code.store(code.load(source, index, inside), live, index, inside)
    return []


def _entry(code: Vector, table: Any, index: Any) -> dict[str, Any]:
    """An entry of the table."""
    start = code.b.gep(table, [code.b.mul(index, I64(len(ENTRY)))], source_etype=I64)
    return {name: code.get(start, I64(i), I64) for i, name in enumerate(ENTRY)}


def _row(b: ir.IRBuilder, entry: dict[str, Any], number: Any) -> Any:
    """Where a version lies in the ring."""
    return b.inttoptr(b.add(entry["ring"], b.mul(b.urem(number, entry["depth"]), entry["row"])), P)


def _places(form: Form, b: ir.IRBuilder, entry: dict[str, Any], version: Any) -> dict[str, Any]:
    """The addresses of a version's numbers, and of the next one's (`+`)."""
    following = b.add(version, I64(1))
    odd = b.trunc(version, I1)
    rows = [_row(b, entry, number) for number in (version, following)]

    def pair(one: str, other: str) -> list[Any]:
        first, second = (b.inttoptr(entry[name], P) for name in (one, other))
        return [b.select(odd, second, first), b.select(odd, first, second)]

    found: dict[str, Any] = dict(zip(("v", "v+"), pair("v0", "v1"), strict=True))
    found |= dict(zip(("w", "w+"), rows if form.prediction == "none" else pair("w0", "w1"), strict=True))
    found["row+"] = rows[1]
    if form.back:
        found |= dict(zip(("back", "back+"), pair("back0", "back1"), strict=True))
    found["live"], found["copied"] = b.inttoptr(entry["live"], P), b.icmp_unsigned("!=", entry["live"], I64(0))
    return found


class _Step:
    """What happens to a vector of elements.

    Args:
        form: what there is to do.
        code: to write it with.
        c: the stage's coefficients, in every lane.
    """

    def __init__(self, form: Form, code: Vector, c: dict[str, Any]) -> None:
        self.form, self.code, self.c = form, code, c

    def __call__(self, index: Any, inside: Any, bad: Any, gradient: Any, places: dict[str, Any]) -> Any:
        form, code, c, b = self.form, self.code, self.c, self.code.b
        g, w, v = (code.load(address, index, inside) for address in (gradient, places["w"], places["v"]))
        exponent = _exponent(form.double)
        bits = b.and_(code.bits(g), code.constant(exponent, code.integers))
        bad = b.or_(bad, b.sext(b.icmp_unsigned("==", bits, code.constant(exponent, code.integers)), code.integers))
        g = b.fdiv(g, c["size"]) if form.divided else g
        g = b.fmul(g, c["shrink"]) if form.shrink else g
        g = self._fma(c["decay"], w, g) if form.decay else g
        v = b.fadd(b.fmul(v, c["momentum"]), g)
        change = b.fadd(b.fmul(v, c["a"]), b.fmul(g, c["b"])) if form.compensated else v
        change = b.fdiv(change, c["late"]) if form.annealed else change
        following = self._fma(change, c["rate"], w)
        self._put(v, places["v+"], index, inside)
        self._put(following, places["w+"], index, inside)
        with b.if_then(places["copied"]):
            code.store(following, places["live"], index, inside)
        if form.prediction == "velocity":
            self._put(self._ahead(v, "ahead", following), places["row+"], index, inside)
        elif form.prediction == "weight":
            ahead = b.fadd(b.fmul(b.fsub(following, w), c["ahead"]), following)
            self._put(ahead, places["row+"], index, inside)
        if form.back:
            self._put(self._ahead(v, "back", following), places["back+"], index, inside)
        return bad

    def _put(self, value: Any, address: Any, index: Any, inside: Any) -> None:
        """Store a result. Whoever waits for a thread sees what it streamed: waiting takes locked instructions."""
        if self.form.streamed and inside is None:
            self.code.stream(value, address, index)
        else:
            self.code.store(value, address, index, inside)

    def _ahead(self, v: Any, horizon: str, w: Any) -> Any:
        """w - eta T v."""
        b = self.code.b
        return b.fadd(b.fmul(b.fmul(v, self.c[horizon]), self.c["next"]), w)

    def _fma(self, x: Any, y: Any, z: Any) -> Any:
        kind = self.code.vector
        name = f"llvm.fma.v{self.code.lanes}f{64 if self.form.double else 32}"
        return self.code.b.call(declared(self.code.b, name, kind, [kind] * 3), [x, y, z])


def _exponent(double: bool) -> int:
    """The bits that are all set in what is not finite."""
    return 0x7FF << 52 if double else 0xFF << 23


def form_of(rule: SGDM, update: Update, layout: Layout, update_size: int, clipped: bool) -> Form:
    """What an update has to do."""
    how = update.mitigation
    kind = {"velocity": "velocity", "spectrain": "velocity", "weight": "weight"}.get(how.prediction, "none")
    return Form(
        layout.dtype == torch.float64,
        update_size > 1,
        how.shrink != 1 or clipped,
        rule.weight_decay != 0,
        rule.spikes(update.late) is not None,
        how.annealing != 0,
        kind if update.predicts else "none",
        update.turns,
        sum(layout.sizes) >= STREAMED,
    )
