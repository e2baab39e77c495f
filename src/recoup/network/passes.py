"""What a pass over calibration images measured, given again to the next repair that would measure the same.

A study puts one network into one state after another, and each starts from the checkpoint: ``paired`` measures the
hardware that ``recalibrated on hardware`` has measured, and its baseline, which is the same for any number of threads;
a combination begins with a repair that is a state of its own. What a pass measures is decided by the images, which the
study names, and by the network: parameters, buffers, configs, modes, extras, and the plain attributes of its modules,
such as counters. One with hooks, or with attributes that cannot be told, is measured anew every time.
"""

import pickle
import random
import warnings
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from recoup.network.attributes import attributes, is_its_bytes
from recoup.network.derived import replaced
from recoup.network.emulated import Emulated
from recoup.storage.digest import of_tensors

T = TypeVar("T")


class Passes:
    """What passes measured, by what decides it."""

    def __init__(self) -> None:
        self.known: dict[Hashable, Any] = {}


_kept: ContextVar[tuple[Passes, Hashable] | None] = ContextVar("recoup_passes", default=None)


@contextmanager
def keeping_passes(passes: Passes, images: Hashable) -> Iterator[None]:
    """Keep what passes measure meanwhile, and give it again.

    Args:
        passes: what is known.
        images: which ones every pass meanwhile is over; equal for the same in the same order alone.
    """
    token = _kept.set((passes, images))
    try:
        yield
    finally:
        _kept.reset(token)


def state(model: nn.Module, *what: Hashable, writes: Collection[nn.Module] = ()) -> Hashable:
    """What decides, as far as repairs change it, what a pass measures beside its images; None: nothing is kept, or
    what decides is not known.

    Args:
        model: as it runs in the pass.
        what: is measured.
        writes: whose buffers are left out, because the pass writes into them.
    """
    if _kept.get() is None:
        return None
    held = attributes(model)
    if held is None:
        return None
    parts: list[Hashable] = [torch.get_num_threads(), torch.is_autocast_enabled("cpu"), held, *what]
    for name, module in model.named_modules():
        tensors: dict[str, Tensor | None] = dict(module._parameters)
        tensors |= {} if module in writes else module._buffers
        acts: Hashable = None
        if isinstance(module, Emulated):
            if module.sums is not None:
                return None  # the pass would be counted
            acts, extras = module.acts_as(), module.travelling
            tensors = {own: value for own, value in tensors.items() if own not in extras}
        if replaced(module) or not all(x is None or is_its_bytes(x) for x in tensors.values()):
            return None
        shapes = tuple((own, None if x is None else (x.dtype, x.shape, x.stride())) for own, x in tensors.items())
        kind = module.float_class if isinstance(module, Emulated) else type(module)  # of the config ``acts`` knows more
        parts += [name, type(module), kind.extra_repr(module), module.training, acts, shapes]
        parts.append(of_tensors(*tensors.values()))
    return tuple(parts)


def measured(
    states: Sequence[Hashable], make: Callable[[Sequence[int]], Sequence[T]], left: Callable[[], Hashable]
) -> list[T]:
    """What passes measure, each by its `state`: what is known, and for the rest what is made in one go.

    A pass that draws random numbers, warns, or leaves the network otherwise than it was is not kept: the next one is
    not the same, or would not be heard.

    Args:
        states: of the passes.
        make: is given the places of those to make, and gives theirs in that order; nobody changes them afterwards.
        left: the `state` that a pass must leave as it found it.
    """
    held = _kept.get()
    known = {} if held is None else held[0].known
    keys = [None if held is None or one is None else (held[1], one) for one in states]
    found = {place: known[key] for place, key in enumerate(keys) if key in known}
    missing = [place for place in range(len(states)) if place not in found]
    wanted = [place for place in missing if keys[place] is not None]
    if missing and not wanted:
        found.update(zip(missing, make(missing), strict=True))
    elif missing:
        before = (*_random(), left())
        with _heard() as said:
            found.update(zip(missing, make(missing), strict=True))
        if not said and before == (*_random(), left()):
            known.update({keys[place]: found[place] for place in wanted})
    return [found[place] for place in range(len(states))]


def _random() -> tuple[bytes, Hashable, bytes]:
    """Where the generators are that a network may draw from."""
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), pickle.dumps(np.random.get_state())


@contextmanager
def _heard() -> Iterator[list[warnings.WarningMessage]]:
    """Warnings, which are passed on."""
    said: list[warnings.WarningMessage] = []
    try:
        with warnings.catch_warnings(record=True) as caught:
            try:
                yield said
            finally:
                said += caught
    finally:
        for one in said:
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno, source=one.source)
