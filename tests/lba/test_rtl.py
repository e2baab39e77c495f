"""The multiply-add unit in gates equals the emulation, whatever its formats; generators broken by hand are caught."""

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("amaranth")

import recoup as rc
from recoup.errors import RecoupError
from recoup.formats import Float, FloatFields, Int, decode, encode
from recoup.gates import arithmetic
from recoup.gates.module import Expected
from recoup.lba import LBA
from recoup.lba.rtl import build
from recoup.lba.rtl_operations import adder, multiplier
from recoup.silicon import Measured
from tests.lba.exact import quantise
from tests.tiers import slow_but

M4E3 = Float.lba(3, 4, bias=3)
NEAREST = {"rounding": "nearest"}
# config, operands, outer adder
CASES = {
    "M7E4": (LBA(chunk=None), M4E3, None),
    "fused": (LBA(product=None, chunk=None), M4E3, None),
    "nearest": (LBA(Float.lba(4, 7, 12, **NEAREST), Float.lba(4, 7, 10, **NEAREST), None), M4E3, None),
    "chunks, one adder": (LBA(), M4E3, "shared"),
    "chunks, two adders": (LBA(), M4E3, "own"),
    "IEEE with subnormals": (LBA.fp32(product=None), Float.parse("e4m3fn"), None),
    "product lower than the sum": (LBA(Float(3, -4, 3), Float(4, -3, 4), None), Float(2, -3, 2), None),
    "incomplete top binade": (LBA(None, Float.parse("e4m3fn"), 4), Float.parse("e2m1fn"), None),
    "mixed operands": (LBA(Float(5, -9, 4, **NEAREST), Float(3, -4, 5, False), None), (Float(2, -3, 2), Int(4)), None),
    "promotion": (LBA.sequential14(), Float.parse("e4m3fn"), None),
    "integers into M7E4": (LBA(chunk=None), Int(6), None),
    "int12, saturates": (LBA.int12(operands=Int(6)), None, None),
    "int12, wraps": (LBA.int12("wrap", operands=Int(6)), None, None),
    "unsigned activations": (LBA.int12(operands=(Int(5, signed=False), Int(4))), None, None),
    "int16, wraps, wide products": (LBA(None, Int(16, overflow="wrap"), 4), Float.lba(5, 2, bias=1), None),
    "fixed point": (LBA(None, Int(10), None, scale=2.0**-3), M4E3, None),
    "fixed point, chunks": (LBA(Float.lba(4, 3, 8), Int(8, overflow="wrap"), 4, scale=0.5), M4E3, "shared"),
    "fixed point, promoted": (LBA(None, Int(8), 4, promotion=Float.parse("float16"), scale=0.25), Int(4), None),
    "no mantissa": (LBA(Float.lba(3, 0, 3), Float.lba(3, 0, 3, **NEAREST), None), Float.lba(2, 0, 1), None),
    "one exponent bit": (LBA(Float.lba(1, 2, 0), Float.lba(1, 3, 0), 4), Float.lba(1, 1, 0), None),
}


def unit(name: str) -> Measured:
    config, operands, outer = CASES[name]
    return Measured.of(build(config, operands=operands, outer=outer))


QUICK = [
    "M7E4",
    "nearest",
    "chunks, one adder",
    "mixed operands",
    "int12, wraps",
    "unsigned activations",
    "fixed point, chunks",
    "one exponent bit",
]


@pytest.mark.parametrize("name", slow_but(QUICK, CASES))
def test_a_unit_equals_the_emulation(name):
    found = unit(name).verify(4096, coverage=False)
    assert not found.mismatches, found


@pytest.mark.parametrize(
    ("config", "outer"),
    slow_but(
        [(LBA(chunk=None), None), (LBA.m10e5(), "shared")],
        [(LBA(chunk=None), None), (LBA(), "shared"), (LBA(), "own"), (LBA.m10e5(), "shared")],
    ),
)
def test_vectors_show_nearly_every_broken_gate_of_the_papers_units(config, outer):
    found = Measured.of(build(config, operands=M4E3, outer=outer)).verify(1 << 12)
    assert found.coverage >= 0.995, found.missed


def spread(generator, shape, form):
    """Values of a format, with products on both sides of every threshold."""
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * 2.0 ** torch.randint(-3, 3, shape)
    return rc.quantize(x.float(), form)


