"""The products that run while a network does, each with the module in whose forward it runs: functional calls and
kernels of other packages included, by the names of torch's operators."""

import re
from collections import Counter
from collections.abc import Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from recoup.network.modes import eagerly
from recoup.network.turns import Turn, turn

PRODUCT = re.compile(r"(^|_)(\w*mm|(add)?mv|v?dot|linear|conv\w*|attention|rnn_layer|triton_kernel)(_|$)")
OWN = "recoup"


@dataclass(slots=True)
class Heard:
    """By module: the multiply-accumulates of each product that runs in its own forward, None of which they are not
    known, and how often every module ran."""

    macs: dict[str, list[int | None]] = field(default_factory=dict)
    calls: Counter[str] = field(default_factory=Counter)


class _Listening(TorchDispatchMode):
    """Notes the multiply-accumulates of every product, and where it runs."""

    supports_higher_order_operators = True

    def __init__(self, running: list[str], heard: Heard, whole: Container[str]) -> None:
        super().__init__()
        self.running, self.heard, self.whole = running, heard, whole

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not isinstance(func, torch._ops.OpOverload):
            return self._higher(func, args, kwargs)
        if _decomposes(func):  # as autograd does before this sees it, but under inference_mode
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        output = func(*args, **kwargs)
        if _is_product(func):
            self._note(func._overloadpacket, args, kwargs, output)
        return output

    def _higher(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """Of operators of functions (branches, loops, attention with a function of scores): a product as a whole where
        it is called one, else the products of the functions, as often as they run."""
        if _is_product_name(func.name()):
            output = func(*args, **kwargs)
            self._note(func, args, kwargs, output)
            return output
        args, kwargs = tree_map(self._within, (args, kwargs))
        return func(*args, **kwargs)

    def _within(self, value: Any) -> Any:
        if not callable(value) or isinstance(value, Tensor | type):
            return value

        def heard(*args: Any, **kwargs: Any) -> Any:
            with self:
                return value(*args, **kwargs)

        return heard

    def _note(self, func: Any, args: tuple, kwargs: dict, output: Any) -> None:
        if not any(name in self.whole for name in self.running):  # torch's formulas take longer than small products
            name = self.running[-1] if self.running else ""
            self.heard.macs.setdefault(name, []).append(_macs(func, args, kwargs, output))


@lru_cache(4096)
def _decomposes(func: Any) -> bool:
    """Asked of torch once: it looks the operator up by its name, in longer than the operator takes."""
    return func._can_decompose()


@lru_cache(4096)
def _is_product(func: Any) -> bool:
    space, _, name = func._schema.name.partition("::")
    return space != OWN and _is_product_name(name)


def _is_product_name(name: str) -> bool:
    return bool(PRODUCT.search(name))


def _macs(func: Any, args: tuple, kwargs: dict, output: Any) -> int | None:
    """As torch counts them; None of what it does not count, such as attention on the CPU."""
    from torch.utils.flop_counter import flop_registry

    count = flop_registry.get(func)
    return None if count is None else int(count(*args, **kwargs, out_val=output)) // 2


@contextmanager
def hearing_products(model: nn.Module, whole: Container[str]) -> Iterator[Heard]:
    """Hear which products run meanwhile, and in which module.

    Args:
        model: what runs.
        whole: names of modules whose products, and those of modules within them, are left out.
    """
    running: list[str] = []
    heard = Heard()
    hooks: list[Any] = []

    def follow(name: str, module: nn.Module, own: Turn) -> None:
        def enter(*_: Any) -> None:
            if own.heard:
                heard.calls[name] += 1
            if own.here:  # the mode, too, hears its own thread alone
                running.append(name)

        def leave(*_: Any) -> None:
            if own.here:
                running.pop()

        hooks.append(module.register_forward_pre_hook(enter, prepend=True))
        hooks.append(module.register_forward_hook(leave, always_call=True))

    try:
        with turn() as own:
            for name, module in model.named_modules():
                if not isinstance(module, torch.jit.ScriptModule):  # it calls its parts by itself
                    follow(name, module, own)
            # Torch compiles operators of functions that are called as they are, which no dispatch mode may listen to;
            # saying so loads the compiler, as the first operator under any such mode does.
            with eagerly(), _Listening(running, heard, whole):
                yield heard
    finally:
        for hook in hooks:
            hook.remove()
