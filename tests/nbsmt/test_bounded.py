"""Registers that saturate, signed values added many at once, against registers clipped after every single product."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import recoup as rc
from recoup.kernels import llvm
from recoup.nbsmt import bounded, emit_bounded, reference, runs, saturate, walked
from recoup.nbsmt.config import NBSMT
from recoup.nbsmt.emit_bounded import PIECE, SPAN, Form, Register
from recoup.nbsmt.ports import SIGNED
from recoup.nbsmt.saturate import Saturating
from recoup.network.convolution import POINTWISE, Geometry
from tests.nbsmt.strategies import ONE_PRODUCT
from tests.nbsmt.test_runs import bits, clipped, hostile

HERE = llvm.host().features >= runs.NEEDED
needs_vnni = pytest.mark.skipif(not HERE, reason="this processor has no AVX-512 VNNI")


def values(kind, shape, random):
    """Values int8: all of them, few but zero, small ones, or near the ends of the range."""
    value = torch.randint(-128, 128, shape, generator=random)
    if kind == "zeros":
        value = value * (torch.rand(shape, generator=random) < 0.2)
    elif kind == "small":
        value = value // 16
    elif kind == "ends":
        value = torch.where(value < 0, -128 - value % 8, 120 + value % 8).clamp(-128, 127)
    return value.to(torch.int8)


def made(weight, register):
    return Saturating(weight, NBSMT(1, accumulator=rc.Int(register)), 1)


def summed(kernel, value, geometry, **settings):
    """By the way that is tested; and which share of the pieces it walked."""
    code = (value.to(torch.int16) + SIGNED).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    found = kernel(code, geometry, SIGNED, **settings)
    return found, kernel._tiles[geometry.groups, SIGNED]._walked


@needs_vnni
@settings(max_examples=20, deadline=None)
@given(
    register=st.one_of(bits, st.integers(12, 24)),
    seed=st.integers(0, 2**31),
    of=st.sampled_from(["any", "zeros", "small", "ends"]),
    **ONE_PRODUCT,
    block=st.sampled_from([1, 40, 96]),
    tile=st.sampled_from([2, 4]),
)
def test_convolutions_equal_registers_clipped_after_every_product(
    register, seed, kind, of, images, channels, outputs, groups, kernel, stride, padding, dilation, block, tile
):
    """Any geometry and any size, borders of the code 128, with blocks of few slots and of many."""
    geometry, size = Geometry(kernel, stride, padding, dilation, groups), (7, 9)
    assume(min(geometry.outputs(size)) >= 1)
    random = torch.Generator().manual_seed(seed)
    weight = hostile(kind, (outputs * groups, channels, *kernel), channels, random)
    value = values(of, (images, channels * groups, *size), random)
    with pytest.MonkeyPatch.context() as patch:
        sizes = (runs, "OUTPUTS", 1), (runs, "PIXELS", 1), (bounded, "BLOCK", block), (bounded, "GROUPS", tile)
        for module, name, number in sizes:
            patch.setattr(module, name, number)
        found, _ = summed(made(weight, register), value, geometry)
        real, _ = summed(made(weight, register), value, geometry, floats=True)
    expected = clipped(value, weight, geometry, register)
    assert found.dtype == torch.int32
    assert torch.equal(found.long(), expected)
    assert torch.equal(real, expected.float())


@needs_vnni
@pytest.mark.parametrize(
    ("register", "least", "most", "changes"),
    [
        (12, 0.99, 1, 1),
        (15, 0.99, 1, 0.9),
        (16, 0.9, 0.999, 0.5),
        (17, 0.6, 0.95, 0.1),
        (18, 0.05, 0.4, 0.001),
        (20, 0, 0, 0),
    ],
)
def test_large_layers_saturate_alike(register, least, most, changes):
    """Several blocks and tiles, some not full, of which a share of the pieces is walked, from all of them to none."""
    random = torch.Generator().manual_seed(register)
    geometry = Geometry((3, 3), (1, 1), (1, 1), (1, 1), 1)
    weight = hostile("any", (40, 75, 3, 3), 75, random)
    value = values("any", (2, 75, 11, 13), random) // 3
    expected, exact = (clipped(value, weight, geometry, size) for size in (register, 32))
    changed = float((expected != exact).float().mean())
    assert changed >= changes if changes else changed == 0
    found, walked = summed(made(weight, register), value, geometry)
    assert torch.equal(found.long(), expected)
    assert least <= walked <= most


@needs_vnni
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("beyond", [-3, -1, 0, 1, 2])
@pytest.mark.parametrize("at", [0, 3, 15, 31])
@pytest.mark.parametrize("apart", [2, 40])
@pytest.mark.parametrize("register", [14, 16, 18, 21])
def test_sums_that_pass_an_end_and_come_back(register, apart, at, beyond, sign):
    """All that a piece can do, values in proportion to weights, is up in two slots and down in two, or up in a span and
    down in the next: one pixel stays short of its register's end, reaches it, or would pass it by one or two."""
    first, step, pixel = 20 * SPAN, 48, 5
    highest = (1 << (register - 1)) - (sign > 0)
    start = highest + beyond - 2 * step * step
    weight, value = (torch.zeros(size, first + 128, dtype=torch.int64) for size in (32, 64))
    for k, part in enumerate(_parts(start)):
        value[pixel, k], weight[:, k] = part
    up, down = (slice(first + place, first + place + 2) for place in (at, at + apart))
    value[pixel, up], value[pixel, down], weight[:, up], weight[:, down] = step, -step, step, step
    x, w = (part.to(torch.int8)[:, :, None, None] for part in (value, weight * sign))
    expected = clipped(x, w, POINTWISE, register)
    assert expected[pixel].flatten().tolist() == [sign * (start - max(0, beyond))] * 32
    found, walked = summed(made(w, register), x, POINTWISE)
    assert torch.equal(found.long(), expected)
    assert walked > 0 or (beyond <= 0 and apart == 2)
    if beyond < -2 and apart == 2 and at < PIECE - 3:
        assert walked == 0


