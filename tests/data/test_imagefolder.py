"""Image folders."""

from pathlib import Path

import pytest
import torch

import recoup.data
from recoup.data import CenterCrop, Pictures, ResizedCrop
from recoup.data.pictures import Files, decode, to_tensor
from recoup.errors import RecoupError

from .conftest import encoded, noise


def test_reads_lazily_and_in_order(picture_folder: Path) -> None:
    data = recoup.data.load(f"imagefolder:{picture_folder}", "train")
    assert repr(data) == "Dataset(pets, train: 6 images of 3 x 224 x 224, 2 classes)"
    assert data.classes == ("cat", "dog")
    assert data.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert isinstance(data.images, Pictures)
    assert data.images.crop == CenterCrop(256, 224)
    assert data.augmentation == ResizedCrop(224)


def test_test_view_and_options(picture_folder: Path) -> None:
    data = recoup.data.load(f"imagefolder:{picture_folder},resize=40,crop=32")
    assert (data.split, len(data)) == ("val", 4)
    (x, y), *_ = data.batches(4)
    assert x.shape == (4, 3, 32, 32)
    assert y.tolist() == [0, 0, 1, 1]
    file = picture_folder / "val" / "dog" / "0.png"
    view = to_tensor(CenterCrop(40, 32).view(decode(Files((str(file),)), 0)))
    mean, std = (torch.tensor(values)[:, None, None] for values in (data.mean, data.std))
    assert torch.equal(x[2], (view.float() / 255 - mean) / std)


def test_augmented_batches_repeat(picture_folder: Path) -> None:
    data = recoup.data.load(f"imagefolder:{picture_folder},resize=32,crop=32", "train")
    batches = data.batches(4, augment=True, shuffle=True, seed=5)
    first, second = (torch.cat([x for x, _ in batches]) for _ in range(2))
    other = torch.cat([x for x, _ in data.batches(4, augment=True, shuffle=True, seed=6)])
    assert first.shape == (6, 3, 32, 32)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_crop_flip_also_fits_pictures(picture_folder: Path) -> None:
    from dataclasses import replace

    from recoup.data import CropFlip

    data = recoup.data.load(f"imagefolder:{picture_folder},resize=32,crop=32", "train")
    (x, _), *_ = replace(data, augmentation=CropFlip(4)).batches(6, augment=True)
    black = (torch.zeros(3) - torch.tensor(data.mean)) / torch.tensor(data.std)
    assert bool((x == black[:, None, None]).all(1).any())


def test_truncated_picture_is_named_when_its_turn_comes(picture_folder: Path) -> None:
    file = picture_folder / "val" / "dog" / "1.png"
    file.write_bytes(file.read_bytes()[:-300])
    data = recoup.data.load(f"imagefolder:{picture_folder}")
    batches = iter(data.batches(3))
    next(batches)
    with pytest.raises(RecoupError, match=r"dog/1\.png cannot be decoded: image file is truncated"):
        next(batches)


def test_undivided_folder_is_one_split(picture_folder: Path) -> None:
    alone = picture_folder / "train"
    assert len(recoup.data.load(f"imagefolder:{alone}", "all")) == 6
    with pytest.raises(RecoupError, match="no folders train and test: no split 'test'; there is all"):
        recoup.data.load(f"imagefolder:{alone}")


def test_limit_needs_a_seed_where_classes_are_sorted(picture_folder: Path) -> None:
    spec = f"imagefolder:{picture_folder}"
    with pytest.raises(RecoupError, match="sorted by class, so the first 3 miss some; give a seed"):
        recoup.data.load(spec, "train", limit=3)
    some = recoup.data.load(spec, "train", limit=3, seed=0)
    assert torch.equal(some.labels, recoup.data.load(spec, "train").subset(3, seed=0).labels)
    assert len(recoup.data.load(spec, "train", limit=6)) == 6


def test_other_files_are_left_out_and_subfolders_read(picture_folder: Path) -> None:
    cats = picture_folder / "val" / "cat"
    (cats / "boxes.txt").write_text("1 2 3 4")
    (cats / ".hidden.png").write_bytes(b"")
    (cats / "more").mkdir()
    (cats / "more" / "x.JPEG").write_bytes(encoded(noise(1, 30, 30, 3)[0], "JPEG"))
    data = recoup.data.load(f"imagefolder:{picture_folder}")
    assert data.labels.tolist() == [0, 0, 0, 1, 1]


def test_refuses(picture_folder: Path, tmp_path: Path) -> None:
    spec = f"imagefolder:{picture_folder}"
    with pytest.raises(RecoupError, match="no split 'dev'; there is train, val"):
        recoup.data.load(spec, "dev")
    with pytest.raises(RecoupError, match="no such folder"):
        recoup.data.load(f"imagefolder:{tmp_path / 'none'}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RecoupError, match="empty: no class folders; a picture's label is the name of the folder"):
        recoup.data.load(f"imagefolder:{tmp_path / 'empty'}")
    with pytest.raises(RecoupError, match="size must be 1 or more and at most resize"):
        recoup.data.load(f"{spec},resize=100")
    with pytest.raises(RecoupError, match="resize='big' must be a number of pixels"):
        recoup.data.load(f"{spec},resize=big")
    with pytest.raises(RecoupError, match="no option 'label'; legal are resize, crop"):
        recoup.data.load(f"{spec},label=x")
    (picture_folder / "val" / "eel").mkdir()
    with pytest.raises(RecoupError, match=r"train and val have different classes, .*: eel"):
        recoup.data.load(spec)
    (picture_folder / "train" / "eel").mkdir()
    with pytest.raises(RecoupError, match=r"val/eel holds no pictures; these are read: \.bmp"):
        recoup.data.load(spec)


def test_pictures_without_class_folders_are_found_where_they_lie(picture_folder: Path, tmp_path: Path) -> None:
    picture = (picture_folder / "val" / "dog" / "0.png").read_bytes()
    for place in ("flat", "split/train", "split/val"):
        (tmp_path / place).mkdir(parents=True)
        for name in ("a.png", "b.png", "notes.txt"):
            (tmp_path / place / name).write_bytes(picture)
    flat, split = tmp_path / "flat", tmp_path / "split"
    with pytest.raises(RecoupError) as refused:
        recoup.data.load(f"imagefolder:{flat}", "train")
    assert f"{flat}: no class folders (2 pictures in {flat} itself)" in str(refused.value)
    assert str(refused.value).endswith(f"as in {flat}/CLASS/a.png")
    with pytest.raises(RecoupError) as refused:
        recoup.data.load(f"imagefolder:{split}", "train")
    assert f"{split}/train, {split}/val: no class folders (2 pictures in {split}/train itself, 2 " in str(refused.value)
    assert str(refused.value).endswith(f"as in {split}/train/CLASS/a.png")
    (split / "cat").mkdir()
    (split / "cat" / "a.png").write_bytes(picture)  # now train and val are classes, however they are called
    assert recoup.data.load(f"imagefolder:{split}", "all").classes == ("cat", "train", "val")
