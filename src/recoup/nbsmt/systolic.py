"""NB-SMT's output-stationary array: processing elements, skew registers, and the control that drains tile after tile.

Row r of operands enters r clocks late, column c c clocks late; ``first`` travels with the activations of its row. With
I = max(reduction, rows), tile t's slots enter at clock t I and its end token (``first`` once more) at t I + reduction:
with the next tile's first slot where reduction >= rows, else alone with zero operands. Slots of the gap are zeros. A
finished sum goes into the drain register, which moves down a column: row r shifts exactly r times, from ``rows`` clocks
after row 0 of its column was loaded. Clock edges from the first operand to the last result are those of
`recoup.network.systolic.layer_cycles` with overlap, plus the latency, once a matrix product.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from recoup.errors import RecoupError
from recoup.fields import integer
from recoup.gates.module import Expected, Inputs, Module, Port, amaranth, element_type, pattern, signed
from recoup.nbsmt import element as parts
from recoup.nbsmt.config import NBSMT
from recoup.network.systolic import Array, layer_cycles

LARGEST = 4096
"""Processing elements of one generated array; beyond them the text alone takes gigabytes."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """When what enters an array: one matrix product of ``tiles`` tiles, each of ``reduction`` slots.

    Attributes:
        rows, cols: of the array.
        reduction: slots of a tile.
        tiles: how many.
        latency: clock edges between an operand at the ports and its product in the accumulator, less one.
    """

    rows: int
    cols: int
    reduction: int
    tiles: int
    latency: int

    @property
    def interval(self) -> int:
        """Clocks between the beginnings of two tiles."""
        return max(self.reduction, self.rows)

    @property
    def end(self) -> int:
        """The clock in which the last end token enters."""
        return (self.tiles - 1) * self.interval + self.reduction

    @property
    def loaded(self) -> int:
        """Clocks from a token at the ports to the step in which row 0's drain register of column 0 shows the sum."""
        return self.latency + 1

    @property
    def steps(self) -> int:
        """Clocks until the last result is shown, and one."""
        return self.end + self.loaded + self.cols - 1 + 2 * self.rows

    def shown(self, tile: int, row: int, column: int) -> int:
        """The step in which the bottom of a column shows a tile's result: the last row comes first."""
        token = tile * self.interval + self.reduction
        return token + self.loaded + column + self.rows - 1 + (self.rows - 1 - row)

    def first(self) -> np.ndarray:
        """[steps]: ``first`` of row 0."""
        values = np.zeros(self.steps, bool)
        values[0] = True  # later tiles begin at an end token: what gap slots add is zero
        values[[t * self.interval + self.reduction for t in range(self.tiles)]] = True
        return values

    def shift(self) -> np.ndarray:
        """[steps, rows]: the shift signals at the left edge, per row."""
        values = np.zeros((self.steps, self.rows), bool)
        for tile in range(self.tiles):
            base = tile * self.interval + self.reduction + self.loaded + self.rows - 2
            for row in range(self.rows):
                values[base : base + row, row] = True
        return values


def build(config: NBSMT, options: parts.Options, array: Any) -> Module:
    """The array of a config's processing elements with its skew registers.

    Raises:
        RecoupError: no two sizes, more than `LARGEST` elements, or elements without drain register.
    """
    try:
        rows, cols = array
    except (TypeError, ValueError):
        raise RecoupError(
            f"nbsmt.rtl.build(array={array!r}): array must be rows and columns, such as (16, 16)"
        ) from None
    rows = integer("nbsmt.rtl.build", "array rows", rows, (1, LARGEST))
    cols = integer("nbsmt.rtl.build", "array columns", cols, (1, LARGEST))
    if rows * cols > LARGEST:
        raise RecoupError(
            f"nbsmt.rtl.build(array={array!r}): {rows * cols} processing elements; at most {LARGEST} are generated: "
            "measure one element and multiply"
        )
    if not options.drain:
        raise RecoupError("nbsmt.rtl.build(drain=False): an array's results leave through drain registers")
    element = parts.element(config, options)
    latency = element.latency
    steps = Schedule(rows, cols, max(2, rows - 1), 3, latency)
    return Module(
        name=f"{element.name.removesuffix('pe')}array_{rows}x{cols}",
        title=f"{element.title}: {rows} x {cols} array",
        ports=_ports(config.threads, rows, cols, options),
        elaborate=lambda m, port: _elaborate(m, port, element, rows, cols),
        expected=lambda inputs: expected(inputs, config, options, steps),
        latency=latency,
        steps=steps.steps,
        control=lambda n: _control(steps, n, begun=True),
        cleared=_cleared(rows, cols),
        presets=tuple(
            Port(preset_of(pe), "in", options.accumulator_bits, "the accumulator before the run", signed=True)
            for _, _, pe in _places(rows, cols)
        ),
        protocol=_protocol(rows, cols, latency),
        work=rows * cols * config.threads,
        feed=lambda operands, lanes, generator: feed(
            operands, lanes, generator, config.threads, rows, cols, latency, options.zero
        ),
        units=(element,),
        facts={**element.facts, "rows": rows, "columns": cols},
    )


