"""What a kernel takes, by name: one list that gives its LLVM type, its C prototype and the check that both agree.

A kernel has up to thirty parameters, most of them addresses, which no type tells apart. So nobody passes them in a row:
the emitter owns a `Signature`, writes the function by it, calls other functions of its module by name, and compiles it
to a `Kernel`, which is called by name or bound to what stays the same between calls.

    >>> import numpy as np
    >>> from llvmlite import ir
    >>> from recoup.kernels.llvm import F, I64, P
    >>> scaling = Signature.of(x=P, factor=F)
    >>> module = ir.Module()
    >>> f = scaling.define(module, "scale")
    >>> f.b.store(f.b.fmul(f.b.load(f["x"], typ=F), f["factor"]), f["x"]) and f.b.ret_void()
    <ir.Ret ...>
    >>> scale, x = Kernel(module, "scale", scaling), np.array([1.5], np.float32)
    >>> scale(x=x.ctypes.data, factor=2.0)
    >>> double = scale.bind(factor=2.0)
    >>> double(x=x.ctypes.data)
    >>> x
    array([6.], dtype=float32)
"""

import ctypes
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

from llvmlite import ir

from recoup.errors import RecoupError
from recoup.kernels.llvm import I64, VOID, Native, P, Target

SLOT = 8  # bytes

_CTYPES: dict[str, Any] = {
    "i32": ctypes.c_int32,
    "i64": ctypes.c_int64,
    "float": ctypes.c_float,
    "double": ctypes.c_double,
    "ptr": ctypes.c_void_p,
}


@dataclass(frozen=True, slots=True)
class Signature:
    """The parameters of a function without a result: names and LLVM types, in the order of its machine code."""

    names: tuple[str, ...]
    types: tuple[ir.Type, ...]

    @classmethod
    def of(cls, **types: ir.Type) -> "Signature":
        """From names and types: integers of 32 and 64 bits, float, double, and addresses (``ptr``)."""
        for name, kind in types.items():
            if str(kind) not in _CTYPES:
                raise RecoupError(f"Signature.of({name}={kind}): the types are {', '.join(_CTYPES)}")
        return cls(tuple(types), tuple(types.values()))

    @property
    def llvm(self) -> ir.FunctionType:
        """The type of the function in a module."""
        return ir.FunctionType(VOID, self.types)

    @property
    def ctypes(self) -> list[Any]:
        """The types that Python converts arguments to."""
        return [_CTYPES[str(kind)] for kind in self.types]

    def define(self, module: ir.Module, name: str) -> "Definition":
        """Start a function of a module."""
        function = ir.Function(module, self.llvm, name)
        for argument, label in zip(function.args, self.names, strict=True):
            argument.name = label
        arguments = dict(zip(self.names, function.args, strict=True))
        return Definition(self, function, ir.IRBuilder(function.append_basic_block("entry")), arguments)

    def ordered(self, owner: str, given: Mapping[str, Any]) -> list[Any]:
        """Arguments in the function's order; an error names those that lack, or that it does not have."""
        if given.keys() != set(self.names):
            raise RecoupError(_mismatch(owner, self.names, given))
        return [given[name] for name in self.names]

    def check(self, module: ir.Module, name: str) -> None:
        """Refuse a function of a module whose parameters are not these."""
        function = module.globals[name]
        found = tuple(argument.name for argument in function.args)
        if found != self.names or function.ftype != self.llvm:
            emitted, expected = (
                f"{kind.return_type} ({', '.join(f'{t} {n}' for t, n in zip(kind.args, names, strict=True))})"
                for kind, names in ((function.ftype, found), (self.llvm, self.names))
            )
            raise RecoupError(f"kernel {name}: emitted as {emitted}; its signature is {expected}")


@dataclass(frozen=True, slots=True)
class Definition:
    """A function being written.

    Attributes:
        signature: its parameters.
        function: in its module.
        b: a builder at its entry.
        arguments: by name.
    """

    signature: Signature
    function: ir.Function
    b: ir.IRBuilder
    arguments: dict[str, Any]

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def call(self, caller: "Definition", **given: Any) -> None:
        """Call it from another function: with ``given``, and else with the caller's arguments of the same name."""
        names = self.signature.names
        passed = {name: value for name, value in caller.arguments.items() if name in names} | given
        caller.b.call(self.function, self.signature.ordered(self.function.name, passed))


