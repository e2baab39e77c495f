"""Where numbers below float32's normal ones count, whatever `torch.set_flush_denormal` was told.

That function sets a state of the calling thread; threads started later inherit it, torch's own workers among them, and
keep it. Emulated hardware has its own rules for small numbers, so its operators never run in such a thread: where the
caller's flushes, one of ours that does not does the work, with workers of its own.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import wraps
from typing import Any, TypeVar

import torch

__all__ = ["exactly", "flushes", "keep"]

SMALLEST = 5e-324
CALLERS = 8
"""Threads for callers that flush, should so many call at once."""

Result = TypeVar("Result")

_threads: list[ThreadPoolExecutor] = []

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_threads.clear)


def flushes() -> bool:
    """Whether the calling thread takes numbers below the normal ones for zero."""
    return SMALLEST * 1.0 == 0.0


def keep() -> None:
    """Let the calling thread keep them."""
    torch.set_flush_denormal(False)


def exactly(function: Callable[..., Result]) -> Callable[..., Result]:
    """A function of CPU tensors, below autograd, that gives the same bits in threads that flush."""

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Result:
        if not flushes() or not _on_cpu(args):
            return function(*args, **kwargs)
        if not _threads:
            _threads.append(ThreadPoolExecutor(CALLERS, thread_name_prefix="recoup-exact", initializer=keep))
        return _threads[0].submit(copy_context().run, _below_autograd, function, args, kwargs).result()

    return run


def _below_autograd(function: Callable[..., Result], args: tuple, kwargs: dict) -> Result:
    with torch.no_grad():
        return function(*args, **kwargs)


def _on_cpu(args: tuple) -> bool:
    return all(value.is_cpu for value in args if isinstance(value, torch.Tensor))