def _places(rows: int, cols: int) -> list[tuple[int, int, str]]:
    """Row, column and name of every element."""
    return [(r, c, f"pe_{r}_{c}") for r in range(rows) for c in range(cols)]


def _cleared(rows: int, cols: int) -> tuple[str, ...]:
    """Registers in front of the accumulators. Those that an element passes on have the name of the wire behind them,
    the last of a row's or column's skew that of the element's port."""
    names = (*parts.CLEARED, "x", "w", "first")
    inside = (f"{pe}.{name}" for _, _, pe in _places(rows, cols) for name in names)
    return ("skew_", "x_next_", "w_next_", "first_next_", *inside)


def preset_of(pe: str) -> str:
    """The name of an element's accumulator in the array's netlist."""
    return f"{pe}.accumulator"


def cycles(M: int, C: int, N: int, module: Module, *, taps: int = 1, threads: int = 1) -> int:
    """Clock edges of one matrix product on a built array, its latency included."""
    array = Array(module.facts["rows"], module.facts["columns"], latency=module.latency)
    return layer_cycles(M, C, N, threads, array, taps=taps)


def _ports(T: int, rows: int, cols: int, options: parts.Options) -> tuple[Port, ...]:
    x, w = parts.operand_ports(T, options.zero)
    rows_alike = {"parts": T * rows, "signed": x.signed, "narrow": x.narrow, "edges": x.edges}
    return (
        Port("x", "in", x.width * rows, "a slot of every row, row 0 lowest", **rows_alike),
        Port("w", "in", w.width * cols, "a slot of every column", True, T * cols, 4, w.edges),
        Port("first", "in", 1, "a sum begins with these operands; the one before is finished"),
        _shift_port(rows),
        Port("y", "out", options.accumulator_bits * cols, "the bottom drain registers, by column", True, cols),
    )


def _shift_port(rows: int) -> Port:
    return Port("shift", "in", rows, "by row: drain registers move down")


def _protocol(rows: int, cols: int, latency: int) -> dict[str, Any]:
    return {
        "operands": "row r and column c of a slot stand at the ports in the same clock; the array skews them itself",
        "tiles": f"tile t begins at clock t I, I = max(reduction, {rows}); its end token, first alone or with the next "
        "tile's first slot, stands at t I + reduction; slots between are zeros. Tile 0's first slot has first too, a "
        "later one's only together with an end token: first again would drain a sum of nothing",
        "shift": f"row r is high for r clocks from t I + reduction + latency + {rows} - 1",
        "results": f"column c shows row r of tile t at clock t I + reduction + latency + c + 2 * {rows} - 1 - r; "
        "row 0's stays until the next tile's",
        "latency": f"{latency}: clock edges beyond those of the cycle formula, once a matrix product",
        "size": f"{rows} x {cols}",
    }


def _elaborate(m: Any, port: Any, element: Module, rows: int, cols: int) -> None:
    """Skew registers around a grid of elements."""
    hdl = amaranth("hdl")
    T = element.port("x").parts
    bits = element.port("drain").width

    def late(value: Any, clocks: int, name: str) -> Any:
        for i in range(clocks):
            value = parts.delayed(m, hdl, value, f"{name}_{i}")
        return value

    rights = []
    for r in range(rows):
        x = late(port.x[8 * T * r : 8 * T * (r + 1)], r, f"skew_x{r}")
        rights.append([x, late(port.first, r, f"skew_first{r}"), port.shift[r]])
    downs = []
    for c in range(cols):
        downs.append([late(port.w[8 * T * c : 8 * T * (c + 1)], c, f"skew_w{c}"), hdl.Const(0, bits)])
    for r in range(rows):
        for c in range(cols):
            signals = {p.name: hdl.Signal(p.width, name=f"{p.name}_{r}_{c}") for p in element.outputs}
            x, first, shift = rights[r]
            w, drain = downs[c]
            given = {"x": x, "w": w, "first": first, "shift": shift, "drain": drain}
            wired = {f"i_{name}": value for name, value in given.items()}
            wired |= {f"o_{name}": signal for name, signal in signals.items()}
            setattr(m.submodules, f"pe_{r}_{c}", hdl.Instance(element.name, i_clk=hdl.ClockSignal(), **wired))
            rights[r] = [signals["x_next"], signals["first_next"], signals["shift_next"]]
            downs[c] = [signals["w_next"], signals["drain_next"]]
    m.d.comb += port.y.eq(hdl.Cat(*(drain for _, drain in downs)))


