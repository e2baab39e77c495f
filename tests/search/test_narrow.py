"""The search ends within its budget, is deterministic, and resumes from its log."""

import json

import pytest
import torch

import recoup as rc
from recoup.errors import RecoupError
from recoup.lba import LBA
from recoup.search import narrowest
from tests.networks import batches_of, small_net

CANDIDATES = (LBA.m10e5(), LBA.m7e4(), LBA.biased(4, 3), LBA.biased(2, 2))


def labelled():
    """A network and batches that it classifies perfectly."""
    model = small_net()
    with torch.no_grad():
        return model, [(x, model(x).argmax(1)) for x in batches_of(3, 16)]


def test_the_found_network_keeps_the_budget(tmp_path):
    model, batches = labelled()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    lines = []
    found = narrowest(
        model, batches, budget=5.0, candidates=CANDIDATES, log=tmp_path / "log.json", progress=lines.append
    )
    assert found.reference == 100.0
    assert found.accuracy >= 95.0
    assert set(found.uniform) <= set(CANDIDATES)
    assert len(lines) == found.evaluations
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    rc.emulate_(model, None, layers=found.layers)
    assert rc.evaluate(model, batches).top1 == found.accuracy
    assert found.bits == sum(c.accumulator.bits for c in found.layers.values()) / len(found.layers)
    rc.restore_(model)

    again = narrowest(model, batches, budget=5.0, candidates=CANDIDATES, log=tmp_path / "log.json")
    assert again.evaluations == 0
    assert (again.layers, again.accuracy) == (found.layers, found.accuracy)
    kept = json.loads((tmp_path / "log.json").read_text())
    kept["accuracy"].popitem()
    (tmp_path / "log.json").write_text(json.dumps(kept))
    assert narrowest(model, batches, budget=5.0, candidates=CANDIDATES, log=tmp_path / "log.json").evaluations == 1


def test_bad_input(tmp_path):
    model, batches = labelled()
    with pytest.raises(RecoupError, match="candidates must be a list of LBA configs"):
        narrowest(model, batches, candidates=())
    with pytest.raises(RecoupError, match=r"even .* in all layers falls"):
        narrowest(model, batches, budget=0.0, candidates=(LBA.biased(2, 2),))
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(RecoupError, match="no log of a search"):
        narrowest(model, batches, log=tmp_path / "other.json")
    log = tmp_path / "log.json"
    narrowest(model, batches, candidates=CANDIDATES[:1], calibration=batches, log=log)
    kept, run = log.read_text(), {"candidates": CANDIDATES[:1], "log": log}
    longer = [*batches, batches[0]]
    relabelled = [(x, (y + 1) % 10) for x, y in batches]
    for told, arguments, options in (
        ("another model", (small_net(1), batches), {"calibration": batches}),
        ("other batches", (model, longer), {"calibration": batches}),
        ("other batches", (model, relabelled), {"calibration": batches}),
        ("another calibration", (model, batches), {"calibration": longer}),
        ("another calibration", (model, batches), {}),
    ):
        with pytest.raises(RecoupError, match=f"log of a search with {told}"):
            narrowest(*arguments, **options, **run)
    assert log.read_text() == kept
    with pytest.raises(RecoupError, match="emulated already"):
        narrowest(rc.emulate_(model, LBA()), batches)
