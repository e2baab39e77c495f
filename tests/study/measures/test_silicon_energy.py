"""Energy of a study's configs: on the operands of its own network, every layer as often as it has steps."""

from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("amaranth")

import recoup as rc
from recoup.errors import RecoupError
from recoup.report.summary import quoted_of, summarize
from recoup.silicon import build
from recoup.silicon.measured import Measured
from recoup.study.lab import Lab
from recoup.study.measures import silicon_energy
from recoup.study.measures.silicon import SiliconResults
from recoup.study.measures.silicon_energy import NO_NETWORK, NO_OPERANDS, energies
from recoup.study.repairs import NONE
from tests.study.examples import results, small_recipe

TWO, LBA = rc.NBSMT(threads=2), rc.LBA(chunk=None)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Made-up accuracies of a network that is there."""
    recipe = small_recipe(tmp_path_factory.mktemp("study"), configs=["nbsmt-2t", repr(LBA)])
    return results().model_copy(update={"recipe": recipe, "weights_sha256": None})


@pytest.fixture
def asked(monkeypatch):
    """Layers whose energy was measured, by module: every step costs 2 mJ, 1 mJ with a gated drain."""
    found = {}

    def energy(module, operands, liberty, *, glitches, lanes):
        found.setdefault(module.title, []).append(operands)
        return SimpleNamespace(step=2e9, gated=1e9, tool=f"{liberty} {glitches} {lanes}", liberty=(("a.lib", "ab"),))

    monkeypatch.setattr(Measured, "energy", energy)
    return found


def built(config):
    return build(config, **({"operands": rc.Float.lba(2, 3, bias=3)} if isinstance(config, rc.LBA) else {}))


def measure(study, **options):
    return energies(study, built, quoted_of(summarize(study)), "lib", **options)


def test_every_layer_counts_as_often_as_it_has_steps(study, asked):
    found = measure(study)
    assert (found.images, found.lanes, found.lower_bound, found.tool) == (8, 64, False, "lib True 64")
    assert list(asked) == ["2T S+A nearest", "1T", "2T exact"]
    lab = Lab(study.recipe)
    model = lab.repaired(TWO, NONE, study.recipe.calibration.seeds[0])
    batch = next(iter(lab.test.batches(8)))
    macs = sum(layer.macs for layer in rc.nbsmt.cycles(model, batch).layers if layer.macs and layer.threads > 1) / 8
    own, single, exact = found.rows
    assert (own.layers, own.counterpart, single.counterpart) == (len(asked["1T"]), False, True)
    assert own.image == exact.image == pytest.approx(2 * macs / 2)
    assert own.gated == pytest.approx(own.image / 2)
    assert single.image == pytest.approx(2 * macs)
    assert (own.operation, single.operation) == (pytest.approx(1e9), pytest.approx(2e9))


def test_operands_are_those_of_the_state_that_is_quoted(study, asked):
    energies(study, built, lambda *_: (NONE, 90.0), "lib", baselines=False)
    bare = [x for x, _ in asked.pop("2T S+A nearest")]
    assert not asked
    energies(study, built, lambda *_: ("paired", 90.0), "lib", baselines=False)
    repaired = [x for x, _ in asked["2T S+A nearest"]]
    assert (bare[0] == repaired[0]).all()  # nothing emulated stands before it
    assert any((a != b).any() for a, b in zip(bare, repaired, strict=True))


def test_a_policy_of_one_unit_has_no_baseline_to_take_operands_from(study, asked):
    policy = rc.Policy({"features.3": TWO}, name="one layer")
    recipe = study.recipe.model_copy(update={"configs": (TWO,), "policy": (policy,)})
    changed, lines = study.model_copy(update={"recipe": recipe}), []
    found = energies(changed, built, lambda *_: (NONE, 90.0), "lib", told=lines.append)
    assert [(row.config, row.layers) for row in found.rows] == [(repr(TWO), 3)] * 3 + [("one layer", 1)] * 2
    assert [row.module for row in found.rows][3:] == ["2T S+A nearest", "2T exact"]
    shown = SiliconResults(rows=(), left={}, tool="", energies=found).joined(changed, lambda *_: (NONE, 90.0))
    assert [row.layers for row in shown.spent] == [3, 3, 3, 1, 1]  # one unit, but not the same layers
    assert f"  1T: left out: {NO_NETWORK}" in lines
    assert found.missing == {"one layer": {"1T": NO_NETWORK}}


def test_hardware_without_operands_is_listed_with_the_reason(study, asked):
    found = measure(study, glitches=False)
    assert found.left == {repr(LBA): NO_OPERANDS}
    assert found.lower_bound

    def absent(config):
        raise RecoupError("no gates today")

    assert energies(study, absent, quoted_of(summarize(study)), "lib").left[repr(TWO)] == "no gates today"


def failing(monkeypatch, title):
    """Energy of every module but one: 1 fJ a step."""

    def energy(module, *_, **__):
        if module.title == title:
            raise RecoupError("too large")
        return SimpleNamespace(step=1.0, gated=1.0, tool="t", liberty=())

    monkeypatch.setattr(Measured, "energy", energy)


def test_a_config_that_fails_half_way_has_no_row(study, monkeypatch):
    failing(monkeypatch, "2T S+A nearest")
    found = measure(study)
    assert (found.rows, found.left[repr(TWO)], found.missing) == ((), "too large", {})


def test_a_counterpart_that_fails_leaves_the_figures_of_the_others(study, monkeypatch):
    failing(monkeypatch, "2T exact")
    found = measure(study)
    assert [row.module for row in found.rows] == ["2T S+A nearest", "1T"]
    assert found.missing == {repr(TWO): {"2T exact": "too large"}}
    assert repr(TWO) not in found.left
    shown = SiliconResults(rows=(), left={}, tool="", energies=found)
    assert shown.joined(study, quoted_of(summarize(study))).unspent["2T exact beside 2 threads, S+A"] == "too large"
    assert shown.joined(None).unspent[f"2T exact beside {TWO!r}"] == "too large"


def test_counterparts_that_cannot_be_made_leave_the_own_figure(study, asked):
    def lonely():
        raise RecoupError("no conventional gates")

    found = energies(study, lambda c: built(c).replace(baselines=lonely), quoted_of(summarize(study)), "lib")
    assert [row.module for row in found.rows] == ["2T S+A nearest"]
    assert found.missing == {repr(TWO): {"what is conventional": "no conventional gates"}}


def test_a_counterpart_without_operands_is_listed(study, asked):
    """One whose ports no layer feeds, such as a unit of another wing."""
    other = built(LBA)
    found = energies(
        study, lambda c: built(c).replace(baselines=lambda: {"other": other}), quoted_of(summarize(study)), "lib"
    )
    assert found.missing == {repr(TWO): {other.title: NO_OPERANDS}}


def test_a_counterpart_of_other_operands_has_those_of_the_baseline_in_the_state_that_is_quoted(
    study, asked, monkeypatch
):
    """One thread beside two: the 8-bit network, in the state of the accuracy that stands beside it."""
    captured, layers = [], silicon_energy._Network.layers
    monkeypatch.setattr(
        silicon_energy._Network, "layers", lambda *given: captured.append(given[1:]) or layers(given[0], given[1], NONE)
    )
    energies(study, built, lambda _, baseline: ("its own" if baseline else "paired", 90.0), "lib")
    assert captured == [(TWO, "paired"), (rc.NBSMT(threads=1), "its own")]


def test_weights_that_changed_are_refused(study, tmp_path):
    (tmp_path / "w.pt").write_bytes(b"other")
    recipe = study.recipe.model_copy(update={"weights": str(tmp_path / "w.pt")})
    changed = study.model_copy(update={"recipe": recipe, "weights_sha256": "ab" * 32})
    with pytest.raises(RecoupError, match="no longer the file that the study ran on"):
        measure(changed)


def test_layers_of_the_other_kind_of_codes_are_named_with_the_remedy():
    """A network of signed and unsigned layers is captured as it is; one unit takes one kind."""
    torch.manual_seed(0)
    sizes = {"first": nn.ReLU(), "a": nn.GELU(), "b": nn.GELU(), "c": nn.ReLU(), "last": nn.Identity()}
    parts = [(name, nn.Sequential(nn.Linear(4, 4), end)) for name, end in sizes.items()]
    model, x = nn.Sequential(OrderedDict(parts)).eval(), torch.rand(8, 4)
    rc.emulate_(rc.calibrate_(model, [x]), rc.NBSMT(2))
    layers = rc.silicon.capture(model, x)
    assert {name: str(operands[0].dtype) for name, operands in layers.items()} == {
        "a.0": "uint8", "b.0": "int8", "c.0": "int8"
    }  # fmt: skip
    with pytest.raises(RecoupError, match=r'^b\.0, c\.0: .*activations="signed"\), and capture\(..., layers=\['):
        silicon_energy._measured(rc.silicon.build(rc.NBSMT(2)), rc.NBSMT(2), layers, None)  # type: ignore[arg-type]
    unit = rc.silicon.build(rc.NBSMT(2), activations="signed")
    with pytest.raises(RecoupError, match=r'^a\.0: .*activations="unsigned"\)'):
        silicon_energy._measured(unit, rc.NBSMT(2), layers, None)  # type: ignore[arg-type]
