"""Kernels called by name: every argument reaches its parameter, and names that lack or are unknown are refused."""

import itertools
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llvmlite import ir

from recoup.errors import RecoupError
from recoup.kernels.llvm import I16, I32, I64, VOID, D, F, P, Target, host
from recoup.kernels.signature import Definition, Kernel, Signature

KINDS = {"i32": I32, "i64": I64, "float": F, "double": D}
VALUES = {"i32": -7, "i64": 1 << 40, "float": 0.1, "double": 0.1}


def recorder(kinds: tuple[str, ...]) -> Kernel:
    """A kernel that writes each of its numbers, as float64, to ``out``, after the numbers by their names."""
    signature = Signature.of(**{f"x{i}": KINDS[kind] for i, kind in enumerate(kinds)}, out=P)
    module = ir.Module("recorder")
    f = signature.define(module, "record")
    for i, kind in enumerate(kinds):
        x = f[f"x{i}"]
        value = x if kind == "double" else f.b.fpext(x, D) if kind == "float" else f.b.sitofp(x, D)
        f.b.store(value, f.b.gep(f["out"], [I64(i)], source_etype=D))
    f.b.ret_void()
    return Kernel(module, "record", signature)


def expected(kinds: tuple[str, ...], numbers: list[int]) -> list[float]:
    return [
        float(np.float32(VALUES[kind] * n) if kind == "float" else VALUES[kind] * n)
        for kind, n in zip(kinds, numbers, strict=True)
    ]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(sorted(KINDS)), min_size=1, max_size=24), st.data())
def test_every_argument_reaches_its_parameter_in_any_order(kinds, data):
    kinds = tuple(kinds)
    kernel, numbers = recorder(kinds), list(range(1, len(kinds) + 1))
    arguments = {f"x{i}": VALUES[kind] * numbers[i] for i, kind in enumerate(kinds)}
    order = data.draw(st.permutations([*arguments, "out"]))
    out = np.zeros(len(kinds))
    arguments["out"] = out.ctypes.data
    kernel(**{name: arguments[name] for name in order})
    assert out.tolist() == expected(kinds, numbers)
    out[:] = 0
    cut = data.draw(st.integers(0, len(order)))
    bound = kernel.bind(**{name: arguments[name] for name in order[:cut]})
    for _ in range(2):  # nothing of a call is left for the next
        bound(**{name: arguments[name] for name in order[cut:]})
        assert out.tolist() == expected(kinds, numbers)
        out[:] = 0


def test_bound_kernels_keep_nothing_of_a_call():
    """Calls from many threads at once, each with numbers and a place of its own."""
    kernel = recorder(("i64", "i64"))
    bound, outs = kernel.bind(x0=5), np.zeros((4, 2))

    def work(number: int) -> None:
        for _ in range(300):
            bound(x1=number, out=outs[number].ctypes.data)
            assert outs[number].tolist() == [5, number]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outs.tolist() == [[5, i] for i in range(4)]


def test_names_that_lack_or_are_unknown_are_refused():
    kernel, out = recorder(("i64", "float")), np.zeros(2)
    address = out.ctypes.data
    for arguments, message in (
        ({"x0": 1, "out": address}, "record: lacks x1; its arguments are x0, x1, out"),
        ({"x0": 1, "x1": 1.0, "out": address, "x2": 1}, "record: does not take x2; its arguments are x0, x1, out"),
        ({"x0": 1, "y": 1.0, "out": address}, "record: lacks x1; does not take y; its arguments are x0, x1, out"),
    ):
        with pytest.raises(RecoupError, match=f"^{message}$"):
            kernel(**arguments)
    bound = kernel.bind(x0=1)
    for arguments, message in (
        ({"x1": 1.0}, "record: lacks out; its arguments are x1, out"),
        ({"x0": 1, "out": address}, "record: lacks x1; does not take x0; its arguments are x1, out"),
        ({"x1": 1.0, "out": address, "x0": 1}, "record: does not take x0; its arguments are x1, out"),
    ):
        with pytest.raises(RecoupError, match=f"^{message}$"):
            bound(**arguments)
    with pytest.raises(RecoupError, match=r"^record\.bind: does not take y; its arguments are x0, x1, out$"):
        kernel.bind(x0=1, y=2)
    assert out.tolist() == [0, 0]


def function(module: ir.Module, types: list[ir.Type], names: list[str], result: ir.Type = VOID) -> None:
    made = ir.Function(module, ir.FunctionType(result, types), "f")
    for argument, name in zip(made.args, names, strict=True):
        argument.name = name
    ir.IRBuilder(made.append_basic_block()).ret_void()


