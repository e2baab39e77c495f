"""LightNorm's backward unit in gates equals the reference and the operator; generators broken by hand are caught."""

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("amaranth")

import recoup as rc
from recoup.errors import RecoupError
from recoup.formats import Float, ports, quantize
from recoup.gates import fixed
from recoup.gates.wide import Wide
from recoup.lightnorm import LightNorm, reference
from recoup.lightnorm.backward_unit.gates import Gates
from recoup.lightnorm.backward_unit.lane import Lane
from recoup.lightnorm.backward_unit.letter import TAKEN
from recoup.lightnorm.backward_unit.unit import Backward
from recoup.lightnorm.ops import train
from recoup.lightnorm.rtl import build
from recoup.lightnorm.rtl_codes import integers, patterns
from recoup.lightnorm.rtl_conventional import conventional_backward
from recoup.lightnorm.scale import constant, sizes
from recoup.silicon import Measured, vectors
from tests.lightnorm.backward_unit.driver import Drive
from tests.tiers import slow_but

# Formats so small that a unit is made in seconds.
SMALL = Float.ieee(3, 2, subnormals=False, rounding="zero")
WIDE = Float.ieee(3, 5, subnormals=False, rounding="zero")
FINE = Float.ieee(3, 8, subnormals=False, rounding="zero")
FAR = lambda bits: Float.ieee(8, bits, subnormals=False, rounding="zero")  # noqa: E731 -- of 8 bits of exponent
GRADUAL = Float.ieee(3, 2, rounding="nearest")
NEAREST = {"forward": SMALL.replace(rounding="nearest"), "backward": SMALL.replace(rounding="nearest")}
TINY = {"forward": SMALL, "backward": SMALL, "statistics": WIDE, "chunks": 3}
CASES = {
    "no blocks": LightNorm(**TINY, block=None),
    "blocks, outlier": LightNorm(**TINY, block=2),
    "nearest": LightNorm(**(TINY | NEAREST), block=None),
    "flags, one chunk": LightNorm(**(TINY | {"statistics": FINE, "chunks": 1}), block=2, shared="max"),
    "subnormals": LightNorm(**(TINY | dict.fromkeys(("forward", "backward"), GRADUAL)), block=2),
    "all subnormal": LightNorm(**(TINY | dict.fromkeys(("forward", "backward", "statistics"), GRADUAL)), block=None),
}
ELEMENTS, EPS = 32, 0.0625


def unit(name: str) -> Measured:
    return Measured.of(build(CASES[name], elements=ELEMENTS, eps=EPS, unit="backward"))


def test_a_run_has_many_elements_that_lie_beside_a_step():
    """Of one held sigma and m, where the low bits of (g - m) sigma are seen: elements near m alone are four."""
    made = Backward.of(LightNorm(), 1 << 17, 1e-5)
    inputs = vectors.structured(made.module(), 64, np.random.default_rng(0))
    g = made.unpacked(inputs["stored"]).numpy()
    slope, shift = (np.concatenate([inputs[f"held_{name}_{i}"] for i in range(4)]).T for name in ("slope", "shift"))
    sigma, _ = made.slope_parts(slope)
    exact = sigma * g - np.copysign(1.0, sigma) * made.shift_parts(shift)
    units = np.ldexp(np.frexp(np.abs(exact))[0], made.form.mantissa + 1)
    apart = np.abs(units - np.rint(units))
    beside = (apart > 0) & (apart < 1 / 64)
    assert np.mean([len(np.unique(g[beside[:, r, i], r, i])) for r in range(64) for i in range(4)]) > 12


@pytest.mark.slow  # mapped in seconds each, as what follows
@pytest.mark.parametrize("name", CASES)
def test_a_unit_equals_its_letter(name):
    module = unit(name)
    found = module.verify(module.steps * 128, coverage=False)
    assert not found.mismatches, found


