"""Copies of a network that are whole: a function is not copied, so a wrapper that holds a layer holds the first one."""

import copy
import dis
import functools
import gc
import types
import weakref
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

from recoup.errors import RecoupError

M = TypeVar("M", bound=nn.Module)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
LIBRARIES = ("torch", "recoup")  # whose global variables hold nothing of a network's
GLOBAL = ("LOAD_GLOBAL", "LOAD_NAME")
ATTRIBUTE = ("LOAD_ATTR", "LOAD_METHOD")
CACHED = type(functools.lru_cache(len))
"""Functions that remember their arguments, and compute with those of the call."""


def copied(model: M, purpose: str) -> M:
    """A deep copy that computes with nothing of the model's own.

    Raises:
        RecoupError: a method that was set on a module itself, or a hook, is a function that holds a module or a tensor
            of the model (in its closure, its defaults or a global variable that it reads, itself or within something
            that those hold, but as a key): a copy of it would still compute with that one, whatever becomes of the
            copy.
    """
    other = copy.deepcopy(model)
    own = {id(module): name or "the model itself" for name, module in model.named_modules()}
    own |= {id(tensor): name for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    for name, module in other.named_modules():
        for what, value in _set_on(module):
            held = _holds(value, own)
            if held is not None:
                raise RecoupError(
                    f"{purpose}: {name or 'the model itself'}: {what} is a function that holds {own[held]} of this "
                    "very model, and would compute with it in a copy too: set a bound method (types.MethodType), give "
                    "the module a class with such a forward, or take it off"
                )
    return other


def _set_on(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """What was set on a module itself: attributes that can be called, and hooks."""
    for name, value in vars(module).items():
        if name in HOOKS:
            yield from (("a hook", hook) for hook in (value or {}).values())
        elif callable(value) and not isinstance(value, type | nn.Module | Tensor):
            yield name, value


def _holds(value: Any, own: Mapping[int, str]) -> int | None:
    """The module or tensor of ``own`` that something reaches through what a copy shares, by id."""
    seen: set[int] = set()
    open_ = [value]
    while open_:
        one = open_.pop()
        if id(one) in own:
            return id(one)
        if id(one) not in seen:
            seen.add(id(one))
            open_ += _within(one)
    return None


def _within(value: Any) -> list[Any]:
    if isinstance(value, types.FunctionType):
        held = [*_captured(value), *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
        return [*held, *vars(value).values()]
    if isinstance(value, dict):  # keys say of whom something is told, as in what hooks note of each layer
        return list(value.values())
    if isinstance(value, CACHED):
        return [value.__wrapped__]
    if isinstance(value, weakref.ref):
        return [value()]
    if isinstance(value, type | types.ModuleType | types.FrameType | Tensor):
        return []
    return gc.get_referents(value)  # of any class: containers, attributes, slots, what methods and partials are of


def _captured(function: types.FunctionType) -> list[Any]:
    """What a function's closure holds, and the global variables that it and the functions written in it read."""
    found = []
    for cell in function.__closure__ or ():
        try:
            found.append(cell.cell_contents)
        except ValueError:  # not filled yet
            continue
    named = function.__globals__
    if str(named.get("__name__")).partition(".")[0] in LIBRARIES:
        return found
    return found + [x for code in _codes(function.__code__) for x in _read(code, named)]


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            yield from _codes(const)


def _read(code: types.CodeType, named: Mapping[str, Any]) -> Iterator[Any]:
    """The global variables that code reads, told by its instructions from attributes of the same name; of Python's
    modules what is taken from them."""
    value = None
    for instruction in dis.get_instructions(code):
        if instruction.opname in GLOBAL:
            yield value
            value = named.get(instruction.argval)
        elif isinstance(value, types.ModuleType) and instruction.opname in ATTRIBUTE:
            value = vars(value).get(instruction.argval)
        else:
            yield value
            value = None
    yield value
