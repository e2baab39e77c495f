import json
import signal
import time

import pytest
import torch
from torch import nn

from recoup.data import load
from recoup.emulate import emulate_
from recoup.errors import RecoupError
from recoup.lba import LBA, correct_gain_
from recoup.network.emulated import emulated_layers
from recoup.training import Settings, Stage, Trained, fine_tune, train
from recoup.training.checkpoint import FILE
from recoup.training.schedule import schedule
from tests.fresh import Fresh, recoup


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Dropout(0.2), nn.ReLU(), nn.Linear(16, 10))


@pytest.fixture(scope="module")
def digits():
    return load("digits", "train", limit=512, seed=0)


SETTINGS = Settings(batch_size=64, save_every=3, seed=3, clip=1.0, weight_decay=1e-3)
STAGES = [Stage("a", 2, 0.1), Stage("b", 1, 0.02)]


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_it_learns_and_is_deterministic(digits):
    one, other = network(), network()
    trained = train(one, digits, load("digits", "test"), STAGES, SETTINGS)
    train(other, digits, None, STAGES, SETTINGS)
    assert same(weights(one), weights(other))
    assert [row["stage"] for row in trained.epochs] == ["a", "a", "b"]
    assert trained.top1 > 25  # chance is 10
    assert not one.training


class Stopped(Exception):  # noqa: N818
    """What a test breaks a run with."""


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("at", [1, 3, 4, 8, 11, 16, 20, 23])
def test_resumed_after_any_step_is_the_same_run(digits, tmp_path, at, optimizer):
    settings = Settings(**{**{f: getattr(SETTINGS, f) for f in SETTINGS.__slots__}, "optimizer": optimizer})
    whole = network()
    expected = train(whole, digits, None, STAGES, settings)
    steps = 0

    def stop(module, args):
        nonlocal steps
        steps += module.training
        if steps > at:
            raise Stopped

    broken = network()
    hook = broken.register_forward_pre_hook(stop)
    with pytest.raises(Stopped):
        train(broken, digits, None, STAGES, settings, folder=tmp_path)
    hook.remove()
    again = network()
    torch.manual_seed(99)
    resumed = train(again, digits, None, STAGES, settings, folder=tmp_path)
    assert same(weights(whole), weights(again))
    drop = ("seconds",)
    assert [{k: v for k, v in row.items() if k not in drop} for row in resumed.epochs] == [
        {k: v for k, v in row.items() if k not in drop} for row in expected.epochs
    ]
    finished = network()
    train(finished, digits, None, STAGES, settings, folder=tmp_path)
    assert same(weights(whole), weights(finished))


@pytest.mark.slow
def test_killed_and_restarted(tmp_path):
    options = "train --model recoup.models:digits_net --data digits --config LBA.biased(5,4) --epochs 2 --lr 0.05"
    options += " --underflow-epochs 1 --limit 256 --test-limit 50 --batch-size 32 --save-every 2 --json --out"

    def start(folder):
        return Fresh(recoup, *options.split(), str(folder))

    whole = start(tmp_path / "whole").wait()
    assert whole.returncode == 0, whole.stderr
    killed = 0
    for wanted in (1, 3):  # after so many different checkpoints
        process, seen = start(tmp_path / "broken"), set()
        path = tmp_path / "broken" / FILE
        while process.running and len(seen) < wanted:
            if path.exists():
                seen.add(path.stat().st_mtime_ns)
            time.sleep(0.002)
        if process.running:
            process.signal(signal.SIGKILL)
            killed += 1
        process.wait()
    assert killed
    last = start(tmp_path / "broken").wait()
    assert last.returncode == 0, last.stderr
    one, other = ((tmp_path / name / "weights.safetensors").read_bytes() for name in ("whole", "broken"))
    assert one == other
    result = json.loads((tmp_path / "broken" / "training.json").read_text())
    assert [row["stage"] for row in result["epochs"]] == ["without underflow"] * 2 + ["with underflow"]


def test_another_run_is_refused(digits, tmp_path):
    train(network(), digits, None, STAGES, SETTINGS, folder=tmp_path)
    kept = (tmp_path / FILE).read_bytes()
    other = Settings(batch_size=32, save_every=3, seed=3, clip=1.0, weight_decay=1e-3)
    with pytest.raises(RecoupError, match="batch_size was 64 and is 32"):
        train(network(), digits, None, STAGES, other, folder=tmp_path)
    with pytest.raises(RecoupError, match="stages was"):
        train(network(), digits, None, STAGES[:1], SETTINGS, folder=tmp_path)
    with pytest.raises(RecoupError, match=r"weights was '.*' and is"):
        train(network(7), digits, None, STAGES, SETTINGS, folder=tmp_path)
    with pytest.raises(RecoupError, match=r"config of layer '1' was None and is 'LBA\(\)'"):
        train(emulate_(network(), LBA()), digits, None, STAGES, SETTINGS, folder=tmp_path)
    assert (tmp_path / FILE).read_bytes() == kept
    (tmp_path / FILE).write_bytes(kept[:100])
    with pytest.raises(RecoupError, match="cut off or foreign"):
        train(network(), digits, None, STAGES, SETTINGS, folder=tmp_path)


