"""Vectors against NumPy, for every number of lanes, on every instruction path of this processor."""

import ctypes
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recoup.kernels.llvm import I32, I64, VOID, D, F, Native, P, Target, function, host
from recoup.kernels.vector import FOUND, Vector

LEVELS = [level for level in ("x86-64", "haswell", "skylake-avx512") if Target.named(level).features <= host().features]
TARGETS = [host(), *map(Target.named, LEVELS)]
LANES = (4, 8, 16, 32)
TOP = float(np.finfo(np.float32).max)
EDGES = [0.0, -0.0, 1.0, -1.0, 1e-40, -1e-45, 2.0**-126, TOP, -TOP, math.inf, -math.inf, math.nan]


def kernel(write: Callable[[Vector, dict[str, Any]], None], lanes: int, target: Target, double: bool = False) -> Native:
    """A function of two addresses and a number of elements."""
    module, b, v = function("kernel", VOID, {"x": P, "y": P, "n": I64})
    write(Vector(b, lanes, double), v)
    b.ret_void()
    return Native(module, "kernel", None, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64], target)


def run(call: Native, x: np.ndarray, y: np.ndarray, n: int | None = None) -> np.ndarray:
    call(x.ctypes.data, y.ctypes.data, len(x) if n is None else n)
    return y


def mapped(operation: Callable[[Vector, Any], Any], lanes: int, target: Target, double: bool = False) -> Native:
    """y[i] = operation(x[i]) for whole vectors."""

    def write(code: Vector, v: dict[str, Any]) -> None:
        with code.counted(I64(0), v["n"], lanes) as turn:
            code.store(operation(code, code.load(v["x"], turn.index)), v["y"], turn.index)

    return kernel(write, lanes, target, double)


def same(x: np.ndarray, y: np.ndarray) -> bool:
    return x.dtype == y.dtype and x.tobytes() == y.tobytes()


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.cpu)
@pytest.mark.parametrize("n", [0, 1, 7, 16, 33, 64])
def test_a_row_is_read_and_written_to_its_end_and_no_further(lanes, target, n):
    def write(code: Vector, v: dict[str, Any]) -> None:
        def body(index: Any, inside: Any, total: Any) -> list[Any]:
            x = code.load(v["x"], index, inside)
            code.store(code.b.fadd(x, code.constant(1.0)), v["y"], index, inside)
            return [code.b.fadd(total, x)]

        (total,) = code.along(v["n"], body, [code.zero])
        code.put(code.reduced(total, code.b.fadd), v["y"], I64(99))

    x, y = np.arange(100, dtype=np.float32), np.full(100, -1, np.float32)
    run(kernel(write, lanes, target), x, y, n)
    assert np.array_equal(y[:n], x[:n] + 1)
    assert np.array_equal(y[n:99], np.full(99 - n, -1, np.float32))
    assert y[99] == x[:n].sum()


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.cpu)
def test_bits_magnitudes_and_masks(double, target):
    dtype, integer = (np.float64, np.int64) if double else (np.float32, np.int32)
    x = np.resize(np.array(EDGES, dtype), 16)
    sign = np.iinfo(integer).min

    def magnitude(code: Vector, value: Any) -> Any:
        return code.floats(code.magnitude(value))

    def cut(code: Vector, value: Any) -> Any:
        return code.masked(value, code.constant(-8, code.integers))

    bits = x.view(integer)
    assert same(run(mapped(magnitude, 8, target, double), x, np.empty_like(x)).view(integer), bits & ~sign)
    assert same(run(mapped(cut, 8, target, double), x, np.empty_like(x)).view(integer), bits & integer(-8))


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.cpu)
def test_floats_of_other_sizes(target):
    x = np.resize(np.array([1 + 2.0**-23, 1e300, -1e-300, 1 + 2.0**-24, 0.1, -2.5, 0.0, -7.0]), 16)
    with np.errstate(over="ignore"):
        expected = x.astype(np.float32).astype(np.float64)
    assert same(run(mapped(lambda c, v: c.wide(c.narrow(v)), 8, target, True), x, np.empty_like(x)), expected)
    fractions = np.array([1.9, -1.9, 2.0**23 + 1, -0.5, 1e30, 7.0, -8.25, 0.0], np.float32)
    assert same(run(mapped(Vector.whole, 8, target), fractions, np.empty_like(fractions)), np.trunc(fractions))


@pytest.mark.parametrize("lanes", LANES)
def test_the_larger_and_the_smaller_of_floats_and_integers(lanes):
    def write(code: Vector, v: dict[str, Any]) -> None:
        for kind, place in ((code.vector, 0), (code.integers, lanes)):
            x = code.load(v["x"], I64(place), None, kind)
            for i, operation in enumerate((code.larger, code.smaller)):
                code.put(code.reduced(x, operation), v["y"], I64(place + i))

    floats, integers = np.linspace(-3, 4, lanes, dtype=np.float32), np.arange(-5, lanes - 5, dtype=np.int32)
    x = np.concatenate([np.roll(floats, 3), np.roll(integers, -2).view(np.float32)])
    y = run(kernel(write, lanes, host()), x, np.zeros(2 * lanes, np.float32))
    assert y[:2].tolist() == [4, -3]
    assert y[lanes : lanes + 2].view(np.int32).tolist() == [lanes - 6, -5]


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("place", [0, 3, 15, 16, 63, 64, 130])
def test_the_first_place_of_a_value_is_found(lanes, place):
    def write(code: Vector, v: dict[str, Any]) -> None:
        wanted = code.get(v["y"], I64(0), F)
        code.put(code.find(v["x"], wanted), v["y"], I64(1))

    x, y = np.zeros(2 * FOUND + 64, np.float32), np.zeros(4, np.float32)
    x[place], x[place + 1 :], y[0] = 2.5, 2.5, 2.5
    assert run(kernel(write, lanes, host()), x, y).view(np.int64)[1] == place


