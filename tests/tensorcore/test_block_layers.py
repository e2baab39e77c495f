"""Layers with block scales: by hand in numpy and the reference, what training sees, and the house's verbs."""

import math
import warnings

import ml_dtypes
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import recoup as rc
from recoup import tensorcore
from recoup.errors import RecoupError
from recoup.network.emulated import running
from recoup.tensorcore import TensorCore, block_reference
from recoup.tensorcore.attention_layers import TensorCoreAttentionProducts
from recoup.tensorcore.wing import CARD
from tests.networks import batches_of, images, small_net
from tests.tensorcore.strategies import same

UNITS = {name: CARD.presets[f"blackwell-{name}"] for name in ("mxfp8", "mxfp4", "nvfp4")}
TYPES = {"e4m3fn": ml_dtypes.float8_e4m3fn, "e2m1fn": ml_dtypes.float4_e2m1fn}


def in_blocks(x, unit, peak=None):
    """Rows [R, K] in numpy: codes and scales a block, the last one shorter, and the tensor's scale."""
    name, tensor = unit.pair[0], np.float32(1)
    if unit.scale_format == "ue4m3":
        tensor = np.float32(peak) if peak is not None else np.float32(np.abs(x).max() / np.float32(2688))
        x = (x / tensor).astype(np.float32)
    values, scales = np.zeros_like(x), np.zeros((len(x), -(-x.shape[1] // unit.block)), np.float32)
    largest = float(ml_dtypes.finfo(TYPES[name]).max)
    for row in range(len(x)):
        for block in range(scales.shape[1]):
            own = slice(block * unit.block, (block + 1) * unit.block)
            top = np.abs(x[row, own]).max()
            if unit.scale_format == "ue8m0":
                scale = np.float32(2.0 ** (math.floor(math.log2(top)) - math.floor(math.log2(largest))))
            else:
                scale = np.float32(np.float32(min(top / np.float32(6), 448)).astype(ml_dtypes.float8_e4m3fn))
            scales[row, block] = scale
            values[row, own] = np.clip(x[row, own] / scale, -largest, largest).astype(TYPES[name]).astype(np.float32)
    return values, scales, tensor


def by_hand(x, w, unit, peak=None):
    """[R, K] and [O, K] -> [R, O], with the reference's sums."""
    (a, s, t), (b, u, v) = in_blocks(x.numpy(), unit, peak), in_blocks(w.numpy(), unit)
    a, s, b, u = (torch.from_numpy(y) for y in (a, s, b, u))
    return block_reference.matmul(a, b.mT, s, u.mT, unit) * torch.tensor(t * v)


@pytest.mark.parametrize("name", UNITS)
def test_linear_by_hand_with_a_short_last_block(name):
    unit = UNITS[name]
    torch.manual_seed(0)
    layer, x = tensorcore.TensorCoreLinear(75, 6, config=unit), torch.randn(2, 3, 75)
    with torch.no_grad():
        assert layer.bias is not None
        expected = by_hand(x.view(6, 75), layer.weight, unit) + layer.bias
        assert torch.equal(layer(x).view(6, 6), expected)
        layer.mode = "baseline"
        assert torch.allclose(layer(x).view(6, 6), expected, atol=1e-6)


@pytest.mark.parametrize("order", ["ckk", "kkc"])
@pytest.mark.parametrize("name", UNITS)
def test_convolutions_have_blocks_along_the_columns(name, order):
    unit = UNITS[name].replace(order=order)
    torch.manual_seed(1)
    layer, x = tensorcore.TensorCoreConv2d(5, 4, 3, bias=False, config=unit, stride=2), torch.randn(2, 5, 7, 7)
    rows, w = F.unfold(x, 3, stride=2).mT.reshape(-1, 45), layer.weight.detach().reshape(4, 45)
    if order == "kkc":
        rows, w = (t.view(-1, 5, 9).mT.reshape(-1, 45) for t in (rows, w))
    got = layer(x)
    peak = (x.abs().max() / torch.tensor(2688.0)).item()
    expected = by_hand(rows, w, unit, peak if unit.scale_format == "ue4m3" else None)
    assert torch.equal(got.detach().permute(0, 2, 3, 1).reshape(-1, 4), expected)
    with torch.no_grad():
        assert torch.equal(layer(x), got)


def test_groups_and_one_dimension():
    unit = UNITS["mxfp8"]
    whole, x = tensorcore.TensorCoreConv1d(6, 8, 3, groups=2, bias=False, config=unit), torch.randn(2, 6, 9)
    parts = []
    for group in range(2):
        part = tensorcore.TensorCoreConv1d(3, 4, 3, bias=False, config=unit)
        part.load_state_dict({"weight": whole.weight[4 * group : 4 * group + 4]})
        parts.append(part(x[:, 3 * group : 3 * group + 3]))
    assert torch.equal(whole(x), torch.cat(parts, 1))
    assert whole(x[:0]).shape == (0, 8, 7)


def test_mixed_operands_keep_their_sides():
    """Subnormals of e5m2 beside those of e4m3fn: a convolution's weights come first in its product."""
    unit = UNITS["mxfp8"].replace(operands=("e5m2", "e4m3fn"))
    layer = tensorcore.TensorCoreConv2d(40, 4, 1, bias=False, config=unit)
    linear = tensorcore.TensorCoreLinear(40, 4, False, config=unit)
    with torch.no_grad():
        linear.weight.copy_(layer.weight.flatten(1))
    x = torch.randn(2, 40, 3, 3) * 2.0 ** torch.randint(-18, 1, (2, 40, 3, 3))
    assert torch.equal(layer(x).permute(0, 2, 3, 1), linear(x.permute(0, 2, 3, 1)))


@pytest.mark.parametrize("name", UNITS)
def test_gradients_pass_straight_through(name):
    unit = UNITS[name]
    layer, x = tensorcore.TensorCoreLinear(40, 5, False, config=unit), torch.randn(7, 40).requires_grad_()
    grad = torch.randn(7, 5)
    layer(x).backward(grad)
    (a, s, t), (b, u, v) = (in_blocks(y.detach().numpy(), unit) for y in (x, layer.weight))
    left, right = (torch.from_numpy(y * np.repeat(z, unit.block, 1)[:, :40] * r) for y, z, r in ((a, s, t), (b, u, v)))
    assert x.grad is not None
    assert layer.weight.grad is not None
    assert torch.allclose(x.grad, grad @ right, rtol=1e-4, atol=1e-5)
    assert torch.allclose(layer.weight.grad, grad.mT @ left, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", UNITS)
def test_attention_has_blocks_along_both_reductions(name):
    unit = UNITS[name]
    q, k, v = (torch.randn(11, 40, generator=torch.Generator().manual_seed(i)) for i in range(3))
    scores = by_hand(q * (1 / math.sqrt(40)), k, unit)
    expected = by_hand(torch.softmax(scores, -1), v.mT.contiguous(), unit)
    layer = TensorCoreAttentionProducts(unit)
    assert torch.equal(layer(q, k, v), expected)
    layer.mode = "baseline"
    assert torch.allclose(layer(q, k, v), expected, atol=1e-5)
    heads = torch.stack([q, k, v])
    assert tensorcore.attention(heads, heads, heads, unit, causal=True).shape == (3, 11, 40)


@pytest.mark.parametrize("name", UNITS)
@torch.no_grad()
def test_a_network_is_profiled_repaired_costed_saved_and_given_back(name, tmp_path):
    unit, x = UNITS[name], images(4)
    model = small_net()
    plain = model(x)
    rc.emulate_(model, unit)
    assert 0 < float((model(x) - plain).norm() / plain.norm()) < 0.6
    rows = tensorcore.profile(model, [x], outputs=64)
    assert [row.name for row in rows] == [n for n, m in model.named_modules() if hasattr(m, "config")]
    assert all(row.error is not None and row.error < 1e-6 for row in rows)
    cost = rc.cost(small_net(), {"re:.*": unit}, (3, 8, 8))
    eights = rc.cost(small_net(), {"re:.*": unit.replace(block=None, scale_format=None, fraction=25)}, (3, 8, 8))
    for one, other in zip(cost.layers, eights.layers, strict=True):
        assert one.cycles == other.cycles
        if one.macs and one.hardware != "float":
            assert one.traffic > other.traffic  # a byte a block
            assert one.accumulator == 32
    rc.repair_(model, batches_of(2, 8))
    expected = model(x)
    rc.save(model, tmp_path / "chip.safetensors")
    assert torch.equal(rc.load(tmp_path / "chip.safetensors", small_net(seed=7)).eval()(x), expected)
    rc.restore_(model)
    assert torch.equal(model(x), plain)


@torch.no_grad()
def test_a_sum_that_is_cut_shows_in_the_profile_and_the_profile_is_the_unit():
    """Few bits kept: what the profile adds up is what the layer gave."""
    unit = TensorCore("e2m1", 64, 6, "float32", block=16, scale_format="ue4m3")
    model, x = nn.Sequential(nn.Linear(200, 8, bias=False)), torch.rand(16, 200)
    nn.init.uniform_(model[0].weight)  # type: ignore[arg-type]
    rc.emulate_(model, unit)
    (row,) = tensorcore.profile(model, [x], outputs=512)
    with running(model, "baseline"):
        exact = model(x)
    error = float((model(x) - exact).norm() / exact.norm())
    assert row.terms == 200
    assert row.cut > 0.3
    assert row.error == pytest.approx(error, rel=0.2)
    tensorcore.correct_gain_(model, [x])
    assert float((model(x) - exact).norm() / exact.norm()) < 0.6 * error


def test_calibrated_tensor_scales_of_nvfp4():
    unit = UNITS["nvfp4"].replace(scale="calibrated")
    model = rc.calibrate_(rc.emulate_(small_net(), unit), batches_of(2, 8))
    x = images(9)
    with torch.no_grad():
        assert torch.equal(model(x), torch.cat([model(x[:8]), model(x[8:])]))
    layer = tensorcore.TensorCoreLinear(20, 3, False, config=unit)
    with pytest.raises(RecoupError, match="has no activation scale"):
        layer(torch.randn(2, 20))
    layer.activation_scale, layer.activation_zero = 0.01, 128
    rows = torch.randn(4, 20)
    expected = by_hand(rows, layer.weight.detach(), unit, float(np.float32(0.01 * 127 / 2688)))
    assert torch.equal(layer(rows), expected)


def test_what_is_not_finite_names_the_layer():
    model = rc.emulate_(nn.Sequential(nn.Linear(40, 3)), UNITS["mxfp8"])
    x = torch.randn(2, 40)
    x[1, 4] = math.nan
    with pytest.raises(RecoupError, match=r"layer '0'.*: input has 1 elements that are NaN or infinite"):
        model(x)
    rc.restore_(model)
    rc.emulate_(model, UNITS["mxfp8"].replace(nonfinite="propagate"))
    y = model(x)
    assert y[1].isnan().all()
    assert y[0].isfinite().all()


def test_zeros_and_the_refusal_of_gates():
    for unit in UNITS.values():
        layer = tensorcore.TensorCoreLinear(40, 3, False, config=unit)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert same(layer(torch.zeros(2, 40)), torch.zeros(2, 3))
        with pytest.raises(
            RecoupError, match=r"block scales are not built into the adder: .*without them it is Tensor"
        ):
            rc.silicon.build(unit)