def special(channels: int, samples: int, places: int, seed: int) -> tuple[torch.Tensor, ...]:
    """x, gamma, beta and dy whose first channels are zeros, all equal, saturating, of gamma 0, of lone outliers."""
    generator = torch.Generator().manual_seed(seed)
    x, dy = (torch.randn(samples, channels, places, generator=generator) for _ in range(2))
    gamma, beta = (torch.randn(channels, generator=generator) for _ in range(2))
    dy[:, 0] = 0
    x[:, 1] = 1
    dy[:, 2] = 1e12 * dy[:, 2].sign()
    gamma[3] = 0
    dy[0, 4, 1] = 64
    x[:, 5] = x[:, 5].sign()  # ties
    dy[:, 6], x[:, 6] = 0.75, x[:, 6] * 0.125
    return x * 2 + 0.5, gamma, beta, dy


def gradients(x: Any, gamma: Any, beta: Any, dy: Any, config: LightNorm, eps: float) -> tuple[torch.Tensor, ...]:
    """Of the operator, as autograd asks for them."""
    given = [v.clone().requires_grad_() for v in (x, gamma, beta)]
    y = train(*given, config.code, eps, "test")[0]
    return torch.autograd.grad(y, given, dy)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_unit_led_through_whole_channels_gives_the_operators_gradients(name):
    """Two samples of ten places: chunks of 7, 7 and 6; the sequence is that of the module's protocol."""
    config, module = CASES[name], unit(name)
    x, gamma, beta, dy = special(128, 2, 10, 1)
    dx, dgamma, dbeta = gradients(x, gamma, beta, dy, config, EPS)
    saved = reference.forward(x, gamma, beta, config, EPS)[1]
    drive = Drive(Backward.of(config, ELEMENTS, EPS), module, dy, saved)
    found = drive.through()
    assert (found["memory"] == drive.stored).all()
    assert (found["dx"] == drive.codes(dx)).all()
    for key, wanted in (("dgamma", dgamma), ("dbeta", dbeta)):
        assert (found[key].reshape(-1) == ports.codes(wanted.double(), config.gradient_statistics)).all()
    assert dx.unique().numel() > 20


@pytest.mark.parametrize(
    "config", slow_but([LightNorm.fp10()], [LightNorm(), LightNorm.fp10(), LightNorm(block=8, chunks=5, shared="max")])
)
def test_the_letter_is_the_reference(config):
    """FP10 on channels of 499 elements, whose sums, the last three elements left out, are registers' first states."""
    x, gamma, beta, dy = (v.double() for v in special(16, 1, 499, 2))
    dy[:, 7:] *= torch.logspace(-8, 6, 9)[None, :, None]
    saved = reference.forward(x, gamma, beta, config, 1e-5)[1]
    letter = Lettered(Backward.of(config, 1 << 17, 1e-5), dy, saved)
    wanted = reference.backward(dy, saved, config)
    for got, value in zip(letter.gradients(), wanted, strict=True):
        assert torch.equal(got, value)