@pytest.mark.parametrize("outer", [None, "shared", "own"])
def test_a_matrix_product_by_the_unit_is_matmul(outer):
    K, lanes, config = 21, 256, LBA(chunk=None if outer is None else 8)
    generator = torch.Generator().manual_seed(0)
    a_MK, b_KN = spread(generator, (16, K), M4E3), spread(generator, (K, 16), M4E3)
    wanted = rc.lba.matmul(a_MK, b_KN, config).flatten()
    module = Measured.of(build(config, operands=M4E3, outer=outer))
    # Terms and ends of chunks, as the protocol says.
    first, ends, start, order = [], [], [], []
    for k in range(K):
        new = k % 8 == 0 if outer else k == 0
        if new and outer == "shared" and k:
            first, ends, order = [*first, int(k == 8)], [*ends, 1], [*order, 0]
        first, order = [*first, int(new)], [*order, k]
        ends.append(int(outer == "own" and new and k > 0))
        start.append(int(outer == "own" and k == 8))
    first, ends, start, order = [*first, 0], [*ends, int(outer is not None)], [*start, 0], [*order, 0]
    steps = len(first) + 1
    control = {"first": first, "outer": ends, "start": start}
    names = [port.name for port in module.inputs if port.name in control]
    x = encode(a_MK[:, order, None].expand(16, -1, 16).movedim(1, 0).reshape(-1, lanes), M4E3)
    w = encode(b_KN[order, None, :].expand(-1, 16, 16).reshape(-1, lanes), M4E3)
    inputs = {
        **{name: np.repeat(np.array([*control[name], 0], np.uint64)[:, None], lanes, 1) for name in names},
        **{n: np.vstack([v.numpy(), v.numpy()[:1]]).astype(np.uint64) for n, v in (("x", x), ("w", w))},
    }
    at = steps - (2 if outer is None else 1)  # without an outer cycle the sum is there a step earlier
    codes = encode(wanted, config.accumulator).numpy().astype(np.uint64)[None]
    from recoup.silicon.verify import compare

    fixed = module.replace(steps=steps, expected=lambda _: {"y": Expected((at,), codes)})
    wrong, example = compare(fixed, module.netlist(), inputs, np.random.default_rng(0))
    assert not wrong, example


def test_the_letter_is_an_independent_model_too():
    module = build(LBA(chunk=None), operands=M4E3)
    generator = np.random.default_rng(1)
    names, steps = ("x", "w"), module.steps
    ports: dict[str, Any] = {n: module.port(n) for n in names}
    inputs = {n: ports[n].legal(generator.integers(0, 512, (steps, 40), dtype=np.uint64)) for n in names}
    inputs["first"] = np.repeat(module.control(steps)["first"], 20, 1)  # 20 runs of each schedule
    (sums,) = module.presets
    assert sums.legal is not None
    inputs["y"] = sums.legal(generator.integers(0, 1 << 13, (1, 40), dtype=np.uint64))
    first = decode(torch.from_numpy(inputs["y"][0].astype(np.int64)), LBA().accumulator).tolist()
    assert module.expected is not None
    found = module.expected(inputs)["y"]
    x, w = (decode(torch.from_numpy(inputs[n].astype(np.int64)), M4E3).tolist() for n in names)
    for lane in range(40):
        total = Fraction(first[lane])
        for step in range(steps - 1):
            term = quantise(Fraction(x[step][lane]) * Fraction(w[step][lane]), LBA().product, True)
            total = term + (0 if inputs["first"][step, lane] else total)
            total = quantise(total, LBA().accumulator, True)
            code = int(encode(torch.tensor([float(total)]), LBA().accumulator))
            assert found.values[list(found.at).index(step + 1), lane] == code


EXHAUSTIVE = {
    "flag, truncated": Float.lba(3, 2, 3),
    "flag, nearest": Float.lba(3, 2, 3, rounding="nearest"),
    "subnormals, nearest": Float(2, -2, 4),
    "subnormals, truncated": Float(3, -2, 2, rounding="zero"),
    "flushed, incomplete": Float(2, -3, 3, subnormals=False, largest=12.0),
}


@pytest.mark.parametrize("name", slow_but(["flag, truncated", "flag, nearest", "subnormals, nearest"], EXHAUSTIVE))
def test_every_sum_of_a_small_format(name):
    form = EXHAUSTIVE[name]
    found = Measured.of(adder(form, form, form)).verify("exhaustive")
    assert found.mismatches == 0, found
    assert found.coverage > 0.95, found.missed  # subnormals leave stages of shifters that never act


