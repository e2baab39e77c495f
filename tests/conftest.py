"""Shared by all tests: one torch thread per worker, because the suite runs on as many workers as there are cores."""

import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from hypothesis import settings

from tests.ten_lines import trunc  # noqa: F401 -- a fixture

if os.environ.get("TRITON_INTERPRET") == "1":  # the processes of test_gpu.py
    from tests.interpreter import hasten

    hasten()

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's job in the background; children would ignore it too
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("recoup", deadline=None, print_blob=True)  # shared machines: no timed assertions
settings.load_profile("recoup")


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)
    assert torch.is_grad_enabled(), "the test left gradients switched off"
