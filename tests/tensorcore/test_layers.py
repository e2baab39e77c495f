"""Layers on a tensor core: what is multiplied, what training sees, and the house's verbs."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import recoup as rc
from recoup.errors import RecoupError
from recoup.tensorcore import TensorCore, TensorCoreConv1d, TensorCoreConv2d, TensorCoreLinear, matmul
from tests.tensorcore.strategies import same

HOPPER = TensorCore.hopper_fp8()


def by_hand(x, w, config):
    """[rows, I] and [O, I], by the layers' equation."""
    form = rc.Float.parse("e4m3fn")
    s_x, s_w = x.abs().max() / 448, w.abs().amax(1) / 448
    y = matmul(rc.quantize(x / s_x, form), rc.quantize(w / s_w[:, None], form).mT.contiguous(), config)
    return y * (s_x * s_w)


def test_linear_is_the_scaled_product():
    layer, x = TensorCoreLinear(40, 7, config=HOPPER), torch.randn(2, 3, 40)
    assert layer.bias is not None
    expected = by_hand(x.view(6, 40), layer.weight, HOPPER) + layer.bias
    assert torch.equal(layer(x).view(6, 7), expected)


@pytest.mark.parametrize("order", ["ckk", "kkc"])
@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 1}, {"dilation": 2, "padding": "same"}])
def test_convolutions_are_products_of_columns(order, options):
    config = HOPPER.replace(order=order)
    layer, x = TensorCoreConv2d(5, 6, (3, 2), bias=False, config=config, **options), torch.randn(2, 5, 9, 8)
    padding = layer._reversed_padding_repeated_twice
    columns = F.unfold(F.pad(x, padding), (3, 2), layer.dilation, 0, layer.stride)  # [N, C kh kw, P]
    rows, w = columns.mT.reshape(-1, 30), layer.weight.reshape(6, 30)
    if order == "kkc":
        rows, w = (t.view(-1, 5, 6).mT.reshape(-1, 30) for t in (rows, w))
    got = layer(x)
    assert torch.equal(got.permute(0, 2, 3, 1).reshape(-1, 6), by_hand(rows, w, config))
    with torch.no_grad():
        assert torch.equal(layer(x), got)


def test_groups_have_the_order_of_their_own_channels():
    config = TensorCore.hopper_bf16(order="kkc")
    whole = TensorCoreConv2d(6, 8, 3, groups=2, bias=False, config=config)
    x, parts = torch.randn(2, 6, 5, 5), []
    for group in range(2):
        part = TensorCoreConv2d(3, 4, 3, bias=False, config=config)
        part.load_state_dict({"weight": whole.weight[4 * group : 4 * group + 4]})
        parts.append(part(x[:, 3 * group : 3 * group + 3]))
    assert torch.equal(whole(x), torch.cat(parts, 1))
    with torch.no_grad():
        line = TensorCoreConv1d(6, 8, 3, groups=2, bias=False, config=config)
        flat = TensorCoreConv2d(6, 8, (1, 3), groups=2, bias=False, config=config)
        flat.weight.copy_(line.weight[:, :, None])
        assert torch.equal(line(x[:, :, 0]), flat(x[:, :, :1])[:, :, 0])


@pytest.mark.parametrize("pair", [("e5m2", "e4m3fn"), ("float16", "bfloat16")])
def test_activations_and_weights_keep_their_formats(pair):
    """Subnormals of one format beside the other's show which is whose; a gradient on the unit has them too."""
    config = TensorCore(pair, 8, 8, output="float32", backward="unit")
    layer, linear = TensorCoreConv2d(16, 4, 1, bias=False, config=config), TensorCoreLinear(16, 4, False, config=config)
    with torch.no_grad():
        linear.weight.copy_(layer.weight.flatten(1))
    x = (torch.randint(-7, 8, (2, 16, 3, 3)) * 2.0**-21).requires_grad_()
    y = layer(x)
    assert torch.equal(y.permute(0, 2, 3, 1), linear(x.permute(0, 2, 3, 1)))
    y.sum().backward()
    assert x.grad is not None


def test_one_dimension_groups_and_no_batch():
    layer, x = TensorCoreConv1d(4, 6, 3, groups=2, config=TensorCore.hopper_bf16()), torch.randn(4, 11)
    flat = nn.Conv1d(4, 6, 3, groups=2)
    flat.load_state_dict(layer.state_dict())
    assert layer(x).shape == flat(x).shape
    assert torch.allclose(layer(x), flat(x), atol=0.05)
    assert torch.equal(layer(x[None])[0], layer(x))


@pytest.mark.parametrize("config", [HOPPER, TensorCore.ampere_tf32(), TensorCore.hopper_f16(output="float16")])
def test_a_network_is_emulated_repaired_and_given_back(config):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 3, groups=4),
        nn.Flatten(),
        nn.Linear(128, 4),
    )
    x = torch.randn(16, 3, 8, 8)
    before = copy.deepcopy(model.state_dict())
    plain = model.eval()(x)
    rc.emulate_(model, config)
    assert [type(m).__name__ for m in model if hasattr(m, "config")] == [
        "TensorCoreConv2d",
        "TensorCoreConv2d",
        "TensorCoreLinear",
    ]
    assert 0 < (model(x) - plain).abs().max() < 0.3 * plain.abs().max()
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))
    rc.repair_(model, [x])
    rc.restore_(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(x), plain)


def test_it_trains():
    torch.manual_seed(0)
    model = rc.emulate_(nn.Sequential(nn.Linear(8, 16), nn.ReLU(inplace=True), nn.Linear(16, 2)), HOPPER)
    x, y = torch.randn(64, 8), torch.randint(2, (64,))
    optimizer, losses = torch.optim.SGD(model.parameters(), 0.5), []
    for _ in range(12):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]


@pytest.mark.parametrize("layer", [TensorCoreLinear(4, 4), TensorCoreConv2d(4, 4, 1)])
def test_results_may_be_changed_in_place(layer):
    x = torch.randn(4, 4) if isinstance(layer, TensorCoreLinear) else torch.randn(2, 4, 3, 3)
    y = layer(x)
    y += x
    F.relu(y, inplace=True).sum().backward()
    assert layer.weight.grad is not None


def test_empty_batches():
    assert TensorCoreLinear(4, 3)(torch.zeros(0, 4)).shape == (0, 3)
    assert TensorCoreConv2d(4, 3, 1)(torch.zeros(0, 4, 2, 2)).shape == (0, 3, 2, 2)


def test_zeros_and_infinite_inputs():
    layer = TensorCoreLinear(4, 3, bias=False)
    assert same(layer(torch.zeros(2, 4)), torch.zeros(2, 3))
    with pytest.raises(RecoupError, match="input has 1 elements that are NaN or infinite"):
        layer(torch.tensor([[float("inf"), 0, 0, 0]]))


def test_refused():
    with pytest.raises(RecoupError, match="config must be a TensorCore"):
        TensorCoreLinear(3, 4, config="hopper")
    with pytest.raises(RecoupError, match="must have 4 features"):
        TensorCoreLinear(4, 3)(torch.zeros(2, 5))
    with pytest.raises(RecoupError, match="must have 4 channels"):
        TensorCoreConv2d(4, 3, 1)(torch.zeros(1, 5, 2, 2))
    with pytest.raises(RecoupError, match=r"takes float32; the input is torch.float64 \[2, 4\]"):
        TensorCoreLinear(4, 3)(torch.zeros(2, 4, dtype=torch.float64))