def test_every_sum_of_two_formats_in_a_third():
    forms = Float(2, -4, 1), Float(3, -2, 3, subnormals=False), Float(4, -3, 3, rounding="zero")
    assert not Measured.of(adder(*forms)).verify("exhaustive", coverage=False).mismatches


def test_every_product_of_fp8():
    found = Measured.of(multiplier(M4E3, M4E3, LBA().product)).verify("exhaustive")
    assert found.vectors == 257**2
    assert found.mismatches == 0, found
    assert found.coverage > 0.99, found.missed


def too_far(right):
    return lambda m, value, amount, name, keep=True: right(m, value, amount + 1, name, keep)


BROKEN = {
    "no guard bit": ("guard_bits", lambda _: int),
    "ties away from zero": ("rounds_up", lambda _: lambda half, *_: half),
    "aligned one too far": ("shifted_right", too_far),
}


@pytest.mark.parametrize("fault", slow_but(["no guard bit", "ties away from zero"], BROKEN))
def test_a_broken_generator_is_caught(fault, monkeypatch):
    name, breaking = BROKEN[fault]
    monkeypatch.setattr(arithmetic, name, breaking(getattr(arithmetic, name)))
    for case in ("nearest",) if fault == "ties away from zero" else ("M7E4", "nearest"):
        found = unit(case).verify(4096, coverage=False)
        assert found.mismatches, fault
        assert found.counterexample.operands["x"]


def test_the_flag_is_said():
    module = build(LBA.m7e4(), operands=M4E3)
    assert module.facts["accumulator bits"] == 13
    assert "13 bits with its non-zero flag" in module.title
    assert "13 bits with its non-zero flag" in module.port("y").meaning
    assert FloatFields(LBA().accumulator).bits == module.port("y").width


def test_baselines_have_the_same_operands():
    found = build(LBA.m7e4(), operands=M4E3).baselines()
    assert {"fp32, nearest", "fp16, toward zero", "int32, saturates", "int32, wraps", "m10e5, no chunks"} <= set(found)
    assert all(module.port("x").width == 9 for module in found.values())
    exact = Measured.of(found["int32, wraps"])  # for these operands nothing is lost
    assert not exact.verify(2048, coverage=False).mismatches


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (LBA.m7e4(), {}, "operands=None are float32"),
        (LBA(underflow=False), {"operands": M4E3}, "underflow=False"),
        (LBA(accumulator=Float.lba(4, 7, 10, rounding="stochastic")), {"operands": M4E3}, "stochastically"),
        (LBA.sequential14(), {"operands": M4E3, "outer": "shared"}, "promotion is another format"),
        (LBA(), {"operands": M4E3, "outer": "none"}, "outer"),
        (LBA(), {"operands": "fp8"}, "must be a Float or an Int"),
        (LBA(), {"operands": Float.parse("float64")}, "at most 23 bits"),
        (LBA(), {"operands": Int(32)}, "have 2 to 24 bits"),
        (LBA(), {"operands": Int(1)}, "have 2 to 24 bits"),
    ],
)
def test_what_no_hardware_can_have_is_refused(config, options, message):
    with pytest.raises(RecoupError, match=message):
        rc.silicon.build(config, **options)


@st.composite
def small(draw):
    """A format of a product, a sum or operands."""
    exponent, mantissa = draw(st.integers(2, 5)), draw(st.integers(1, 7))
    bias = draw(st.integers(1, 2**exponent - 1))
    return Float.lba(exponent, mantissa, bias, rounding=draw(st.sampled_from(("zero", "nearest"))))


@st.composite
def units(draw):
    """A config with its operands and outer adder."""
    whole = st.builds(Int, st.integers(6, 16), overflow=st.sampled_from(("saturate", "wrap")))
    config = LBA(draw(st.none() | small()), draw(small() | whole), draw(st.sampled_from((None, 4, 16))))
    operands = draw(st.just(M4E3) | small() | st.builds(Int, st.integers(3, 8)))
    return config, operands, draw(st.sampled_from((None, "shared", "own"))) if config.chunk else None


@pytest.mark.slow
@settings(max_examples=8, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(units())
def test_any_unit_is_proved(drawn):
    config, operands, outer = drawn
    found = Measured.of(build(config, operands=operands, outer=outer)).verify()
    assert found.ok, found
