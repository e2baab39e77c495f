"""The kernels against the reference, bit for bit, in every form that processors take."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recoup.kernels.llvm import Target, assembly, host
from recoup.tensorcore import TensorCore, cpu, emit, emit_form, reference
from recoup.tensorcore.emit_form import Reach
from tests.tensorcore.strategies import KINDS, PLAIN, operands, same, units

LEVELS = [t for t in ("skylake-avx512", "haswell", "x86-64") if Target.named(t).features <= host().features]


@given(units(), st.tuples(st.integers(1, 6), st.integers(1, 50), st.integers(1, 40)), st.sampled_from(KINDS), st.data())
@settings(max_examples=25)
def test_any_unit_equals_the_reference(unit, shape, kind, data):
    a, b = operands(unit, shape, kind, data.draw(st.integers(0, 2**30)))
    got, faults = cpu.products(a, b, unit)
    assert faults == 0
    assert same(got, reference.matmul(a, b, unit))


@pytest.mark.parametrize("preset", PLAIN)
def test_presets_equal_the_reference(preset):
    unit = PLAIN[preset]
    for seed, kind in enumerate(KINDS):
        a, b = operands(unit, (3, 2 * unit.group + 1, 5), kind, seed)
        assert same(cpu.products(a, b, unit)[0], reference.matmul(a, b, unit))


@pytest.mark.parametrize("level", LEVELS)
def test_other_processors_give_the_same_bits(level):
    for unit in (TensorCore.hopper_fp8(), TensorCore.hopper_bf16(), TensorCore.hopper_f16(output="float16")):
        a, b = operands(unit, (5, 70, 37), "spread", 1)
        expected = cpu.products(a, b, unit)[0]
        with cpu.target(level):
            assert same(cpu.products(a, b, unit)[0], expected)


@pytest.mark.parametrize(("register", "rows"), [(64, 4), (16, 1), (32, 3)])
def test_other_tiles_give_the_same_bits(register, rows, monkeypatch):
    if register == emit_form.AVX512 and "skylake-avx512" not in LEVELS:
        pytest.skip("this processor has no AVX-512")
    plain = cpu.form_of
    for unit in (TensorCore.hopper_fp8(promotion=64), TensorCore.ampere_tf32(output="e8m13")):
        a, b = operands(unit, (9, 70, 150), "zeros", 2)
        expected = cpu.products(a, b, unit)[0]
        with monkeypatch.context() as patched:
            patched.setattr(
                cpu, "form_of", lambda *given: replace(plain(*given), register=register, piece=register, rows=rows)
            )
            assert same(cpu.products(a, b, unit)[0], expected)


def at_the_edge(reach, form, shape, seed):
    """Values of a format between two exponents, some with the lowest bit and some with the highest, and zeros."""
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.randint(reach.low + form.mantissa, reach.high + 1, shape, generator=generator)
    ends = torch.rand(shape, generator=generator)
    exponents[ends < 0.2], exponents[ends > 0.8] = reach.low + form.mantissa, reach.high
    significands = torch.randint(1 << form.mantissa, 2 << form.mantissa, shape, generator=generator)
    signs = torch.where(torch.rand(shape, generator=generator) < 0.5, -1.0, 1.0)
    x = signs * (significands * 2.0**-form.mantissa).ldexp(exponents)
    x[(ends > 0.45) & (ends < 0.5)] = 0.0
    x[0, 0], x[-1, -1] = 2.0**reach.high, (1 + 2.0**-form.mantissa) * 2.0 ** (reach.low + form.mantissa)
    return x


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("beyond", [False, True])
@pytest.mark.parametrize(
    "reach", [((-59, 3), (-59, 3)), ((-102, -40), (6, 30)), ((-2, 60), (-60, 0)), ((-64, -2), (-62, -2))]
)
def test_bytes_hold_exponents_up_to_the_limit(reach, beyond, level):
    """And words do from there on."""
    first, second = (Reach(*ends) for ends in reach)
    first = replace(first, low=first.low - 2 * beyond)
    unit = TensorCore.hopper_bf16()
    form = unit.formats[0]
    a, b = at_the_edge(first, form, (5, 70), 1), at_the_edge(second, form, (70, 37), 2)
    found = cpu.reach_of(a, form), cpu.reach_of(b, form)
    assert found == (first, second)
    with cpu.target(level):
        assert emit_form.form_of(unit, Target.named(level), found, 70).short is not beyond
        assert same(cpu.products(a, b, unit)[0], reference.matmul(a, b, unit))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("beyond", [False, True])
@pytest.mark.parametrize(
    "reach", [((-21, 21), (-21, 21)), ((9, 51), (9, 51)), ((-30, 12), (-13, 28)), ((0, 42), (20, 40))]
)
def test_bytes_of_lowest_bits_hold_signs_up_to_the_limit(reach, beyond, level):
    """And columns have them for either sign from there on."""
    first, second = (Reach(*ends) for ends in reach)
    first = replace(first, low=first.low - beyond)
    unit = TensorCore.hopper_bf16()
    form = unit.formats[0]
    a, b = at_the_edge(first, form, (5, 70), 3), at_the_edge(second, form, (70, 37), 4)
    a[1], b[:, 2] = 0.0, 0.0
    found = cpu.reach_of(a, form), cpu.reach_of(b, form)
    assert found == (first, second)
    with cpu.target(level):
        kernel = emit_form.form_of(unit, Target.named(level), found, 70)
        assert (kernel.short, kernel.folded) == (True, not beyond)
        assert same(cpu.products(a, b, unit)[0], reference.matmul(a, b, unit))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("top", range(100, 127, 3))
@pytest.mark.parametrize("fraction", [2, 5, 9, 11, 13])
def test_what_sums_are_cut_with_stays_finite(fraction, top, level):
    """Few bits are cut with a power of two far above the sums, which float32 may not hold."""
    unit = TensorCore(operands="bfloat16", group=1, fraction=fraction)
    a, b = torch.ones(1, 2), torch.tensor([[1.5 * 2.0 ** (top - 5)], [2.0**top]])
    with cpu.target(level):
        assert same(cpu.products(a, b, unit)[0], reference.matmul(a, b, unit))


def test_processors_that_run_halves_count_in_halves(monkeypatch):
    """Every form that any AVX-512 core takes, on this one."""
    if "skylake-avx512" not in LEVELS:
        pytest.skip("this processor has no AVX-512")
    plain = cpu.form_of
    for unit in (TensorCore.hopper_fp8(), TensorCore.ampere_tf32(), TensorCore.hopper_f16(output="float16")):
        a, b = operands(unit, (7, 70, 70), "spread", 5)
        expected = reference.matmul(a, b, unit)
        for piece, rows, repeated in ((32, 3, False), (32, 3, True), (32, 4, False), (64, 4, True), (64, 4, False)):
            with monkeypatch.context() as patched:

                def form(*given, piece=piece, rows=rows, repeated=repeated):
                    found = plain(*given)
                    piece = min(piece, found.columns * found.integer.width // 8)
                    return replace(found, piece=piece, rows=rows, repeated=repeated or not found.short)

                patched.setattr(cpu, "form_of", form)
                assert same(cpu.products(a, b, unit)[0], expected)


def test_avx512_code_keeps_its_sums_in_registers(monkeypatch):
    module = {}
    monkeypatch.setattr(emit, "Kernel", lambda made, *_: module.setdefault("made", made))
    target = Target.named("skylake-avx512")
    emit.steps.__wrapped__(cpu.form_of(TensorCore.hopper_fp8(), target), target)
    code = assembly(module["made"], target)
    loops = [part for part in code.split(".LBB") if part.count("vfmadd231ps") >= 16]
    assert loops
    assert all("zmm" in part for part in loops)
    assert min(part.count("(%rsp)") for part in loops) <= 4  # nothing is spilled


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", [(64, 96, 200), (200, 96, 3), (1, 33, 1)])
def test_threads_change_nothing(threads, shape):
    unit = TensorCore.hopper_fp8(promotion=32)
    a, b = operands(unit, shape, "normal", 3)
    expected = cpu.products(a, b, unit)[0]
    torch.set_num_threads(threads)
    assert same(cpu.products(a, b, unit)[0], expected)
    assert same(cpu.products(b.mT.contiguous(), a.mT.contiguous(), unit)[0].mT.contiguous(), expected)


def test_long_sums_overflow_where_the_unit_does():
    unit = TensorCore.ampere_bf16()
    a = torch.tensor([[2.0**100] * 40, [-(2.0**100)] * 40])
    b = torch.full((40, 2), 2.0**26)
    b[:, 1] = 2.0**-40
    got = cpu.products(a, b, unit)[0]
    assert same(got, reference.matmul(a, b, unit))
    assert got.isinf().tolist() == [[True, False], [True, False]]


def test_flushing_changes_nothing():
    unit = TensorCore.hopper_bf16()
    a, b = operands(unit, (3, 40, 20), "subnormal", 4)
    expected = cpu.products(a, b, unit)[0]
    assert torch.set_flush_denormal(True)
    try:
        got = torch.ops.recoup.tensorcore_matmul(a[None], b[None], unit.code, "layer", "a b")[0]
    finally:
        torch.set_flush_denormal(False)
    assert same(got, expected)


@pytest.mark.parametrize("level", LEVELS)
def test_one_allocation_holds_all_that_is_prepared(level, monkeypatch):
    """Kernels write to bare addresses: what is too short would be written beyond."""
    take, taken, left = cpu.Memory.take, [], []

    def checked(memory, part):
        found = take(memory, part)
        assert memory.rest is not None
        assert (found.numel(), found.data_ptr() % cpu.LINE) == (part[0], 0) or part[0] == 0
        taken.append(part[0])
        left.append(len(memory.rest))
        return found

    monkeypatch.setattr(cpu.Memory, "take", checked)
    monkeypatch.setattr(cpu, "KEPT", 0)
    for unit in (TensorCore.hopper_fp8(), TensorCore.hopper_bf16(), TensorCore.hopper_f16(output="float16")):
        for shape in ((1, 1, 1), (5, 71, 67)):
            for kind in ("normal", "spread"):  # in bytes, and bfloat16's in words
                a, b = operands(unit, shape, kind, 3)
                with cpu.target(level):
                    assert same(cpu.products(a, b, unit)[0], reference.matmul(a, b, unit))
                assert left[-1] == 0  # what is allocated is what is taken, no more
    assert taken
