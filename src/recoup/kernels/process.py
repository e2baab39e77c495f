"""What a process of recoup's own settles before it loads torch: how torch's threads wait, and which memory is kept.

Commands and workers do this for themselves. Importing recoup changes neither: the process is the user's then.

torch's OpenMP threads spin for some milliseconds after every parallel region, in case another one follows at once. What
follows in emulation is a kernel of recoup's on its own pool (`recoup.kernels.threads`), which wants that core, and
spinning counts as CPU time. Threads that sleep at once (OMP_WAIT_POLICY=PASSIVE) are woken too often where torch's
regions are small: a fraction of a millisecond serves both (benchmarks/waiting_threads.py). Results never depend on it.
"""

import ctypes
import os
import sys

WAITING, TURNS = "GOMP_SPINCOUNT", 10_000
"""Of GNU's OpenMP, which torch's wheels for Linux have, and reads once, when it is loaded; 300,000 is its default."""
SPINNING = ("OMP_WAIT_POLICY", WAITING, "KMP_BLOCKTIME", "KMP_LIBRARY")
"""What says how threads wait; the first is OpenMP's own, the others are of one library alone, and go before it."""

ALLOCATING = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES")
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # glibc's mallopt
LARGEST_KEPT = (1 << 26, 1 << 25)  # bytes of a block, the operands of a layer for 250 images; older glibc's most
MOST_KEPT = 1 << 30  # bytes of all


def begin() -> None:
    """Settle both, in a process that has not loaded torch yet; what the user set stays."""
    if "torch" in sys.modules:
        return
    if not any(name in os.environ for name in SPINNING):
        os.environ[WAITING] = str(TURNS)
    keep_pages()


def keep_pages() -> bool:
    """Have freed memory stay with the process, up to 1 GiB, where the C library is glibc; whether it does.

    Otherwise every layer's output comes in pages that are new, and the kernel clears them one by one.
    """
    if not sys.platform.startswith("linux") or any(name in os.environ for name in ALLOCATING):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # Either alone switches off the adaptation of the other: where no block's size is taken, all stays as it was.
    if mallopt is None or not any(mallopt(MMAP_THRESHOLD, size) == 1 for size in LARGEST_KEPT):
        return False
    return mallopt(TRIM_THRESHOLD, MOST_KEPT) == 1


def waiting() -> str:
    """How torch's threads wait, by what the environment says, in words."""
    said = [f"{name}={os.environ[name]}" for name in SPINNING if name in os.environ]
    return ", ".join(said) or f"spinning ({WAITING} and OMP_WAIT_POLICY are not set)"
