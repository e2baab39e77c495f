"""Triton's interpreter, faster: it would look for what to patch in all of its language at every call of a function.

It exchanges the language's functions while a kernel runs, and does so again at each call that the kernel makes, where
most have been exchanged already. Looking through every name took two fifths of the interpreter's time.
"""

import inspect
from typing import Any


def remember_names() -> None:
    """Let the interpreter look once which names of a module or class are functions of the language."""
    from triton.language import core
    from triton.runtime import interpreter

    names: dict[Any, list[str]] = {}

    def patch(owner: Any, _: Any, scope: Any) -> None:
        if owner not in names:  # at first nothing is exchanged yet
            names[owner] = [name for name, member in inspect.getmembers(owner) if core.is_builtin(member)]
        for name in names[owner]:
            member = getattr(owner, name)
            if core.is_builtin(member):
                interpreter._patch_attr(owner, name, member, None, scope)

    interpreter._patch_builtin = patch