def test_gains_survive_an_interruption(digits, tmp_path):
    def start():
        model = emulate_(network(), LBA.biased(4, 4))
        return correct_gain_(model, digits.batches(64))

    def gains(model):
        return {name: layer.gain.clone() for name, layer in emulated_layers(model).items()}

    run = {"epochs": 1, "underflow_epochs": 1, "learning_rate": 0.05, "settings": SETTINGS}
    whole, broken = start(), start()
    expected = gains(whole)
    fine_tune(whole, digits, **run)
    steps = 0

    def stop(module, args):
        nonlocal steps
        steps += module.training
        if steps > 5:
            raise Stopped

    hook = broken.register_forward_pre_hook(stop)
    with pytest.raises(Stopped):
        fine_tune(broken, digits, **run, folder=tmp_path)
    hook.remove()
    for again in (start(), start()):  # goes on; then finds it finished
        fine_tune(again, digits, **run, folder=tmp_path)
        assert same(gains(again), expected)
        assert same(weights(again), weights(whole))
    without = emulate_(network(), LBA.biased(4, 4))
    with pytest.raises(RecoupError, match="another run: weights"):
        fine_tune(without, digits, **run, folder=tmp_path)


def test_a_loss_that_is_not_finite_stops(digits, tmp_path):
    with pytest.raises(RecoupError, match="stage 'wild', epoch 1, step"):
        train(network(), digits, None, [Stage("wild", 3, 1e18)], Settings(batch_size=64), folder=tmp_path)


def test_bad_input(digits):
    with pytest.raises(RecoupError, match="no stages"):
        train(network(), digits, None, [])
    with pytest.raises(RecoupError, match="512 images are less than a batch"):
        train(network(), digits, None, STAGES, Settings(batch_size=513))
    with pytest.raises(RecoupError, match="schedule"):
        schedule("step", 10)
    with pytest.raises(RecoupError, match="warm_up"):
        schedule("cosine", 10, 10)
    with pytest.raises(RecoupError, match="no epoch"):
        _ = Trained([]).top1
    with pytest.raises(RecoupError, match="nothing was measured"):
        _ = train(network(), digits, None, [Stage("a", 1, 0.1)], SETTINGS).top1


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"optimizer": "lion"}, "optimizer must be one of 'sgd', 'adamw'"),
        ({"schedule": "poly"}, "schedule must be one of 'constant', 'cosine', 'linear'"),
        ({"batch_size": "128"}, "batch_size must be an integer from 1"),
        ({"save_every": 0}, "save_every must be an integer from 1"),
        ({"warm_up": -1}, "warm_up must be an integer from 0"),
        ({"seed": -1}, "seed must be an integer from 0"),
        ({"clip": -1.0}, "clip must be a number above 0, or None"),
        ({"clip": 0}, "clip must be"),
        ({"clip": float("nan")}, "clip must be"),
        ({"momentum": 1.0}, "momentum must be a number from 0 to below 1"),
        ({"weight_decay": -0.1}, "weight_decay must be a number of at least 0"),
        ({"label_smoothing": 2}, "label_smoothing must be a number from 0 to 1"),
        ({"nesterov": True, "momentum": 0.0}, "nesterov needs a momentum"),
        ({"nesterov": 1}, "nesterov must be True or False"),
        ({"augment": "no"}, "augment must be True or False"),
    ],
)
def test_bad_settings(values, told):
    with pytest.raises(RecoupError, match=rf"Settings\(.*{told}"):
        Settings(**values)


def test_bad_stages(digits):
    with pytest.raises(RecoupError, match=r"Stage\(epochs=-1\): epochs must be an integer from 0"):
        Stage("a", -1, 0.1)
    with pytest.raises(RecoupError, match=r"Stage\(learning_rate='1'\): learning_rate must be a number"):
        Stage("a", 1, "1")  # type: ignore[arg-type]
    with pytest.raises(RecoupError, match=r"epochs=-1"):
        fine_tune(emulate_(network(), LBA()), digits, epochs=-1)


def test_the_schedules():
    rise = schedule("linear", 6, 2)
    assert [rise(step) for step in range(6)] == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    assert {schedule("constant", 3)(step) for step in range(3)} == {1.0}


def test_fine_tuning_switches_underflow_on_last(digits):
    model = emulate_(network(), LBA.biased(5, 4))
    seen = []

    def note(module, args):
        if module.training:
            seen.append(next(iter(emulated_layers(module).values())).config.underflow)

    model.register_forward_pre_hook(note)
    fine_tune(model, digits, epochs=1, underflow_epochs=1, learning_rate=0.05, settings=SETTINGS)
    assert seen == [False] * 8 + [True] * 8
    assert all(layer.config.underflow for layer in emulated_layers(model).values())
    with pytest.raises(RecoupError, match="no layer whose hardware is fine-tuned in phases"):
        fine_tune(network(), digits)
