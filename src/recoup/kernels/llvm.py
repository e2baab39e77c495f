"""Native functions from LLVM vector IR, through llvmlite: no compiler to install, nothing compiled at import.

A kernel is written as vector IR with ``llvmlite.ir``, which is independent of the machine; LLVM picks the instructions.
What a kernel may assume about its machine it asks of a `Target`, so another machine's form of it can be built, and on
a machine that has the instructions also run, by naming that machine.

Threads may compile at the same time: llvmlite takes a lock around every call of LLVM.
"""

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

from llvmlite import binding, ir

from recoup.errors import RecoupError

I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
F, D, P, VOID = ir.FloatType(), ir.DoubleType(), ir.PointerType(), ir.VoidType()  # P: an address, of anything

# What each named level has, as far as kernels ask; LLVM itself derives the instructions from the name.
_LEVELS: dict[str, frozenset[str]] = {
    "x86-64": frozenset(),
    "haswell": frozenset({"avx2", "fma"}),
    "skylake-avx512": frozenset({"avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl"}),
}


@dataclass(frozen=True, slots=True)
class Target:
    """The processor that code is generated for.

    Attributes:
        cpu: its name in LLVM, which decides the scheduling model.
        flags: instruction set flags in LLVM's syntax (``+avx2,-avx512f``); empty: those of ``cpu``.
        features: names of the features present, e.g. ``"avx2"``: what kernels choose their form by. LLVM may misname a
            processor, for instance on virtual machines; its features are right.
        triple: LLVM's name of machine and system; empty: of this process.
    """

    cpu: str
    flags: str
    features: frozenset[str]
    triple: str = ""

    @classmethod
    def named(cls, level: str) -> "Target":
        """A common level of x86-64 instructions: ``x86-64`` (SSE2), ``haswell`` (AVX2, FMA), ``skylake-avx512``."""
        if level not in _LEVELS:
            raise RecoupError(f"Target.named({level!r}): the levels are {', '.join(_LEVELS)}")
        return cls(level, "", _LEVELS[level])

    @property
    def fma(self) -> bool:
        """Whether multiply-add with one rounding is an instruction rather than a call of the C library."""
        return "fma" in self.features or self.machine in ("aarch64", "arm64")

    @property
    def halves(self) -> bool:
        """Whether operations of 512 bits are run in two halves: twice as many of 256 bits take as long."""
        return self.cpu == "znver4"

    @property
    def machine(self) -> str:
        """The processor's family, as ``x86_64`` or ``aarch64``."""
        return (self.triple or _process_triple()).split("-")[0]


@cache
def _process_triple() -> str:
    return binding.get_process_triple()


@cache
def host() -> Target:
    """The processor this process runs on."""
    features = binding.get_host_cpu_features()
    present = frozenset(name for name, has in features.items() if has)
    return Target(binding.get_host_cpu_name(), features.flatten(), present)


class Native:
    """A compiled function, callable with Python numbers and addresses; it runs without the GIL.

    Args:
        module: the IR; it must define ``name``.
        name: the function.
        result: ctypes type of its result, None for void.
        arguments: ctypes types of its arguments.
        target: the processor; None: this one. It must have the instructions to run the function.

    Attributes:
        address: of the machine code, valid as long as this object lives.
        call: the function itself, as ctypes calls it.
    """

    def __init__(
        self, module: ir.Module, name: str, result: Any, arguments: Sequence[Any], target: Target | None = None
    ) -> None:
        machine, compiled = _optimise(module, target or host())
        self._engine = binding.create_mcjit_compiler(compiled, machine)  # owns the code
        self._engine.finalize_object()
        self.address: int = self._engine.get_function_address(name)
        self.call = ctypes.CFUNCTYPE(result, *arguments)(self.address)

    def __call__(self, *arguments: Any) -> Any:
        return self.call(*arguments)

    def also(self, name: str, result: Any, arguments: Sequence[Any]) -> Any:
        """Another function of the module, as ctypes calls it; valid as long as this object lives."""
        return ctypes.CFUNCTYPE(result, *arguments)(self._engine.get_function_address(name))


def assembly(module: ir.Module, target: Target) -> str:
    """The optimised machine code of a module, as text, for any target that llvmlite's LLVM knows."""
    machine, compiled = _optimise(module, target)
    return machine.emit_assembly(compiled)


