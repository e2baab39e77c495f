"""Decoding: what is refused, by name, and what becomes of odd modes."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from recoup.data import CenterCrop, Pictures, pictures
from recoup.data.pictures import Files, Rows, decode, decode_all, to_tensor
from recoup.errors import RecoupError

from .conftest import encoded, noise


def rows(*contents: Any) -> Rows:
    return Rows(contents, "shelf.parquet")


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM"])
@pytest.mark.parametrize("shape", [(5, 7, 3), (5, 7)])
def test_lossless_formats_decode_exactly(kind: str, shape: tuple[int, ...]) -> None:
    pixels = noise(1, *shape)[0]
    image = to_tensor(decode(rows(encoded(pixels, kind)), 0, None))
    assert torch.equal(image, torch.from_numpy(pixels).view(5, 7, -1).permute(2, 0, 1))


def test_lossless_webp_decodes_exactly() -> None:
    pixels = noise(1, 6, 6, 3)[0]
    image = to_tensor(decode(rows(encoded(pixels, "WEBP", lossless=True)), 0))
    assert torch.equal(image, torch.from_numpy(pixels).permute(2, 0, 1))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_every_8_bit_mode_becomes_rgb(mode: str) -> None:
    kind = "TIFF" if mode in ("CMYK", "YCbCr") else "PNG"
    buffer = io.BytesIO()
    Image.fromarray(noise(1, 8, 8, 3)[0]).convert(mode).save(buffer, kind)
    assert to_tensor(decode(rows(buffer.getvalue()), 0)).shape == (3, 8, 8)


def test_palette_with_transparency_does_not_warn() -> None:
    picture = Image.fromarray(noise(1, 8, 8)[0], "L").convert("P")
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", transparency=bytes(range(256)))
    assert to_tensor(decode(rows(buffer.getvalue()), 0)).shape == (3, 8, 8)


def test_16_bits_are_refused() -> None:
    content = encoded(np.arange(64, dtype=np.uint16).reshape(8, 8))
    with pytest.raises(RecoupError, match=r"shelf.parquet, image 0: pixels of mode I;16, not 8 bits a channel"):
        decode(rows(content), 0)


GOOD = encoded(noise(1, 40, 40, 3)[0])
JPEG = encoded(noise(1, 40, 40, 3)[0], "JPEG")


@pytest.mark.parametrize(
    "content",
    [GOOD[:-200], GOOD[:30], GOOD[:60] + bytes(40) + GOOD[100:], JPEG[:-400], b"", b"no picture at all", None, {}],
    ids=["cut", "header", "overwritten", "jpeg", "empty", "foreign", "missing", "empty row"],
)
def test_bad_pictures_are_named(content: Any) -> None:
    with pytest.raises(RecoupError, match=r"shelf\.parquet, image 1 cannot be decoded: "):
        decode_all(rows(GOOD, content), torch.tensor([0, 1]))


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecoupError, match=r"gone\.png cannot be decoded"):
        decode(Files((str(tmp_path / "gone.png"),)), 0)


def test_rows_may_point_to_files(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(GOOD)
    assert decode(rows({"bytes": None, "path": str(tmp_path / "a.png")}), 0).size == (40, 40)


def test_decode_all_keeps_gray_only_where_all_is_gray() -> None:
    gray, color = noise(1, 8, 8)[0], noise(1, 8, 8, 3)[0]
    alone = decode_all(rows(encoded(gray), encoded(gray)), torch.tensor([1, 0]))
    mixed = decode_all(rows(encoded(gray), encoded(color)), torch.tensor([0, 1, 0]))
    assert alone.shape == (2, 1, 8, 8)
    assert mixed.shape == (3, 3, 8, 8)
    assert torch.equal(mixed[0], alone[0].expand(3, 8, 8))
    assert torch.equal(mixed[0], mixed[2])
    assert torch.equal(mixed[1], torch.from_numpy(color).permute(2, 0, 1))


def test_decode_all_refuses_mixed_sizes_and_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecoupError, match="image 1 is 9 x 8 pixels, the first image is 8 x 8"):
        decode_all(rows(encoded(noise(1, 8, 8)[0]), encoded(noise(1, 9, 8)[0])), torch.tensor([0, 1]))
    monkeypatch.setattr(pictures, "MEMORY_LIMIT", 100)
    with pytest.raises(RecoupError, match=r"1 images of 8 x 8 need .* give a limit"):
        decode_all(rows(encoded(noise(1, 8, 8)[0])), torch.tensor([0]))


def test_pictures_decode_what_is_asked_whatever_the_threads() -> None:
    contents = [encoded(noise(1, 20 + i, 30, 3, seed=i)[0]) for i in range(6)]
    shelf = Pictures(rows(*contents), torch.tensor([5, 4, 3, 2, 1, 0]), CenterCrop(18, 16))
    assert shelf.shape == (6, 3, 16, 16)
    images = shelf.images(torch.tensor([0, 2]))
    expected = [to_tensor(CenterCrop(18, 16).view(decode(rows(*contents), i))) for i in (5, 3)]
    assert torch.equal(images, torch.stack(expected))
    assert torch.equal(shelf.select(torch.tensor([2, 0])).images(torch.tensor([1, 0])), images)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(shelf.images(torch.tensor([0, 2])), images)
    finally:
        torch.set_num_threads(threads)
