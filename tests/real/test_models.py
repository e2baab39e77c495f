"""The four public CIFAR-10 checkpoints, where RECOUP_DATA has them."""

from pathlib import Path

import pytest
import torch

import recoup.data
import recoup.models
from recoup.data import Dataset

pytestmark = pytest.mark.real

# Correct answers on the 10,000 test images, as the README of the data has them.
CORRECT = {"resnet20": 9173, "resnet32": 9263, "resnet44": 9311, "resnet56": 9339}

CORRECT_OF_2000 = {"resnet32": 1838, "resnet44": 1864, "resnet56": 1884}  # of the subset with seed 0


def checkpoint(name: str) -> Path:
    found = sorted((recoup.data.root() / "cifar10_models").glob(f"{name}-*.th"))
    if not found:
        pytest.skip(f"{recoup.data.root()}/cifar10_models/{name}-*.th is absent; set RECOUP_DATA")
    return found[0]


@pytest.fixture(scope="module")
def test_split() -> Dataset:
    path = recoup.data.root() / "cifar10"
    if not path.is_dir():
        pytest.skip(f"{path} is absent; set RECOUP_DATA to the folder of real data")
    return recoup.data.load(f"cifar10:{path}")


def correct(name: str, data: Dataset) -> int:
    model = recoup.models.load(name, checkpoint(name)).eval()
    with torch.no_grad():
        return sum(int((model(x).argmax(1) == y).sum()) for x, y in data.batches(250, channels_last=True))


@pytest.mark.parametrize("name", CORRECT)
def test_every_key_is_found(name: str) -> None:
    """Zero missing and zero unexpected keys: in ours, and in torch's own strict loading.

    These files are from before torch 0.4.1, which began to count batches; torch lets that one buffer be missing, too.
    """
    weights = torch.load(checkpoint(name), map_location="cpu", weights_only=True)["state_dict"]
    model = recoup.models.load(name, checkpoint(name))
    own = model.state_dict()
    plain = {key.removeprefix("module."): value for key, value in weights.items()}
    assert plain.keys() == {key for key in own if not key.endswith("num_batches_tracked")}
    assert all(torch.equal(own[key], plain[key]) for key in plain)
    recoup.models.load(name).load_state_dict(plain, strict=True)


def test_resnet20_reaches_the_published_accuracy(test_split: Dataset) -> None:
    # 91.73 %, measured in float32 and in float64 alike. Another processor sums in another order, which may tip an image
    # whose two best logits agree to seven digits: one image in 10,000 is allowed for it.
    assert abs(correct("resnet20", test_split) - CORRECT["resnet20"]) <= 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet32", "resnet44", "resnet56"])
def test_the_others_on_a_subset(name: str, test_split: Dataset) -> None:
    # Half a minute for all images on two cores, and they do give CORRECT; 2,000 are enough to notice a change.
    assert abs(correct(name, test_split.subset(2000, seed=0)) - CORRECT_OF_2000[name]) <= 1


def test_weights_for_another_network_are_refused() -> None:
    from recoup.errors import RecoupError

    with pytest.raises(RecoupError, match=r"missing: layer1\.3\.conv1\.weight, .* and 56 more$"):
        recoup.models.load("resnet32", checkpoint("resnet20"))
    with pytest.raises(
        RecoupError, match=r"shape: linear\.weight is \[10, 64\] in the file and \[100, 64\] in the model"
    ):
        recoup.models.load("resnet20", checkpoint("resnet20"), num_classes=100)
