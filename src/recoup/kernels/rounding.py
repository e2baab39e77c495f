"""How the processor rounds while a kernel runs, and whether it reads and makes numbers below the normal ones.

Both are state of the thread, which torch and NumPy rely on: a kernel sets them around its arithmetic and restores what
was there. They are whole words, so that nothing a caller set (`torch.set_flush_denormal` among it) reaches a kernel's
bits. The arithmetic must stand in a function of its own that is not inlined (`internal`): LLVM knows no order between
an addition and a change of the word, and would move one across the other.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from llvmlite import ir

from recoup.kernels.llvm import I32, I64, VOID, P, Target, declared
from recoup.kernels.signature import Definition, Signature

# Of x86's MXCSR. FLUSH: operands below the normal numbers are zero too, not only results.
EXCEPTIONS_MASKED, TOWARD_ZERO, FLUSH_RESULTS, FLUSH = 0x1F80, 0x6000, 0x8000, 0x8040


@contextmanager
def rounding(b: ir.IRBuilder, control: int, target: Target) -> Iterator[None]:
    """Write a block whose calls run with a whole control word (see above); the caller's is restored after it."""
    saved = _set(b, control, target)
    yield
    _restore(b, saved, target)


def _set(b: ir.IRBuilder, control: int, target: Target) -> Any:
    words = b.bitcast(b.alloca(I32, 2), P)  # the caller's, and the kernel's
    if _is_x86(target):
        b.call(_mxcsr(b, "st"), [words])
        wanted = b.gep(words, [I64(1)], source_etype=I32)
        b.store(I32(control), wanted)
        b.call(_mxcsr(b, "ld"), [wanted])
    else:
        b.store(b.call(declared(b, "llvm.get.rounding", I32, []), []), words)
        b.call(_set_rounding(b), [I32(0 if control & TOWARD_ZERO else 1)])
    return words


def _restore(b: ir.IRBuilder, saved: Any, target: Target) -> None:
    if _is_x86(target):
        b.call(_mxcsr(b, "ld"), [saved])
    else:
        b.call(_set_rounding(b), [b.load(saved, typ=I32)])


def _is_x86(target: Target) -> bool:
    return target.machine in ("x86_64", "i686")


def _mxcsr(b: ir.IRBuilder, which: str) -> Any:
    return declared(b, f"llvm.x86.sse.{which}mxcsr", VOID, [P])


def _set_rounding(b: ir.IRBuilder) -> Any:
    return declared(b, "llvm.set.rounding", VOID, [I32])


def internal(module: ir.Module, name: str, signature: Signature) -> Definition:
    """Start a function of its own that is not inlined: see above."""
    made = signature.define(module, name)
    made.function.linkage = "internal"
    made.function.attributes.add("noinline")
    return made