class Kernel:
    """A compiled function that is called by the names of its parameters; it runs without the GIL.

    Args:
        module: the IR; it must define ``name``, with the signature's parameters.
        name: the function.
        signature: its parameters.
        target: the processor; None: this one.
        varying: what differs between calls of `prepare`'s; none: it is not used.

    Raises:
        RecoupError: the function has other parameters than the signature; at a call, names that lack or are unknown.
    """

    def __init__(
        self,
        module: ir.Module,
        name: str,
        signature: Signature,
        target: Target | None = None,
        varying: tuple[str, ...] = (),
    ) -> None:
        signature.check(module, name)
        self.name, self.names, self.varying = name, signature.names, varying
        brief = _brief(module, name, signature, varying) if varying else None
        self.native, self.native_types = Native(module, name, None, signature.ctypes, target), signature.ctypes
        types = dict(zip(self.names, self.native_types, strict=True))
        self.brief = self.native.also(brief, None, [ctypes.c_void_p, *(types[n] for n in varying)]) if brief else None
        # Small products take microseconds: this is the fastest way from names to an order.
        self.ordered = (
            itemgetter(*self.names) if len(self.names) > 1 else lambda given: tuple(given[n] for n in self.names)
        )

    def __call__(self, **arguments: float) -> None:
        try:
            ordered = self.ordered(arguments)
        except KeyError:
            ordered = ()
        if len(ordered) != len(arguments):
            raise RecoupError(_mismatch(self.name, self.names, arguments))
        self.native.call(*ordered)

    def bind(self, **constants: float) -> "Bound":
        """The same with some arguments given; what they point to must live as long."""
        if not constants.keys() <= set(self.names):
            raise RecoupError(_mismatch(f"{self.name}.bind", self.names, constants, partly=True))
        return Bound(self, constants)

    def prepare(self, **constants: float) -> Callable[..., None]:
        """The same, to be called with the values of ``varying`` in their order, for the smallest products: thirty
        arguments take longer to convert than those to compute.

        Raises:
            RecoupError: the kernel has no ``varying``; constants that are not all others.
        """
        fixed = [name for name in self.names if name not in self.varying]
        if self.brief is None or constants.keys() != set(fixed):
            raise RecoupError(_mismatch(f"{self.name}.prepare", fixed, constants))
        types = dict(zip(self.names, self.native_types, strict=True))
        table = (ctypes.c_int64 * len(fixed))()
        for i, name in enumerate(fixed):
            value = types[name](constants[name])
            ctypes.memmove(ctypes.addressof(table) + SLOT * i, ctypes.addressof(value), ctypes.sizeof(value))
        call, at = self.brief, ctypes.addressof(table)

        def run(*values: float) -> None:
            call(at, *values)

        run.kept = self, table  # type: ignore[attr-defined] -- the machine code, and what ``at`` points to
        return run


def _brief(module: ir.Module, name: str, signature: Signature, varying: tuple[str, ...]) -> str:
    """Define a function of a table, with a slot for every argument that does not vary, and of those that do."""
    types = dict(zip(signature.names, signature.types, strict=True))
    function = ir.Function(module, ir.FunctionType(VOID, [P, *(types[n] for n in varying)]), f"{name}_brief")
    b = ir.IRBuilder(function.append_basic_block("entry"))
    passed: dict[str, Any] = dict(zip(varying, function.args[1:], strict=True))
    slot = 0
    for argument, kind in types.items():
        if argument not in passed:
            passed[argument] = b.load(b.gep(function.args[0], [I64(slot)], source_etype=I64), typ=kind)
            slot += 1
    b.call(module.globals[name], [passed[n] for n in signature.names])
    b.ret_void()
    return function.name


class Bound:
    """A kernel with some of its arguments given, to be called with the names of the others."""

    def __init__(self, kernel: Kernel, constants: dict[str, float]) -> None:
        self.kernel, self.constants = kernel, constants

    def __call__(self, **arguments: float) -> None:
        try:
            ordered = self.kernel.ordered(self.constants | arguments)
        except KeyError:
            ordered = ()
        if len(ordered) != len(self.constants) + len(arguments):
            missing = [name for name in self.kernel.names if name not in self.constants]
            raise RecoupError(_mismatch(self.kernel.name, missing, arguments))
        self.kernel.native.call(*ordered)


def _mismatch(owner: str, names: Iterable[str], given: Mapping[str, Any], partly: bool = False) -> str:
    names = list(names)
    lacking = [] if partly else [name for name in names if name not in given]
    unknown = [name for name in given if name not in names]
    parts = [f"{word} {', '.join(some)}" for word, some in (("lacks", lacking), ("does not take", unknown)) if some]
    return f"{owner}: {'; '.join(parts)}; its arguments are {', '.join(names)}"