def _parts(total):
    """Pairs of factors, of 120 or less, whose products add up to a number."""
    parts = []
    for size in (120, 11, 3, 1):
        parts += [(size, size)] * (total // size**2)
        total %= size**2
    assert len(parts) <= 20 * SPAN
    return parts


@needs_vnni
@settings(max_examples=20, deadline=None)
@given(bits, st.integers(0, 2**31), st.sampled_from([64, 130, 200]), st.integers(1, 300), st.integers(32, 50))
def test_matmul_equals_the_reference(register, seed, rows, size, columns):
    """Tiles as they come."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randint(-128, 128, (rows, size), generator=random, dtype=torch.int8)
    w = torch.randint(-128, 128, (size, columns), generator=random, dtype=torch.int8)
    config = NBSMT(1, accumulator=rc.Int(register))
    assert torch.equal(rc.nbsmt.matmul(x, w, config), reference.matmul(x, w, config))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 5), st.integers(1, 200), st.sampled_from([32, 64, 96]), bits)
def test_weights_are_laid_out_once_and_in_order(seed, outputs, slots, size, register):
    """Lengths are never shorter than what they stand for, not by a bit."""
    random = torch.Generator().manual_seed(seed)
    weight = torch.randint(-128, 128, (outputs, slots), generator=random, dtype=torch.int8)
    laid, narrow = bounded.weights(weight, register, size), register < 16
    padded = torch.nn.functional.pad(weight, (0, -slots % size)).long()
    assert torch.equal(laid.quads.transpose(0, 1).flatten(1).long(), padded)
    words = (
        laid.singles.view(torch.int16).transpose(0, 1).reshape(*padded.shape, 2).long()
        >> Register.of(register).shift_of_weights
    )
    even = torch.arange(padded.shape[1]) % 2 == 0
    for word, own in ((0, even), (1, ~even)):
        assert torch.equal(words[..., word], padded if narrow else padded * own)
    lengths, zeros = (part.transpose(0, 1).flatten(1, 2) for part in (laid.lengths, laid.zeros))
    of_pieces = padded.unflatten(1, (-1, SPAN // PIECE, PIECE))
    for i, part in enumerate([padded.unflatten(1, (-1, SPAN)), *of_pieces.unbind(2)]):
        exact = part.square().sum(2).double()
        assert bool((lengths[..., i].double().square() >= exact).all())
        assert bool((lengths[..., i].double().square() <= exact * 1.00001).all())
        assert torch.equal(zeros[..., i].long(), -SIGNED * part.sum(2))


@needs_vnni
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_thread_count_and_pieces_change_nothing(threads, monkeypatch):
    random = torch.Generator().manual_seed(0)
    geometry = Geometry((3, 3), (1, 1), (1, 1), (1, 1), 1)
    weight, value = hostile("any", (33, 20, 3, 3), 20, random), values("any", (3, 20, 9, 10), random)
    before, (whole, walked) = torch.get_num_threads(), summed(made(weight, 17), value, geometry)
    assert 0 < walked < 1
    try:
        torch.set_num_threads(threads)
        assert torch.equal(summed(made(weight, 17), value, geometry)[0], whole)
        for module, name, number in ((saturate, "CHUNK", 1), (bounded, "GROUPS", 2), (bounded, "WORK", 1)):
            monkeypatch.setattr(module, name, number)
            assert torch.equal(summed(made(weight, 17), value, geometry)[0], whole)
    finally:
        torch.set_num_threads(before)


@needs_vnni
@pytest.mark.parametrize(("register", "heavy"), [(12, True), (16, True), (20, False)])
def test_a_layer_that_saturates_all_the_time_goes_back_to_single_slots(register, heavy):
    """After the first call, with the same bits; one that hardly does stays, with the weights laid out once."""
    random = torch.Generator().manual_seed(3)
    geometry = Geometry((3, 3), (1, 1), (1, 1), (1, 1), 1)
    weight, value = hostile("any", (32, 24, 3, 3), 24, random), values("any", (1, 24, 9, 8), random)
    kernel = made(weight, register)
    first, share = summed(kernel, value, geometry)
    own = kernel._tiles[1, SIGNED]
    assert own.pays is (share <= bounded.WALKED) is not heavy
    assert not kernel._layouts
    code = (value.to(torch.int16) + SIGNED).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    assert torch.equal(kernel(code, geometry, SIGNED), first)
    assert isinstance(kernel._tiles[1, SIGNED], walked.Tiles) is (register < walked.WORD)
    assert bool(kernel._layouts) is (heavy and register >= walked.WORD)
    assert (kernel._tiles[1, SIGNED] is own) is (register >= walked.WORD)


def test_code_of_a_tile():
    """A tile's registers stay in the processor's, where they are added and where they are walked."""
    target = llvm.Target("cascadelake", "", llvm.Target.named("skylake-avx512").features | {"avx512vnni"})
    if target.machine != "x86_64":
        return
    lines = llvm.assembly(emit_bounded.tiles_module(Form(False, 8, True)), target).splitlines()
    words = [line.split() for line in lines if line.split()]
    walk = words[next(i for i, word in enumerate(words) if word[0] == "walk:") :]
    assert sum(word[0] == "vpdpbusd" for word in walk) == 8 * 2 * SPAN // 4
    assert sum(word[0] == "vpdpwssds" for word in walk) == 8 * 2 * SPAN // PIECE
    used = [" ".join(word) for word in walk if word[0].startswith("vpdp")]
    assert not any("(%rsp)" in line for line in used)
