"""CIFAR-10 in both layouts, and every way its folder can be wrong."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import recoup.data
from recoup.data import CropFlip
from recoup.errors import RecoupError

from .conftest import encoded, noise, pixels, write_parquet

LABELS = [3, 1, 9, 0, 5, 5]
Sizes = Callable[[int, int], None]


def png(count: int, side: int = 32) -> list[bytes]:
    return [encoded(values) for values in noise(count, side, side, 3)]


@pytest.mark.parametrize("inner", ["", "data", "plain_text"])
@pytest.mark.parametrize("image", ["img", "image"])
def test_parquet(tmp_path: Path, small_cifar: Sizes, inner: str, image: str) -> None:
    small_cifar(6, 2)
    (tmp_path / inner).mkdir(exist_ok=True)
    for shard in range(2):
        path = tmp_path / inner / f"train-0000{shard}-of-00002.parquet"
        write_parquet(path, png(6)[3 * shard :][:3], LABELS[3 * shard :][:3], image)
    data = recoup.data.load(f"cifar10:{tmp_path}", "train")
    assert torch.equal(pixels(data), torch.from_numpy(noise(6, 32, 32, 3)).permute(0, 3, 1, 2))
    assert data.labels.tolist() == LABELS
    assert data.classes[:2] == ("airplane", "automobile")
    assert data.augmentation == CropFlip(4, flip=True)
    with pytest.raises(RecoupError, match=r"holds no CIFAR-10: test-\*-of-\*\.parquet or test_batch\.bin is missing"):
        recoup.data.load(f"cifar10:{tmp_path}", "test")


def test_limit_decodes_only_what_it_takes(tmp_path: Path, small_cifar: Sizes) -> None:
    small_cifar(0, 6)
    contents = [*png(3), b"broken", b"broken", b"broken"]
    write_parquet(tmp_path / "test-00000-of-00001.parquet", contents, LABELS)
    assert len(recoup.data.load(f"cifar10:{tmp_path}", limit=3)) == 3
    with pytest.raises(RecoupError, match=r"test-00000-of-00001\.parquet, image 3 cannot be decoded"):
        recoup.data.load(f"cifar10:{tmp_path}", limit=4)


@pytest.mark.parametrize("inner", ["", "cifar-10-batches-bin"])
def test_binary(tmp_path: Path, small_cifar: Sizes, inner: str) -> None:
    small_cifar(5, 3)
    (tmp_path / inner).mkdir(exist_ok=True)
    values = noise(5, 3, 32, 32)
    for i in range(5):
        content = bytes([LABELS[i]]) + values[i].tobytes()
        (tmp_path / inner / f"data_batch_{i + 1}.bin").write_bytes(content)
    data = recoup.data.load(f"cifar10:{tmp_path}", "train")
    assert torch.equal(pixels(data), torch.from_numpy(values))
    assert data.labels.tolist() == LABELS[:5]


def test_refuses_pickles_without_reading_them(tmp_path: Path) -> None:
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    for folder in (tmp_path, tmp_path / "cifar-10-batches-py"):
        with pytest.raises(RecoupError, match="the python version of CIFAR-10, which is pickled, and recoup never"):
            recoup.data.load(f"cifar10:{folder}")


def test_refuses_truncated_and_foreign_files(tmp_path: Path, small_cifar: Sizes) -> None:
    small_cifar(0, 6)
    path = write_parquet(tmp_path / "test-00000-of-00001.parquet", png(6), LABELS)
    whole = path.read_bytes()
    for content in (whole[:-100], whole[:100], b"", b"PAR1 and nothing else", whole[:200] + bytes(200) + whole[400:]):
        path.write_bytes(content)
        with pytest.raises(RecoupError, match=r"test-00000-of-00001\.parquet"):
            recoup.data.load(f"cifar10:{tmp_path}")
    path.unlink()
    (tmp_path / "test_batch.bin").write_bytes(bytes(3073 * 6 - 1))
    with pytest.raises(RecoupError, match=r"test_batch\.bin has 18,437 bytes, not a multiple of 3073"):
        recoup.data.load(f"cifar10:{tmp_path}")
    (tmp_path / "test_batch.bin").write_bytes(bytes([10]) * 3073 * 6)
    with pytest.raises(RecoupError, match=r"test_batch\.bin: labels lie in 10 \.\. 10, CIFAR-10's in 0 \.\. 9"):
        recoup.data.load(f"cifar10:{tmp_path}")


def test_refuses_what_is_not_cifar10(tmp_path: Path, small_cifar: Sizes) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "test-00000-of-00001.parquet"
    write_parquet(path, png(6), LABELS)
    with pytest.raises(RecoupError, match="6 test images, CIFAR-10 has 10,000; read a part of it with hf:"):
        recoup.data.load(f"cifar10:{tmp_path}")
    small_cifar(0, 6)
    write_parquet(path, png(6), [*LABELS[:5], 10])
    with pytest.raises(RecoupError, match=r"labels lie in 0 \.\. 10"):
        recoup.data.load(f"cifar10:{tmp_path}")
    write_parquet(path, png(6, side=28), LABELS)
    with pytest.raises(RecoupError, match=r"its images are \[3, 28, 28\], CIFAR-10's are \[3, 32, 32\]"):
        recoup.data.load(f"cifar10:{tmp_path}")
    write_parquet(path, [*png(5), None], LABELS)
    with pytest.raises(RecoupError, match="image 5 cannot be decoded: the row holds no picture"):
        recoup.data.load(f"cifar10:{tmp_path}")
    for table, message in (
        ({"text": ["a"], "label": [0]}, "has columns text, label; CIFAR-10 has img and label"),
        ({"img": ["a"] * 6, "label": [0] * 6}, "column img holds no encoded images"),
        ({"img": [{"bytes": b""}] * 6, "label": ["cat"] * 6}, "labels must be whole numbers, not string"),
        ({"img": [{"bytes": b""}] * 6, "label": [None, 1, 2, 3, 4, 5]}, "int64 with 1 missing"),
    ):
        pq.write_table(pa.table(table), path)
        with pytest.raises(RecoupError, match=message):
            recoup.data.load(f"cifar10:{tmp_path}")


def test_refuses_missing_parts(tmp_path: Path) -> None:
    with pytest.raises(RecoupError, match=r"cifar10:.*nowhere: no such folder"):
        recoup.data.load(f"cifar10:{tmp_path / 'nowhere'}")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(RecoupError, match="that is a file; cifar10 needs a folder"):
        recoup.data.load(f"cifar10:{tmp_path / 'file'}")
    with pytest.raises(RecoupError, match=r"holds no CIFAR-10: .* is missing; it has file"):
        recoup.data.load(f"cifar10:{tmp_path}")
    with pytest.raises(RecoupError, match="no split 'val'; there is train, test"):
        recoup.data.load(f"cifar10:{tmp_path}", "val")
    write_parquet(tmp_path / "train-00001-of-00002.parquet", png(1), [0])
    with pytest.raises(RecoupError, match=r"1 of 2 files train-\*\.parquet are there"):
        recoup.data.load(f"cifar10:{tmp_path}", "train")
    (tmp_path / "train-00001-of-00002.parquet").unlink()
    (tmp_path / "data_batch_1.bin").write_bytes(np.zeros(3073, np.uint8).tobytes())
    with pytest.raises(RecoupError, match=r"data_batch_2\.bin cannot be read"):
        recoup.data.load(f"cifar10:{tmp_path}", "train")
