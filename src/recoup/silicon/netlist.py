"""A mapped netlist as word operations: yosys's JSON becomes a program over 64 lanes a word.

Net 0 is constant zero, net 1 constant one. `Netlist.run` simulates with zero delay.
"""

from collections import defaultdict, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from recoup.errors import RecoupError
from recoup.gates.module import Inputs, Module
from recoup.silicon import kernels
from recoup.silicon.cells import FlipFlop, Library
from recoup.silicon.kernels import COPY, OPERATIONS
from recoup.silicon.logic import Logic, parse
from recoup.silicon.logic import names as used
from recoup.silicon.words import bits

_PLAIN: dict[str, tuple[str, ...]] = {
    "$_BUF_": ("A", "A"),
    "$_NOT_": ("A", "!A"),
    "$_AND_": ("AB", "A & B"),
    "$_NAND_": ("AB", "!(A & B)"),
    "$_OR_": ("AB", "A | B"),
    "$_NOR_": ("AB", "!(A | B)"),
    "$_XOR_": ("AB", "A ^ B"),
    "$_XNOR_": ("AB", "!(A ^ B)"),
    "$_MUX_": ("ABS", "(A & !S) | (B & S)"),
}
_PLAIN_FLIP_FLOP = FlipFlop("C", "D", None, None, "IQ", "IQN")


@dataclass(frozen=True, slots=True)
class Gate:
    """One output of a combinational cell: its cell's name and kind, pins' nets, the output's pin, net and function."""

    name: str
    kind: str
    pins: dict[str, int]
    output: str
    target: int
    function: Logic


@dataclass(frozen=True, slots=True)
class Register:
    """A flip-flop: its cell's name and kind, pins' nets, what it is loaded with, the net of its state, its nets by
    output pin."""

    name: str
    kind: str
    pins: dict[str, int]
    next_state: int
    state: int
    outputs: dict[str, int]
    clock: str


@dataclass(slots=True)
class Netlist:
    """The program and what it stands for.

    Attributes:
        nets: how many values a step has, scratch included.
        gates: in the order of evaluation.
        program: rows (operation, target, a, b, c).
        first: row of ``program`` at which a gate begins, one more at the end; gates, then what registers need.
        inputs, outputs: nets of every port, lowest bit first.
        names: net -> its name in the design, where it has one.
        registered: nets of the module's presets, lowest bit first.
        cleared: nets of registers that begin with zero.
        probed: nets of the module's probes, lowest bit first.
        held: nets of the module's registers of sums, of those that are still there.
    """

    nets: int
    gates: list[Gate]
    registers: list[Register]
    program: np.ndarray
    first: np.ndarray
    inputs: dict[str, list[int]]
    outputs: dict[str, list[int]]
    names: dict[int, str] = field(default_factory=dict)
    registered: dict[str, list[int]] = field(default_factory=dict)
    cleared: list[int] = field(default_factory=list)
    probed: dict[str, list[int]] = field(default_factory=dict)
    held: dict[str, list[int]] = field(default_factory=dict)
    library: Library | None = None

    def run(self, inputs: np.ndarray, initial: np.ndarray) -> np.ndarray:
        """Outputs of every step, and probes behind them.

        Args:
            inputs: [steps, input bits, words] in the ports' order.
            initial: the registers' states before the first step, [registers, words].

        Returns:
            [steps, output bits, words].
        """
        outputs = np.empty((inputs.shape[0], len(self.output_nets), inputs.shape[2]), np.uint64)
        kernels.simulate(
            self.program, self.nets, self.input_nets, inputs, self.output_nets, outputs, *self.states, initial
        )
        return outputs

    @property
    def input_nets(self) -> np.ndarray:
        """Nets of all input bits."""
        return np.array([net for nets in self.inputs.values() for net in nets], np.int32)

    @property
    def output_nets(self) -> np.ndarray:
        """Nets of all output bits, and of the probes'."""
        return np.array([net for nets in self.shown.values() for net in nets], np.int32)

    @property
    def shown(self) -> dict[str, list[int]]:
        """Nets of output ports and probes."""
        return self.outputs | self.probed

    @property
    def states(self) -> tuple[np.ndarray, np.ndarray]:
        """Nets of the registers' states and of what they are loaded with."""
        pairs = np.array([(r.state, r.next_state) for r in self.registers], np.int32).reshape(-1, 2)
        return np.ascontiguousarray(pairs[:, 0]), np.ascontiguousarray(pairs[:, 1])


