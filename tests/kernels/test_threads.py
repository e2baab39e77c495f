"""The pool: every row once, errors passed on, and nothing left running behind an interrupt."""

import os
import signal
import threading
import time

import pytest
import torch

from recoup.kernels.threads import over_rows


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("rows", [0, 1, 2, 7, 100])
def test_every_row_is_computed_once(threads, rows):
    torch.set_num_threads(threads)
    seen = []
    over_rows(lambda first, last: seen.extend(range(first, last)), rows, 1 << 20)
    assert sorted(seen) == list(range(rows))


def test_an_error_in_a_worker_reaches_the_caller():
    torch.set_num_threads(2)

    def kernel(first, last):
        if first:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        over_rows(kernel, 2, 1 << 20)


def test_an_interrupt_waits_for_the_workers():
    torch.set_num_threads(2)
    done = []

    def kernel(first, last):
        if first:
            time.sleep(0.6)
            done.append(first)

    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        over_rows(kernel, 2, 1 << 20)
    assert done == [1]
    timer.join()


@pytest.mark.parametrize("threads", [2, 3])
def test_rows_within_rows_stay_on_their_thread(threads):
    torch.set_num_threads(threads)
    seen = []

    def inner(first, last):
        seen.append((threading.get_ident(), first, last))

    def outer(first, last):
        for _ in range(first, last):
            over_rows(inner, 5, 1 << 20)

    over_rows(outer, 4, 1 << 20)
    assert [rows for _, *rows in seen] == [[0, 5]] * 4
    assert len({thread for thread, *_ in seen}) > 1
    seen.clear()
    over_rows(inner, 5, 1 << 20)  # and afterwards they are shared out again
    assert len(seen) > 1
