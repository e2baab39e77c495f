"""What a library's cells are: logic, capacitances, timing and power tables, in SI units."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import numpy as np

from recoup.errors import RecoupError
from recoup.silicon import yosys
from recoup.silicon.liberty import File, Group
from recoup.silicon.logic import Logic, parse
from recoup.storage.digest import of_file

_UNITS = {"f": 1e-15, "p": 1e-12, "n": 1e-9, "u": 1e-6, "m": 1e-3, "": 1.0, "k": 1e3}


@dataclass(frozen=True, slots=True)
class Table:
    """A look-up table in SI units: values [len(slews), len(loads)], linear between and beyond its points."""

    slews: np.ndarray
    loads: np.ndarray
    values: np.ndarray
    data_first: bool = False

    def order(self, clock: float, data: float) -> tuple[float, float]:
        """A constraint's two slews in the order of its axes."""
        return (data, clock) if self.data_first else (clock, data)

    def at(self, slew: float, load: float) -> float:
        """The value at a slew (s) and a load (F)."""
        i, u = _place(self.slews, slew)
        j, v = _place(self.loads, load)
        grid = self.values
        if len(self.slews) == 1:
            return float(grid[0, j] * (1 - v) + grid[0, j + 1] * v) if len(self.loads) > 1 else float(grid[0, 0])
        if len(self.loads) == 1:
            return float(grid[i, 0] * (1 - u) + grid[i + 1, 0] * u)
        low = grid[i, j] * (1 - v) + grid[i, j + 1] * v
        high = grid[i + 1, j] * (1 - v) + grid[i + 1, j + 1] * v
        return float(low * (1 - u) + high * u)


def _place(axis: np.ndarray, value: float) -> tuple[int, float]:
    if len(axis) == 1:
        return 0, 0.0
    index = int(np.clip(np.searchsorted(axis, value, "right") - 1, 0, len(axis) - 2))
    return index, float((value - axis[index]) / (axis[index + 1] - axis[index]))


@dataclass(frozen=True, slots=True)
class Arc:
    """From an input to an output: delays and slews of the output's rise and fall, None where it has no such edge.

    ``sense``: positive_unate, negative_unate or non_unate; ``edge``: whether a clock's rising edge starts it.
    """

    source: str
    target: str
    sense: str
    edge: bool
    rise: Table | None
    fall: Table | None
    rise_slew: Table | None
    fall_slew: Table | None


@dataclass(frozen=True, slots=True)
class Power:
    """Internal energy of a pin's rise and fall; ``when`` is a condition on the other pins, ``related`` the cause."""

    pin: str
    related: str
    when: Logic | None
    rise: Table | None
    fall: Table | None


@dataclass(frozen=True, slots=True)
class FlipFlop:
    """A flip-flop's inside: clock pin, its next state, what clears and presets it, and the state's two names."""

    clock: str
    next_state: Logic
    clear: Logic | None
    preset: Logic | None
    state: str
    inverse: str


@dataclass(frozen=True, slots=True)
class Cell:
    """A cell, in SI units; area in the library's own."""

    name: str
    area: float
    leakage: float
    capacitance: dict[str, float]
    outputs: dict[str, Logic]
    flip_flop: FlipFlop | None
    arcs: tuple[Arc, ...]
    setup: dict[str, tuple[Table | None, Table | None]]
    power: tuple[Power, ...]


