"""Weights made ready: sums that stay in a register for certain, sums over bytes in parts, rows as one image."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import recoup as rc
from recoup.nbsmt import cpu, ops, prepare
from recoup.nbsmt.config import NBSMT
from recoup.nbsmt.cpu import Backend
from recoup.nbsmt.ops import convolution
from recoup.nbsmt.weights import quantize_weight
from recoup.network.convolution import Geometry
from tests.nbsmt.strategies import configs
from tests.nbsmt.test_ops import stand_in

needs_int8 = pytest.mark.skipif(cpu.probe().name != "int8", reason="oneDNN's 8-bit products are not exact here")


def convolved(x, weight, config, geometry):
    stride, padding, dilation, groups = geometry.arguments
    arguments = (1.0, config.code, list(stride), list(padding), list(dilation), groups, "layer")
    return ops.convolution(x, weight, None, *arguments)


@needs_int8
@settings(max_examples=40, deadline=None)
@given(
    config=configs,
    seed=st.integers(0, 2**31),
    images=st.integers(1, 4),
    channels=st.integers(1, 9),
    outputs=st.integers(1, 9),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.integers(1, 2),
    padding=st.integers(0, 1),
    at_once=st.sampled_from([1, 600, 1 << 20]),
    data=st.data(),
)
def test_sums_that_stay_in_a_register_are_those_added_slot_by_slot(
    config, seed, images, channels, outputs, kernel, stride, padding, at_once, data
):
    """Registers from so narrow that all saturate to so wide that none can; where it is certain, no slot is walked."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 256, (images, channels, 5, 6), generator=random).float()
    weight = torch.randint(-128, 128, (outputs, channels, *kernel), generator=random) / 128
    geometry = Geometry(kernel, (stride, stride), (padding, padding), (1, 1), 1)
    wide = prepare.prepare(weight, config).operand.bound.bit_length() + 1
    register = rc.Int(data.draw(st.integers(8, min(24, max(8, wide - 1)))))
    config = config.replace(accumulator=register)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "QUADS", 10**9)
        expected = convolved(x, weight, config, geometry)
    prepare.forget(weight)
    kept = prepare.prepare(weight, config)
    assume(kept.register is not None)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("QUADS", 0), ("SUMS", at_once)):
            patch.setattr(prepare, name, value)
        patch.setattr(cpu, "probe", lambda: Backend("int8", "AMX", "a test's"))
        found = convolved(x, weight, config, geometry)
        again = convolved(x, weight, config, geometry)
    assert torch.equal(found, expected)
    assert torch.equal(again, expected)
    assert (kept.saturating is None) is bool(kept.signs)


@needs_int8
@pytest.mark.parametrize(("up", "down", "certain"), [(129, 0, True), (130, 0, False), (0, 128, True), (0, 129, False)])
def test_the_ends_of_a_register_are_in_it(up, down, certain):
    """127 x 129 is the largest number of 15 bits, -128 x 128 the smallest; codes of these weights are 127 and -128."""
    weight = torch.tensor([127.5, -127.5] * 100).view(1, 200, 1, 1)
    x = torch.zeros(1, 200, 3, 3)
    x[:, 0, 1, 1], x[:, 1, 2, 0] = up, down
    geometry, config = Geometry((1, 1), (1, 1), (0, 0), (1, 1), 1), NBSMT(1, accumulator=rc.Int(15))
    convolved(x, weight, config, geometry)
    assert bool(prepare.prepare(weight, config).signs) is certain


@needs_int8
def test_networks_whose_sums_saturate_are_asked_once(monkeypatch):
    """The first call finds that it is not certain; what follows is added slot by slot without asking."""
    random = torch.Generator().manual_seed(0)
    x, weight = torch.rand(2, 200, 4, 4, generator=random) * 255, torch.randn(5, 200, 1, 1, generator=random)
    geometry, config = Geometry((1, 1), (1, 1), (0, 0), (1, 1), 1), NBSMT(1, accumulator=rc.Int(12))
    asked = []
    sums = prepare.Prepared._sums
    monkeypatch.setattr(prepare.Prepared, "_sums", lambda *given: asked.append(given) or sums(*given))
    first = convolved(x, weight, config, geometry)
    assert len(asked) == 2
    assert torch.equal(convolved(x, weight, config, geometry), first)
    assert len(asked) == 2


@needs_int8
@pytest.mark.parametrize("sign", [1, -1])
def test_sums_of_one_sign_that_may_leave_32_bits_are_not_asked(sign):
    """70,000 products of 255 x 127 are beyond 2^31: on 32 bits they come back on the other side, where no end is."""
    x, weight = torch.full((1, 70_000, 1, 2), 255.0), torch.full((1, 70_000, 1, 1), float(sign))
    config, geometry = NBSMT(1, accumulator=rc.Int(16)), Geometry((1, 1), (1, 1), (0, 0), (1, 1), 1)
    found = convolved(x, weight, config, geometry) / prepare.prepare(weight, config).scale_O
    assert found.round().tolist() == [[[[32767.0 if sign > 0 else -32768.0] * 2]]]


@pytest.mark.parametrize(("number", "most", "piece"), [
    (1, 0, 1), (7, 100, 7), (64, 24, 16), (1009, 256, 253), (26, 24, 13), (31, 1, 1), (31, 2, 2), (0, 5, 1),
])  # fmt: skip
def test_pieces_are_few_whatever_the_number(number, most, piece):
    """A prime number of rows was taken one by one."""
    assert prepare._piece(number, most) == piece


