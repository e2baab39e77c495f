"""The tensor core's adder in gates equals the reference; a generator broken by hand is caught."""

import numpy as np
import pytest
import torch

pytest.importorskip("amaranth")

import recoup as rc
from recoup.errors import RecoupError
from recoup.formats import ports
from recoup.gates import arithmetic
from recoup.silicon import Measured, vectors
from recoup.tensorcore import TensorCore, reference
from recoup.tensorcore.profiling import advanced
from recoup.tensorcore.rtl import Adder, build
from tests.tiers import slow_but

CASES = {
    "few bits": TensorCore("e4m3fn", 2, 5),
    "e2m1fn": TensorCore("e2m1fn", 4, 6),
    "one product": TensorCore("e4m3fn", 1, 9),
    "hopper, four at once": TensorCore.hopper_fp8(group=4),
    "float16": TensorCore("float16", 2, 12, output="float32"),
    "two formats": TensorCore(("e5m2", "e4m3fn"), 3, 25, output="float32"),
    "hopper": TensorCore.hopper_fp8(),
}


@pytest.mark.parametrize("name", slow_but(["hopper, four at once"], CASES))
def test_a_unit_is_proved(name):
    found = Measured.of(build(CASES[name])).verify()
    assert found, found
    assert found.coverage >= 0.995


def test_a_matrix_product_by_the_unit_is_matmul():
    """Ten terms in groups of four, the last filled with zeros, in lanes of a run."""
    config, adder = TensorCore.hopper_fp8(group=4), Measured.of(build(TensorCore.hopper_fp8(group=4)))
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(size, generator=generator) * 16 for size in ((8, 10), (10, 8)))
    a, b = (rc.quantize(v, rc.Float.parse("e4m3fn")) for v in (a, b))
    wanted = reference.matmul(a, b, config)
    assert torch.equal(rc.tensorcore.matmul(a, b, config), wanted)
    x, w = np.zeros((4, 64, 4), np.uint64), np.zeros((4, 64, 4), np.uint64)
    for k in range(10):
        x[k // 4, :, k % 4] = ports.codes(a[:, k].repeat_interleave(8).double(), config.formats[0])
        w[k // 4, :, k % 4] = ports.codes(b[k].repeat(8).double(), config.formats[1])
    first = np.repeat(np.array([[1], [0], [0], [0]], np.uint64), 64, 1)
    got = adder.simulate({"x": x, "w": w, "first": first})["y"]
    assert torch.equal(ports.values(got[3], Adder(config).sum).float().view(8, 8), wanted)


def test_the_letter_is_the_reference():
    """What verification compares with, step by step, and sums that only the middle of a long one has."""
    for config in (CASES["two formats"], CASES["e2m1fn"]):
        module = build(config)
        found = vectors.structured(module, 40, np.random.default_rng(1))
        x, w = (
            ports.values(found[n], form).reshape(module.steps, 40, -1).tolist()
            for n, form in zip("xw", config.formats, strict=True)
        )
        assert module.expected is not None
        shown = module.expected(found)["y"]
        for lane in range(40):
            c = float(ports.values(found["y"][0, lane : lane + 1], Adder(config).sum))
            for step in range(module.steps - 1):
                c = reference.step(0.0 if found["first"][step, lane] else c, x[step][lane], w[step][lane], config)
                code = int(ports.codes(torch.tensor([c], dtype=torch.float64), Adder(config).sum)[0])
                assert shown.values[list(shown.at).index(step + 1), lane] == code
        c, a, b = np.array([-1.5]), np.array([[2.0, 0.5]]), np.array([[1.0, 0.5]])
        assert advanced(c, a, b, config)[0][0] == reference.step(-1.5, [2.0, 0.5], [1.0, 0.5], config)


def test_no_sum_leaves_the_accumulators_range():
    """The largest products beside a sum of any binade: from where they are below its last bit on, it stays."""
    for config in (*CASES.values(), TensorCore.blackwell_fp8(), TensorCore.volta_f16()):
        adder = Adder(config)
        largest = [[form.largest_value] * config.group for form in config.formats]
        smallest = [[form.smallest_subnormal] * config.group for form in config.formats]
        after = [
            reference.step(2.0**e * (2 - 2.0**-adder.sum.mantissa), *largest, config)
            for e in range(adder.sum.max_exponent + 1)
        ]
        assert max(after) <= adder.sum.largest_value
        top = 2.0**adder.sum.max_exponent
        assert reference.step(top, *largest, config) == top
        assert reference.step(0.0, *largest, config) > 0
        least = reference.step(0.0, *smallest, config)
        assert least == 0 or least >= adder.sum.smallest_normal


def off_by_one(right):
    return lambda m, value, amount, name, keep=True: right(m, value, amount + 1, name, keep)


def test_a_broken_generator_is_caught(monkeypatch):
    monkeypatch.setattr(arithmetic, "shifted_right", off_by_one(arithmetic.shifted_right))
    found = Measured.of(build(CASES["few bits"])).verify(2048, coverage=False)
    assert found.mismatches
    assert found.counterexample.operands["x"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (TensorCore.hopper_bf16(), "sums of bfloat16 may be subnormal or infinite"),
        (TensorCore.ampere_tf32(), "operands may be e4m3fn, e5m2, e2m1fn, float16"),
        (TensorCore.hopper_fp8(output="float16"), "overflows to infinity"),
        (TensorCore.hopper_fp8(promotion=128), "without promotion"),
        (TensorCore.hopper_fp8(nonfinite="propagate"), "without NaN"),
    ],
)
def test_what_is_not_built_is_refused(config, message):
    with pytest.raises(RecoupError, match=message):
        rc.silicon.build(config)
