"""Narrow accumulators on real data: order of the sweep, gain correction, attention."""

import pytest
import torch

import recoup as rc
from recoup import lba
from recoup.data import root
from recoup.data.text import contexts
from recoup.evaluation import nats_per_token
from recoup.lba import LBA
from recoup.models import load_chargpt

FOLDER = root()
pytestmark = pytest.mark.real


@pytest.mark.skipif(not (FOLDER / "cifar10").is_dir(), reason="no CIFAR-10: set RECOUP_DATA")
def test_narrower_accumulators_lose_more_and_a_gain_per_channel_wins_it_back():
    torch.set_num_threads(2)
    spec = f"cifar10:{FOLDER / 'cifar10'}"
    train, test = rc.data.load(spec, "train", limit=256, seed=0), rc.data.load(spec, limit=1000, seed=0)
    model = rc.models.load("resnet20", FOLDER / "cifar10_models" / "resnet20-12fca82f.th").eval()
    plain = rc.evaluate(model, test.batches(250)).top1
    found = {}
    for mantissa in (10, 6, 5):
        rc.emulate_(model, LBA.biased(mantissa, 5))
        found[mantissa] = rc.evaluate(model, test.batches(250)).top1
        rc.restore_(model)
    assert abs(found[10] - plain) <= 0.5
    assert found[10] > found[6] > found[5]
    assert found[5] < plain - 10
    rc.emulate_(model, LBA.biased(5, 5))
    lba.correct_gain_(model, train.batches(128))
    assert rc.evaluate(model, test.batches(250)).top1 > plain - 4


@pytest.mark.filterwarnings("ignore:evaluate. sums end:recoup.RecoupWarning")  # its attention saturates, and is told so
@pytest.mark.skipif(not (FOLDER / "text").is_dir(), reason="no text: set RECOUP_DATA")
def test_a_transformer_on_twelve_bits_predicts_as_well():
    torch.set_num_threads(2)
    (checkpoint,) = (FOLDER / "text").glob("*.pt")
    model, alphabet = load_chargpt(checkpoint)
    (text,) = (FOLDER / "text").glob("*.txt")
    batches = contexts(text, alphabet, model.context, first=0.97)
    plain = nats_per_token(model, batches)
    rc.emulate_(model, LBA.m7e4())
    twelve = nats_per_token(model, batches)
    rc.restore_(model)
    rc.emulate_(model, LBA.biased(4, 3))
    eight = nats_per_token(model, batches)
    assert abs(twelve - plain) < 0.03
    assert eight > plain + 0.5


@pytest.mark.skipif(not (FOLDER / "cifar10").is_dir(), reason="no CIFAR-10: set RECOUP_DATA")
def test_raw_pixels_saturate_with_a_warning_and_shifts_bring_the_accuracy_back():
    torch.set_num_threads(2)
    spec = f"cifar10:{FOLDER / 'cifar10'}"
    train, test = rc.data.load(spec, "train", limit=32, seed=0), rc.data.load(spec, limit=250, seed=0)
    model = rc.models.load("resnet20", FOLDER / "cifar10_models" / "resnet20-12fca82f.th").eval()
    plain = rc.evaluate(model, test.batches(250)).top1
    norm = model.get_submodule("bn1")  # pixels of 0 to 255, but for their offset: the same function in float
    norm.running_mean.mul_(57.6)
    norm.running_var.mul_(57.6**2)
    raw = [(57.6 * x, y) for x, y in test.batches(250)]
    assert abs(rc.evaluate(model, raw).top1 - plain) <= 0.4
    rc.emulate_(model, LBA.m7e4())
    with pytest.warns(rc.RecoupWarning, match=r"evaluate: sums end at .* conv1 \d+(\.\d+)? %.*choose_exponents_"):
        assert rc.evaluate(model, raw).top1 < 50
    lba.choose_exponents_(model, [57.6 * x for x, _ in train.batches(32)])
    assert rc.evaluate(model, raw).top1 > plain - 2
