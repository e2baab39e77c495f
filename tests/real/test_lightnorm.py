"""LightNorm on real data: a trained network converted without training."""

import pytest
import torch

import recoup as rc
from recoup.data import root
from recoup.lightnorm import LightNorm

FOLDER = root()
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not (FOLDER / "cifar10").is_dir(), reason=f"no CIFAR-10 in {FOLDER.name}: set RECOUP_DATA"),
]


def test_a_converted_resnet20_keeps_its_accuracy_once_recalibrated():
    torch.set_num_threads(2)
    spec = f"cifar10:{FOLDER / 'cifar10'}"
    train, test = rc.data.load(spec, "train", limit=512, seed=0), rc.data.load(spec, limit=2000, seed=0)
    weights = FOLDER / "cifar10_models" / "resnet20-12fca82f.th"
    plain = rc.evaluate(rc.models.load("resnet20", weights).eval(), test.batches(250)).top1
    found = {}
    for config in (LightNorm.range(), LightNorm()):
        model = rc.emulate_(rc.models.load("resnet20", weights).eval(), config)
        before = rc.evaluate(model, test.batches(250)).top1
        rc.recalibrate_(model, train.batches(128))
        found[config] = before, rc.evaluate(model, test.batches(250)).top1
    assert found[LightNorm.range()][1] >= plain - 1
    before, after = found[LightNorm()]
    assert before < plain - 3  # FP10 and blocks shift every layer's statistics
    assert after >= plain - 1
