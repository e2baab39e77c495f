"""LightNorm's units for rows in gates equal the letter, and the letter is the reference of layer and RMS norms."""

from fractions import Fraction

import numpy as np
import pytest
import torch

pytest.importorskip("amaranth")

from benchmarks.log import Log
from benchmarks.measure import RESULTS
from benchmarks.proofs import subject
from benchmarks.silicon_rows import PROVED, proved_of

import recoup as rc
from recoup.errors import RecoupError
from recoup.formats import Float, ports
from recoup.lightnorm import LightNorm
from recoup.lightnorm.row_unit.gates import RowGates
from recoup.lightnorm.row_unit.unit import KINDS, Rows
from recoup.lightnorm.rows import reference
from recoup.lightnorm.rtl import build
from recoup.lightnorm.rtl_conventional import conventional_rms
from recoup.silicon import Measured, vectors
from recoup.silicon.verify import COVERAGE
from tests.tiers import slow_but

# Formats so small that a unit is made in seconds.
SMALL = Float.ieee(3, 2, subnormals=False, rounding="zero")
WIDE = Float.ieee(3, 5, subnormals=False, rounding="zero")
NEAREST = {"forward": SMALL.replace(rounding="nearest"), "statistics": WIDE.replace(rounding="nearest")}
TINY = {"forward": SMALL, "backward": SMALL, "statistics": WIDE, "chunks": 1}
CASES = {
    "no blocks": LightNorm(**TINY, block=None),
    "blocks, outlier": LightNorm(**TINY, block=2, difference=WIDE),
    "blocks, subnormals": LightNorm(**(TINY | {"forward": Float.ieee(3, 2, rounding="nearest")}), block=2),
    "three lanes, chunks": LightNorm(**(TINY | {"chunks": 3}), block=3, shared="max"),
    "nearest, no blocks": LightNorm(**(TINY | NEAREST), block=None, difference=WIDE.replace(rounding="nearest")),
}
EPS = 0.0625
UNITS = [(kind, name) for name in CASES for kind in KINDS]


def unit(kind: str, name: str) -> Measured:
    return Measured.of(build(CASES[name], elements=18, eps=EPS, unit=kind))


@pytest.mark.parametrize(("kind", "name"), slow_but([("rms", "blocks, outlier")], UNITS))
def test_a_unit_equals_the_letter(kind, name):
    module = unit(kind, name)
    found = module.verify(module.steps * 64, coverage=False)
    assert not found.mismatches, found


def test_an_eps_as_large_as_all_ranges_has_its_bit_in_s():
    """Of values up to 0.22; s had R C's bits alone, and the divider a phase of no length."""
    wide = Float.ieee(5, 5, subnormals=False, rounding="zero")
    config = LightNorm(**(TINY | {"forward": Float.lba(2, 2, 6), "statistics": wide}), block=None)
    for kind in KINDS:
        letter = Rows.of_kind(kind, config, 32, 0.2)
        low, high = letter.phases["align s"]
        assert high > low
        ones = (1 << letter.range_bits) - 1, (1 << letter.constant_bits) - 1
        assert ((ones[0] * ones[1] << letter.pad) + letter.eps_units).bit_length() <= letter.width
    module = Measured.of(build(config, elements=32, eps=0.2, unit="layer"))
    found = module.verify(module.steps * 64, coverage=False)
    assert not found.mismatches, found


@pytest.mark.parametrize(("kind", "name"), UNITS)
def test_the_letter_is_the_reference(kind, name):
    """`rows.reference.forward` on rows of as many chunks as a run has, whose second pass reads what the first kept."""
    runs, generator = 64, np.random.default_rng(0)
    letter = Rows.of_kind(kind, CASES[name], 18, EPS)
    count, m = letter.chunks
    config = CASES[name].replace(chunks=count)
    module, G = letter.module(), letter.lanes
    inputs = dict(vectors.structured(module, runs, generator))
    inputs["first"][:] = 0
    inputs["first"][[0, m]] = 1
    width = count * m * G
    if kind == "layer":
        inputs["count"][:] = width
    # The unit's constant is C / K for its K; the row's chunks are fewer.
    constant = float(reference.constants_of(kind, width, config)[0]) / count
    inputs["constant"][:] = int(Fraction(constant) / Fraction(2) ** letter.constants[0])
    collect = np.flatnonzero(np.array(letter.schedule["collect"]))
    late = np.array([step + 1 for step in collect])
    steps = np.arange(module.steps - len(collect) - 1, module.steps - 1)
    inputs["stored"][steps] = module.expected(inputs)["y"].values[late - 1]
    found = module.expected(inputs)

    def row(codes: np.ndarray) -> torch.Tensor:  # [steps, runs(, G)] -> [runs, D]
        return ports.values(codes.reshape(len(collect), runs, G), config.forward).permute(1, 0, 2).reshape(runs, width)

    x = row(inputs["x"][collect])
    gamma = row(inputs["gamma"][steps])
    beta = row(inputs["beta"][steps]) if kind == "layer" else torch.zeros_like(gamma)
    at = [found["xhat"].at.index(step) for step in steps]
    shown = [list(found["y"].at).index(step + 1) for step in steps]
    y_codes, xhat = found["y"].values[shown], row(found["xhat"].values[at])
    form = config.statistics
    for i in range(runs):
        y, saved = reference.forward(x[i : i + 1], gamma[i], beta[i], None, kind, config, EPS)
        assert torch.equal(xhat[i], saved.normalized[0])
        assert letter.signed(found["reciprocal"].values[0])[i] == ports.codes(saved.reciprocal, form)[0]
        packed = letter.packed(y.double().reshape(len(collect), 1, G))
        assert (packed[:, 0] == y_codes[:, i]).all()