def _control(schedule: Schedule, steps: int, *, begun: bool = False) -> Inputs:
    """The signals of a run; one that has ``begun`` goes on with sums that stand in the accumulators, so that their
    upper bits carry: three tiles of a few slots would never reach them."""
    shift = schedule.shift() @ (1 << np.arange(schedule.rows, dtype=object))
    kind = element_type(_shift_port(schedule.rows))
    first = schedule.first().astype(np.uint64)
    first[0] &= not begun
    found = {"first": first, "shift": shift.astype(kind)}
    return {name: values[:steps] for name, values in found.items()}


def expected(inputs: Inputs, config: NBSMT, options: parts.Options, schedule: Schedule) -> Mapping[str, Expected]:
    """Every tile's results at the bottom, as sums of its slots; the last stays there after the run."""
    T, rows, cols = config.threads, schedule.rows, schedule.cols
    x = parts.activations(inputs["x"], options.zero).reshape(*inputs["x"].shape[:2], rows, T)
    w = signed(inputs["w"], 8).reshape(*inputs["w"].shape[:2], cols, T)
    lanes = x.shape[1]
    values = np.zeros((schedule.steps, lanes, cols), np.uint64)
    known = np.zeros((schedule.steps, cols), bool)
    for tile in range(schedule.tiles):
        token = tile * schedule.interval + schedule.reduction
        slots = range(max(0, token - schedule.interval) if tile else 0, token)
        for r in range(rows):
            for c in range(cols):
                total: Any = sum(parts.slot_sum(x[s, :, r], w[s, :, c], config, options) for s in slots)
                if not tile and not inputs["first"][0, 0]:
                    total = total + signed(inputs[preset_of(f"pe_{r}_{c}")][0], options.accumulator_bits)
                at = schedule.shown(tile, r, c)
                values[at, :, c] = pattern(np.asarray(total), options.accumulator_bits)
                known[at, c] = True
    for c in range(cols):  # nothing else shows whether the bottom row's drain registers hold
        last = schedule.shown(schedule.tiles - 1, 0, c)
        values[last + 1 :, :, c] = values[last, :, c]
        known[last + 1 :, c] = True
    at = np.flatnonzero(known.any(axis=1)).tolist()  # columns show a row's results one step after the other
    shown = values[at][:, :, 0] if cols == 1 else values[at]
    return {"y": Expected(at, shown, known[at])}


def feed(
    operands: tuple[np.ndarray, ...],
    lanes: int,
    generator: np.random.Generator,
    threads: int,
    rows: int,
    cols: int,
    latency: int,
    zero: int,
) -> Inputs:
    """Tiles of a layer, x uint8 (signed: int8) [M, T, S], w int8 [T, S, N]: a lane is a tile of outputs, all its slots.

    Raises:
        RecoupError: as `recoup.nbsmt.element.layer_operands`.
    """
    x, w = parts.layer_operands(operands, threads, zero)
    slots = x.shape[2]
    schedule = Schedule(rows, cols, slots, 1, latency)
    found_x = np.zeros((schedule.steps, lanes, rows, x.shape[1]), np.uint64)
    found_w = np.zeros((schedule.steps, lanes, cols, x.shape[1]), np.uint64)
    picked_x = generator.integers(0, x.shape[0], (lanes, rows))
    picked_w = generator.integers(0, w.shape[2], (lanes, cols))
    found_x[:slots] = pattern(x[picked_x].astype(np.int64), 8).transpose(3, 0, 1, 2)
    found_w[:slots] = pattern(w[:, :, picked_w].astype(np.int64), 8).transpose(1, 2, 3, 0)
    control = {
        name: np.repeat(values[:, None], lanes, 1) for name, values in _control(schedule, schedule.steps).items()
    }
    flat = {"x": found_x.reshape(schedule.steps, lanes, -1), "w": found_w.reshape(schedule.steps, lanes, -1)}
    return {**{n: v[:, :, 0] if v.shape[2] == 1 else v for n, v in flat.items()}, **control}
