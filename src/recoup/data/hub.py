"""Hugging Face datasets: by name, or a local folder or parquet file."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recoup.data.augmentation import Augmentation, CenterCrop, CropFlip, ResizedCrop
from recoup.data.dataset import IMAGENET_MEAN, IMAGENET_STD, Dataset
from recoup.data.pictures import Pictures, Rows, decode, decode_all
from recoup.data.places import Pick, choose_split
from recoup.errors import RecoupError

SMALL = 64  # pixels a side up to which images are kept in memory at their own size
GRAY_MEAN, GRAY_STD = (0.5,), (0.5,)


@dataclass(frozen=True)
class Columns:
    """What a spec may say where the data set leaves a choice; None lets the features decide."""

    config: str | None = None
    image: str | None = None
    label: str | None = None


def read(location: str, split: str, pick: Pick, columns: Columns, crop: CenterCrop | None) -> Dataset:
    """A labelled image data set, through the library ``datasets``, which downloads and caches it.

    ``location`` is a name on the Hub, a folder (of data files, or written by ``save_to_disk``) or one parquet file,
    whose name tells its split (``test-00000-of-00001.parquet``) or else is split ``"all"``. Split ``"test"`` may also
    be called ``validation``, ``valid`` or ``val``. HF_HUB_OFFLINE=1 keeps the library off the network.

    Images of at most 64 x 64 pixels are kept in memory at their own size, and augmented by moving them an eighth of it,
    never mirrored (they may be letters). Larger ones, and all where ``crop`` is given, are resized and cropped batch by
    batch and augmented as in ``imagefolder``. RGB images are normalized with ImageNet's mean and standard deviation,
    gray ones with 0.5 and 0.5.

    Raises:
        RecoupError: not found, not readable, unknown split, no or several image or label columns, unlabelled images.
    """
    what = f"hf:{location}"
    name, table = _open(what, location, split, columns.config)
    image = _image_column(what, table.features, columns.image)
    labels, classes = _labels(what, table, _label_column(what, table.features, columns.label))
    positions = pick(labels)
    rows = Rows(_encoded(table, image), f"{what}, {name}")
    images, augmentation = _images(rows, positions, crop)
    color = images.shape[1] == 3
    return Dataset(
        name=Path(location).name,
        split=name,
        images=images,
        labels=labels[positions],
        classes=classes,
        mean=IMAGENET_MEAN if color else GRAY_MEAN,
        std=IMAGENET_STD if color else GRAY_STD,
        augmentation=augmentation,
    )


def _images(rows: Rows, positions: Tensor, crop: CenterCrop | None) -> tuple[Tensor | Pictures, Augmentation]:
    if crop is None:
        first = decode(rows, int(positions[0]))
        if max(first.size) <= SMALL:
            images = decode_all(rows, positions)
            return images, CropFlip(padding=max(1, min(first.size) // 8), flip=False)
        crop = CenterCrop()
    return Pictures(rows, positions, crop), ResizedCrop(crop.size)


def _open(what: str, location: str, split: str, config: str | None) -> tuple[str, Any]:
    """The split's own name and the ``datasets.Dataset``."""
    path = Path(location).expanduser()
    if not path.exists() and (path.is_absolute() or location.startswith((".", "~")) or location.count("/") > 1):
        raise RecoupError(f"{what}: no such file or folder")
    try:
        if path.is_dir() and ((path / "dataset_dict.json").exists() or (path / "state.json").exists()):
            return _from_disk(what, path, split)
        return _prepared(what, path, location, split, config)
    except RecoupError:
        raise
    except Exception as error:  # the library raises its own, the network's and the file formats' errors
        detail = str(error.__cause__ or error).strip().splitlines()
        raise RecoupError(f"{what} cannot be loaded: {type(error).__name__}: {detail[0] if detail else ''}") from error


def _from_disk(what: str, path: Path, split: str) -> tuple[str, Any]:
    import datasets

    saved = datasets.load_from_disk(str(path))
    tables = saved if isinstance(saved, datasets.DatasetDict) else {str(saved.split or "all"): saved}
    name = choose_split(what, split, [str(key) for key in tables])
    return name, tables[name]


def _prepared(what: str, path: Path, location: str, split: str, config: str | None) -> tuple[str, Any]:
    import datasets

    if path.is_file():
        if path.suffix != ".parquet":
            raise RecoupError(f"{what}: a file must be .parquet; give the folder for other kinds")
        name = choose_split(what, split, [_split_of(path)])
        builder = datasets.load_dataset_builder("parquet", data_files=str(path))
        key = "train"  # what the library calls a lone file, whatever its name
    else:
        builder = datasets.load_dataset_builder(str(path) if path.is_dir() else location, config)
        splits = builder.config.data_files or builder.info.splits or {}
        name = key = choose_split(what, split, [str(one) for one in splits])
    builder.download_and_prepare()
    return name, builder.as_dataset(split=key)


def _split_of(path: Path) -> str:
    words = path.stem.replace("_", "-").replace(".", "-").split("-")
    return next((name for name in ("train", "test", "validation", "valid", "val") if name in words), "all")


def _image_column(what: str, features: Any, asked: str | None) -> str:
    import datasets

    def holds_images(feature: Any) -> bool:
        return isinstance(feature, datasets.Image) or (isinstance(feature, dict) and set(feature) == {"bytes", "path"})

    found = [name for name in features if holds_images(features[name])]
    if asked is not None:
        found = [name for name in found if name == asked]
    return _only(what, "image", found, features)


def _label_column(what: str, features: Any, asked: str | None) -> str:
    """The column of class labels; of whole numbers where none is declared as such."""
    import datasets

    def whole(feature: Any) -> bool:
        return isinstance(feature, datasets.Value) and feature.dtype.lstrip("u").startswith("int")

    declared = [name for name in features if isinstance(features[name], datasets.ClassLabel)]
    numbers = [name for name in features if whole(features[name])]
    found = (declared or numbers) if asked is None else [name for name in declared + numbers if name == asked]
    return _only(what, "label", found, features)


def _only(what: str, kind: str, found: list[str], features: Any) -> str:
    if not found:
        raise RecoupError(f"{what} has no such {kind} column; its columns are {', '.join(features)}")
    if len(found) > 1:
        raise RecoupError(
            f"{what} has several {kind} columns, {', '.join(found)}: choose one with {what},{kind}={found[0]}"
        )
    return found[0]


def _labels(what: str, table: Any, column: str) -> tuple[Tensor, tuple[str, ...]]:
    import datasets

    values = np.asarray(table.select_columns([column]).with_format("numpy")[:][column])
    if len(values) == 0:
        raise RecoupError(f"{what} is empty")
    if values.dtype.kind not in "iu" or values.min() < 0:
        raise RecoupError(f"{what}: column {column} has missing or negative labels; is this split unlabelled?")
    feature = table.features[column]
    if isinstance(feature, datasets.ClassLabel):
        classes = tuple(feature.names or ())
    else:
        classes = tuple(str(label) for label in range(int(values.max()) + 1))
    return torch.from_numpy(values.astype(np.int64)), classes


def _encoded(table: Any, column: str) -> Any:
    """Rows of ``{"bytes": ..., "path": ...}``, not decoded by the library."""
    import datasets

    single = table.select_columns([column])
    if isinstance(table.features[column], datasets.Image):
        single = single.cast_column(column, datasets.Image(decode=False))
    return _Column(single, column)


@dataclass(frozen=True)
class _Column:
    table: Any
    name: str

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Any:
        return self.table[index][self.name]
