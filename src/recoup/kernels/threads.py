"""One pool of worker threads per process, for kernels that release the GIL.

A kernel is called over disjoint ranges of rows; every output element is computed by one call in a fixed order, so
results never depend on the number of threads. The pool is ours rather than a second OpenMP runtime, which would spin
against torch's and kill forked DataLoader workers; a forked child makes its own pool on first use.
"""

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import pairwise

import torch

from recoup.kernels.subnormals import keep

_inside = threading.local()  # .rows: whether this thread is computing rows already
_pools: dict[int, ThreadPoolExecutor] = {}


def _pool(workers: int) -> ThreadPoolExecutor:
    pool = _pools.get(workers)
    if pool is None:
        pool = _pools[workers] = ThreadPoolExecutor(workers, thread_name_prefix="recoup", initializer=keep)
    return pool


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pools.clear)


def over_rows(kernel: Callable[[int, int], None], rows: int, cost_per_row: int, minimum_cost: int = 1 << 16) -> None:
    """Call ``kernel(first, last)`` over ranges that cover ``0 .. rows``, on as many threads as torch uses.

    Args:
        kernel: computes rows ``first <= row < last``; it must release the GIL to gain from threads.
        rows: how many rows there are.
        cost_per_row: elements touched per row; work below ``minimum_cost`` elements in all stays on the caller.
        minimum_cost: the least number of elements that pays for waking one more thread.

    A kernel that calls it again gets all rows on its own thread: the others are busy with the rows around it.
    """
    if getattr(_inside, "rows", False):
        kernel(0, rows)
        return
    threads = max(1, min(torch.get_num_threads(), rows, rows * cost_per_row // minimum_cost))
    if threads == 1:
        kernel(0, rows)
        return
    bounds = [rows * i // threads for i in range(threads + 1)]
    futures = [_pool(threads - 1).submit(_marked, kernel, first, last) for first, last in pairwise(bounds[1:])]
    try:
        _marked(kernel, bounds[0], bounds[1])
    finally:
        _settle(futures)
    for future in futures:
        future.result()


def _marked(kernel: Callable[[int, int], None], first: int, last: int) -> None:
    _inside.rows = True
    try:
        kernel(first, last)
    finally:
        _inside.rows = False


def _settle(futures: list[Future]) -> None:
    """Wait for every range, also through Ctrl-C: the kernels write to buffers that the caller is about to free."""
    interrupt = None
    while pending := [future for future in futures if not future.done()]:
        try:
            wait(pending)
        except KeyboardInterrupt as error:
            interrupt = error
    if interrupt is not None:
        raise interrupt
