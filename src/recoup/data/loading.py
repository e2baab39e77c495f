"""From ``"cifar10:DIR"`` to a data set."""

import os
import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from recoup.data import cifar, digits, hub, idx, imagefolder
from recoup.data.augmentation import CenterCrop
from recoup.data.dataset import Dataset, check_count
from recoup.data.places import Pick, TooFewError
from recoup.errors import RecoupError

SPECS = (
    "digits, cifar10:DIR, mnist:DIR, fashion-mnist:DIR, imagefolder:DIR[,resize=256][,crop=224], "
    "hf:NAME[,config=...][,image=COLUMN][,label=COLUMN][,resize=256][,crop=224]"
)
OPTIONS = {"imagefolder": ("resize", "crop"), "hf": ("config", "image", "label", "resize", "crop")}
SOURCES = ("digits", "cifar10", *idx.KINDS, "imagefolder", "hf")


def load(spec: str, split: str = "test", *, limit: int | None = None, seed: int | None = None) -> Dataset:
    """The data set that ``spec`` names.

    ==========================  =====================================================================================
    ``digits``                  scikit-learn's 8 x 8 handwritten digits, 1,201 train and 596 test images, no download
    ``cifar10:DIR``             parquet files or the binary version
    ``mnist:DIR``               the official idx files; ``fashion-mnist:DIR`` alike
    ``imagefolder:DIR``         ``DIR/train/CLASS/*.jpg`` and ``DIR/val/CLASS/*.jpg``; ``,resize=256,crop=224``
    ``hf:NAME``                 a Hugging Face data set, or a local folder or parquet file in place of NAME;
                                ``,config=...,image=COLUMN,label=COLUMN`` where it leaves a choice
    ==========================  =====================================================================================

    Args:
        spec: one of these.
        split: ``"train"`` or ``"test"``; folders and ``hf`` have the splits they have.
        limit: how many images; only these are decoded. None is all.
        seed: which images ``limit`` takes: None the first ones, otherwise those of ``load(...).subset(limit, seed)``.

    Raises:
        RecoupError: an unknown spec or split, data that are missing, truncated or of a foreign format, a limit below 1
            or above what there is, or a limit without a seed on images that are sorted by class.

    >>> load("digits", "train")
    Dataset(digits, train: 1,201 images of 1 x 8 x 8, 10 classes)
    """
    source, location, options = _parse(spec)
    read = _reader(spec, source, location, options)
    return read(split, lambda labels: _pick(f"{spec}, {split}", labels, limit, seed))


def rest(
    spec: str, split: str, *, limit: int, seed: int | None = None, take: int | None = None, drawn: int = 0
) -> Dataset:
    """The images of a split that ``load(spec, split, limit=limit, seed=seed)`` leaves, in their order.

    Args:
        spec, split, limit, seed: as in `load`.
        take: as many of them, drawn with the seed ``drawn``; only these are decoded.
        drawn: see ``take``.

    Raises:
        RecoupError: as `load`; or none is left.
        TooFewError: fewer than ``take`` are left.

    >>> len(rest("digits", "test", limit=500)) + 500 == len(load("digits", "test"))
    True
    """
    source, location, options = _parse(spec)
    what = f"{spec}, {split}"

    def others(labels: Tensor) -> Tensor:
        left = torch.ones(len(labels), dtype=torch.bool)
        left[_pick(what, labels, limit, seed)] = False
        if not bool(left.any()):
            raise TooFewError(f"{what}: its first or drawn {limit:,} images are all there are, so none is left")
        places = left.nonzero().flatten()
        if take is None:
            return places
        if take > len(places):
            told = f"{what}: {limit:,} of its images leave {len(places):,}, where {take:,} are asked for"
            raise TooFewError(told, available=len(places))
        return places[torch.randperm(len(places), generator=torch.Generator().manual_seed(drawn))[:take]]

    return _reader(spec, source, location, options)(split, others)


def root() -> Path:
    """The folder of real data for tests and benchmarks: RECOUP_DATA, else ``../shared/data`` beside the project.

    It need not exist; whoever asks must look.
    """
    named = os.environ.get("RECOUP_DATA")
    return Path(named) if named else Path(__file__).resolve().parents[3].parent / "shared" / "data"


def _parse(spec: str) -> tuple[str, str, dict[str, str]]:
    if not isinstance(spec, str):
        raise RecoupError(f"data {spec!r}: must be a text; legal are {SPECS}")
    source, _, rest = spec.partition(":")
    if source == "text":
        raise RecoupError(
            f"data {spec!r}: a text is read with a language model's vocabulary: `recoup evaluate`, recipes and "
            f"searches take it, recoup.data.text.windows in Python; here legal are {SPECS}"
        )
    if source not in SOURCES:
        raise RecoupError(f"data {spec!r}: unknown; legal are {SPECS}")
    if source == "digits":
        if spec != "digits":
            raise RecoupError(f"data {spec!r}: digits comes with scikit-learn and takes nothing after its name")
        return source, "", {}
    location, options = rest, {}
    legal = OPTIONS.get(source, ())
    while legal and (match := re.fullmatch(r"(.*),(\w+)=([^,]*)", location)):
        location, name, value = match.groups()
        if name not in legal:
            raise RecoupError(f"data {spec!r}: no option {name!r}; legal are {', '.join(legal)}")
        options[name] = value
    if not location:
        raise RecoupError(f"data {spec!r}: what follows the colon is missing; legal are {SPECS}")
    return source, location, options


def _reader(spec: str, source: str, location: str, options: dict[str, str]) -> Callable[[str, Pick], Dataset]:
    if source == "digits":
        return digits.read
    if source == "cifar10":
        return lambda split, pick: cifar.read(location, split, pick)
    if source in idx.KINDS:
        return lambda split, pick: idx.read(source, location, split, pick)
    crop = _crop(spec, options)
    if source == "imagefolder":
        return lambda split, pick: imagefolder.read(location, split, pick, crop or CenterCrop())
    columns = hub.Columns(options.get("config"), options.get("image"), options.get("label"))
    return lambda split, pick: hub.read(location, split, pick, columns, crop)


def _crop(spec: str, options: dict[str, str]) -> CenterCrop | None:
    sizes = {name: options[name] for name in ("resize", "crop") if name in options}
    if not sizes:
        return None
    for name, value in sizes.items():
        if not value.isdecimal():
            raise RecoupError(f"data {spec!r}: {name}={value!r} must be a number of pixels")
    return CenterCrop(int(sizes.get("resize", "256")), int(sizes.get("crop", "224")))


def _pick(what: str, labels: Tensor, limit: int | None, seed: int | None) -> Tensor:
    if limit is None:
        return torch.arange(len(labels))
    check_count(f"{what}: limit", limit, len(labels))
    if seed is not None:
        return torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))[:limit]
    if limit < len(labels) and bool((labels.diff() >= 0).all()) and labels[0] != labels[-1]:
        raise RecoupError(
            f"{what}: its images are sorted by class, so the first {limit} miss some; give a seed as well"
        )
    return torch.arange(limit)
