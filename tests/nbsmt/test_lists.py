"""Groups of few weights, summed by lists, against the reference tap by tap."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import recoup as rc
from recoup.errors import RecoupError
from recoup.kernels import llvm
from recoup.nbsmt import cpu, lists, ops, reference
from recoup.nbsmt.config import NBSMT
from recoup.nbsmt.lists import Lists, divided
from recoup.nbsmt.prepare import Prepared, prepare
from recoup.nbsmt.weights import weight_operand
from recoup.network.convolution import Geometry
from tests.nbsmt.strategies import ACTIVATIONS

pytestmark = pytest.mark.skipif(not llvm.host().features >= lists.NEEDED, reason="no AVX-512 VNNI here")
geometries = st.builds(
    Geometry,
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    groups=st.just(1),
)


def expected(code, weight, config, geometry):
    """int64 [N, h, w, O]: the sums of the taps, each by the reference on integers."""
    (down, across), (h, w) = geometry.padding, geometry.outputs(code.shape[2:])
    padded = F.pad(code.long(), [across, across, down, down]).to(torch.uint8)
    total = torch.zeros(len(code), h, w, len(weight), dtype=torch.int64)
    for i in range(geometry.kernel[0]):
        for j in range(geometry.kernel[1]):
            y, x = geometry.dilation[0] * i, geometry.dilation[1] * j
            rows = padded[:, :, y :: geometry.stride[0], x :: geometry.stride[1]][:, :, :h, :w].permute(0, 2, 3, 1)
            total += reference.matmul(rows.flatten(0, 2), weight[:, :, i, j].t(), config).view(total.shape)
    return total


def drawn(shape, zeros, random, low=0, high=256):
    """Whole numbers, of which some are zero and some are those that decide something."""
    value = torch.randint(low, high, shape, generator=random)
    if low == 0:
        special = torch.tensor(ACTIVATIONS)[torch.randint(len(ACTIVATIONS), shape, generator=random)]
        value = torch.where(torch.rand(shape, generator=random) < 0.4, special, value)
    return value * (torch.rand(shape, generator=random) >= zeros)


def operands(seed, images, channels, outputs, size, geometry, zeros):
    """Codes uint8 and weights int8."""
    random = torch.Generator().manual_seed(seed)
    code = drawn((images, channels, *size), 0.4, random)
    weight = drawn((outputs, channels, *geometry.kernel), zeros, random, -128, 128)
    return code.to(torch.uint8), weight.to(torch.int8)


@settings(max_examples=25, deadline=None)
@given(
    geometry=geometries,
    config=st.builds(
        NBSMT,
        threads=st.just(4),
        policy=st.sampled_from(["S", "S+A", "S+Aw", "S+W", "S+aW"]),
        rounding=st.sampled_from(["nearest", "half_up", "zero"]),
    ),
    width=st.sampled_from([("halves", 16), ("halves", 48), ("halves", 80), ("adjacent", 4), ("adjacent", 68)]),
    outputs=st.sampled_from([1, 5, 16, 19]),
    size=st.tuples(st.integers(1, 9), st.integers(1, 20)),
    images=st.integers(1, 3),
    zeros=st.sampled_from([0.0, 0.1, 0.6, 1.0]),
    seed=st.integers(0, 2**31),
)
def test_all_groups_by_lists_equal_the_reference(geometry, config, width, outputs, size, images, zeros, seed):
    config = config.replace(pairing=width[0])
    assume(min(geometry.outputs(size)) > 0)
    code, weight = operands(seed, images, width[1], outputs, size, geometry, zeros)
    found = Lists(weight_operand(weight, config), config, geometry, size)
    sums = torch.full((images, *geometry.outputs(size), outputs), 3.0)
    found.add(sums, code.permute(0, 2, 3, 1).float().mul(0.5).contiguous(), 0.5)
    assert torch.equal(sums.long() - 3, expected(code, weight, config, geometry))


@pytest.mark.parametrize("policy", ["S+A", "S+Aw"])
def test_threads_and_blocks_of_images_give_the_same(policy, monkeypatch):
    config, geometry = NBSMT(4, policy), Geometry((3, 3), (1, 1), (1, 1), (1, 1), 1)
    code, weight = operands(0, 7, 32, 33, (9, 13), geometry, 0.1)
    made = Lists(weight_operand(weight, config), config, geometry, (9, 13))
    x_NHWC, sums = code.permute(0, 2, 3, 1).float().contiguous(), []
    monkeypatch.setattr(lists, "WORK", 1)
    for block in (1, 1 << 13, 1 << 19):
        monkeypatch.setattr(lists, "BLOCK", block)
        sums.append(torch.zeros(7, 9, 13, 33))
        made.add(sums[-1], x_NHWC, 1.0)
    wanted = expected(code, weight, config, geometry)
    assert all(torch.equal(found.long(), wanted) for found in sums)


def layer(zeros, channels=32):
    """A convolution whose weights are whole numbers, on four threads, and activations of which many are zero."""
    random = torch.Generator().manual_seed(0)
    conv = torch.nn.Conv2d(channels, 24, 3, padding=1, stride=2)
    weight = drawn(conv.weight.shape, zeros, random, -128, 128)
    weight = weight + (weight == 0) if zeros == 0 else weight
    weight = weight.float().clamp(-127.5, 127.5)
    weight[:, 0, 0, 0] = 127.5  # the largest: a step is 1
    conv.weight.data = weight
    x = drawn((2, channels, 11, 9), 0.5, random).float()
    x[0, 0, 0, 0] = 255
    rc.calibrate_(net := torch.nn.Sequential(conv).eval(), [(x,)], {"0": True})
    rc.emulate_(net, None, {"0": NBSMT(threads=4)})
    return net, x


@pytest.mark.skipif(cpu.probe().isa != "AVX-512 VNNI", reason="other instructions multiply zeros faster")
@pytest.mark.parametrize(
    ("zeros", "channels", "used"), [(0.05, 32, True), (0.05, 30, False), (0.6, 32, False), (0.0, 32, False)]
)
def test_layers_use_them_where_they_pay_with_the_same_bits(zeros, channels, used, monkeypatch):
    net, x = layer(zeros, channels)
    calls = []
    add = Lists.add
    monkeypatch.setattr(Lists, "add", lambda self, *args: calls.append(1) or add(self, *args))
    found = net(x)
    assert bool(calls) == used
    monkeypatch.setattr(Prepared, "divided", lambda *_: None)
    assert torch.equal(found, net(x))
    with ops.backend("float32"):
        assert torch.equal(found, net(x))


@pytest.mark.skipif(cpu.probe().isa != "AVX-512 VNNI", reason="other instructions multiply zeros faster")
def test_images_too_large_for_lists_keep_none(monkeypatch):
    net, x = layer(0.05)
    found = net(x)
    prepared = prepare(net[0].weight, NBSMT(threads=4))
    assert prepared.lists.popitem()[1].fits
    monkeypatch.setattr(lists, "PLANES", 0)
    assert torch.equal(found, net(x))
    assert list(prepared.lists.values()) == [None]


def test_what_lists_do_not_take():
    code = torch.randint(-128, 128, (16, 32, 3, 3), generator=torch.Generator().manual_seed(0))
    code[:, ::10] = 0
    config, host = NBSMT(4), llvm.host()
    operand = weight_operand(code.to(torch.int8), config)
    assert divided(operand, config, 0, host) is not None
    assert divided(operand, config, 128, host) is None  # signed codes
    assert divided(operand, config, 0, llvm.Target.named("haswell")) is None
    assert divided(weight_operand(code.to(torch.int8), NBSMT(2)), NBSMT(2), 0, host) is None
    odd = weight_operand(code[:, :20].to(torch.int8), config)  # partners would lie within other quads
    assert divided(odd, config, 0, host) is None
    whole = torch.full((1, 128, 3, 3), 127, dtype=torch.int8)
    whole[:, ::7] = 0
    assert divided(weight_operand(whole, config), config, 0, host) is None  # sums beyond 2^24


def test_shapes_that_do_not_fit_are_named():
    geometry = Geometry((1, 1), (1, 1), (0, 0), (1, 1), 1)
    weight = torch.ones(3, 16, 1, 1, dtype=torch.int8)
    made = Lists(weight_operand(weight, NBSMT(4)), NBSMT(4), geometry, (2, 2))
    with pytest.raises(RecoupError, match=r"Lists\.add: x must be float32 \[1, 2, 2, 16\]"):
        made.add(torch.zeros(1, 2, 2, 3), torch.zeros(1, 2, 2, 12), 1.0)
    with pytest.raises(RecoupError, match=r"Lists\.add: sums must be float32 \[1, 2, 2, 3\]"):
        made.add(torch.zeros(1, 3, 2, 2), torch.zeros(1, 2, 2, 16), 1.0)
