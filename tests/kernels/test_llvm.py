"""Emitted code: built, run, built for other processors, and built by many threads at once."""

import ctypes
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from llvmlite import binding, ir

from recoup.errors import RecoupError
from recoup.kernels import llvm

FLOAT, COUNT = ir.FloatType(), ir.IntType(64)
LANES = 8
HERE_X86 = binding.get_process_triple().startswith("x86_64")


def polynomial(constant: float = 1.0) -> ir.Module:
    """``polynomial(x float*, a, n)``: x[i] = x[i] a + constant for whole vectors, then the lanes turned round."""
    module, b, arg = llvm.function("polynomial", ir.VoidType(), {"x": FLOAT.as_pointer(), "a": FLOAT, "n": COUNT})
    a, one = (llvm.splat(b, v, LANES) for v in (arg["a"], FLOAT(constant)))
    with llvm.loop(b, COUNT(0), arg["n"], LANES) as turn:
        place = b.bitcast(b.gep(arg["x"], [turn.index]), ir.VectorType(FLOAT, LANES).as_pointer())
        value: Any = llvm.fma(b, b.load(place, align=4), a, one)
        b.store(llvm.shuffle(b, value, range(LANES)[::-1]), place, align=4)
    b.ret_void()
    return module


def build(target: llvm.Target | None = None, constant: float = 1.0) -> llvm.Native:
    types = [ctypes.c_void_p, ctypes.c_float, ctypes.c_int64]
    return llvm.Native(polynomial(constant), "polynomial", None, types, target)


def run(kernel: llvm.Native, x: np.ndarray, a: float) -> np.ndarray:
    x = x.copy()
    kernel(x.ctypes.data, a, x.size)
    return x


def expected(x: np.ndarray, a: float, constant: float = 1.0) -> np.ndarray:
    exact = x.astype(np.float64) * np.float64(np.float32(a)) + constant  # 24 x 24 bits fit, so does this sum here
    return exact.astype(np.float32).reshape(-1, LANES)[:, ::-1].ravel()


X = np.arange(24, dtype=np.float32) / 8


def test_kernel_computes():
    assert np.array_equal(run(build(), X, 3.0), expected(X, 3.0))


def test_fma_rounds_once():
    x = np.full(8, 1 + 2.0**-12, dtype=np.float32)
    assert np.all(run(build(constant=-1.0), x, 1 + 2.0**-12) == np.float32(2.0**-11 + 2.0**-24))


@pytest.mark.parametrize("count", [0, 8, 24])
def test_loop_runs_whole_range(count: int):
    x = X.copy()
    build()(x.ctypes.data, 2.0, count)
    assert np.array_equal(x[:count], expected(X, 2.0)[:count])
    assert np.array_equal(x[count:], X[count:])


def test_carried_values():
    """Two values carried at once: the sum and the product of 1 .. n."""
    module, b, arg = llvm.function("sums", COUNT, {"n": COUNT})
    with llvm.loop(b, COUNT(1), b.add(arg["n"], COUNT(1)), 1, [COUNT(0), COUNT(1)]) as turn:
        turn.carry(b.add(turn.values[0], turn.index), b.mul(turn.values[1], turn.index))
    b.ret(b.add(b.mul(turn.values[0], COUNT(1_000_000)), turn.values[1]))
    sums = llvm.Native(module, "sums", ctypes.c_int64, [ctypes.c_int64])
    assert [sums(n) for n in (0, 1, 5)] == [1, 1_000_001, 15_000_120]


@pytest.mark.parametrize("unroll", [True, False])
def test_a_loop_is_written_once_where_that_is_asked_for(unroll: bool):
    module, b, arg = llvm.function("sum", COUNT, {"n": COUNT, "x": COUNT.as_pointer()})
    with llvm.loop(b, COUNT(0), arg["n"], 1, [COUNT(7)], unroll=unroll) as outer:
        with llvm.loop(b, COUNT(0), COUNT(2), 1, outer.values, unroll=unroll) as inner:
            x = b.load(b.gep(arg["x"], [b.add(outer.index, inner.index)]))
            inner.carry(b.xor(b.mul(inner.values[0], COUNT(7919)), x))
        outer.carry(*inner.values)
    b.ret(outer.values[0])
    x, expected = np.arange(5, dtype=np.int64), 7
    for i in range(2):
        for j in range(2):
            expected = 7919 * expected ^ int(x[i + j])
    assert llvm.Native(module, "sum", ctypes.c_int64, [ctypes.c_int64, ctypes.c_void_p])(2, x.ctypes.data) == expected
    products = sum("imul" in line for line in llvm.assembly(module, llvm.Target.named("x86-64")).splitlines())
    if HERE_X86:
        assert (products == 1) == (not unroll)


@pytest.mark.parametrize("level", ["x86-64", "haswell", "skylake-avx512"])
def test_other_levels_same_result(level: str):
    target = llvm.Target.named(level)
    if not HERE_X86 or not target.features <= llvm.host().features:
        pytest.skip(f"this processor does not run {level}")
    assert np.array_equal(run(build(target), X, 3.0), expected(X, 3.0))


@pytest.mark.parametrize(
    ("target", "instruction"),
    [
        (llvm.Target.named("skylake-avx512"), "vfmadd"),
        (llvm.Target.named("haswell"), "vfmadd"),
        (llvm.Target("generic", "", frozenset(), "aarch64-unknown-linux-gnu"), "fmla"),
    ],
    ids=["avx512", "haswell", "aarch64"],
)
def test_assembly_of_other_processors(target: llvm.Target, instruction: str):
    if not target.triple and not HERE_X86:
        pytest.skip("an x86 level on another machine")
    assert instruction in llvm.assembly(polynomial(), target)


def test_targets_know_fma():
    arm = "aarch64-unknown-linux-gnu"
    assert llvm.Target.named("haswell").fma
    assert llvm.Target("generic", "", frozenset(), arm).fma
    assert not llvm.Target("x86-64", "", frozenset(), "x86_64-unknown-linux-gnu").fma


def test_unknown_level():
    with pytest.raises(RecoupError, match=r"Target\.named\('pentium'\): the levels are x86-64, haswell"):
        llvm.Target.named("pentium")


def test_threads_build_at_once():
    """Kernels built concurrently keep their own code, also after other kernels are gone."""
    with ThreadPoolExecutor(8) as pool:
        kernels = list(pool.map(lambda c: build(constant=float(c)), range(16)))
    del kernels[::2]
    for constant, kernel in zip(range(1, 16, 2), kernels, strict=True):
        assert np.array_equal(run(kernel, X, 3.0), expected(X, 3.0, constant))
