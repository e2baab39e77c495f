"""Addresses, and results in huge pages where the system has them."""

from pathlib import Path

import numpy as np
import pytest
import torch

from recoup.kernels import memory
from recoup.kernels.memory import LARGE, address, fresh

SMAPS = Path("/proc/self/smaps")


def flags(place: int) -> list[str]:
    """What Linux notes of the mapping that an address lies in."""
    inside = False
    for line in SMAPS.read_text().splitlines():
        head = line.split()[0]
        if "-" in head and not head.endswith(":"):
            first, last = (int(end, 16) for end in head.split("-"))
            inside = first <= place < last
        elif inside and head == "VmFlags:":
            return line.split()[1:]
    raise AssertionError(f"no mapping holds {place:#x}")


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32, np.float64])
def test_addresses_are_those_of_the_elements(dtype):
    x = np.arange(12, dtype=dtype)
    assert address(x) == x.ctypes.data
    assert address(x[5:]) == x.ctypes.data + 5 * x.itemsize


def test_addresses_of_what_a_kernel_must_not_write_are_refused():
    x = np.arange(12)
    x.flags.writeable = False
    with pytest.raises(TypeError, match="not writable"):
        address(x)
    with pytest.raises(TypeError, match="not C contiguous"):
        address(np.arange(12)[::2])


@pytest.mark.parametrize("size", [0, 1, 1000, LARGE // 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fresh_tensors_are_contiguous_and_of_their_models_shape(size, dtype):
    like = torch.zeros(size, 2, dtype=dtype).T
    made = fresh(like)
    assert (made.shape, made.dtype, made.device.type) == (like.shape, dtype, "cpu")
    assert made.is_contiguous()
    assert made.data_ptr() != like.data_ptr() or not size


@pytest.mark.skipif(not SMAPS.exists(), reason="Linux notes it there")
def test_large_tensors_lie_in_huge_pages():
    enabled = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not enabled.exists() or "[never]" in enabled.read_text():
        pytest.skip("this kernel has no huge pages to ask for")
    large = fresh(torch.zeros(4 * LARGE, dtype=torch.uint8))
    assert "hg" in flags(large.data_ptr() + LARGE)


def test_small_tensors_ask_for_nothing(monkeypatch):
    asked = []
    monkeypatch.setattr(memory, "_advise", lambda: lambda *given: asked.append(given))
    fresh(torch.zeros(8, dtype=torch.uint8))
    assert asked == []
    fresh(torch.zeros(LARGE, dtype=torch.uint8))
    assert len(asked) == 1
