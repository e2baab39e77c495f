"""The main job on real data: the pretrained ResNet-20 on the whole CIFAR-10 test set."""

import copy

import pytest
import torch

import recoup as rc
from recoup.data import root

FOLDER = root()
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not (FOLDER / "cifar10").is_dir(), reason=f"no CIFAR-10 in {FOLDER.name}: set RECOUP_DATA"),
]


def test_resnet20_loses_accuracy_on_four_threads_and_paired_recalibration_wins_most_of_it_back():
    torch.set_num_threads(2)
    spec = f"cifar10:{FOLDER / 'cifar10'}"
    train, test = rc.data.load(spec, "train", limit=2048, seed=0), rc.data.load(spec, "test")
    model = rc.models.load("resnet20", FOLDER / "cifar10_models" / "resnet20-12fca82f.th").eval()
    batches = test.batches(250, channels_last=True)
    clean = train.batches(128, channels_last=True)

    def top1() -> float:
        return rc.evaluate(model, batches).top1

    plain = top1()
    rc.calibrate_(model, clean)
    state = copy.deepcopy(model.state_dict())
    rc.emulate_(model, rc.NBSMT(threads=1))
    eight = top1()
    rc.restore_(model)
    rc.emulate_(model, rc.NBSMT(threads=4))
    broken = top1()
    rc.recalibrate_(model, clean)
    paired = top1()
    model.load_state_dict(state)
    rc.recalibrate_(model, clean, "average")
    averaged = top1()
    assert abs(eight - plain) <= 0.3
    assert eight - broken > 1.0
    assert paired - broken > 0.5 * (eight - broken)
    assert averaged < broken  # clean images: the trap that paired recalibration avoids
