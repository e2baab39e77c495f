"""LightNorm's forward unit in gates equals the reference, however it packs; generators broken by hand are caught."""

import os
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("amaranth")

from benchmarks.log import Log
from benchmarks.measure import RESULTS
from benchmarks.proofs import subject
from benchmarks.silicon_lightnorm import PROVED, proved_of

import recoup as rc
from recoup.errors import RecoupError
from recoup.formats import Float, ports
from recoup.gates import arithmetic, division
from recoup.lightnorm import LightNorm
from recoup.lightnorm.rtl import Forward, build
from recoup.lightnorm.rtl_conventional import conventional
from recoup.lightnorm.rtl_deciding import deciding
from recoup.lightnorm.rtl_gates import Gates
from recoup.lightnorm.rtl_meeting import meeting
from recoup.lightnorm.rtl_normalise import Normalise
from recoup.lightnorm.scale import constant
from recoup.silicon import Measured, vectors
from recoup.silicon.verify import COVERAGE
from tests.tiers import slow_but

# Formats so small that a unit is made in a second.
SMALL = Float.ieee(3, 2, subnormals=False, rounding="zero")
WIDE = Float.ieee(3, 5, subnormals=False, rounding="zero")
NEAREST = {"forward": SMALL.replace(rounding="nearest"), "statistics": WIDE.replace(rounding="nearest")}
TINY = {"forward": SMALL, "backward": SMALL, "statistics": WIDE, "chunks": 1}
CASES = {
    "exact difference": LightNorm(**TINY, block=None),
    "blocks, outlier": LightNorm(**TINY, block=2, difference=WIDE),
    "blocks, subnormals": LightNorm(**(TINY | {"forward": Float.ieee(3, 2, rounding="nearest")}), block=2),
    "nearest, no blocks": LightNorm(**(TINY | NEAREST), block=None, difference=WIDE.replace(rounding="nearest")),
}


def unit(name: str) -> Measured:
    return Measured.of(build(CASES[name], elements=4, eps=0.0625))


@pytest.mark.parametrize("name", slow_but(["exact difference"], CASES))
def test_a_unit_equals_the_reference(name):
    module = unit(name)
    found = module.verify(module.steps * 128, coverage=False)
    assert not found.mismatches, found


@pytest.mark.parametrize("name", CASES)
def test_the_expected_values_are_those_of_the_reference_as_a_whole(name):
    """`reference.forward` on channels of three elements, whose second pass reads what the first stored."""
    config, eps, runs, generator = CASES[name], 0.0625, 64, np.random.default_rng(0)
    module, letter = build(config, elements=4, eps=eps), Forward.of(config, 4, eps)
    inputs = dict(vectors.structured(module, runs, generator))
    inputs["first"][[0, 3]] = 1
    unit = Fraction(constant(3, config.scale)) / Fraction(2) ** letter.constants[0]
    inputs["count"][:], inputs["constant"][:] = 3, int(unit)
    for held in ("gamma", "beta"):
        inputs[held] = np.repeat(inputs[held][:1], module.steps, 0)
    inputs["stored"][-4:-1] = module.expected(inputs)["y"].values[:3]
    found = module.expected(inputs)
    G, lane = letter.lanes, inputs["lane"][0].astype(int) if letter.lanes > 1 else np.zeros(runs, int)
    x, scale, shift = (
        ports.values(v, config.forward) for v in (inputs["x"][:3], inputs["gamma"][0], inputs["beta"][0])
    )
    x_NCP = x.reshape(3, runs * G).t()[None]
    y, saved = rc.lightnorm.reference.forward(x_NCP, scale.reshape(-1), shift.reshape(-1), config, eps)

    def chosen(values: Any, form: Any) -> Any:  # of the lane that was settled
        codes = ports.codes(values.reshape(runs, G, -1).permute(2, 0, 1), form)
        return codes[:, np.arange(runs), lane]

    wide = config.statistics
    assert (found["mean"].values == chosen(saved.statistics.mean, wide)).all()
    assert (letter.signed(found["reciprocal"].values) == chosen(saved.statistics.reciprocal, wide)).all()
    xhat = found["xhat"].values[-3:].reshape(3, runs, G)[:, np.arange(runs), lane]
    assert (xhat == chosen(saved.normalized, config.forward)).all()
    if G == 1:
        assert (found["y"].values[-3:] == chosen(y, config.forward)).all()