class Library:
    """One or several Liberty files of one process that are read together.

    Args:
        paths: the files; those that end with .gz are unpacked into the cache.

    Raises:
        RecoupError: a file that is none, is broken, or whose cells cannot make the hardware: an inverter, a two-input
            NAND or NOR, and a flip-flop on a rising clock must be there.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        if not paths:
            raise RecoupError("liberty: no file is named")
        self.paths = yosys.plain(paths)
        self.names = tuple(Path(path).name for path in paths)
        self.digests = tuple(of_file(path) for path in self.paths)
        self.files = tuple(File(path) for path in self.paths)
        self._cells: dict[str, Cell] = {}
        for file in self.files:
            if "time_unit" not in file.head.values or "capacitive_load_unit" not in file.head.values:
                raise RecoupError(f"liberty: {file.path.name}: time_unit or capacitive_load_unit is missing")
        if not any("ff" in file.text and re.search(r"\bff\s*\(", file.text) for file in self.files):
            raise RecoupError(
                f"liberty: {', '.join(self.names)}: no cell is a flip-flop (a group ff); a library that is split over "
                "files needs all of them"
            )

    def __contains__(self, name: str) -> bool:
        return any(name in file.places for file in self.files)

    def cell(self, name: str) -> Cell:
        """A cell by name.

        Raises:
            RecoupError: there is none, or what it needs is missing.
        """
        if name not in self._cells:
            file = next((file for file in self.files if name in file.places), None)
            if file is None:
                raise RecoupError(f"liberty: {', '.join(self.names)}: has no cell {name!r}")
            self._cells[name] = _Reader(file).cell(name)
        return self._cells[name]

    @cached_property
    def voltage(self) -> float:
        """The nominal voltage, V."""
        return self.files[0].head.number("nom_voltage")

    @cached_property
    def nand2(self) -> float:
        """The area of the smallest two-input NAND, the unit of gate counts.

        Raises:
            RecoupError: the library has none.
        """
        function = {"not(and(A,B))", "not(and(B,A))", "or(not(A),not(B))", "or(not(B),not(A))"}
        for file in self.files:
            found = [name for name in file.places if re.search(r"nand2", name, re.IGNORECASE)]
            areas = []
            for name in found:
                cell = self.cell(name)
                inputs = tuple(cell.capacitance)
                if len(inputs) == 2 and len(cell.outputs) == 1:
                    text = _written(next(iter(cell.outputs.values())), dict(zip(inputs, "AB", strict=True)))
                    if text in function:
                        areas.append(cell.area)
            if areas:
                return min(areas)
        raise RecoupError(f"liberty: {', '.join(self.names)}: has no two-input NAND (a cell whose name has nand2)")

    @property
    def wire_load(self) -> str:
        """The name of the library's default wire load; "" where it has none."""
        return str(self.files[0].head.values.get("default_wire_load", ""))

    def wire_capacitance(self, fanout: np.ndarray) -> np.ndarray:
        """F of nets by their fan-out, from the default wire load: capacitance times a length that is a table of it.

        Raises:
            RecoupError: the library names none.
        """
        head = self.files[0].head
        found = [g for g in head.all("wire_load") if g.args[0] == self.wire_load]
        if not found:
            raise RecoupError(f"liberty: {self.names[0]}: names no default wire load; give wires as farads per fan-out")
        rows = found[0].values.get("fanout_length", ())
        table = np.array([(0.0, 0.0), *((float(row[0]), float(row[1])) for row in rows)])
        lengths = np.interp(fanout, table[:, 0], table[:, 1])
        beyond = fanout > table[-1, 0]
        lengths[beyond] += (fanout[beyond] - table[-1, 0]) * found[0].number("slope", 0.0)
        return lengths * found[0].number("capacitance") * _Reader(self.files[0]).farad


def _written(tree: Logic, names: dict[str, str]) -> str:
    if isinstance(tree, tuple):
        return f"{tree[0]}({','.join(_written(part, names) for part in tree[1:])})"
    return names.get(tree, tree) if isinstance(tree, str) else str(tree)


@cache
def library(paths: tuple[Path, ...]) -> Library:
    """A library that is read once a process."""
    return Library(paths)


