"""A disk that runs full in a study or a training: the file is named, and what is kept, and it goes on from there."""

import errno
import os
import re

import pytest
import torch
from torch import nn

from recoup.data import load
from recoup.errors import RecoupError
from recoup.models import digits_net
from recoup.report import write_html
from recoup.storage.files import NoSpaceError
from recoup.study import run
from recoup.study.machine import cpu_threads
from recoup.training import Settings, Stage, train, train_pipelined
from recoup.training.run import TrainingRecipe, run_training
from tests.study.examples import results, small_recipe

FULL = "cannot be written (No space left on device)"


@pytest.fixture(autouse=True)
def _one_thread():
    with cpu_threads(1):
        yield


@pytest.fixture
def disk(monkeypatch):
    """A function after which only so many more files fit; None: all."""
    left: list[int | None] = [None]
    sync = os.fsync

    def synced(handle):
        if left[0] is not None:
            if left[0] == 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            left[0] -= 1
        sync(handle)

    monkeypatch.setattr("recoup.storage.files.os.fsync", synced)
    return lambda count: left.__setitem__(0, count)


@pytest.mark.parametrize(("fit", "file", "kept"), [(0, "recipe.yaml", None), (3, "measurements.json", 2), (9, None, 8)])
def test_a_study(tmp_path, disk, fit, file, kept):
    recipe = small_recipe(tmp_path, states=["float statistics", "paired"], profile_images=0)
    disk(fit)
    with pytest.raises(NoSpaceError) as error:
        run(recipe, progress=False)
    said = str(error.value)
    assert said.startswith(f"{tmp_path / (file or 'results.json')}: {FULL}")
    assert kept is None or f"{kept} of 8 measurements are kept in {tmp_path / 'measurements.json'}; the same" in said
    disk(None)
    assert len(run(recipe, progress=False).accuracy) == 7


def test_a_report_leaves_the_one_before(tmp_path, disk):
    path = write_html(results(), tmp_path)
    before = path.read_text()
    disk(0)
    with pytest.raises(NoSpaceError, match=re.escape(f"{path}: {FULL}; it is as it was before")):
        write_html(results(), tmp_path)
    assert path.read_text() == before


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


def test_a_training(tmp_path, disk):
    data, settings = load("digits", "train", limit=128, seed=0), Settings(batch_size=32, save_every=2)
    stages = [Stage("only", 2, 0.1)]
    disk(0)
    with pytest.raises(NoSpaceError, match=r"checkpoint\.safetensors: cannot be written .*; no checkpoint is kept"):
        train(network(), data, None, stages, settings, folder=tmp_path)
    disk(4)
    with pytest.raises(NoSpaceError, match="the checkpoint at stage 'only', epoch 2, step 0 is kept; the same call"):
        train(network(), data, None, stages, settings, folder=tmp_path)
    disk(None)
    resumed, whole = network(), network()
    train(resumed, data, None, stages, settings, folder=tmp_path)
    train(whole, data, None, stages, settings)
    assert all(torch.equal(one, other) for one, other in zip(resumed.parameters(), whole.parameters(), strict=True))


def test_a_pipeline(tmp_path, disk):
    data, settings = load("digits", "train", limit=20, seed=0), Settings(save_every=5, augment=False)
    how = {"mitigation": "none", "epochs": 1, "learning_rate": 0.01, "settings": settings, "folder": tmp_path}
    disk(0)
    with pytest.raises(NoSpaceError, match=r"pipeline\.pt: cannot be written .*; no checkpoint is kept"):
        train_pipelined(digits_net(norm="group"), data, None, **how)
    torch.manual_seed(0)
    model = digits_net(norm="group")
    disk(1)
    with pytest.raises(NoSpaceError, match="the checkpoint before it is kept"):
        train_pipelined(model, data, None, **how)


BASE = {"model": "recoup.models:digits_net", "data": "digits", "limit": 128, "test_limit": 50, "batch_size": 64}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"model": "resnet21"}, "no factory"),
        ({"weights": "no-such-file.pt"}, "no such file"),
        ({"model": "resnet20"}, r"'resnet20' does not take the images of 'digits', \[1, 8, 8\] each"),
        ({"layers": {"nothing": "lba-m7e4"}}, "'nothing' matches no layer"),
        ({"batch_size": 200}, "128 images are less than a batch of 200"),
        ({"limit": 100_000}, "100000"),
    ],
)
def test_a_training_that_is_refused_claims_no_folder(tmp_path, change, told):
    with pytest.raises(RecoupError, match=told):
        run_training(TrainingRecipe.build({**BASE, **change}), tmp_path / "new", progress=False)
    assert not (tmp_path / "new").exists()


def test_a_training_that_diverges_says_where(tmp_path):
    data, settings = load("digits", "train", limit=128, seed=0), Settings(batch_size=32, save_every=2, augment=False)
    with pytest.raises(RecoupError, match=r"the loss is (nan|inf) in stage 'wild', epoch \d+, step \d+: lower"):
        train(network(), data, None, [Stage("wild", 4, 1e38)], settings, folder=tmp_path)
    with pytest.raises(RecoupError, match=r"train_pipelined: epoch 1, sample \d+: .*(loss|gradient) of step \d+ is "):
        train_pipelined(
            digits_net(norm="none"), data, None, mitigation="none", epochs=1, learning_rate=1e38, settings=settings
        )


def test_not_on_a_terminal_training_says_a_line_an_epoch(capsys):
    data = load("digits", "train", limit=64, seed=0)
    train(network(), data, data, [Stage("only", 2, 0.1)], Settings(batch_size=32), progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert [line.partition(":")[0] for line in err.splitlines()] == ["only, epoch 1", "only, epoch 2"]
    assert all("loss " in line and "top-1 " in line for line in err.splitlines())