class Lettered:
    """The letter of a unit on whole channels, a run of it for every extremum; [n, runs, G]."""

    def __init__(self, unit: Backward, dy: torch.Tensor, saved: reference.Saved) -> None:
        self.unit, self.n, self.shape = unit, dy.shape[0] * dy.shape[2], dy.shape
        G, stats = unit.lanes, saved.statistics
        self.raw, self.xhat = (self.rows(v) for v in (quantize(dy, unit.form), saved.normalized))
        self.g = unit.blocked(self.raw)
        self.gamma, self.r = (v.reshape(-1, G) for v in (saved.gamma, stats.reciprocal))
        self.ends = [v.reshape(-1, G, v.shape[1]) for v in (stats.largest, stats.smallest)]
        self.plain = dict(vectors.structured(unit.module(), self.g.shape[1], np.random.default_rng(0)))
        units = integers(self.g, unit.unit)
        self.terms = {"sum": units, "cross": units * integers(self.xhat, unit.activations.unit)}

    def rows(self, v: torch.Tensor) -> torch.Tensor:
        return v.permute(0, 2, 1).reshape(self.n, -1, self.unit.lanes)

    def inputs(self, i: int, low: int, k: int) -> dict[str, np.ndarray]:
        """A run that settles lane i and computes an extremum of it."""
        unit, past, (n, runs, G) = self.unit, self.unit.activations, self.g.shape
        found = {name: v.copy() for name, v in self.plain.items()}
        for j in range(G):
            for name, bits in (("sum", unit.sum_bits), ("cross", unit.cross_bits)):
                found[f"{name}_{j}"] = patterns(self.terms[name][:-TAKEN, :, j].sum(0)[None], bits)
        part = (lambda v: v) if G > 1 else (lambda v: v[..., 0])
        found["dy"][:TAKEN] = part(ports.codes(self.raw[-TAKEN:], unit.form))
        found["xhat"][1 : TAKEN + 1] = part(ports.codes(self.xhat[-TAKEN:], past.form))
        m = sizes(n, unit.config.chunks)[k]
        value = constant(m, unit.config.scale) / unit.config.chunks
        held = {"first": 0, "count": n, "low": low, "constant": int(np.ldexp(value, -unit.constants[0])), "lane": i}
        held["gamma"] = ports.codes(self.gamma[:, i], past.form)
        held["reciprocal"] = past.unsigned(ports.codes(self.r[:, i], past.wide))
        held["stored"] = unit.packed(self.g[self.ends[low][:, i, k], torch.arange(runs)][None])
        for name in held.keys() & found.keys():
            found[name][:] = held[name]
        return found

    def gradients(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        unit, (n, runs, G), K = self.unit, self.g.shape, self.unit.config.chunks
        dx, result = torch.empty_like(self.g), torch.empty(2, runs, G, dtype=torch.float64)
        for i in range(G):
            for low, k in itertools.product((0, 1), range(K)):
                found = unit.expected(self.inputs(i, low, k))
                if (low, k) == (0, 0):
                    held = [np.tile(found[f"held_{name}_{i}"].values[0], n) for name in ("slope", "shift")]
                    dx[:, :, i] = unit.lane.computed(self.g[:, :, i].reshape(-1), *held).reshape(n, -1)
                    for row, name in enumerate(("dgamma", "dbeta")):
                        result[row, :, i] = ports.values(found[name].values[0], unit.wide)
                own, other = (self.ends[end][:, i, k] for end in (low, 1 - low))
                at = (own != other).nonzero().squeeze(1)
                dx[own[at], at, i] = ports.values(found["extremum_dx"].values[0], unit.form)[at]
        blocked = unit.blocked(dx).reshape(self.shape[0], self.shape[2], -1).permute(0, 2, 1)
        dgamma, dbeta = result.reshape(2, -1)
        return blocked, dgamma, dbeta


def test_flags_are_among_the_cases():
    assert {Backward.of(config, ELEMENTS, EPS).flagged for config in CASES.values()} == {False, True}


HALF = dict.fromkeys(("forward", "backward", "statistics"), Float.ieee(5, 10, rounding="nearest"))


@pytest.mark.slow
@pytest.mark.parametrize("config", [LightNorm(), LightNorm(**HALF, block=None)], ids=["default", "half precision"])
def test_large_units_equal_their_letter(config):
    """Four lanes; and m sigma with 32 leading zeros at most, more places than C(m) / K would need."""
    module = Measured.of(build(config, unit="backward"))
    found = module.verify(module.steps * 64, coverage=False)
    assert not found.mismatches, found


@pytest.mark.slow
def test_a_lane_equals_the_reference():
    for config in (CASES["no blocks"], CASES["nearest"], LightNorm.fp10()):
        found = Measured.of(Lane(config, ELEMENTS, EPS).module()).verify(1 << 14, coverage=False)
        assert not found.mismatches, found


BROKEN = {
    "a sum a bit too narrow": (
        fixed,
        "fixed_point",
        lambda made: lambda m, n, unit, width, name: made(m, n, unit, width - 1, name),
    ),
    "minima taken for maxima": (
        Gates,
        "_signs",
        lambda signs: lambda self, m, port, *rest: signs(self, m, flipped(port), *rest),
    ),
    "the other lane": (
        Gates,
        "_of_lane",
        lambda chosen: lambda self, m, port, values, name: chosen(self, m, port, values[::-1], name),
    ),
    "the mean added": (Gates, "_channel", lambda channel: lambda self, *given: negated(channel(self, *given))),
    "a shift too many": (
        Wide,
        "place",
        lambda place: (
            lambda self, now, register, coarse: place(replace(self, shifts=~self.shifts), now, register, coarse)
        ),
    ),
    "a quotient bit where it does not fit": (
        Wide,
        "divide",
        lambda divide: lambda self, now, fits, difference: divide(self, now, fits | self.b[-2], difference),
    ),
}


def flipped(port: Any) -> Any:
    """Ports with ``low`` the other way around."""
    from types import SimpleNamespace

    return SimpleNamespace(**(vars(port) | {"low": ~port.low}))


def negated(codes: dict[str, Any]) -> dict[str, Any]:
    """The mean with the other sign."""
    return codes | {"mean": replace(codes["mean"], sign=~codes["mean"].sign)}


@pytest.mark.slow
@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_generator_is_caught(fault, monkeypatch):
    place, name, breaking = BROKEN[fault]
    monkeypatch.setattr(place, name, breaking(getattr(place, name)))
    module = unit("blocks, outlier" if fault == "the other lane" else "no blocks")
    found = module.verify(module.steps * 64, coverage=False)
    assert found.mismatches
    assert found.counterexample is not None


@pytest.mark.slow
def test_a_lane_without_the_mean_is_caught(monkeypatch):
    added = Lane._added

    def without(self: Lane, m: Any, shift: Any, *rest: Any) -> Any:
        return added(self, m, replace(shift, significand=shift.significand & 0), *rest)

    monkeypatch.setattr(Lane, "_added", without)
    assert Measured.of(Lane(CASES["no blocks"], ELEMENTS, EPS).module()).verify(1 << 14, coverage=False).mismatches


@pytest.mark.slow
def test_conventional_lanes_equal_their_letter_and_stand_beside_the_unit():
    tiny = Float.ieee(4, 3, subnormals=False)
    found = Measured.of(conventional_backward(tiny, "tiny")).verify(1 << 14, coverage=False)
    assert not found.mismatches, found
    module = build(LightNorm(), unit="backward")
    assert list(module.baselines()) == ["conventional, FP16, backward", "conventional, FP32, backward"]


def test_what_the_unit_is_says_its_widths():
    module = rc.silicon.build(LightNorm(), unit="backward")
    assert module.name == "lightnorm_backward"
    assert module.facts["lanes"] == 4
    assert module.facts["bits of the exact sum of dy"] == 66 + 17
    assert module.facts["bits of the exact sum of dy xhat"] == 100 + 17
    assert module.port("dx").width == rc.formats.code_bits(LightNorm().backward_blocks)
    assert list(module.protocol) == ["pass 1", "settle", "extrema", "pass 2"]
    assert rc.silicon.build(LightNorm()).name == "lightnorm_forward"


@pytest.mark.parametrize(
    ("config", "unit", "message"),
    [
        (LightNorm(), "sideways", "'forward' or 'backward'"),
        (LightNorm(backward=None), "backward", "backward is None"),
        (LightNorm(axis="place"), "backward", "axis='channel'"),
        (
            LightNorm(**dict.fromkeys(("forward", "backward", "statistics"), Float.ieee(8, 23))),
            "backward",
            "at most 53",
        ),
        (
            LightNorm(forward=FAR(18), backward=FAR(5), statistics=FAR(19), block=None),
            "backward",
            "65 with its exponent, sign and flags",
        ),
        (LightNorm(chunks=1), "backward", "needs 3 or more"),
    ],
)
def test_what_no_hardware_can_have_is_refused(config, unit, message):
    with pytest.raises(RecoupError, match=message):
        rc.silicon.build(config, unit=unit, elements=2 if config.chunks == 1 else 1 << 17)
