"""LightNorm's forward unit in gates equals the reference, however it packs; generators broken by hand are caught."""

from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("amaranth")

import recoup as rc
from recoup.errors import RecoupError
from recoup.formats import Float, ports
from recoup.gates import arithmetic, division
from recoup.lightnorm import LightNorm
from recoup.lightnorm.rtl import build
from recoup.silicon import Measured

# Formats so small that a unit is made in a second.
SMALL = Float.ieee(3, 2, subnormals=False, rounding="zero")
WIDE = Float.ieee(3, 5, subnormals=False, rounding="zero")
NEAREST = {"forward": SMALL.replace(rounding="nearest"), "statistics": WIDE.replace(rounding="nearest")}
TINY = {"forward": SMALL, "backward": SMALL, "statistics": WIDE, "chunks": 1}
CASES = {
    "exact difference": LightNorm(**TINY, block=None),
    "blocks, outlier": LightNorm(**TINY, block=2, difference=WIDE),
    "nearest, no blocks": LightNorm(**(TINY | NEAREST), block=None, difference=WIDE.replace(rounding="nearest")),
}


def unit(name: str) -> Measured:
    return Measured.of(build(CASES[name], elements=4, eps=0.0625))


@pytest.mark.parametrize("name", CASES)
def test_a_unit_equals_the_reference(name):
    module = unit(name)
    found = module.verify(module.steps * 192, coverage=False)
    assert not found.mismatches, found


def test_the_expected_values_are_those_of_the_reference_as_a_whole():
    """`reference.forward` on the channels of one run, whose second pass reads what the first stored."""
    config = CASES["blocks, outlier"]
    module, runs, generator = build(config, elements=4, eps=0.0625), 8, np.random.default_rng(0)
    steps, G = module.steps, 2
    port: Any = module.port("x")
    drawn = {
        n: port.legal(generator.integers(0, 64, (steps, runs, G), dtype=np.uint64)) for n in ("x", "gamma", "beta")
    }
    gamma, beta = (np.repeat(drawn[n][:1], steps, 0) for n in ("gamma", "beta"))
    assert module.control is not None
    assert module.expected is not None
    held: Any = module.port("stored")
    stored = held.legal(np.zeros((steps, runs), np.uint64))
    control = {n: np.repeat(v[:, None], runs, 1) for n, v in module.control(steps).items()}
    first, second = (np.flatnonzero(control[n][:, 0]) for n in ("collect", "normalise"))
    inputs = {**control, "x": drawn["x"], "gamma": gamma, "beta": beta, "stored": stored}
    packed = module.expected(inputs)["y"]
    stored[second] = packed.values[: len(first)]
    found = module.expected(inputs)
    x, scale, shift = (ports.values(v, config.forward) for v in (drawn["x"][first], gamma[0], beta[0]))
    x_NCP = x.permute(1, 2, 0).reshape(1, runs * G, len(first))
    y, saved = rc.lightnorm.reference.forward(x_NCP, scale.reshape(-1), shift.reshape(-1), config, 0.0625)
    xhat = ports.codes(saved.normalized.reshape(runs, G, -1).permute(2, 0, 1), config.forward)
    assert (found["xhat"].values == xhat).all()
    y_q = y.reshape(runs, G, -1).permute(2, 0, 1)
    from recoup.lightnorm.rtl import Forward

    assert (found["y"].values[len(first) :] == Forward.of(config, 4, 0.0625)._packed(y_q)).all()


BROKEN = {
    "no guard bit": (arithmetic, "guard_bits", lambda _: lambda *_: 0),
    "a quotient bit where it does not fit": (
        division.Divider,
        "divide",
        lambda divide: lambda self, m: divide(division.Divider(self.width, self.digits, self.most, self.a, self.b >> 1,
                                                               self.quotient, self.shifts), m),
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_generator_is_caught(fault, monkeypatch):
    place, name, breaking = BROKEN[fault]
    monkeypatch.setattr(place, name, breaking(getattr(place, name)))
    module = unit("nearest, no blocks")
    found = module.verify(module.steps * 64, coverage=False)
    assert found.mismatches
    assert found.counterexample is not None


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
