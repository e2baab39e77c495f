"""Registers that saturate all the time, signed values added one by one, against ones clipped after every product."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from recoup.kernels import llvm
from recoup.nbsmt import emit_walked, runs, saturate, walked
from recoup.nbsmt.emit_walked import AT_ONCE, Form
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
    register=st.integers(8, 15),
    seed=st.integers(0, 2**31),
    of=st.sampled_from(["any", "zeros", "small", "ends"]),
    **ONE_PRODUCT,
    block=st.sampled_from([1, 4 << 10, 14 << 10]),
    columns=st.sampled_from([2, 3]),
    tail=st.sampled_from([0, 0.25, 1]),
)
def test_convolutions_equal_registers_clipped_after_every_product(
    register, seed, kind, of, images, channels, outputs, groups, kernel, stride, padding, dilation, block, columns, tail
):
    """Any geometry and any size, borders of the code 128, blocks of few slots or many, from both ends or not."""
    geometry, size = Geometry(kernel, stride, padding, dilation, groups), (7, 9)
    assume(min(geometry.outputs(size)) >= 1)
    random = torch.Generator().manual_seed(seed)
    weight = hostile(kind, (outputs * groups, channels, *kernel), channels, random)
    value = values(of, (images, channels * groups, *size), random)
    with pytest.MonkeyPatch.context() as patch:
        sizes = (runs, "OUTPUTS", 1), (runs, "PIXELS", 1), (walked, "BLOCK", block), (walked, "COLUMNS", columns)
        for module, name, number in (*sizes, (walked, "TAIL", tail)):
            patch.setattr(module, name, number)
        found, _ = summed(weight, value, geometry, register)
        real, _ = summed(weight, value, geometry, register, floats=True)
    expected = clipped(value, weight, geometry, register)
    assert found.dtype == torch.int32
    assert torch.equal(found.long(), expected)
    assert torch.equal(real, expected.float())


@needs_vnni
@pytest.mark.parametrize(("register", "tail"), [(9, 1 / 16), (13, 1 / 8), (15, 0)])
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
    assert tiles.tail == tail


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
@pytest.mark.parametrize("lowest", [-127, -128])
@pytest.mark.parametrize("register", [14, 15])
def test_products_at_the_end_of_a_word(register, lowest):
    """-128 times -128 leaves a word if it is doubled: such weights are held up by one end alone."""
    random = torch.Generator().manual_seed(0)
    weight = torch.where(torch.rand(32, 40, 1, 1, generator=random) < 0.5, lowest, 127).to(torch.int8)
    value = torch.where(torch.rand(1, 40, 9, 9, generator=random) < 0.5, -128, 127).to(torch.int8)
    found, tiles = summed(weight, value, POINTWISE, register)
    assert torch.equal(found.long(), clipped(value, weight, POINTWISE, register))
    assert walked.held(weight.flatten(1), register) is (register == 15 and lowest == -127)
    assert tiles.asks is (register == 15 and lowest == -128)
    within, tiles = summed(weight, value.clamp(min=-127), POINTWISE, register)
    assert torch.equal(within.long(), clipped(value.clamp(min=-127), weight, POINTWISE, register))
    assert {shift for _, shift in tiles._laid} == {int(register == 15)}


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 5), st.integers(1, 200), st.sampled_from([32, 64, 96]), st.integers(0, 3))
def test_weights_are_laid_out_once_and_in_order(seed, outputs, slots, size, shift):
    random = torch.Generator().manual_seed(seed)
    weight = torch.randint(-128, 128, (outputs, slots), generator=random, dtype=torch.int8)
    words = walked.weights(weight, shift, size).view(torch.int16).transpose(0, 1).reshape(outputs, -1, 4)
    padded = torch.nn.functional.pad(weight, (0, -slots % size)).to(torch.int16)
    for i in range(4):
        assert torch.equal(words[..., i], padded << shift if i < 2 else padded)


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


def test_code_of_a_tile():
    """A tile's registers stay in the processor's, on both paths, and kinds of instructions in the order they are in."""
    target = llvm.Target("cascadelake", "", llvm.Target.named("skylake-avx512").features | {"avx512vnni"})
    if target.machine != "x86_64":
        return
    lines = llvm.assembly(emit_walked.tiles_module(Form(walked.COLUMNS, 6, False, True)), target).splitlines()
    words = [line.split() for line in lines if line.split() and not line.lstrip().startswith("#")]
    walk = words[next(i for i, word in enumerate(words) if word[0] == "walk_2:") :]
    walk = walk[: next(i for i, word in enumerate(walk) if word[0] == "retq")]
    first = next(i for i, word in enumerate(walk) if word[0] == "vpmullw")
    last = max(i for i, word in enumerate(walk) if word[0] == "vpmaxsw")
    own = [word[0] for word in walk[first : last + 1] if word[0] != "vpbroadcastd"]
    counts = {"vpmullw": 8, "vpaddsw": 12, "vpaddw": 4, "vpminsw": 4, "vpmaxsw": 16}
    assert {name: own.count(name) for name in own} == {name: AT_ONCE * count for name, count in counts.items()}
    assert own[:8] == ["vpmullw"] * 8
    assert set(own[8:24]) == {"vpaddsw", "vpaddw"}
    assert not any("(%rsp)" in " ".join(word) for word in walk[first : last + 1])