@pytest.mark.parametrize("name", slow_but(list(CASES)[:2], CASES))
def test_a_lane_equals_the_reference(name):
    found = Measured.of(Normalise(CASES[name], 4, 0.0625).module()).verify(1 << 14, coverage=False)
    assert not found.mismatches, found


def test_what_cancels_is_zero_whatever_the_exponents():
    """x r and mu r beyond the largest value, and equal, in a format with subnormals."""
    form = Float.ieee(3, 3, rounding="nearest")
    lane = Measured.of(Normalise(LightNorm(forward=form, backward=form, block=None), 1 << 17, 1e-5).module())
    shift, r, x = 7571243008, 121856, 119  # -15 r and r = 28672, in 1-5-12; x = -15
    codes = {"x": x, "shift": shift, "reciprocal": r, "gamma": 24, "beta": 24}
    inputs = {name: np.full((1, 64), code, np.uint64) for name, code in codes.items()}
    assert (lane.simulate(inputs)["xhat"] == 0).all()
    found = lane.verify(1 << 14, coverage=False)
    assert not found.mismatches, found


def test_elements_that_decide_lie_nearest_to_steps_and_share_a_block():
    """Of one mu and r all codes are tried: within 1/64 of a step lie four times as many as of codes that are drawn."""
    config, generator = LightNorm(), np.random.default_rng(0)
    F, S = config.forward, config.statistics
    assert F is not None
    assert S is not None
    legal = ports.port("", "in", S, "").legal
    assert legal is not None
    mean, r = (ports.values(legal(generator.integers(0, 1 << 18, (8, 4), dtype=np.uint64)), S) for _ in range(2))
    mean, r = (np.clip(np.abs(v.numpy()), 2.0**-3, 2.0**3) for v in (mean, r))
    x = ports.values(deciding(F, None, mean, r, 400, generator), F).numpy()
    units = np.ldexp(np.frexp(np.abs((x - mean) * r))[0], 5)
    assert (np.abs(units - np.rint(units)) < 1 / 64).mean() > 2 / 64 * 4
    exponents = np.frexp(x)[1]
    assert (exponents == exponents[..., :1]).all()
    assert len(np.unique(exponents)) > 10
    assert len(np.unique(x)) > 200


DRAWN = """
from benchmarks.proofs import drawn_of
from benchmarks.silicon_lightnorm import PROVED, proved_of
for name in PROVED:
    print(drawn_of(proved_of(name)))
"""


@pytest.mark.slow
def test_vectors_are_the_same_on_a_processor_without_wide_vectors():
    """A proof is one of its vectors, and numpy's own logarithms differ in the last bit between vector units."""
    wide = "X86_V4 AVX512F AVX512CD AVX512_SKX AVX512_CLX AVX512_CNL AVX512_ICL AVX512_SPR X86_V3 AVX2 FMA3"
    found = set()
    for features in ("", wide):
        run = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", DRAWN],
            env=os.environ | {"NPY_DISABLE_CPU_FEATURES": features},
            cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True,
        )  # fmt: skip
        found.add(run.stdout)
    assert len(found) == 1
    assert found.pop().count("\n") == len(PROVED)


@pytest.mark.slow
@pytest.mark.parametrize("name", PROVED)
def test_whole_units_are_proved(name):
    """By the log of benchmarks/silicon_lightnorm.py: of today's design, vectors and rounds, for it takes minutes."""
    module = proved_of(name)
    log = Log(RESULTS / "silicon_lightnorm.jsonl")
    assert log.of[name, "coverage"] == subject(module), f"{module.title}: another design is proved; run the benchmark"
    assert log.values[name, "coverage"] >= COVERAGE
    assert log.values[name, "mismatches"] == 0


def test_operands_that_meet_lie_beside_steps():
    """Products of 13 and more bits beside a multiple of a step of FP10, by less than can be seen otherwise."""
    config = LightNorm()
    x, mean, r = (
        ports.values(codes, form).numpy()
        for codes, form in zip(
            meeting(config.forward, config.statistics, (4096,), np.random.default_rng(0)),
            (config.forward, config.statistics, config.statistics),
            strict=True,
        )
    )
    exact = (x - mean) * r
    fraction = np.ldexp(np.abs(np.frexp(exact)[0]), 5)
    beside = np.abs(fraction - np.rint(fraction))
    assert (beside < 2.0**-12).mean() > 0.5
    assert (beside == 0).mean() < 0.2