class _Program:
    """Collects operations; nets beyond the design's own are scratch."""

    def __init__(self, nets: int) -> None:
        self.nets = nets
        self.rows: list[tuple[int, int, int, int, int]] = []

    def scratch(self) -> int:
        self.nets += 1
        return self.nets - 1

    def add(self, tree: Logic, pins: Mapping[str, int], target: int | None = None) -> int:
        """Evaluate an expression into ``target``, or where its value lies already or may lie."""
        if isinstance(tree, str | int):
            net = pins[tree] if isinstance(tree, str) else tree
            if target is None:
                return net
            self.rows.append((COPY, target, net, net, net))
            return target
        name, parts = tree[0], tree[1:]
        if name == "not" and isinstance(parts[0], tuple) and parts[0][0] in ("and", "or", "xor"):
            name, parts = "not " + parts[0][0], parts[0][1:]
        operands = [self.add(part, pins) for part in parts]
        out = self.scratch() if target is None else target
        self.rows.append((OPERATIONS[name], out, operands[0], operands[-1], operands[-1]))
        return out


def read(result: Any, module: Module, library: Library | None) -> Netlist:
    """yosys's JSON as a netlist.

    Raises:
        RecoupError: a cell that cannot be simulated, a loop without register, a net that nothing drives, or a preset or
            probe that is not there.
    """
    design = result["netlist"]["modules"][module.name]
    numbers: dict[Any, int] = {"0": 0, "1": 1, "x": 0}

    def net(bit: Any) -> int:
        return numbers.setdefault(bit, len(numbers) - 1)

    ports = {port.name: [net(bit) for bit in design["ports"][port.name]["bits"]] for port in module.ports}
    gates, registers = [], []
    for name, cell in design["cells"].items():
        pins = {pin: net(nets[0]) for pin, nets in cell["connections"].items() if nets}
        outputs, flip_flop = _functions(cell["type"], library)
        if flip_flop is None:
            gates += [
                Gate(name, cell["type"], pins, pin, pins[pin], function)
                for pin, function in outputs.items()
                if pin in pins
            ]
        else:
            registers.append((name, cell["type"], pins, outputs, flip_flop))
    names = _names(design, numbers)
    program = _Program(len(numbers) - 1)
    states = [_state(part, program) for part in registers]
    ready = {0, 1, *(n for p in module.inputs for n in ports[p.name]), *(n for s in states for n in s.known)}
    ordered = ordered_gates(gates, ready, module.name)
    first = []
    for state in states:
        for row in state.rows:
            program.rows.append(row)
    for gate in ordered:
        first.append(len(program.rows))
        program.add(gate.function, gate.pins, gate.target)
    first.append(len(program.rows))
    made = [state.register(program) for state in states]
    return Netlist(
        nets=program.nets,
        gates=ordered,
        registers=made,
        program=np.array(program.rows, np.int32).reshape(-1, 5),
        first=np.array(first, np.int64),
        inputs={port.name: ports[port.name] for port in module.inputs},
        outputs={port.name: ports[port.name] for port in module.outputs},
        names=names,
        registered={p.name: [net(bit) for bit in _bits(design, p.name)] for p in module.presets},
        cleared=[net(bit) for bit in _cleared(design, module)],
        probed={p.name: [net(bit) for bit in _bits(design, p.name)] for p in module.probes},
        held={
            p.name: [net(bit) for bit in _bits(design, p.name)] for p in module.held if _there(design, p.name, numbers)
        },
        library=library,
    )


def _bits(design: Any, name: str) -> list[Any]:
    if name not in design["netnames"]:
        raise RecoupError(f"netlist: {name!r} is no register any more")
    return design["netnames"][name]["bits"]


def _cleared(design: Any, module: Module) -> list[Any]:
    """Bits of the registers that are zero before a run."""
    names = [key for key in design["netnames"] if module.cleared and key.startswith(module.cleared)]
    return [bit for name in names for bit in design["netnames"][name]["bits"]]


def _there(design: Any, name: str, numbers: Mapping[Any, int]) -> bool:
    """Whether a register is still there with all its bits."""
    return name in design["netnames"] and all(bit in numbers for bit in design["netnames"][name]["bits"])


def _names(design: Any, numbers: Mapping[Any, int]) -> dict[int, str]:
    """Net -> name; the design's own names go before those that mapping gave."""
    given = sorted(design["netnames"].items(), key=lambda item: item[0].startswith("g"), reverse=True)
    return {
        numbers[bit]: (name if len(value["bits"]) == 1 else f"{name}[{i}]")
        for name, value in given
        for i, bit in enumerate(value["bits"])
        if bit in numbers
    }


@dataclass(slots=True)
class _State:
    """A flip-flop on its way into the program."""

    name: str
    kind: str
    pins: dict[str, int]
    flip_flop: FlipFlop
    state: int
    outputs: dict[str, int]
    rows: list[tuple[int, int, int, int, int]]

    @property
    def known(self) -> list[int]:
        return [self.state, *self.outputs.values()]

    def register(self, program: _Program) -> Register:
        names = {**self.pins, self.flip_flop.state: self.state}
        loaded = program.add(self.flip_flop.next_state, names)
        clock = self.flip_flop.clock
        return Register(self.name, self.kind, self.pins, loaded, self.state, self.outputs, clock)


