"""How the processor rounds while a kernel runs, and whether it reads and makes numbers below the normal ones.

Both are state of the thread, which torch and NumPy rely on: a kernel sets them around its arithmetic and restores what
was there. They are whole words, so that nothing a caller set (`torch.set_flush_denormal` among it) reaches a kernel's
bits. The arithmetic must stand in a function of its own that is not inlined (`internal`): LLVM knows no order between
an addition and a change of the word, and would move one across the other.

A word is written as x86 has it, in MXCSR, and translated for AArch64, whose FPCR flushes operands and results together
or neither: results alone it does not flush, which no kernel's bits depend on.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from llvmlite import ir

from recoup.errors import RecoupError
from recoup.kernels.llvm import I32, I64, VOID, P, Target, declared
from recoup.kernels.signature import Definition, Signature

# Of x86's MXCSR. FLUSH: operands below the normal numbers are zero too, not only results.
EXCEPTIONS_MASKED, TOWARD_ZERO, FLUSH_RESULTS, FLUSH = 0x1F80, 0x6000, 0x8000, 0x8040
_TOWARD_ZERO_FPCR, _FLUSH_FPCR = 3 << 22, 1 << 24  # of AArch64's


@contextmanager
def rounding(b: ir.IRBuilder, control: int, target: Target) -> Iterator[None]:
    """Write a block whose calls run with a whole control word (see above); the caller's is restored after it.

    Raises:
        RecoupError: for a processor that is neither x86 nor AArch64.
    """
    if target.machine in ("x86_64", "i686"):
        load, store = (declared(b, f"llvm.x86.sse.{which}mxcsr", VOID, [P]) for which in ("ld", "st"))
        with b.goto_entry_block():  # within a loop, every turn would take more of the stack
            saved, wanted = (b.bitcast(b.alloca(I32), P) for _ in range(2))
        b.call(store, [saved])
        b.store(I32(control), wanted)
        b.call(load, [wanted])
        yield
        b.call(load, [saved])
    elif target.machine in ("aarch64", "arm64"):
        load = declared(b, "llvm.aarch64.set.fpcr", VOID, [I64])
        word = b.call(declared(b, "llvm.aarch64.get.fpcr", I64, []), [])
        b.call(load, [I64(_fpcr(control))])
        yield
        b.call(load, [word])
    else:
        raise RecoupError(
            f"rounding toward zero and flushing are written for x86 and AArch64; this processor is {target.machine}"
        )


def _fpcr(control: int) -> int:
    toward_zero, flush = control & TOWARD_ZERO == TOWARD_ZERO, control & FLUSH == FLUSH
    return toward_zero * _TOWARD_ZERO_FPCR | flush * _FLUSH_FPCR


def internal(module: ir.Module, name: str, signature: Signature) -> Definition:
    """Start a function of its own that is not inlined: see above."""
    made = signature.define(module, name)
    made.function.linkage = "internal"
    made.function.attributes.add("noinline")
    return made
