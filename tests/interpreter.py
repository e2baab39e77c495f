"""Triton's interpreter, faster: it spends most of its time on what it found out before, not on numbers.

It exchanges the language's functions while a kernel runs, and does so again at each call that the kernel makes, where
all have been exchanged already. It looks through every name of the language for what to exchange, makes a table of
types at every operation, and takes shapes apart to compare them. What it computes stays its own.
"""

import inspect
import math
from typing import Any


def hasten() -> None:
    """Let the interpreter of this process remember names, types and shapes."""
    _remember_names()
    _exchange_once_a_launch()
    _remember_types()
    _remember_shapes()
    _compare_shapes_first()


def _remember_names() -> None:
    """Look once which names of a module or class are functions of the language."""
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


def _exchange_once_a_launch() -> None:
    """Exchange nothing at a call from a kernel for which it has been exchanged."""
    import triton.language as tl
    from triton.runtime import interpreter

    exchange, seen = interpreter._patch_lang, {}
    exchanged: set[tuple[int, ...]] = set()

    class Scope:
        def __init__(self, scope: Any) -> None:
            self.scope = scope

        def restore(self) -> None:
            if self.scope is not None:
                self.scope.restore()
            exchanged.clear()

    def once(function: Any) -> Any:
        if function not in seen:
            modules = [value for value in function.__globals__.values() if inspect.ismodule(value)]
            seen[function] = tuple({id(value) for value in modules if value in (tl, tl.core)})
        if seen[function] in exchanged:
            return Scope(None)  # nobody restores at the end of a call
        exchanged.add(seen[function])
        return Scope(exchange(function))

    interpreter._patch_lang = once


def _remember_types() -> None:
    """NumPy's type of one of the language's, made once."""
    from triton.runtime import interpreter

    find, found = interpreter._get_np_dtype, {}

    def remembered(kind: Any) -> Any:
        element = kind.scalar
        if element.name not in found:
            found[element.name] = find(element)
        return found[element.name]

    interpreter._get_np_dtype = remembered


def _remember_shapes() -> None:
    """Shapes of types and of tensors, checked and wrapped once for all that have them."""
    from triton.language import core

    make_type, of_types, of_tensors = core.block_type.__init__, {}, {(): (core.constexpr(1), core.tuple([]))}

    def block_type(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = tuple(s.value if isinstance(s, core.constexpr) else s for s in shape)
        if sizes not in of_types:
            make_type(self, element_ty, shape)
            of_types[sizes] = self.shape, self.numel, str(self.shape)
        self.element_ty = element_ty
        self.shape, self.numel, text = of_types[sizes]
        self.name = f"<{text}, {element_ty}>"

    def tensor(self: Any, handle: Any, type: Any) -> None:  # noqa: A002 - given by this name
        sizes = tuple(type.shape.values) if type.is_block() else ()
        if sizes not in of_tensors:
            wrapped = core.tuple([core.constexpr(size) for size in sizes])
            of_tensors[sizes] = core.constexpr(math.prod(sizes)), wrapped
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape = of_tensors[sizes]

    core.block_type.__init__ = block_type
    core.tensor.__init__ = tensor


def _compare_shapes_first() -> None:
    """Operands of one shape need no broadcasting."""
    from triton.runtime.interpreter import interpreter_semantic

    broadcast = interpreter_semantic.broadcast_impl_value

    def compared(left: Any, right: Any) -> Any:
        one, other = left.type, right.type
        if one.is_block() and other.is_block() and one.shape.values == other.shape.values:
            return left, right
        return broadcast(left, right)

    interpreter_semantic.broadcast_impl_value = compared