class _Reader:
    """Makes cells of one file's groups."""

    def __init__(self, file: File) -> None:
        self.file = file
        head = file.head
        self.time = _unit(str(head.values["time_unit"]), "s", file.path.name)
        amount, prefix = head.values["capacitive_load_unit"]
        self.farad = float(amount) * _UNITS[str(prefix).strip().lower().removesuffix("f")]
        volt = _unit(str(head.values.get("voltage_unit", "1V")), "v", file.path.name)
        self.energy = self.farad * volt * volt
        self.watt = _unit(str(head.values.get("leakage_power_unit", "1nW")), "w", file.path.name)
        self.templates = {group.args[0]: group for group in head.groups if group.args}

    def cell(self, name: str) -> Cell:
        """One cell.

        Raises:
            RecoupError: its area is missing.
        """
        group = self.file.cell(name)
        if "area" not in group.values:
            raise RecoupError(f"liberty: {self.file.path.name}: cell {name}: area is missing")
        pins = {pin.args[0]: pin for pin in group.all("pin")}
        outputs = {n: p for n, p in pins.items() if p.values.get("direction") == "output"}
        inputs = {n: p for n, p in pins.items() if p.values.get("direction") == "input"}
        powers = [power for n, p in pins.items() for power in self._powers(n, p)]
        return Cell(
            name=name,
            area=group.number("area"),
            leakage=self._leakage(group),
            capacitance={n: p.number("capacitance", 0.0) * self.farad for n, p in inputs.items()},
            outputs={n: parse(p.values["function"]) for n, p in outputs.items() if "function" in p.values},
            flip_flop=self._flip_flop(group),
            arcs=tuple(arc for n, p in outputs.items() for arc in self._arcs(n, p)),
            setup={n: found for n, p in inputs.items() if (found := self._setup(p))},
            power=tuple(powers),
        )

    def _leakage(self, group: Group) -> float:
        if "cell_leakage_power" in group.values:
            return group.number("cell_leakage_power") * self.watt
        states = [part for part in group.all("leakage_power") if "when" in part.values] or group.all("leakage_power")
        pins: dict[str, list[float]] = {}
        for part in states:
            pins.setdefault(str(part.values.get("related_pg_pin", "")), []).append(part.number("value"))
        return sum(float(np.mean(values)) for values in pins.values()) * self.watt

    def _flip_flop(self, group: Group) -> FlipFlop | None:
        ff = group.one("ff")
        if ff is None:
            return None
        clock = str(ff.values.get("clocked_on", "")).strip(" ()")
        given = {name: parse(str(ff.values[name])) for name in ("clear", "preset") if name in ff.values}
        return FlipFlop(
            clock, parse(str(ff.values["next_state"])), given.get("clear"), given.get("preset"), ff.args[0], ff.args[1]
        )

    def _arcs(self, target: str, pin: Group) -> list[Arc]:
        arcs = []
        for timing in pin.all("timing"):
            kind = str(timing.values.get("timing_type", "combinational"))
            if kind not in ("combinational", "rising_edge", "combinational_rise", "combinational_fall"):
                continue
            names = ("cell_rise", "cell_fall", "rise_transition", "fall_transition")
            rise, fall, rise_slew, fall_slew = (self._table(timing.one(name), self.time) for name in names)
            sense = str(timing.values.get("timing_sense", "non_unate"))
            for source in str(timing.values.get("related_pin", "")).split():
                arcs.append(Arc(source, target, sense, kind == "rising_edge", rise, fall, rise_slew, fall_slew))
        return arcs

    def _setup(self, pin: Group) -> tuple[Table | None, Table | None] | None:
        for timing in pin.all("timing"):
            if str(timing.values.get("timing_type")) == "setup_rising":
                tables = (timing.one("rise_constraint"), timing.one("fall_constraint"))
                return tuple(self._table(table, self.time, constraint=True) for table in tables)  # type: ignore
        return None

    def _powers(self, name: str, pin: Group) -> list[Power]:
        found = []
        for power in pin.all("internal_power"):
            when = parse(str(power.values["when"])) if "when" in power.values else None
            both = power.one("power")
            rise = self._table(power.one("rise_power") or both, self.energy)
            fall = self._table(power.one("fall_power") or both, self.energy)
            found.append(Power(name, str(power.values.get("related_pin", "")), when, rise, fall))
        return found

    def _table(self, group: Group | None, unit: float, constraint: bool = False) -> Table | None:
        if group is None or "values" not in group.values:
            return None
        template = self.templates.get(group.args[0]) if group.args else None
        rows = [_numbers(text) for text in group.values["values"]]
        flat = np.array([value for row in rows for value in row]) * unit
        axes: list[np.ndarray] = []
        kinds: list[str] = []
        for i in (1, 2):
            found = group.values.get(f"index_{i}") or (template.values.get(f"index_{i}") if template else None)
            if found is None:
                continue
            axes.append(np.array(_numbers(found if isinstance(found, str) else " ".join(found))))
            kinds.append(str(template.values.get(f"variable_{i}", "")) if template else "")
        if not axes:
            return Table(np.zeros(1), np.zeros(1), flat.reshape(1, 1))
        loads = [i for i, kind in enumerate(kinds) if "capacitance" in kind]
        grid = flat.reshape([len(axis) for axis in axes])
        if len(axes) == 1:
            if loads:
                return Table(np.zeros(1), axes[0] * self.farad, grid.reshape(1, -1))
            return Table(axes[0] * self.time, np.zeros(1), grid.reshape(-1, 1))
        if constraint:
            return Table(axes[0] * self.time, axes[1] * self.time, grid, kinds[0].startswith("constrained"))
        if loads == [0]:
            axes, grid = axes[::-1], grid.T
        return Table(axes[0] * self.time, axes[1] * self.farad, grid)


def _numbers(text: str) -> list[float]:
    return [float(part) for part in re.split(r"[,\s]+", text.replace("\\", " ").strip()) if part]


def _unit(text: str, symbol: str, file: str) -> float:
    match = re.fullmatch(r"\s*([\d.]+)\s*([a-z]*)\s*", text, re.IGNORECASE)
    prefix = match.group(2).lower().removesuffix(symbol) if match else "?"
    if match is None or prefix not in _UNITS:
        raise RecoupError(f"liberty: {file}: {text!r} is no unit of {symbol}")
    return float(match.group(1)) * _UNITS[prefix]