@pytest.mark.parametrize("lanes", LANES)
def test_conditions_of_lanes(lanes):
    """What is in a lane, whether any is inside, and the word of a condition."""

    def write(code: Vector, v: dict[str, Any]) -> None:
        b = code.b
        inside = code.inside(I64(0), v["n"])
        code.put(code.b.zext(code.word(inside), I64), v["y"], I64(0))
        code.put(b.zext(code.any(inside), I64), v["y"], I64(1))
        code.put(b.zext(code.word(code.lane(v["n"])), I64), v["y"], I64(2))

    call = kernel(write, lanes, host())
    for n in range(lanes):
        y = run(call, np.zeros(0, np.float32), np.zeros(3, np.int64), n)
        assert y.tolist() == [(1 << n) - 1, n > 0, 1 << n]


@settings(max_examples=50)
@given(st.lists(st.floats(-(2.0**200), 2.0**200), min_size=16, max_size=16))
def test_joined_sums_keep_their_errors(values):
    x, y = np.array(values), np.zeros(2)
    run(JOINED, x, y)
    s, e = np.array(values), np.zeros(16)
    while len(s) > 1:  # every two-sum is exact, so only the errors' own sums round
        half = len(s) // 2
        exact = [Fraction(a) + Fraction(b) for a, b in zip(s[:half], s[half:], strict=True)]
        e = (e[:half] + e[half:]) + [float(t - Fraction(float(t))) for t in exact]
        s = np.array([float(t) for t in exact])
    assert y.tolist() == [s[0], e[0]]


def joined() -> Native:
    def write(code: Vector, v: dict[str, Any]) -> None:
        for i, value in enumerate(code.joined(code.load(v["x"], I64(0)), code.zero)):
            code.put(value, v["y"], I64(i))

    return kernel(write, 16, host(), True)


JOINED = joined()


@pytest.mark.parametrize("target", [t for t in TARGETS if t.fma], ids=lambda t: t.cpu)
def test_multiply_adds(target):
    """One rounding of (1 + u)^2 - 1 keeps u^2, which two lose; toward zero it is cut, to nearest rounded up."""
    x = np.full(16, 1 + 2.0**-12, np.float32)
    fused = run(mapped(lambda c, v: c.fma(v, v, c.constant(-1.0)), 16, target), x, np.empty_like(x))
    assert same(fused, np.full(16, 2.0**-11 + 2.0**-24, np.float32))
    exact = run(mapped(lambda c, v: c.multiply_add(v, c.constant(2.0), v), 16, target), x, np.empty_like(x))
    assert same(exact, x * 3)
    if "avx512f" in target.features:
        sevenths = np.arange(1, 17, dtype=np.float32) / np.float32(7)
        cut = run(mapped(lambda c, v: c.fma_toward_zero(v, v, c.constant(1.0)), 16, target), sevenths, np.empty_like(x))
        total = sevenths.astype(np.float64) ** 2 + 1  # exact: 48 bits and a few
        nearest = total.astype(np.float32)
        up = nearest > total
        assert 0 < up.sum() < 16
        assert same(cut, np.where(up, np.nextafter(nearest, np.float32(0)), nearest))


def test_streamed_stores_arrive():
    def write(code: Vector, v: dict[str, Any]) -> None:
        with code.counted(I64(0), v["n"], code.lanes) as turn:
            code.stream(code.load(v["x"], turn.index), v["y"], turn.index)
        code.b.fence("seq_cst")

    x, buffer = np.arange(64, dtype=np.float32), np.zeros(64 + 16, np.float32)
    start = -buffer.ctypes.data % 64 // 4
    y = buffer[start : start + 64]
    assert np.array_equal(run(kernel(write, 16, host()), x, y), x)


def test_types():
    _, b, _ = function("types", VOID, {})
    narrow, wide = Vector(b, 8), Vector(b, 4, double=True)
    assert (narrow.vector, narrow.integers) == (narrow.of(F), narrow.of(I32))
    assert (wide.vector, wide.integers) == (wide.of(D), wide.of(I64))
    assert [c.constant for c in wide.numbers(I64, 4).constant] == [4, 5, 6, 7]


@pytest.mark.parametrize("lanes", [2, 4, 8, 16])
@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.cpu)
def test_squares_are_transposed(lanes, target):
    def write(code: Vector, v: dict[str, Any]) -> None:
        rows = [code.load(v["x"], I64(i * lanes)) for i in range(lanes)]
        for i, row in enumerate(code.transposed(rows)):
            code.store(row, v["y"], I64(i * lanes))

    x = np.arange(lanes * lanes, dtype=np.float32)
    found = run(kernel(write, lanes, target), x, np.empty_like(x))
    assert np.array_equal(found.reshape(lanes, lanes), x.reshape(lanes, lanes).T)
