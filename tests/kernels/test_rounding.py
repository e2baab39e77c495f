"""The control word: what a kernel asks for holds within its block, and the caller's is back after it."""

import ctypes

import numpy as np
import pytest
import torch
from llvmlite import ir

from recoup.errors import RecoupError
from recoup.kernels.llvm import I64, Native, P, Target, assembly, declared, host
from recoup.kernels.rounding import EXCEPTIONS_MASKED, FLUSH, FLUSH_RESULTS, TOWARD_ZERO, internal, rounding
from recoup.kernels.signature import Kernel, Signature
from recoup.kernels.vector import Vector

LANES = 4
TINY = 2.0**-140  # subnormal
NEAREST, TRUNCATING = EXCEPTIONS_MASKED, EXCEPTIONS_MASKED | TOWARD_ZERO
X = np.array([1 + 2.0**-23, -1 - 2.0**-23, 2.0**-120, TINY], np.float32)
Y = np.array([1.5 * 2.0**-24, -1.5 * 2.0**-24, 2.0**-20, 2.0**60], np.float32)
ADDED = {False: [1 + 2.0**-22, -1 - 2.0**-22], True: [1 + 2.0**-23, -1 - 2.0**-23]}


def module(control: int, target: Target) -> ir.Module:
    """out[0] = x + y and out[1] = x y within the block, and out[2] = x + y after it, in vectors."""
    made, signature = ir.Module("rounding"), Signature.of(x=P, y=P, out=P)
    work = internal(made, "work", signature)
    b, code = work.b, Vector(work.b, LANES)
    x, y = (code.load(work[name], I64(0)) for name in ("x", "y"))
    code.store(b.fadd(x, y), work["out"], I64(0))
    code.store(b.fmul(x, y), work["out"], I64(LANES))
    b.ret_void()
    outer = signature.define(made, "outer")
    with rounding(outer.b, control, target):
        work.call(outer)
    work.call(outer, out=Vector(outer.b, LANES).at(outer["out"], I64(2 * LANES)))
    outer.b.ret_void()
    return made


def run(control: int) -> np.ndarray:
    """[inside the block or after it, sum or product, lane]."""
    out = np.full((2, 2, LANES), np.nan, np.float32)
    call = Native(module(control, host()), "outer", None, [ctypes.c_void_p] * 3)
    call(X.ctypes.data, Y.ctypes.data, out.ctypes.data)
    return out


X86 = pytest.mark.skipif(host().machine != "x86_64", reason="another processor's word")


@pytest.mark.parametrize("toward_zero", [False, True])
def test_sums_round_as_asked_and_as_before_after_it(toward_zero):
    out = run(TRUNCATING if toward_zero else NEAREST)
    assert out[0, 0, :2].tolist() == ADDED[toward_zero]
    assert out[1, 0, :2].tolist() == ADDED[False]
    assert (X + Y)[:2].tolist() == ADDED[False]


@X86
@pytest.mark.parametrize(
    ("control", "product", "operand"), [(0, True, True), (FLUSH_RESULTS, False, True), (FLUSH, False, False)]
)
def test_results_and_operands_below_the_normal_numbers(control, product, operand):
    inside, after = run(TRUNCATING | control)
    assert (inside[1, 2] != 0) == product  # 2^-140 from normal operands
    assert (inside[1, 3] != 0) == operand  # 2^-80 from a subnormal one
    assert after[1, 2:].tolist() == [TINY, 2.0**-80]
    assert (X * Y)[2:].tolist() == [TINY, 2.0**-80]


@X86
def test_the_callers_word_neither_reaches_the_block_nor_is_lost():
    if not torch.set_flush_denormal(True):
        pytest.skip("torch cannot set the word here")
    try:
        inside, after = run(TRUNCATING)
        flushed = torch.tensor([TINY]) * 0.5
    finally:
        torch.set_flush_denormal(False)
    assert inside[1, 2:].tolist() == [TINY, 2.0**-80]
    assert after[1, 2:].tolist() == [0, 0]
    assert flushed.item() == 0


@pytest.mark.parametrize("level", ["x86-64", "skylake-avx512"])
def test_arithmetic_stays_between_the_changes_of_the_word(level):
    text = assembly(module(TRUNCATING, Target.named(level)), Target.named(level))
    outer = text[text.index("outer:") :]
    order = [word for line in outer.splitlines() for word in ("ldmxcsr", "stmxcsr", "call") if word in line]
    assert order == ["stmxcsr", "ldmxcsr", "call", "ldmxcsr", "call"]


def test_a_block_in_a_loop_takes_no_more_stack_with_every_turn():
    made, signature = ir.Module("turns"), Signature.of(out=P, n=I64)
    work = internal(made, "work", signature)
    work.b.ret_void()
    outer = signature.define(made, "outer")
    b, code = outer.b, Vector(outer.b, LANES)
    with code.counted(I64(0), outer["n"]) as turn:
        with rounding(b, TRUNCATING, host()):
            work.call(outer)
        pointer = b.call(declared(b, "llvm.stacksave.p0", P, []), [])
        code.put(b.ptrtoint(pointer, I64), outer["out"], turn.index)
    b.ret_void()
    out = np.zeros(5, np.int64)
    Kernel(made, "outer", signature)(out=out.ctypes.data, n=5)
    assert out[0] != 0
    assert out.tolist() == [out[0]] * 5


ARM = Target("generic", "", frozenset(), "aarch64-unknown-linux-gnu")


@pytest.mark.parametrize(
    ("control", "word"),
    [(NEAREST, None), (TRUNCATING, 3 << 22), (TRUNCATING | FLUSH, (3 << 22) | (1 << 24)), (NEAREST | FLUSH, 1 << 24)],
)
def test_the_word_of_another_processor(control, word):
    """Emitted only: AArch64 rounds toward zero by bits 22 and 23 of FPCR and flushes by bit 24."""
    text = assembly(module(control, ARM), ARM)
    lines = [line.split() for line in text[text.index("outer:") :].splitlines() if line.split()]
    assert [line[0] for line in lines if line[0] in ("mrs", "msr", "bl")][:4] == ["mrs", "msr", "bl", "msr"]
    register = next(line[2] for line in lines if line[0] == "msr")
    moved = [line[2] for line in lines if line[0] == "mov" and line[1][1:] == f"{register[1:]},"]
    assert (register == "xzr") if word is None else (moved[0] == f"#{word}")


def test_processors_whose_word_is_unknown_are_refused():
    other = Target("generic", "", frozenset(), "riscv64-unknown-linux-gnu")
    with pytest.raises(RecoupError, match="written for x86 and AArch64; this processor is riscv64"):
        module(TRUNCATING, other)
