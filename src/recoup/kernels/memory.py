"""Memory for results: large tensors in huge pages where Linux has them, as NumPy asks for its arrays; and addresses.

A fresh page costs more than the kernels that fill it: on the machine of benchmarks/results a pass over 38 MB took
5.9 ms in pages that were there, 37.6 ms in new ones of 4 KiB, and 9.2 ms in new ones of 2 MiB. torch asks for none,
unless THP_MEM_ALLOC_ENABLE is set.
"""

import ctypes
import sys
from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from torch import Tensor

LARGE = 1 << 22  # bytes
PAGE, HUGE_PAGES = 4096, 14  # Linux's MADV_HUGEPAGE


@cache
def _advise() -> Callable[[int, int, int], int] | None:
    """The C library's madvise, or None where there is none."""
    if not sys.platform.startswith("linux"):
        return None
    call = ctypes.CDLL(None).madvise
    call.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return call


def address(array: np.ndarray) -> int:
    """Where a writable array's elements begin, in half the time of NumPy's own property, which small products feel."""
    return ctypes.addressof(ctypes.c_char.from_buffer(array.data))


def fresh(like: Tensor) -> Tensor:
    """A contiguous tensor of a tensor's shape and dtype, not filled."""
    made = torch.empty(like.shape, dtype=like.dtype, device="cpu")
    size = made.numel() * made.element_size()
    advise = _advise() if size >= LARGE else None
    if advise is not None:
        begin = -(-made.data_ptr() // PAGE) * PAGE
        # Advice: where it is refused, pages are small and results the same.
        advise(begin, (made.data_ptr() + size - begin) // PAGE * PAGE, HUGE_PAGES)
    return made
