"""The comparison with a GPU, with a unit in the card's place: what it finds where the two are one, and where not."""

import json

import numpy as np
import pytest
import torch
from benchmarks import tensorcore_gpu
from benchmarks.measure import RESULTS
from benchmarks.tensorcore_gpu import Case, agreement, cases, compared, differences

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
    case = Case("fp8", unit, lambda a, b: rc.tensorcore.matmul(a, b, other))
    row = compared(case, "normal", 128, "cpu", {})
    assert row["different"] > 32
    assert agreement(case, "normal", 128, "cpu")[repr(other)] == 1
    assert row["examples"][0]["emulator"] != row["examples"][0]["card"]
    assert json.loads(json.dumps(row)) == row


@pytest.mark.parametrize("parts", [2, 4])
def test_a_card_that_splits_k_is_told(parts):
    unit, kept = rc.TensorCore.hopper_tf32(), {}

    def card(a, b):
        pieces = zip(a.chunk(parts, 1), b.chunk(parts), strict=True)
        return sum(rc.tensorcore.matmul(x.contiguous(), y.contiguous(), unit) for x, y in pieces)

    row = compared(Case("tf32", unit, card), "normal", 64, "cpu", kept)
    assert (row["different"], row["parts of K"]) == (0, parts)
    assert row["different if not split"] > 16
    assert not kept  # what is kept is the instruction's own


def test_what_an_h100_gave_is_what_the_units_give():
    """The operands and bits that the last run on a card kept: products of all six cases, K to 128."""
    kept = np.load(RESULTS / "tensorcore_gpu_vectors.npz")
    units, seen = {case.name: case.unit for case in cases()}, set()
    for key in kept.files:
        name, kind, _, what = key.rsplit("/", 3)
        if what == "a":
            a, b, card = (torch.from_numpy(kept[key[:-1] + one]).view(torch.float32) for one in ("a", "b", "card"))
            assert not differences(rc.tensorcore.matmul(a, b, units[name]), card).any(), key
            seen.add((name, kind))
    assert len(seen) == len(units) * len(tensorcore_gpu.KINDS)


def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr(tensorcore_gpu.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["tensorcore_gpu.py"])
    with pytest.raises(SystemExit, match="no CUDA GPU here"):
        tensorcore_gpu.main()
