"""Modules that multiply by themselves: ``q @ k``, ``torch.matmul``, ``F.linear`` in a forward, told by its code."""

import dis
import inspect
import re
from collections.abc import Callable, Iterator
from functools import lru_cache
from types import CodeType, FunctionType
from typing import Any

from torch import nn

__all__ = ["multiplies_itself"]

PRODUCTS = frozenset(
    {"matmul", "mm", "bmm", "addmm", "addbmm", "baddbmm", "mv", "addmv", "einsum", "tensordot", "linear", "bilinear"}
    | {"addmm_", "addbmm_", "baddbmm_", "addmv_", "multi_dot", "chain_matmul"}
    | {"scaled_dot_product_attention", "multi_head_attention_forward", "flex_attention"}
    | {f"{name}{dims}d" for name in ("conv", "conv_transpose") for dims in (1, 2, 3)}
)
"""What torch calls its products."""
ANGLES = re.compile(r"(Rotary|Position|RoPE)\w*(Embed|Encod|Bias)|(Rotary|RoPE|Positions?|Embeddings?)(\d?[dD])?$")
"""What makes tables of angles and places, which is no product that hardware would run; an attention that is called
after them (``RoPEAttention``, ``PositionAttention``) is none."""


def multiplies_itself(module: nn.Module) -> bool:
    """Whether a module makes products that are none of its layers', as far as the code of its forward tells.

    The methods and the functions of the same file that a forward names are followed; what a name stands for at run time
    is not known, so that it *may* multiply. Torch's own modules, and modules of tables, count as none.
    """
    kind = type(module)
    if kind.__module__.startswith("torch.") or ANGLES.search(kind.__name__):
        return False
    names, matrix = _told(kind, getattr(kind, "forward", None))
    return matrix or any(not isinstance(getattr(module, name, None), nn.Module) for name in names)


@lru_cache(4096)
def _told(kind: type[nn.Module], forward: Any) -> tuple[frozenset[str], bool]:
    """The names of products in what a forward runs, and whether it has an ``@``."""
    names: set[str] = set()
    matrix = False
    for code in _reached(kind, forward):
        names.update(PRODUCTS.intersection(code.co_names))
        matrix = matrix or any(
            i.opname == "BINARY_OP" and i.argrepr.startswith("@") for i in dis.get_instructions(code)
        )
    return frozenset(names), matrix


def _reached(kind: type[nn.Module], forward: Any) -> Iterator[CodeType]:
    """The code of a forward, of what lies within it, and of the methods and functions that it names."""
    waiting, seen = [forward], set()
    while waiting:
        function = _plain(waiting.pop())
        if function is None or function in seen:
            continue
        seen.add(function)
        for code in _within(function.__code__):
            yield code
            waiting += [found for name in code.co_names for found in _named(kind, function, name)]


def _plain(function: Any) -> FunctionType | None:
    function = inspect.unwrap(function) if callable(function) else function
    return function if isinstance(function, FunctionType) else None


def _named(kind: type[nn.Module], function: FunctionType, name: str) -> Iterator[Callable[..., Any]]:
    """What a name in a function may stand for: methods, where a class calls its base's too, or the file's functions."""
    for base in kind.__mro__:
        if base is nn.Module:
            break
        if name in vars(base):
            yield vars(base)[name]
            if "super" not in function.__code__.co_names:
                break
    found = function.__globals__.get(name)
    if isinstance(found, FunctionType) and found.__globals__ is function.__globals__:
        yield found


def _within(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _within(constant)