def _optimise(module: ir.Module, target: Target) -> tuple[binding.TargetMachine, binding.ModuleRef]:
    triple = target.triple or binding.get_process_triple()
    if triple == binding.get_process_triple():
        binding.initialize_native_target()
        binding.initialize_native_asmprinter()
    else:
        binding.initialize_all_targets()
        binding.initialize_all_asmprinters()
    machine = binding.Target.from_triple(triple).create_target_machine(cpu=target.cpu, features=target.flags, opt=3)
    module.triple, module.data_layout = machine.triple, str(machine.target_data)
    compiled = binding.parse_assembly(str(module))
    builder = binding.create_pass_builder(machine, binding.create_pipeline_tuning_options(speed_level=2))
    builder.getModulePassManager().run(compiled, builder)
    return machine, compiled


def function(name: str, result: Any, arguments: dict[str, Any]) -> tuple[ir.Module, ir.IRBuilder, dict[str, Any]]:
    """Start a function in a module of its own: the module, a builder at its entry, its arguments by name."""
    module = ir.Module(name)
    made = ir.Function(module, ir.FunctionType(result, list(arguments.values())), name)
    for argument, label in zip(made.args, arguments, strict=True):
        argument.name = label
    return module, ir.IRBuilder(made.append_basic_block("entry")), dict(zip(arguments, made.args, strict=True))


def splat(builder: ir.IRBuilder, scalar: Any, lanes: int) -> Any:
    """A vector with the same value in every lane."""
    undefined = ir.Constant(ir.VectorType(scalar.type, lanes), ir.Undefined)
    return shuffle(builder, builder.insert_element(undefined, scalar, I32(0)), [0] * lanes)


def shuffle(builder: ir.IRBuilder, a: Any, order: Sequence[int], b: Any = None) -> Any:
    """Lane i of the result is lane ``order[i]`` of a, or of a followed by b."""
    index = ir.Constant(ir.VectorType(I32, len(order)), list(order))
    return builder.shuffle_vector(a, ir.Constant(a.type, ir.Undefined) if b is None else b, index)


def declared(builder: ir.IRBuilder, name: str, result: Any, arguments: Sequence[Any]) -> Any:
    """A function that the module does not define, such as one of LLVM's own: declared once."""
    found = builder.module.globals.get(name)
    return found or ir.Function(builder.module, ir.FunctionType(result, list(arguments)), name)


def fma(builder: ir.IRBuilder, x: Any, y: Any, z: Any) -> Any:
    """x y + z with one rounding, for float32 scalars and vectors. Slow where `Target.fma` is false."""
    lanes = f"v{x.type.count}f32" if isinstance(x.type, ir.VectorType) else "f32"
    return builder.call(declared(builder, f"llvm.fma.{lanes}", x.type, [x.type] * 3), [x, y, z])


class Loop:
    """A loop being written.

    Attributes:
        index: the counter.
        values: what is carried from turn to turn: inside the loop at the start of a turn, after it the final values.
    """

    def __init__(self, index: Any, values: list[Any]) -> None:
        self.index, self.values, self.following = index, values, values

    def carry(self, *values: Any) -> None:
        """Set what the next turn finds in ``values``."""
        self.following = list(values)


def _as_it_is(module: ir.Module) -> ir.MDValue:
    """What marks a loop that is not to be unrolled: a node of metadata whose first operand is itself."""
    setting = module.add_metadata([ir.MetaDataString(module, "llvm.loop.unroll.disable")])
    node = ir.MDValue(module, [], name=str(len(module.metadata)))
    node.operands = (node, setting)
    return node


@contextmanager
def loop(
    builder: ir.IRBuilder, start: Any, stop: Any, step: Any = 1, carried: Sequence[Any] = (), *, unroll: bool = True
) -> Iterator[Loop]:
    """Write ``for (i = start; i < stop; i += step)`` around a block; signed, possibly without a single turn.

    ``unroll=False`` keeps LLVM from writing the block twice, where all registers are in use.
    """
    before = builder.block
    head, body, after = (builder.append_basic_block(name) for name in ("head", "body", "after"))
    builder.branch(head)
    builder.position_at_end(head)
    index, *values = (builder.phi(value.type) for value in (start, *carried))
    builder.cbranch(builder.icmp_signed("<", index, stop), body, after)
    builder.position_at_end(body)
    turn = Loop(index, values)
    yield turn
    following = [builder.add(index, start.type(step) if isinstance(step, int) else step), *turn.following]
    for phi, first, later in zip((index, *values), (start, *carried), following, strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(later, builder.block)
    again = builder.branch(head)
    if not unroll:
        again.set_metadata("llvm.loop", _as_it_is(builder.module))
    builder.position_at_end(after)