@needs_int8
def test_a_prime_number_of_rows_is_summed_in_few_pieces(monkeypatch):
    random = torch.Generator().manual_seed(0)
    x, weight = torch.randint(0, 9, (101, 200, 1, 1), generator=random).float(), torch.randn(8, 200, generator=random)
    config, geometry = NBSMT(1, accumulator=rc.Int(20)), Geometry((1, 1), (1, 1), (0, 0), (1, 1), 1)
    monkeypatch.setattr(prepare, "SUMS", 10 * 8 * 4)
    asked = []
    sums = prepare.Prepared._sums_of_rows
    monkeypatch.setattr(prepare.Prepared, "_sums_of_rows", lambda *given: asked.append(len(given[1])) or sums(*given))
    found = convolved(x, weight, config, geometry)
    assert prepare.prepare(weight, config).signs
    assert asked == [10] * 20  # of the last row alone no image is made
    with ops.backend("float32"):
        assert torch.equal(found, convolved(x, weight, config, geometry))


def summed_of(patch):
    """Shapes of the weight and of the operand wherever bytes are summed from here on."""
    shapes: list[tuple[torch.Size, tuple[int, ...]]] = []

    def noted(weight, stride, padding, dilation, groups, shape, layer):
        shapes.append((weight.shape, shape))
        return stand_in(weight, stride, padding, dilation, groups, shape, layer)

    patch.setattr("recoup.nbsmt.prepare.packed", noted)
    patch.setattr(ops, "current_backend", lambda: "int8")
    return shapes


def test_sums_over_bytes_that_float32_cannot_hold_are_taken_in_parts(monkeypatch):
    """The values' sums are exact in float32; those over all bytes would have been rounded before."""
    shapes = summed_of(monkeypatch)
    weight = torch.ones(1, 600)
    x = torch.tensor([1.0, -1.0]).repeat(300)[None, :, None, None]
    x[0, 0] = 127
    rest = (None, 1.0, rc.NBSMT(threads=1).code, [1, 1], [0, 0], [1, 1], 1, "layer", 128)
    y = convolution(x, weight, *rest)
    assert y.item() == (126 * 127 * quantize_weight(weight)[1]).item()
    assert [weight[1] for weight, _ in shapes] == [300, 300]
    assert convolution(x[:, :500], weight[:, :500], *rest).item() == float(y)
    assert [weight[1] for weight, _ in shapes] == [300, 300, 500]


@settings(max_examples=15, deadline=None)
@given(
    config=configs,
    seed=st.integers(0, 2**31),
    shape=st.sampled_from([(900, 5, 1), (2100, 1, 1), (300, 4, 3)]),
    images=st.integers(1, 5),
    light=st.integers(0, 900),
)
def test_parts_and_rows_give_what_float64_does(config, seed, shape, images, light):
    """Sums beyond 24 bits are rounded once; parts of equal weight wherever the heavy channels are."""
    (channels, size, kernel), generator = shape, torch.Generator().manual_seed(seed)
    weight = torch.randint(90, 128, (2, channels, kernel, kernel), generator=generator).float()
    weight[:, :light] = torch.randn(weight[:, :light].shape, generator=generator).round()
    weight[1] *= torch.randint(0, 2, weight[1].shape, generator=generator) * 2 - 1
    x = torch.randint(-128, 128, (images, channels, size, size), generator=generator).float()
    x[:, channels // 2 :] = x[:, channels // 2 :].abs().clamp(max=127)
    rest = (None, 1.0, config.code, [1, 1], [0, 0], [1, 1], 1, "layer", 128)
    with ops.backend("float32"):
        expected = convolution(x, weight, *rest)
    with pytest.MonkeyPatch.context() as patch:
        shapes = summed_of(patch)
        found = convolution(x, weight, *rest)
    assert torch.equal(found, expected)
    assert shapes


@pytest.mark.parametrize(("channels", "taps"), [(1, 600), (1, 1200), (3, 600)])
def test_channels_of_so_many_taps_that_none_fits_are_no_parts(channels, taps, monkeypatch):
    """255 times 127 times 600 is beyond 24 bits, and a channel is the least that a part can be."""
    generator = torch.Generator().manual_seed(taps)
    weight = torch.randint(110, 128, (2, channels, 1, taps), generator=generator).float()
    x = torch.randint(-128, 128, (1, channels, 1, taps + 3), generator=generator).float()
    x[..., 2:] = x[..., 2:].abs().clamp(max=127)
    rest = (None, 1.0, NBSMT(1).code, [1, 1], [0, 0], [1, 1], 1, "layer", 128)
    with ops.backend("float32"):
        expected = convolution(x, weight, *rest)
    shapes = summed_of(monkeypatch)
    assert torch.equal(convolution(x, weight, *rest), expected)
    assert not shapes


@pytest.mark.parametrize("zero", [0, 128])
@pytest.mark.parametrize("rows", [1, 2, 15, 16, 17, 33, 100, 1000])
def test_rows_are_one_image_of_few_sizes(rows, zero, monkeypatch):
    generator = torch.Generator().manual_seed(rows)
    x, weight = torch.randn(rows, 9, 1, 1, generator=generator), torch.randn(4, 9, generator=generator)
    x = x if zero else x.abs()
    rest = (None, 0.02, rc.NBSMT(2).code, [1, 1], [0, 0], [1, 1], 1, "layer", zero)
    with ops.backend("float32"):
        expected = convolution(x, weight, *rest)
    shapes = summed_of(monkeypatch)
    assert torch.equal(convolution(x, weight, *rest), expected)
    ((_, (images, _, height, width)),) = shapes
    assert images == width == 1
    assert rows <= height <= rows * 9 / 8
