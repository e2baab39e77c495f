"""The main job on real data: the pretrained ResNet-20 on the whole CIFAR-10 test set; and a transformer."""

import copy

import pytest
import torch

import recoup as rc
from recoup.data import root
from recoup.data.text import contexts
from recoup.evaluation import nats_per_token

FOLDER = root()
pytestmark = pytest.mark.real


@pytest.mark.skipif(not (FOLDER / "cifar10").is_dir(), reason=f"no CIFAR-10 in {FOLDER.name}: set RECOUP_DATA")
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


@pytest.mark.skipif(not (FOLDER / "text").is_dir(), reason=f"no text in {FOLDER.name}: set RECOUP_DATA")
def test_a_transformer_on_two_threads_predicts_as_at_8_bit_with_a_port_of_five_bits():
    """12,288 characters of the last tenth; the 16 linear layers of the blocks, whose inputs are negative too."""
    torch.set_num_threads(2)
    model, alphabet = rc.models.load_chargpt(FOLDER / "text" / "chargpt_tinyshakespeare.pt")
    text = FOLDER / "text" / "tinyshakespeare.txt"
    test = contexts(text, alphabet, model.context, first=0.9)[:3]
    rc.calibrate_(model, contexts(text, alphabet, model.context, last=0.9)[:4], {r"re:blocks\..*": True, "head": None})
    found = {}
    for config in (rc.NBSMT(1), rc.NBSMT(2), rc.NBSMT(2, port=4)):
        rc.emulate_(model, None, {r"re:blocks\..*\.(qkv|proj|fc1|fc2)": config})
        found[config] = nats_per_token(model, test)
        rc.restore_(model)
    eight, five, four = found.values()
    assert abs(eight - nats_per_token(model, test)) < 0.005
    assert eight < five < eight + 0.02
    assert four > five + 0.1
