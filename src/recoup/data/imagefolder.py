"""A folder of pictures, one folder a class: ImageNet's layout."""

import os
from pathlib import Path

import torch

from recoup.data.augmentation import CenterCrop, ResizedCrop
from recoup.data.dataset import IMAGENET_MEAN, IMAGENET_STD, Dataset
from recoup.data.pictures import Files, Pictures
from recoup.data.places import Pick, choose_split, folder
from recoup.errors import RecoupError

SPLITS = ("train", "test", "validation", "valid", "val")
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


def read(location: str, split: str, pick: Pick, crop: CenterCrop) -> Dataset:
    """The pictures of ``DIR/SPLIT/CLASS/**``, decoded batch by batch.

    Classes are numbered in the alphabetical order of their folders, as torchvision does; files of other kinds are left
    out. Split ``"test"`` is the folder ``test``, else ``validation``, ``valid`` or ``val``. A folder without such
    folders is one undivided split, ``"all"``. Normalized with ImageNet's mean and standard deviation; augmentation is
    a random resized crop, and mirroring.

    Raises:
        RecoupError: no such folder or split; no class folders; a class without pictures; splits of different classes.
    """
    path = folder("imagefolder", location)
    name, home = _home(path, split)
    classes = _classes(home)
    files = [_pictures(home / one) for one in classes]
    labels = torch.cat([torch.full((len(found),), label) for label, found in enumerate(files)])
    positions = pick(labels)
    encoded = Files(tuple(file for found in files for file in found))
    return Dataset(
        name=path.resolve().name,
        split=name,
        images=Pictures(encoded, positions, crop),
        labels=labels[positions],
        classes=classes,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        augmentation=ResizedCrop(crop.size),
    )


def _home(path: Path, split: str) -> tuple[str, Path]:
    """The split's own name and its folder of class folders."""
    classes = {name: _classes(path / name) for name in SPLITS if (path / name).is_dir()}
    classes = {name: found for name, found in classes.items() if found}  # ImageNet's own test folder has no labels
    if not classes:
        flat = [path / one for one in _classes(path) if one in SPLITS and _loose(path / one)]
        if len(flat) == len(_classes(path)):  # splits of loose pictures, or no folders at all
            raise RecoupError(_flat(flat or [path]))
        return choose_split(f"{path} has class folders but no folders train and test", split, ["all"]), path
    name = choose_split(str(path), split, classes)
    for other, found in classes.items():
        if found != classes[name]:
            odd = sorted(set(found) ^ set(classes[name]))
            raise RecoupError(
                f"{path}: {other} and {name} have different classes, so their labels would differ: {', '.join(odd[:4])}"
            )
    return name, path / name


def _loose(path: Path) -> list[str]:
    """Pictures in a folder itself."""
    return sorted(entry.name for entry in path.iterdir() if entry.is_file() and entry.name.lower().endswith(SUFFIXES))


def _flat(places: list[Path]) -> str:
    """What is wrong with folders that have no class folders, and what is expected."""
    held = ", ".join(f"{len(_loose(place))} pictures in {place} itself" for place in places if _loose(place))
    example = places[0] / "CLASS" / next(iter(_loose(places[0])), "1.png")
    return (
        f"{', '.join(map(str, places))}: no class folders{f' ({held})' if held else ''}; a picture's label is the name "
        f"of the folder it lies in, as in {example}"
    )


def _classes(path: Path) -> tuple[str, ...]:
    return tuple(sorted(entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith(".")))


def _pictures(path: Path) -> list[str]:
    """Strings, not Paths: ImageNet has 1.28 million of them."""
    found = sorted(
        f"{place}/{name}"
        for place, _, names in os.walk(path, followlinks=True)
        for name in names
        if name.lower().endswith(SUFFIXES) and not name.startswith(".")
    )
    if not found:
        raise RecoupError(f"{path} holds no pictures; these are read: {', '.join(SUFFIXES)}")
    return found
