"""Layers' outputs kept, and given again to those who measure a network over and over with a few layers changed.

A layer that sees the same input in the same state gives the same output: what stands before the changed layer is
computed once. Nothing is inferred from the network's structure, so functional calls, shortcuts and branches are as they
are: a layer's output is found by a 128-bit hash of all that decides it, the input's bytes and the weight's included,
which costs 2 to 3 % of a convolution.
"""

import os
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from recoup.kernels.arrays import array
from recoup.network.derived import replaced
from recoup.network.emulated import Emulated
from recoup.network.modes import compiled

MEMORY = 1 << 30
"""Bytes of outputs that are kept: 754 MB are ResNet-20's layers for 1,000 images, the rest serves repairs."""
PURE = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)  # and no class derived from them
WEIGHTS = ("weight", "bias")
PART = 4  # of the machine's memory, which all processes here may fill with outputs together


def memory(processes: int = 1) -> int:
    """Bytes of outputs for each of some processes on this machine: `MEMORY`, or their part of a quarter of what the
    machine has where that is less."""
    try:
        whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # a system that does not say
        return MEMORY
    return min(MEMORY, whole // PART // max(processes, 1))


@dataclass(slots=True)
class _Kept:
    """An output, and the last round in which it was asked for."""

    output: Tensor
    round: int


class Outputs:
    """Outputs by what decides them, in bounded memory; the numbers of who uses them never depend on the bound.

    A round is one measurement. What the last round did not ask for goes when a new one begins; what no longer fits is
    not kept, so that the first layers stay, which more of the following rounds will ask for. Lasting ones stay for
    good, up to three quarters of the memory.

    Args:
        most: bytes.
    """

    def __init__(self, most: int = MEMORY) -> None:
        self.most, self.held, self.lasting, self._round = most, 0, 0, 0
        self._kept: dict[Hashable, _Kept] = {}

    def begin(self) -> None:
        """A new round."""
        for key in [key for key, kept in self._kept.items() if kept.round < self._round]:
            self._drop(key)
        self._round += 1

    def get(self, key: Hashable) -> Tensor | None:
        """A copy of the output: whoever has it may write into it, and nobody else sees that."""
        kept = self._kept.get(key)
        if kept is None:
            return None
        kept.round = max(kept.round, self._round)
        return kept.output.clone()

    def put(self, key: Hashable, output: Tensor, *, lasting: bool) -> bool:
        """Keep a copy of an output that fits; whether it is kept. One with gaps is not: its copy would have none."""
        size = output.numel() * output.element_size()
        if self.held + size > self.most or (lasting and self.lasting + size > self.most * 3 // 4):
            return False
        copy = output.clone()
        if copy.stride() != output.stride():
            return False
        self._kept[key] = _Kept(copy, _FOREVER if lasting else self._round)
        self.held += size
        self.lasting += size if lasting else 0
        return True

    def _drop(self, key: Hashable) -> None:
        kept = self._kept.pop(key)
        size = kept.output.numel() * kept.output.element_size()
        self.held -= size
        self.lasting -= size if kept.round == _FOREVER else 0


_FOREVER = 1 << 62


class _Replayed:
    """Stands for a layer's ``forward``: what it gave for this input in this state, or the forward itself."""

    def __init__(self, module: nn.Module, outputs: Outputs, keep: bool, lasting: bool) -> None:
        self.module, self.outputs, self.keep, self.lasting = module, outputs, keep, lasting

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Replayed":
        return _Replayed(memo.get(id(self.module), self.module), self.outputs, self.keep, self.lasting)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self.module
        key = None if kwargs or len(args) != 1 else _key(module, args[0])
        if key is None:
            return type(module).forward(module, *args, **kwargs)
        output = self.outputs.get(key)
        if output is None:
            output = type(module).forward(module, *args)
            if self.keep:
                self.outputs.put(key, output, lasting=self.lasting)
        return output


def _key(module: nn.Module, x: Any) -> Hashable:
    """What decides a layer's output; None where that is not known, or gradients are wanted."""
    known = type(module) in PURE or (isinstance(module, Emulated) and module.pure)
    if not known or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or not _is_its_bytes(x):
        return None
    state: list[Any] = [type(module), module.extra_repr(), _digest(x), x.shape, x.stride(), x.dtype]
    if isinstance(module, Emulated):
        state += [repr(module.config), module.mode]
    extras = module.travelling if isinstance(module, Emulated) else ()
    for name in (*WEIGHTS, *extras):
        value = getattr(module, name, None)
        if isinstance(value, Tensor):
            if not _is_its_bytes(value):
                return None
            state += [_digest(value), value.stride(), value.dtype]
            if state[-3] is None:
                return None
        else:
            state += [value, None, None]
    return None if state[2] is None else tuple(state)


def _is_its_bytes(x: Any) -> bool:
    """Whether a tensor is what its bytes, strides and dtype say: none of a derived class, which may compute otherwise,
    none that is sparse or whose sign is kept beside it."""
    return type(x) in (Tensor, nn.Parameter) and x.layout == torch.strided and not (x.is_neg() or x.is_conj())


def _digest(x: Tensor) -> int | None:
    """A hash of a tensor's bytes as they lie; None of one with gaps, and of one that is not on the CPU."""
    plain = x.detach()
    last = plain.dim() == 4 and plain.is_contiguous(memory_format=torch.channels_last)
    plain = plain.permute(0, 2, 3, 1) if last else plain
    if not plain.is_cpu or not plain.is_contiguous():
        return None
    return xxhash.xxh3_128_intdigest(array(plain.reshape(-1).view(torch.uint8)).data)


@contextmanager
def replaying(model: nn.Module, outputs: Outputs, *, keep: bool = True, lasting: bool = False) -> Iterator[None]:
    """Give layers' outputs again while the model runs without gradients, bit for bit what they would compute.

    It concerns convolutions and linear layers of torch's own classes and emulated layers that say so
    (`Emulated.pure`); their hooks run as ever. Compiled models are left alone.

    Args:
        model: its layers' ``forward`` is replaced for the time.
        outputs: what is known.
        keep: whether to add to it.
        lasting: whether that stays for good.
    """
    known = (*PURE, Emulated)
    layers = [] if compiled(model) else [m for m in model.modules() if isinstance(m, known)]
    layers = [layer for layer in layers if "forward" not in layer.__dict__ and not replaced(layer)]
    try:
        for layer in layers:
            layer.__dict__["forward"] = _Replayed(layer, outputs, keep, lasting)
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)
