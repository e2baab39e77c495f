"""Hugging Face data sets, from local files only."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from PIL import Image

import recoup.data
from recoup.data import CropFlip, Pictures, ResizedCrop
from recoup.errors import RecoupError

from .conftest import encoded, noise, pixels, write_parquet

if TYPE_CHECKING:
    import datasets  # seconds of imports, which only the process that runs these tests should pay

pytestmark = pytest.mark.usefixtures("hub_cache")
LABEL, INTEGER = "label", "int64"


def table(columns: dict[str, Any], count: int = 5, shape: tuple[int, ...] = (16, 16, 3)) -> "datasets.Dataset":
    """A data set of one image column, "picture", and the given ones: name: (kind of feature, values)."""
    import datasets

    kinds = {LABEL: datasets.ClassLabel(names=["low", "high"]), "image": datasets.Image()}
    pictures = [Image.fromarray(values) for values in noise(count, *shape)]
    given = {name: kinds.get(kind) or datasets.Value(kind) for name, (kind, _) in columns.items()}
    features = {"picture": datasets.Image()} | given
    values = {"picture": pictures} | {name: values for name, (_, values) in columns.items()}
    return datasets.Dataset.from_dict(values, datasets.Features(features))


LABELLED = {"kind": (LABEL, [0, 1, 1, 0, 1])}


def test_parquet_file_with_features(tmp_path: Path) -> None:
    path = tmp_path / "test-00000-of-00001.parquet"
    table(LABELLED).to_parquet(path)
    data = recoup.data.load(f"hf:{path}")
    assert torch.equal(pixels(data), torch.from_numpy(noise(5, 16, 16, 3)).permute(0, 3, 1, 2))
    assert data.labels.tolist() == [0, 1, 1, 0, 1]
    assert (data.classes, data.split, data.augmentation) == (("low", "high"), "test", CropFlip(2, flip=False))
    with pytest.raises(RecoupError, match="no split 'train'; there is test"):
        recoup.data.load(f"hf:{path}", "train")


def test_parquet_file_without_features(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "anything.parquet", [encoded(x) for x in noise(3, 8, 8)], [0, 2, 1])
    data = recoup.data.load(f"hf:{path}", "all")
    assert (data.images.shape, data.classes, data.mean) == ((3, 1, 8, 8), ("0", "1", "2"), (0.5,))
    with pytest.raises(RecoupError, match="no split 'test'; there is all"):
        recoup.data.load(f"hf:{path}")


def test_folder_of_splits(tmp_path: Path) -> None:
    table(LABELLED).to_parquet(tmp_path / "train-00000-of-00001.parquet")
    table({"label": (LABEL, [1, 0])}, 2).to_parquet(tmp_path / "validation-00000-of-00001.parquet")
    with pytest.raises(RecoupError, match="cannot be loaded"):  # the splits have different columns
        recoup.data.load(f"hf:{tmp_path}", "train")
    table({"kind": (LABEL, [1, 0])}, 2).to_parquet(tmp_path / "validation-00000-of-00001.parquet")
    data = recoup.data.load(f"hf:{tmp_path}")
    assert (data.split, len(data)) == ("validation", 2)
    assert len(recoup.data.load(f"hf:{tmp_path}", "train", limit=4)) == 4
    with pytest.raises(RecoupError, match="no split 'dev'; there is train, validation"):
        recoup.data.load(f"hf:{tmp_path}", "dev")


@pytest.mark.parametrize("split", [None, "train"])
def test_saved_to_disk(tmp_path: Path, split: str | None) -> None:
    import datasets

    saved = table(LABELLED)
    (datasets.DatasetDict({split: saved}) if split else saved).save_to_disk(tmp_path / "saved")
    assert len(recoup.data.load(f"hf:{tmp_path / 'saved'}", split or "all")) == 5


def test_large_pictures_are_lazy(tmp_path: Path) -> None:
    path = tmp_path / "train.parquet"
    table(LABELLED, shape=(70, 90, 3)).to_parquet(path)
    data = recoup.data.load(f"hf:{path}", "train", limit=3, seed=1)
    assert isinstance(data.images, Pictures)
    assert data.augmentation == ResizedCrop(224)
    (x, _), *_ = data.batches(2, augment=True)
    assert x.shape == (2, 3, 224, 224)
    small = recoup.data.load(f"hf:{path},resize=40,crop=32", "train")
    assert small.images.shape == (5, 3, 32, 32)


def test_choosing_columns(tmp_path: Path) -> None:
    path = tmp_path / "test.parquet"
    two = {"fine": (LABEL, [0, 1, 1, 0, 1]), "coarse": (LABEL, [0, 0, 0, 0, 1]), "id": (INTEGER, [5, 6, 7, 8, 9])}
    table(two).to_parquet(path)
    with pytest.raises(RecoupError, match=r"has several label columns, fine, coarse: choose one with hf:.*,label=fine"):
        recoup.data.load(f"hf:{path}")
    assert recoup.data.load(f"hf:{path},label=coarse").labels.tolist() == [0, 0, 0, 0, 1]
    assert recoup.data.load(f"hf:{path},image=picture,label=id").labels.tolist() == [5, 6, 7, 8, 9]
    with pytest.raises(RecoupError, match="has no such label column; its columns are picture, fine, coarse, id"):
        recoup.data.load(f"hf:{path},label=picture")
    with pytest.raises(RecoupError, match="has no such image column"):
        recoup.data.load(f"hf:{path},image=fine,label=fine")
    pictures = [Image.fromarray(values) for values in noise(5, 16, 16, 3)]
    table(LABELLED | {"second": ("image", pictures)}).to_parquet(path)
    with pytest.raises(RecoupError, match="has several image columns, picture, second"):
        recoup.data.load(f"hf:{path}")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": ("string", ["a"] * 5)}, "no such label column; its columns are picture, text"),
        ({"kind": (LABEL, [-1] * 5)}, "negative labels; is this split unlabelled"),
        ({"kind": (INTEGER, [0, None, 1, 0, 1])}, "missing or negative labels"),
    ],
)
def test_refuses_labels(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    table(columns).to_parquet(tmp_path / "test.parquet")
    with pytest.raises(RecoupError, match=message):
        recoup.data.load(f"hf:{tmp_path / 'test.parquet'}")


def test_refuses_broken_and_missing_files(tmp_path: Path) -> None:
    path = tmp_path / "test.parquet"
    table(LABELLED).to_parquet(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(RecoupError, match=r"hf:.*test\.parquet cannot be loaded: .*"):
        recoup.data.load(f"hf:{path}")
    table(LABELLED).select([]).to_parquet(path)
    with pytest.raises(RecoupError, match=r"is empty|cannot be loaded"):
        recoup.data.load(f"hf:{path}")
    write_parquet(path, [b"no picture"], [0])
    with pytest.raises(RecoupError, match=r"test\.parquet, test, image 0 cannot be decoded"):
        recoup.data.load(f"hf:{path}")
    (tmp_path / "x.csv").write_text("a,b\n1,2\n")
    with pytest.raises(RecoupError, match=r"a file must be \.parquet"):
        recoup.data.load(f"hf:{tmp_path / 'x.csv'}")
    for missing in (tmp_path / "none", "./none", "a/b/c"):
        with pytest.raises(RecoupError, match="no such file or folder"):
            recoup.data.load(f"hf:{missing}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RecoupError, match="empty cannot be loaded"):
        recoup.data.load(f"hf:{tmp_path / 'empty'}")


def test_a_name_that_cannot_be_found() -> None:
    with pytest.raises(RecoupError, match="hf:recoup-nobody/nothing cannot be loaded"):
        recoup.data.load("hf:recoup-nobody/nothing")
