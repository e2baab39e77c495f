"""Registers that saturate all the time, signed values added one by one, against ones clipped after every product."""

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from recoup.kernels import llvm
from recoup.nbsmt import bounded, emit_walked, runs, saturate, walked
from recoup.nbsmt.emit_runs import VECTOR
from recoup.nbsmt.emit_walked import Form
from recoup.nbsmt.ports import SIGNED
from recoup.network.convolution import POINTWISE, Geometry
from tests.nbsmt.strategies import ONE_PRODUCT
from tests.nbsmt.test_bounded import made, needs_vnni, values
from tests.nbsmt.test_runs import clipped, hostile

LAYER = Geometry((3, 3), (1, 1), (1, 1), (1, 1), 1)


def summed(weight, value, geometry, register, calls=1, **settings):
    """By the way that is tested: the results of the last call, and its tiles."""
    kernel = made(weight, register)
    kernel._tiles[geometry.groups, SIGNED] = tiles = walked.Tiles(kernel._weight_OSLV, register, geometry.groups)
    code = (value.to(torch.int16) + SIGNED).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    found = kernel(code, geometry, SIGNED, **settings)
    for _ in range(calls - 1):
        found = kernel(code, geometry, SIGNED, **settings)
    assert kernel._tiles[geometry.groups, SIGNED] is tiles
    assert not kernel._layouts
    return found, tiles


@needs_vnni
@settings(max_examples=25, deadline=None)
@given(
    register=st.integers(8, 16),
    seed=st.integers(0, 2**31),
    of=st.sampled_from(["any", "zeros", "small", "ends"]),
    **ONE_PRODUCT,
    block=st.sampled_from([1, 4 << 10, 14 << 10]),
    columns=st.sampled_from([2, 3]),
    tail=st.sampled_from([0, 0.25, 1]),
    cpu=st.sampled_from(["", "znver4"]),
)
def test_convolutions_equal_registers_clipped_after_every_product(
    register,
    seed,
    kind,
    of,
    images,
    channels,
    outputs,
    groups,
    kernel,
    stride,
    padding,
    dilation,
    block,
    columns,
    tail,
    cpu,
):
    """Any geometry and any size, borders of the code 128, blocks of few slots or many, from both ends or not."""
    target = replace(llvm.host(), cpu=cpu or llvm.host().cpu)
    geometry, size = Geometry(kernel, stride, padding, dilation, groups), (7, 9)
    assume(min(geometry.outputs(size)) >= 1)
    random = torch.Generator().manual_seed(seed)
    weight = hostile(kind, (outputs * groups, channels, *kernel), channels, random)
    value = values(of, (images, channels * groups, *size), random)
    with pytest.MonkeyPatch.context() as patch:
        sizes = (runs, "OUTPUTS", 1), (runs, "PIXELS", 1), (walked, "BLOCK", block), (walked, "COLUMNS", columns)
        for module, name, number in (*sizes, (walked, "TAIL", tail)):
            patch.setattr(module, name, number)
        found, _ = summed(weight, value, geometry, register, target=target)
        real, _ = summed(weight, value, geometry, register, floats=True, target=target)
    expected = clipped(value, weight, geometry, register)
    assert found.dtype == torch.int32
    assert torch.equal(found.long(), expected)
    assert torch.equal(real, expected.float())


@needs_vnni
@pytest.mark.parametrize(("register", "tail"), [(9, (0, 1 / 8)), (13, (1 / 8, 1 / 4)), (15, (0, 0))])
def test_the_tail_is_as_long_as_the_register_remembers(register, tail):
    """Several tiles, one of them not full, and blocks; call by call it finds how many slots settle almost all."""
    random = torch.Generator().manual_seed(register)
    weight = hostile("any", (40, 75, 3, 3), 75, random)
    value = values("any", (2, 75, 11, 13), random) // 3
    expected = clipped(value, weight, LAYER, register)
    assert float((expected != clipped(value, weight, LAYER, 32)).float().mean()) > 0.9
    for calls in (1, 2, 6):
        found, tiles = summed(weight, value, LAYER, register, calls)
        assert torch.equal(found.long(), expected)
    assert tail[0] <= tiles.tail <= tail[1]
    assert (tiles.tail > 0) is (register < 15)


@needs_vnni
@pytest.mark.parametrize("register", [10, 14, 15])
def test_an_output_channel_that_never_settles_is_added_from_the_start(register):
    """Channels whose last weights are all zero remember what was before; their neighbours do not."""
    random = torch.Generator().manual_seed(register)
    weight = hostile("largest", (34, 64, 1, 1), 64, random)
    weight[3, 1:], weight[33, 20:] = 0, 0
    value = values("ends", (1, 64, 8, 20), random)
    expected = clipped(value, weight, POINTWISE, register)
    assert expected[:, 3].abs().max() > 0
    assert expected[:, 33].abs().max() > 0
    found, tiles = summed(weight, value, POINTWISE, register)
    assert torch.equal(found.long(), expected)
    assert tiles.tail > 0


@needs_vnni
@pytest.mark.parametrize("cpu", ["", "znver4"])
@pytest.mark.parametrize("register", [8, 14, 15, 16])
def test_products_at_the_end_of_a_word(register, cpu):
    """Two products of -128 times -128 are as many as a word has numbers below 0."""
    random = torch.Generator().manual_seed(0)
    target = replace(llvm.host(), cpu=cpu or llvm.host().cpu)
    weight = torch.where(torch.rand(32, 40, 1, 1, generator=random) < 0.5, -128, 127).to(torch.int8)
    value = torch.where(torch.rand(1, 40, 9, 9, generator=random) < 0.5, -128, 127).to(torch.int8)
    value[:, :, :2] = -128
    for own in (-128, 127):  # up all the way, and down
        weight[:3] = own
        found, _ = summed(weight, value, POINTWISE, register, target=target)
        assert torch.equal(found.long(), clipped(value, weight, POINTWISE, register))