def test_extrema_are_told_in_the_order_of_the_features():
    """The last element of a chunk that is told is its first maximum, minimum or largest magnitude."""
    letter = Rows.of_kind("rms", CASES["three lanes, chunks"], 18, EPS)
    inputs = dict(vectors.structured(letter.module(), 32, np.random.default_rng(1)))
    found = letter.expected(inputs)
    (count, m), (collect,) = letter.chunks, np.nonzero(letter.schedule["collect"])
    flags = found["new_largest"].values[collect]  # of the step before, shown a clock edge later
    given = letter.blocked(letter.values(inputs["x"]))[collect].abs().reshape(count, m, 32, 3)
    for k in range(count):
        for run in range(32):
            features = given[k, :, run].reshape(-1)
            told = np.flatnonzero(flags.reshape(count, m, 32, 3)[k, :, run].reshape(-1))
            assert told[0] == 0
            assert told[-1] == int((features == features.max()).nonzero()[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", PROVED)
def test_units_are_proved(name):
    """By the log of benchmarks/silicon_rows.py: of today's design, vectors and rounds, for it takes minutes."""
    module = proved_of(name)
    log = Log(RESULTS / "silicon_rows.jsonl")
    assert log.of[name, "coverage"] == subject(module), f"{module.title}: another design is proved; run the benchmark"
    assert log.values[name, "coverage"] >= COVERAGE
    assert log.values[name, "mismatches"] == 0


BROKEN = {
    "lanes in a fold cycle": (
        "_units",
        lambda made: lambda s, m, late, *r: made(s, m, late | {"fold": late["low"]}, *r),
    ),
    "a chunk that goes on": (
        "_extremum",
        lambda made: lambda s, m, port, late, *r: made(s, m, port, late | {"chunk": late["first"]}, *r),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_generator_is_caught(fault, monkeypatch):
    name, breaking = BROKEN[fault]
    monkeypatch.setattr(RowGates, name, breaking(getattr(RowGates, name)))
    module = unit("layer", "three lanes, chunks")
    found = module.verify(module.steps * 64, coverage=False)
    assert found.mismatches
    assert found.counterexample is not None


def test_the_conventional_rms_lane_equals_its_letter_and_stands_beside_the_unit():
    found = Measured.of(conventional_rms(Float.ieee(4, 3, subnormals=False), "tiny")).verify(1 << 14, coverage=False)
    assert not found.mismatches, found
    assert {m.name for m in build(LightNorm(), unit="rms").baselines().values()} == {"rmsnorm_16", "rmsnorm_32"}


def test_what_a_unit_is_says_its_norm():
    layer, rms = (build(LightNorm(axis="place"), unit=kind) for kind in KINDS)
    assert (layer.name, rms.name) == ("lightnorm_layer", "lightnorm_rms")
    assert rms.title == "RMS norm, forward, M4E5, 10 bits, blocks of 4, outlier, 8 chunks"
    assert layer.title != rms.title != build(LightNorm()).title
    assert {"beta", "mean", "count", "low"} <= {port.name for port in layer.ports}
    assert not {"beta", "mean", "count", "low", "lane"} & {port.name for port in rms.ports}


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (LightNorm(scale="paper"), {"unit": "rms"}, "gaussian"),
        (LightNorm(), {"unit": "layer", "elements": 31}, "32 features or more"),
        (LightNorm(), {"unit": "rows"}, "'layer' or 'rms'"),
        (LightNorm(statistics=None), {"unit": "layer"}, "statistics is None"),
    ],
)
def test_what_no_unit_can_have_is_refused(config, options, message):
    with pytest.raises(RecoupError, match=message):
        rc.silicon.build(config, **options)