BROKEN = {
    "no guard bit": (arithmetic, "guard_bits", lambda _: lambda *_: 0),
    "a quotient bit where it does not fit": (
        division.Divider,
        "divide",
        lambda divide: lambda self, m: divide(replace(self, b=self.b >> 1), m),
    ),
    "mu r a place too low": (
        Gates,
        "_shift",
        lambda shift: lambda self, m, divider, *rest: shift(self, m, replace(divider, b=divider.b >> 1), *rest),
    ),
}
BROKEN_LANES = {
    "what is lost of the smaller operand": (Normalise, "_lost", lambda _: lambda self, *_: lambda *_: self.eps > 1),
    "fewer bits compared": (
        arithmetic,
        "add",
        lambda add: lambda *given, apart=0, **more: add(*given, apart=apart + 2 * (apart > 0), **more),
    ),
    "a tie away from zero": (arithmetic, "rounds_up", lambda _: lambda half, *_: half),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_generator_is_caught(fault, monkeypatch):
    place, name, breaking = BROKEN[fault]
    monkeypatch.setattr(place, name, breaking(getattr(place, name)))
    module = unit("exact difference" if place is Gates else "nearest, no blocks")
    found = module.verify(module.steps * 64, coverage=False)
    assert found.mismatches
    assert found.counterexample is not None


@pytest.mark.parametrize("fault", slow_but(list(BROKEN_LANES)[:1], BROKEN_LANES))
def test_a_broken_lane_is_caught(fault, monkeypatch):
    place, name, breaking = BROKEN_LANES[fault]
    monkeypatch.setattr(place, name, breaking(getattr(place, name)))
    case = CASES["nearest, no blocks" if name == "rounds_up" else "exact difference"]
    assert Measured.of(Normalise(case, 4, 0.0625).module()).verify(1 << 14, coverage=False).mismatches


def test_conventional_lanes_equal_their_letter_and_stand_beside_the_unit():
    tiny = Float.ieee(4, 3, subnormals=False)
    found = Measured.of(conventional(tiny, "tiny")).verify(1 << 14, coverage=False)
    assert not found.mismatches, found
    assert list(build(LightNorm()).baselines()) == ["conventional, FP16", "conventional, FP32"]


def test_units_that_differ_have_titles_that_differ():
    configs = [LightNorm(chunks=k, **more) for k in (1, 4, 16) for more in ({}, {"block": None}, {"shared": "max"})]
    titles = [build(config).title for config in configs]
    assert len(set(titles)) == len(titles)
    assert "16 chunks" in titles[-1]
    assert "1 chunk" in titles[0].split(", ")


def test_what_the_unit_is_says_its_widths():
    module = build(LightNorm())
    assert module.facts["lanes"] == 4
    assert module.facts["bits of the exact sum"] == 52
    assert module.port("y").width == rc.formats.code_bits(LightNorm().forward_blocks)
    assert "divider" in module.protocol


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (LightNorm.range(), {}, "forward is None"),
        (LightNorm(backward=None), {}, "backward is None"),
        (LightNorm(statistics=None), {}, "statistics is None"),
        (LightNorm(axis="place"), {}, "axis='channel'"),
        (LightNorm(), {"eps": 0.0}, "eps"),
        (LightNorm(), {"elements": 8}, "elements"),
    ],
)
def test_what_no_hardware_can_have_is_refused(config, options, message):
    with pytest.raises(RecoupError, match=message):
        rc.silicon.build(config, **options)


def test_every_way_of_rounding_the_difference_agrees_on_both_kernels():
    """x - mu in a format: float32 (fused), float64 and blocks of places (separate) against the reference."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 24, generator=generator) * 3 + 1
    gamma, beta = torch.randn(4, generator=generator), torch.randn(4, generator=generator)
    for options in ({}, {"block": None}, {"axis": "place"}):
        config = LightNorm(difference=LightNorm().statistics, chunks=2, **options)
        for dtype in (torch.float32, torch.float64):
            given = [v.to(dtype) for v in (x, gamma, beta)]
            y, xhat, *_ = rc.lightnorm.passes.forward(*given, config, 1e-5)
            wanted, saved = rc.lightnorm.reference.forward(*given, config, 1e-5)
            assert torch.equal(y, wanted)
            assert torch.equal(xhat.double(), saved.normalized)
