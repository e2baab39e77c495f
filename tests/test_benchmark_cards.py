"""The comparison with a GPU, with a unit in the card's place: what it finds where the two are one, and where not."""

import json

import numpy as np
import pytest
from benchmarks import tensorcore_gpu
from benchmarks.tensorcore_gpu import Case, cases, compared

import recoup as rc


@pytest.fixture(autouse=True)
def _few_outputs(monkeypatch):
    monkeypatch.setattr(tensorcore_gpu, "SIDE", 8)


@pytest.mark.parametrize("kind", tensorcore_gpu.KINDS)
def test_a_card_that_is_the_unit_does_not_differ(kind):
    for case in cases():
        kept: dict[str, np.ndarray] = {}
        same = Case(case.name, case.unit, lambda a, b, u=case.unit: rc.tensorcore.matmul(a, b, u))
        row = compared(same, kind, 64, "cpu", kept)
        assert (row["different"], row["outputs"]) == (0, 64)
        assert kept[f"{case.name}/{kind}/64/a"].shape == (8, 64)


def test_a_card_of_another_fraction_is_told_by_its_name(monkeypatch):
    unit = rc.TensorCore.hopper_fp8()
    other = unit.replace(fraction=12)
    assert other in list(tensorcore_gpu.neighbours(unit))
    monkeypatch.setattr(tensorcore_gpu, "neighbours", lambda unit: [unit, other])  # each is compiled
    row = compared(Case("fp8", unit, lambda a, b: rc.tensorcore.matmul(a, b, other)), "normal", 128, "cpu", {})
    assert row["different"] > 32
    assert row["neighbours that agree"][repr(other)] == 1
    assert row["examples"][0]["emulator"] != row["examples"][0]["card"]
    assert json.loads(json.dumps(row)) == row


def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr(tensorcore_gpu.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["tensorcore_gpu.py"])
    with pytest.raises(SystemExit, match="no CUDA GPU here"):
        tensorcore_gpu.main()