@needs_vnni
@pytest.mark.parametrize(("register", "cpu", "outputs", "walks"), [
    (15, "", 32, True), (16, "", 256, False), (16, "znver4", 128, True), (16, "znver4", 64, False),
    (17, "znver4", 256, False),
])  # fmt: skip
def test_registers_of_a_word_are_walked_where_multiplying_is_dear(register, cpu, outputs, walks):
    target = replace(llvm.host(), cpu=cpu or "sapphirerapids")
    random = torch.Generator().manual_seed(0)
    weight, value = hostile("any", (outputs, 40, 1, 1), 40, random), values("ends", (1, 40, 9, 9), random)
    kernel = made(weight, register)
    kernel._tiles[1, SIGNED] = tiles = bounded.Tiles(kernel._weight_OSLV, register, 1)
    tiles._walked = 1.0  # a call has found that it does not pay
    code = (value.to(torch.int16) + SIGNED).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    found = kernel(code, POINTWISE, SIGNED, target=target)
    assert torch.equal(found.long(), clipped(value, weight, POINTWISE, register))
    assert isinstance(kernel._tiles[1, SIGNED], walked.Tiles) is walks


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 5), st.integers(1, 200), st.sampled_from([32, 64, 96]), st.integers(2, 8))
def test_steps_add_every_product_once(seed, outputs, slots, size, columns):
    """Going through the steps with values of one's own, in integers: what goes down and up is every slot's product."""
    random = torch.Generator().manual_seed(seed)
    weight = torch.randint(-128, 128, (outputs, slots), generator=random, dtype=torch.int8)
    laid = walked.steps(weight, columns, size)
    assert laid.shape == (laid.shape[0], outputs, size, 2)
    assert len(laid) == -(-(slots + 1) // size)
    pairs = laid[..., 0].contiguous().view(torch.int8).view(*laid.shape[:3], 4).transpose(0, 1).reshape(outputs, -1, 4)
    way = laid[..., 1].transpose(0, 1).reshape(outputs, -1) // (columns * VECTOR)
    value = torch.randint(-128, 128, (slots,), generator=random)
    around = torch.nn.functional.pad(value, (1, pairs.shape[1] - slots))
    parts = torch.stack([around.clamp(min=0), (-around).clamp(min=0)])
    own = torch.arange(pairs.shape[1])
    moved = pairs[..., 0] * parts[way // 2, own] + pairs[..., 1] * parts[way % 2, own + 1]
    assert torch.equal(pairs[..., :2], pairs[..., 2:])
    assert int(moved.max()) <= 0
    up = own % 2 == 1
    product = torch.nn.functional.pad(weight.long() * value, (1, pairs.shape[1] - slots))
    for first, sign in ((own[~up], -1), (own[up], 1)):
        both = sum((sign * product[:, first + i]).clamp(min=0) for i in range(2))
        assert torch.equal(-moved[:, first], both)


@needs_vnni
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_thread_count_and_pieces_change_nothing(threads, monkeypatch):
    random = torch.Generator().manual_seed(0)
    weight, value = hostile("any", (33, 20, 3, 3), 20, random), values("any", (3, 20, 9, 10), random)
    before, (whole, _) = torch.get_num_threads(), summed(weight, value, LAYER, 13)
    try:
        torch.set_num_threads(threads)
        assert torch.equal(summed(weight, value, LAYER, 13)[0], whole)
        for module, name, number in ((saturate, "CHUNK", 1), (walked, "COLUMNS", 2), (walked, "WORK", 1)):
            monkeypatch.setattr(module, name, number)
            assert torch.equal(summed(weight, value, LAYER, 13, 3)[0], whole)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("light", "counts"), [
    (0, {"vpmaddubsw": 32, "vpaddsw": 32, "vpsubw": 32, "vpminsw": 32}),
    (6, {"vpmaddubsw": 32, "vpaddsw": 8, "vpaddw": 24, "vpmaxsw": 24, "vpsubw": 32, "vpminsw": 8, "vpminuw": 24}),
])  # fmt: skip
def test_code_of_a_tile(light, counts):
    """A tile's registers stay in the processor's, on both paths, and no instruction is there but what a step takes."""
    target = llvm.Target("cascadelake", "", llvm.Target.named("skylake-avx512").features | {"avx512vnni"})
    if target.machine != "x86_64":
        return
    lines = llvm.assembly(emit_walked.tiles_module(Form(walked.COLUMNS, False, light, True)), target).splitlines()
    words = [line.split() for line in lines if line.split() and not line.lstrip().startswith("#")]
    walk = words[next(i for i, word in enumerate(words) if word[0] == "walk_2:") :]
    walk = walk[: next(i for i, word in enumerate(walk) if word[0] == "retq")]
    first = next(i for i, word in enumerate(walk) if word[0] == "vpmaddubsw")
    last = max(i for i, word in enumerate(walk) if word[0] in ("vpminsw", "vpminuw"))
    own = [word[0] for word in walk[first : last + 1] if word[0] not in ("vpbroadcastd", "vmovdqu64", "movslq")]
    assert {name: own.count(name) for name in own} == counts
    assert not any("(%rsp)" in " ".join(word) for word in walk[first : last + 1])
