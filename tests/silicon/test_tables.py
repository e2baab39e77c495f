"""Operands that energies are measured on: legal, as stated, and such that the units compute what the emulation does."""

from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("amaranth")

import recoup as rc
from recoup.errors import RecoupError
from recoup.formats import Float, Int, ports
from recoup.gates.module import Module, Port
from recoup.gates.typical import activations, weights
from recoup.silicon import build, tables
from recoup.silicon.tables import LANES, STEPS, Tables, ordinary

FP7 = Float.lba(3, 3, bias=3)
UNITS = {
    "shared": rc.LBA.biased(4, 4).replace(operands=FP7),
    "own": rc.LBA.biased(4, 4).replace(operands=FP7, promotion=Float.lba(5, 5, bias=12)),
    "no chunks": rc.LBA.int12(operands=Int(4)),
    "one term": rc.LBA.int12(operands=Int(4)).replace(chunk=1),
    "tensor core": rc.TensorCore(operands="e2m1fn", group=2, fraction=6),
}


@pytest.mark.parametrize("config", UNITS.values(), ids=UNITS)
def test_units_compute_a_typical_sum(config):
    module = build(config)
    inputs = ordinary(config, module)
    shown = module.simulate(inputs)
    for name, told in module.letter(inputs).items():
        assert len(told.at) > STEPS // 2
        assert np.array_equal(shown[name][list(told.at)], told.values)
    assert len(np.unique(shown["y"][-1])) > LANES // 8  # sums neither vanish nor saturate


@pytest.mark.parametrize("threads", [1, 2])
def test_nbsmt_s_element(threads):
    config = rc.NBSMT(threads)
    module = build(config)
    inputs = {**ordinary(config, module), "accumulator": np.zeros((1, LANES), np.uint64)}
    assert inputs["x"].shape == (STEPS, LANES, 2)[: 2 + (threads > 1)]
    assert 0.45 < (inputs["x"] == 0).mean() < 0.55
    assert not inputs["drain"].any()
    shown = module.simulate(inputs)
    assert np.array_equal(shown["x_next"][1:], inputs["x"][:-1])


@pytest.mark.slow
def test_lightnorm_normalises_by_mu_0_and_r_1():
    config = rc.LightNorm.fp10()
    module = build(config)
    inputs = ordinary(config, module)
    shown = module.simulate(inputs)
    assert np.array_equal(shown["xhat"][STEPS // 2 :], inputs["x"][STEPS // 2 :])
    values = ports.values(shown["y"][STEPS // 2 + 1 :], config.forward)
    assert 0.8 < float(values.std()) < 1.5


def test_the_draw():
    generator = np.random.default_rng(0)
    x, w = (draw((4000,), 127, generator) for draw in (activations, weights))
    assert (x >= 0).all()
    assert (np.abs(w) <= 127).all()
    assert x[x > 0].std() == pytest.approx(127 / 4 * (1 - 2 / np.pi) ** 0.5, rel=0.05)
    assert w.std() == pytest.approx(127 / 4, rel=0.05)


def test_what_no_operands_are_known_of_is_refused(monkeypatch):
    module = Module(
        name="codes",
        title="codes",
        ports=(Port("x", "in", 8, "", legal=lambda codes: codes), Port("y", "out", 8, "")),
        elaborate=lambda *_: None,
        expected=lambda _: {},
    )
    monkeypatch.setattr(tables, "generator_of", lambda _: SimpleNamespace())
    with pytest.raises(RecoupError, match=r"no typical\(config, lanes, steps, generator\).*port 'x'"):
        ordinary(None, module)


def test_without_a_library_there_is_no_energy():
    found = Tables()
    assert found.unit == "NAND2"
    assert found.energy(rc.NBSMT(2)).value is None
    assert found.work(rc.NBSMT(2)).value == 2
    assert "operands=None" in found.area(rc.LBA()).why