def _state(part: tuple, program: _Program) -> _State:
    name, kind, pins, outputs, flip_flop = part
    for what in ("clear", "preset"):
        tree = getattr(flip_flop, what)
        if tree is not None and not _off(tree, pins):
            raise RecoupError(f"netlist: {name} ({kind}): its asynchronous {what} is used; recoup's modules have none")
    wired = {pin: pins[pin] for pin in outputs if pin in pins}
    direct = next((pin for pin in wired if outputs[pin] == flip_flop.state), None)
    state = wired[direct] if direct else program.scratch()
    rows = []
    for pin, target in wired.items():
        if pin == direct:
            continue
        inverted = outputs[pin] in (flip_flop.inverse, ("not", flip_flop.state))
        if not inverted and outputs[pin] != flip_flop.state:
            raise RecoupError(f"netlist: {name} ({kind}): output {pin} is neither its state nor the inverse")
        rows.append((OPERATIONS["not"] if inverted else COPY, target, state, state, state))
    return _State(name, kind, pins, flip_flop, state, wired, rows)


def _off(tree: Logic, pins: Mapping[str, int]) -> bool:
    """Whether a condition of constant pins is never true."""
    if isinstance(tree, str):
        return pins.get(tree) == 0
    if isinstance(tree, tuple) and tree[0] == "not" and isinstance(tree[1], str):
        return pins.get(tree[1]) == 1
    return False


def _functions(kind: str, library: Library | None) -> tuple[dict[str, Logic], FlipFlop | None]:
    """A cell's outputs and, of a register, its inside."""
    if kind in _PLAIN:
        return {"Y": parse(_PLAIN[kind][1])}, None
    if kind == "$_DFF_P_":
        return {"Q": "IQ"}, _PLAIN_FLIP_FLOP
    if library is None or kind.startswith("$"):
        raise RecoupError(f"netlist: cell {kind!r} is none that yosys was asked for")
    cell = library.cell(kind)
    return cell.outputs, cell.flip_flop


def ordered_gates(gates: list[Gate], ready: set[int], name: str) -> list[Gate]:
    """Gates so that each stands after those that drive it.

    Raises:
        RecoupError: a loop, or a net that nothing drives.
    """
    waiting: dict[int, list[int]] = defaultdict(list)
    missing = []
    for i, gate in enumerate(gates):
        needed = {net for pin, net in gate.pins.items() if pin in used(gate.function)} - ready
        missing.append(len(needed))
        for net in needed:
            waiting[net].append(i)
    queue = deque(i for i, count in enumerate(missing) if not count)
    order = []
    while queue:
        gate = gates[queue.popleft()]
        order.append(gate)
        for i in waiting.pop(gate.target, ()):
            missing[i] -= 1
            if not missing[i]:
                queue.append(i)
    if len(order) < len(gates):
        raise RecoupError(
            f"netlist of {name}: {len(gates) - len(order)} gates form a loop or have inputs nobody drives"
        )
    return order


def first_states(module: Module, netlist: "Netlist", inputs: Inputs, generator: np.random.Generator) -> np.ndarray:
    """The registers' states before a run: random bits, but for the module's presets. [registers, words].

    Raises:
        RecoupError: a preset's bit is no register of the netlist.
    """
    words = -(-inputs[module.inputs[0].name].shape[1] // 64)
    found = generator.integers(0, 1 << 64, (len(netlist.registers), words), dtype=np.uint64)
    places = {net: (i, False) for i, r in enumerate(netlist.registers) for net in (r.state,)}
    places |= {row[1]: (places[row[2]][0], row[0] == OPERATIONS["not"]) for row in netlist.program[: netlist.first[0]]}
    for gate in netlist.gates:  # an inverter behind a register that holds the inverse
        if isinstance(gate.function, tuple) and gate.function[0] == "not" and isinstance(gate.function[1], str):
            source = places.get(gate.pins[gate.function[1]])
            if source is not None and gate.target not in places:
                places[gate.target] = (source[0], not source[1])
    for net in netlist.cleared:
        if net in places:
            register, inverse = places[net]
            found[register] = kernels.ONES if inverse else 0
    for port in module.presets:
        if port.name not in inputs:
            continue
        nets = netlist.registered[port.name]
        for net, column in zip(nets, bits(port, inputs)[0], strict=True):
            if net < 2 and bool((column == (kernels.ONES if net else 0)).all()):
                continue  # a constant, as all that are drawn have it
            if net not in places:
                raise RecoupError(f"netlist of {module.name}: {port.name!r} is no register any more")
            register, inverse = places[net]
            found[register] = ~column if inverse else column
    return found
