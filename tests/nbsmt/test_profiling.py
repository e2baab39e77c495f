"""Profiles of small networks against the same figures computed one by one."""

import json

import pytest
import torch
from torch import nn

import recoup as rc
from recoup.errors import RecoupError
from recoup.nbsmt import reference
from recoup.nbsmt.config import NBSMT
from recoup.nbsmt.observe import see
from recoup.nbsmt.profiling import profile
from recoup.network.emulated import emulated_layers, running
from tests.networks import CONVOLUTIONS, images, small_net


def network(config, layers=None):
    model = small_net()
    rc.calibrate_(model, [images(24)])
    return rc.emulate_(model, config, layers)


def linear(config, bias=True, signed=False):
    torch.manual_seed(0)
    layer, x = nn.Linear(12, 7, bias), torch.randn(9, 12)
    x = torch.where(x.abs() < 0.3, 0, x) if signed else x.relu()
    x[0, :2] = 3 * x.max() * torch.tensor([1, -1 if signed else 1])  # the scale is a mean of peaks: some saturate
    rc.calibrate_(layer, [x], {"": True})
    return rc.emulate_(layer, config), x


@pytest.mark.parametrize("zero", [0, 128])
@pytest.mark.parametrize("config", [NBSMT(2), NBSMT(4, "S+W", "zero", "adjacent"), NBSMT(2, "Aw", port=4)])
def test_a_linear_layer_by_hand(config, zero):
    layer, x = linear(config, signed=zero > 0)
    assert layer.activation_zero == zero
    (found,) = profile(layer, [x[:4], x[4:]])
    code = reference.quantize_activation(x, layer.activation_scale, zero)
    low, high = {0: (0, 15), 5: (-16, 15), 4: (-8, 7)}[config.port if zero else 0]
    scale = 2 * layer.weight.detach().abs().amax(1, keepdim=True) / 255
    weight = torch.round(layer.weight.detach() / scale).clamp(-128, 127).to(torch.int8)
    counts = reference.statistics(code, weight.t(), config)
    assert found.collisions == counts["collisions"] / counts["slots"]
    assert found.lossy == counts["lossy"] / counts["active"]
    # 1e-15: the same quotient of integers, rounded in float64 by another route.
    assert found.utilization == pytest.approx(counts["utilization"], rel=1e-15)
    y = reference.matmul(code, weight.t(), config) * scale.t().double()
    y8 = (code.double() @ weight.t().double()) * scale.t().double()
    # The profile sums float32 outputs, here are exact ones.
    assert found.error == pytest.approx(float((y - y8).square().sum() / y8.square().sum()), rel=1e-5)
    shift = (y - y8).mean(0).square().sum() * len(y)
    assert found.mean_shift == pytest.approx(float(shift / y8.square().sum()), rel=1e-5)
    assert found.zero_activations == pytest.approx(float((code == 0).double().mean()), rel=1e-15)
    wide = (code < low) | (code > high)
    assert found.wide_activations == pytest.approx(float(wide.double().mean()), rel=1e-15)
    beyond = (x / see(layer, x).scale > 255.5 - zero) | (x / see(layer, x).scale < -0.5 - zero)
    assert found.saturated == pytest.approx(float(beyond.double().mean()), rel=1e-15)
    assert found.saturated >= (2 if zero else 1) / x.numel()
    assert found.zero_weights == float((weight == 0).double().mean())
    assert found.wide_weights == float(((weight < -8) | (weight > 7)).double().mean())
    assert (found.name, found.kind, found.weight_shape, found.output_shape) == ("", "Linear", (7, 12), (7,))
    assert (found.threads, found.policy, found.macs) == (config.threads, config.policy, 84)


def test_a_network_in_order_of_execution():
    model = network(NBSMT(4), {"block2.conv2": NBSMT(threads=1)}).train()
    found = profile(model, [images(8), images(5, seed=1)])
    assert [layer.name for layer in found] == CONVOLUTIONS
    by_name = {layer.name: layer for layer in found}
    assert by_name["block1.conv1"].macs == 16 * 8 * 12 * 9
    assert by_name["block1.conv1"].output_shape == (12, 4, 4)
    one = by_name["block2.conv2"]
    assert (one.threads, one.collisions, one.lossy, one.error, one.mean_shift) == (1, 0, 0, 0, 0)
    for layer in found:
        assert 0 <= layer.mean_shift <= layer.error < 0.1
    assert json.loads(json.dumps([layer.to_dict() for layer in found]))[0]["weight_shape"] == [12, 8, 3, 3]
    assert all(module.training for module in model.modules())
    assert not any(layer._forward_hooks for layer in emulated_layers(model).values())


def test_it_measures_the_emulation_whatever_the_mode_and_correction():
    model = network(NBSMT(4, rounding="zero"))
    expected = profile(model, [images(8)])
    with running(model, "baseline"):
        assert profile(model, [images(8)]) == expected
        assert all(layer.mode == "baseline" for layer in emulated_layers(model).values())
    rc.correct_bias_(model)
    assert profile(model, [images(8)])[0] == expected[0]


def test_an_order_counts():
    model = network(NBSMT(2))
    before = profile(model, [images(8)])[0]
    model.block1.conv1.order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    after = profile(model, [images(8)])[0]
    assert after.zero_activations == before.zero_activations
    assert after.collisions != before.collisions
    assert after.error != before.error


def test_grouped_and_one_dimensional_layers():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(4, 8, 3, groups=2), nn.ReLU(), nn.Conv1d(8, 6, 3, padding=1))
    x = torch.rand(5, 4, 10)
    rc.calibrate_(model, [x], {"re:.*": True})
    with pytest.warns(rc.RecoupWarning):
        rc.emulate_(model, NBSMT(4))
    first, second = profile(model, [x])
    assert (first.threads, first.error, first.macs) == (1, 0, 8 * 8 * 2 * 3)
    assert (second.threads, second.kind, second.output_shape) == (4, "Conv1d", (6, 8))
    assert second.error > 0


def test_bad_requests_are_refused():
    with pytest.raises(RecoupError, match="profile: the model has no NB-SMT layer"):
        profile(small_net(), [images(2)])
    with pytest.raises(RecoupError, match="profile: there was no batch"):
        profile(network(NBSMT()), [])
