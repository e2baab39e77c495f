"""The real CIFAR-10, MNIST and Fashion-MNIST, where RECOUP_DATA has them."""

import json
from pathlib import Path

import pytest
import torch

import recoup.data
from recoup.data import Dataset
from recoup.errors import RecoupError

pytestmark = pytest.mark.real


def folder(name: str) -> Path:
    path = recoup.data.root() / name
    if not path.is_dir():
        pytest.skip(f"{path} is absent; set RECOUP_DATA to the folder of real data")
    return path


def pixels(data: Dataset) -> torch.Tensor:
    assert isinstance(data.images, torch.Tensor)
    return data.images


def moments(values: torch.Tensor) -> tuple[float, float]:
    """Mean and standard deviation of bytes over 255, from their histogram: no copy of 150 MB in floats."""
    share = values.flatten().bincount(minlength=256).double() / values.numel()
    levels = torch.arange(256) / 255
    mean = float((share * levels).sum())
    return mean, float((share * levels.square()).sum() - mean**2) ** 0.5


@pytest.fixture(scope="module")
def test_split() -> Dataset:
    return recoup.data.load(f"cifar10:{folder('cifar10')}")


def test_cifar_test_split(test_split: Dataset) -> None:
    assert repr(test_split) == "Dataset(cifar10, test: 10,000 images of 3 x 32 x 32, 10 classes)"
    assert test_split.labels.bincount().tolist() == [1000] * 10
    # The official test batch begins with a cat, two ships, an airplane and two frogs; its first pixel is 158, 112, 49.
    assert test_split.labels[:6].tolist() == [3, 8, 8, 0, 6, 6]
    assert pixels(test_split)[0, :, 0, 0].tolist() == [158, 112, 49]


@pytest.mark.slow
def test_cifar_train_split() -> None:
    train = recoup.data.load(f"cifar10:{folder('cifar10')}", "train")
    assert len(train) == 50_000
    assert train.labels.bincount().tolist() == [5000] * 10
    # The official first batch begins with a frog and two trucks; its first pixel is 59, 62, 63.
    assert train.labels[:3].tolist() == [6, 9, 9]
    assert pixels(train)[0, :, 0, 0].tolist() == [59, 62, 63]
    # The published channel means and deviations of the 50,000 images, to their four digits.
    means, deviations = zip(*(moments(channel) for channel in pixels(train).unbind(1)), strict=True)
    assert means == pytest.approx([0.4914, 0.4822, 0.4465], abs=1e-4)
    assert deviations == pytest.approx([0.2470, 0.2435, 0.2616], abs=1e-4)


def test_cifar_has_no_duplicates_but_what_the_original_has(test_split: Dataset) -> None:
    unique = {image.numpy().tobytes() for image in pixels(test_split)}
    assert len(unique) == 10_000
    lossy = json.loads((folder("cifar10") / "lossy.json").read_text())
    assert len(lossy["test"]) == 20


def test_limit_reads_the_same_images(test_split: Dataset) -> None:
    spec = f"cifar10:{folder('cifar10')}"
    assert torch.equal(pixels(recoup.data.load(spec, limit=50)), pixels(test_split)[:50])
    drawn = recoup.data.load(spec, limit=50, seed=7)
    assert torch.equal(pixels(drawn), pixels(test_split.subset(50, seed=7)))
    assert torch.equal(drawn.labels, test_split.subset(50, seed=7).labels)


def test_hub_reads_the_same_images(test_split: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    from datasets import config

    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path)
    datasets.disable_progress_bars()
    file = folder("cifar10") / "test-00000-of-00001.parquet"
    hub = recoup.data.load(f"hf:{file}", limit=200, seed=1)
    assert torch.equal(pixels(hub), pixels(test_split.subset(200, seed=1)))
    assert (hub.classes, hub.mean, hub.std) == (test_split.classes, test_split.mean, test_split.std)


def test_truncated_parquet_is_named(tmp_path: Path) -> None:
    source = folder("cifar10") / "test-00000-of-00001.parquet"
    (tmp_path / source.name).write_bytes(source.read_bytes()[:-1000])
    with pytest.raises(RecoupError, match=r"test-00000-of-00001\.parquet cannot be read as parquet; truncated"):
        recoup.data.load(f"cifar10:{tmp_path}")


@pytest.mark.parametrize(
    ("spec", "place", "first", "histogram"),
    [
        ("mnist", "mnist", [7, 2, 1, 0, 4], [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]),
        ("fashion-mnist", "fashion_mnist", [9, 2, 1, 1, 6], [1000] * 10),
    ],
)
def test_mnist(spec: str, place: str, first: list[int], histogram: list[int]) -> None:
    test, train = (recoup.data.load(f"{spec}:{folder(place)}", split) for split in ("test", "train"))
    assert (len(test), len(train)) == (10_000, 60_000)
    assert test.labels[:5].tolist() == first
    assert test.labels.bincount().tolist() == histogram
    assert moments(pixels(train)) == pytest.approx((train.mean[0], train.std[0]), abs=1e-4)  # constants of four digits