@pytest.mark.parametrize(
    ("types", "names", "emitted"),
    [
        ([I64, P], ["n", "x"], r"void \(i64 n, ptr x\)"),
        ([P, I64], ["n", "x"], r"void \(ptr n, i64 x\)"),
        ([P, I32], ["x", "n"], r"void \(ptr x, i32 n\)"),
        ([P], ["x"], r"void \(ptr x\)"),
    ],
)
def test_what_was_emitted_must_be_the_signature(types, names, emitted):
    module = ir.Module()
    function(module, types, names)
    with pytest.raises(RecoupError, match=rf"^kernel f: emitted as {emitted}; its signature is void \(ptr x, i64 n\)$"):
        Kernel(module, "f", Signature.of(x=P, n=I64))
    result = ir.Module()
    function(result, [P, I64], ["x", "n"], I32)
    with pytest.raises(RecoupError, match=r"emitted as i32 \(ptr x, i64 n\)"):
        Kernel(result, "f", Signature.of(x=P, n=I64))


def test_types_without_a_conversion_are_refused():
    with pytest.raises(RecoupError, match=r"^Signature\.of\(n=i16\): the types are i32, i64, float, double, ptr$"):
        Signature.of(x=P, n=I16)


def summing(module: ir.Module, signature: Signature) -> Definition:
    """out[0] += x - y"""
    f = signature.define(module, "inner")
    place = f["out"]
    f.b.store(f.b.add(f.b.load(place, typ=I64), f.b.sub(f["x"], f["y"])), place)
    f.b.ret_void()
    return f


@pytest.mark.parametrize("order", list(itertools.permutations(("x", "y", "out"))))
def test_functions_of_a_module_are_called_by_name(order):
    """Given arguments come before the caller's of the same name."""
    types, module = {"x": I64, "y": I64, "out": P}, ir.Module()
    inner = summing(module, Signature.of(**{name: types[name] for name in order}))
    outer = Signature.of(out=P, y=I64, x=I64, z=I64).define(module, "outer")
    inner.call(outer)
    inner.call(outer, x=outer["z"])
    outer.b.ret_void()
    kernel, out = Kernel(module, "outer", outer.signature), np.zeros(1, np.int64)
    kernel(x=100, y=1, z=1000, out=out.ctypes.data)
    assert out.tolist() == [99 + 999]


def test_functions_of_a_module_refuse_other_names():
    module = ir.Module()
    inner = summing(module, Signature.of(x=I64, y=I64, out=P))
    outer = Signature.of(x=I64, out=P).define(module, "outer")
    with pytest.raises(RecoupError, match=r"^inner: lacks y; its arguments are x, y, out$"):
        inner.call(outer)
    with pytest.raises(RecoupError, match=r"^inner: does not take z; its arguments are x, y, out$"):
        inner.call(outer, y=outer["x"], z=outer["x"])
    with pytest.raises(TypeError):
        inner.call(outer, y=outer["out"])


def test_a_named_target_is_built_for():
    levels = [t for t in ("x86-64", "haswell") if Target.named(t).features <= host().features]
    for level in levels:
        module, out = ir.Module(), np.zeros(1, np.int64)
        f = Signature.of(n=I64, out=P).define(module, "f")
        f.b.store(f["n"], f["out"])
        f.b.ret_void()
        Kernel(module, "f", f.signature, Target.named(level))(n=3, out=out.ctypes.data)
        assert out[0] == 3


def mixed() -> Kernel:
    """out = x + n, of arguments of every size."""
    module = ir.Module()
    f = Signature.of(x=D, unused=F, n=I32, out=P).define(module, "f")
    f.b.store(f.b.fadd(f["x"], f.b.sitofp(f["n"], D)), f["out"])
    f.b.ret_void()
    return Kernel(module, "f", f.signature, varying=("out", "x"))


def test_prepared_kernels_take_what_varies_in_its_order():
    kernel, out = mixed(), np.zeros(1)
    add = kernel.prepare(n=-3, unused=1.0)
    other = kernel.prepare(n=4, unused=1.0)
    for run, expected in ((add, -2.5), (other, 4.5), (add, -2.5)):
        run(out.ctypes.data, 0.5)
        assert out[0] == expected


def test_prepared_kernels_refuse_other_names():
    with pytest.raises(RecoupError, match=r"^f\.prepare: lacks unused; its arguments are unused, n$"):
        mixed().prepare(n=1)
    with pytest.raises(RecoupError, match=r"^f\.prepare: does not take x; its arguments are unused, n$"):
        mixed().prepare(n=1, unused=1.0, x=2.0)
