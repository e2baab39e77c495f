"""Registers that saturate, added run by run, against registers that are clipped after every single product."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import recoup as rc
from recoup.kernels import llvm
from recoup.nbsmt import bounded, emit_runs, reference, runs, saturate
from recoup.nbsmt.config import NBSMT
from recoup.nbsmt.saturate import Saturating
from recoup.network.convolution import POINTWISE, Geometry
from tests.nbsmt.strategies import ONE_PRODUCT

HERE = llvm.host().features >= runs.NEEDED
needs_vnni = pytest.mark.skipif(not HERE, reason="this processor has no AVX-512 VNNI")
bits = st.sampled_from([8, 9, 15, 16, 17, 18, 20, 24, 31, 32])


def clipped(code, weight, geometry, register):
    """Every output's register after every product, in the order channel, row, column of the kernel: int64 [N, O, h, w].

    Plain sums of int64 in Python's order; the patches are torch's own.
    """
    low, high = -(1 << (register - 1)), (1 << (register - 1)) - 1
    outputs = []
    for x, w in zip(code.chunk(geometry.groups, 1), weight.chunk(geometry.groups), strict=True):
        x_NKM = F.unfold(x.double(), geometry.kernel, geometry.dilation, geometry.padding, geometry.stride).long()
        w_KO = w.flatten(1).t().long()
        total = torch.zeros(len(code), w_KO.shape[1], x_NKM.shape[2], dtype=torch.long)
        for k, w_O in enumerate(w_KO):
            total = (total + x_NKM[:, k, None, :] * w_O[None, :, None]).clamp(low, high)
        outputs.append(total)
    return torch.cat(outputs, 1).unflatten(2, geometry.outputs(code.shape[2:]))


def hostile(kind, shape, channels, random):
    """Weights int8 [O, C, h, w] of one kind of those that decide something."""
    weight = torch.randint(-128, 128, shape, generator=random)
    slot = torch.arange(weight[0].numel()).view(shape[1:])
    if kind == "alternating":  # up and down at an end of the register
        weight = weight.abs().clamp_max(127) * (1 - 2 * (slot % 2))
    elif kind == "runs":  # as long as windows, and longer
        weight = weight.abs().clamp_max(127) * (1 - 2 * (slot // channels % 2))
    elif kind == "sparse":
        weight = weight * (torch.rand(shape, generator=random) < 0.3)
    elif kind == "largest":
        weight = torch.where(weight < 0, -128, 127)
    elif kind == "one sign":
        weight = weight.abs().clamp_max(127) * (1 - 2 * (torch.arange(shape[0]) % 2)).view(-1, 1, 1, 1)
    return weight.to(torch.int8)


def values(kind, shape, random):
    """Codes uint8: all of them, few but zero, or near the largest."""
    code = torch.randint(0, 256, shape, generator=random)
    if kind == "zeros":
        code = code * (torch.rand(shape, generator=random) < 0.3)
    elif kind == "largest":
        code = code // 16 + 240
    return code.to(torch.uint8)


def summed(code, weight, register, geometry, **settings):
    """By the kernel, which has to be the one that is tested."""
    kernel = Saturating(weight, NBSMT(1, accumulator=rc.Int(register)), 1)
    found = kernel(code.permute(0, 2, 3, 1).contiguous(), geometry, **settings)
    assert (geometry.groups, settings.get("zero", 0)) in kernel._tiles
    return found


@needs_vnni
@settings(max_examples=20, deadline=None)
@given(
    register=bits,
    seed=st.integers(0, 2**31),
    of=st.sampled_from(["any", "zeros", "largest"]),
    **ONE_PRODUCT,
    block=st.sampled_from([1, 2, 6, 24]),
)
def test_convolutions_equal_registers_clipped_after_every_product(
    register, seed, kind, of, images, channels, outputs, groups, kernel, stride, padding, dilation, block
):
    """Any geometry and any size, with blocks of few slots and of many."""
    geometry, size = Geometry(kernel, stride, padding, dilation, groups), (7, 9)
    assume(min(geometry.outputs(size)) >= 1)
    random = torch.Generator().manual_seed(seed)
    weight = hostile(kind, (outputs * groups, channels, *kernel), channels, random)
    code = values(of, (images, channels * groups, *size), random)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "OUTPUTS", 1)
        patch.setattr(runs, "PIXELS", 1)
        patch.setattr(runs, "BLOCK", block << 10)
        found = summed(code, weight, register, geometry)
        real = summed(code, weight, register, geometry, floats=True)
    expected = clipped(code, weight, geometry, register)
    assert found.dtype == torch.int32
    assert torch.equal(found.long(), expected)
    assert torch.equal(real, expected.float())


@needs_vnni
@pytest.mark.parametrize("register", [16, 18, 22])
def test_large_layers_saturate_alike(register):
    """As many slots as several blocks hold, more pixels than a tile and some that fill none: sums leave and return."""
    random = torch.Generator().manual_seed(register)
    geometry = Geometry((3, 3), (1, 1), (1, 1), (1, 1), 1)
    weight = hostile("any", (40, 72, 3, 3), 72, random)
    code = values("any", (2, 72, 11, 12), random)
    expected = clipped(code, weight, geometry, register)
    exact = clipped(code, weight, geometry, 32)
    changed = float((expected != exact).float().mean())
    assert changed > 0.3 if register < 20 else changed == 0
    assert torch.equal(summed(code, weight, register, geometry).long(), expected)


@needs_vnni
@settings(max_examples=20, deadline=None)
@given(bits, st.integers(0, 2**31), st.integers(64, 200), st.integers(1, 300), st.integers(32, 50))
def test_matmul_equals_the_reference(register, seed, rows, size, columns):
    random = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 256, (rows, size), generator=random, dtype=torch.uint8)
    w = torch.randint(-128, 128, (size, columns), generator=random, dtype=torch.int8)
    config = NBSMT(1, accumulator=rc.Int(register))
    assert torch.equal(rc.nbsmt.matmul(x, w, config), reference.matmul(x, w, config))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 5), st.integers(1, 60), st.sampled_from([2, 8, 96]), bits)
def test_steps_hold_every_product_once_and_in_order(seed, outputs, slots, size, register):
    """In a step all products have one sign, but for those before the sum can have left the register."""
    random, highest = torch.Generator().manual_seed(seed), (1 << (register - 1)) - 1
    weight = torch.randint(-128, 128, (outputs, slots), generator=random)
    weight = (weight * (torch.rand(weight.shape, generator=random) < 0.8)).to(torch.int8)
    found = runs.steps(weight, highest, size)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(runs, "AT_ONCE", 2 * slots)  # two output channels at once
        assert all(map(torch.equal, runs.steps(weight, highest, size)[:2], found[:2]))
    rebuilt, last = torch.zeros(outputs, slots, dtype=torch.int8), [-1] * outputs
    safe = 255 * weight.abs().long().cumsum(1) <= highest
    assert found.ends[0, 0] == 0
    assert found.ends[-1, -1] == len(found.steps)
    for block, ends in enumerate(found.ends.tolist()):
        for o in range(outputs):
            for byte, packed in found.steps[ends[o] : ends[o + 1]].tolist():
                first = block * size + byte // emit_runs.VECTOR * emit_runs.EVERY
                quad = torch.tensor([packed], dtype=torch.int32).view(torch.int8).tolist()
                taken = [(first + i, w) for i, w in enumerate(quad) if w]
                assert taken[0][0] > last[o]
                assert taken[-1][0] < (block + 1) * size
                assert len({w > 0 for k, w in taken if not safe[o, k]}) <= 1
                for k, w in taken:
                    rebuilt[o, k], last[o] = w, k
    assert torch.equal(rebuilt, weight)


@needs_vnni
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_thread_count_and_pieces_change_nothing(threads, monkeypatch):
    random = torch.Generator().manual_seed(0)
    geometry = Geometry((3, 3), (1, 1), (1, 1), (1, 1), 1)
    weight, code = hostile("any", (33, 20, 3, 3), 20, random), values("any", (3, 20, 9, 10), random)
    whole, before = summed(code, weight, 16, geometry), torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert torch.equal(summed(code, weight, 16, geometry), whole)
        for module, name, value in (
            (saturate, "CHUNK", 1),
            (runs, "GROUPS", 3),
            (runs, "AT_ONCE", 1),
            (runs, "WORK", 1),
        ):
            monkeypatch.setattr(module, name, value)
            assert torch.equal(summed(code, weight, 16, geometry), whole)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("way", "zero", "other"), [(runs, 0, 128), (bounded, 128, 0)])
def test_what_is_added_many_at_once(way, zero, other):
    """One product a slot, on a processor that multiplies quads, of a layer that is large enough: a sign, a way."""
    weight = torch.ones(64, 8, 9, 1, dtype=torch.int8)
    able = llvm.Target("cascadelake", "", runs.NEEDED)
    assert way.fits(weight, 1, zero, 64, able)
    assert way.fits(weight, 2, zero, 64, able)
    assert not way.fits(weight, 4, zero, 64, able)  # 16 output channels a group
    assert not way.fits(weight, 1, other, 64, able)  # a signed product's sign is not its weight's
    assert not way.fits(weight, 1, zero, 63, able)
    assert not way.fits(weight.view(64, 4, 9, 2), 1, zero, 64, able)
    assert not way.fits(weight[:, :0], 1, zero, 64, able)
    assert not way.fits(weight, 1, zero, 64, llvm.Target("haswell", "", frozenset({"avx2"})))


@needs_vnni
def test_weights_are_cut_once():
    kernel = Saturating(torch.ones(32, 4, 1, 1, dtype=torch.int8), NBSMT(1, accumulator=rc.Int(8)), 1)
    code = torch.ones(64, 1, 1, 4, dtype=torch.uint8)
    kernel(code, POINTWISE)
    cut = kernel._tiles[1, 0]
    kernel(code, POINTWISE)
    assert kernel._tiles[1, 0] is cut


def test_code_of_a_tile():
    """The registers of a tile stay in the processor's: eight steps are written out, and one more."""
    target = llvm.Target("cascadelake", "", llvm.Target.named("skylake-avx512").features | {"avx512vnni"})
    if target.machine != "x86_64":
        return
    lines = llvm.assembly(emit_runs.tiles_module(8, True), target).splitlines()
    words = [line.split() for line in lines if line.split()]
    assert sum(word[0] == "vpdpbusds" for word in words) == 8 * (emit_runs.AT_ONCE + 1)
    first = next(i for i, word in enumerate(words) if word[0] == "vpdpbusds")
    assert not any("(%rsp)" in " ".join(word) and "zmm" in " ".join(word) for word in words[first : first + 100])
