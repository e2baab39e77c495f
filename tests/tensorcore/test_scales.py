"""Calibrated activation scales: a model in numpy, who must be calibrated, and what travels."""

import copy
import warnings

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import nn

import recoup as rc
from recoup.errors import RecoupError, RecoupWarning
from recoup.models.attention import AttentionProducts
from recoup.network.emulated import emulated_layers
from recoup.search.bench import needing_scales
from recoup.study.hardware import needs_scales
from recoup.tensorcore import TensorCore, quantize_operand
from recoup.tensorcore.wing import CARD
from tests.networks import batches_of, images, small_net
from tests.tensorcore import letter

UNIT = TensorCore.hopper_fp8(scale="calibrated")


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 4))


def row_batches(count, size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, 12, generator=generator) for _ in range(count)]


def codes(x, scale):
    """float32 / float32, to e4m3's nearest, saturated."""
    return np.clip(x / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)


def layer_by_hand(x, layer, seen, unit):
    """One Linear in numpy: ``seen`` are the inputs of calibration."""
    signed = min(float(s.min()) for s in seen) < 0
    peaks = np.concatenate([np.abs(s).max(1) for s in seen]).astype(np.float64)
    steps = 127 if signed else 255
    step = np.float32(peaks.sum() / len(peaks) / steps)
    scale = np.float32(float(step) * steps / 448)
    weight = layer.weight.detach().numpy()
    w_scale = (np.abs(weight).max(1) / np.float32(448)).astype(np.float32)
    a, b = codes(x, scale), codes(weight, w_scale[:, None])
    sums = np.array([[letter.dot(row.tolist(), column.tolist(), unit) for column in b] for row in a], np.float32)
    return sums * (scale * w_scale) + layer.bias.detach().numpy()


def test_equal_to_numpy():
    model, data = mlp(), row_batches(3, 5)
    floats = copy.deepcopy(model)
    rc.emulate_(model, UNIT)
    rc.calibrate_(model, data)
    x = 3 * row_batches(1, 6, seed=1)[0]  # larger than what was seen: it saturates
    with torch.no_grad():
        hidden = layer_by_hand(x.numpy(), floats[0], [d.numpy() for d in data], UNIT)
        seen = [floats[1](floats[0](d)).numpy() for d in data]
        expected = layer_by_hand(np.maximum(hidden, 0), floats[2], seen, UNIT)
        assert np.array_equal(model(x).numpy(), expected)


def test_calibration_may_come_first_and_has_no_say_in_other_units():
    one, other, third = (small_net() for _ in range(3))
    data = batches_of(2, 8)
    everything = {"stem": True, "classifier": True, "re:.*": True}
    rc.emulate_(rc.calibrate_(one, data, everything), UNIT)
    rc.calibrate_(rc.emulate_(other, UNIT), data)
    assert torch.equal(one(images(3)), other(images(3)))
    plain = rc.emulate_(small_net(), TensorCore.hopper_fp8())
    assert torch.equal(rc.emulate_(rc.calibrate_(third, data), TensorCore.hopper_fp8())(images(3)), plain(images(3)))
    assert not torch.equal(plain(images(3)), one(images(3)))


@pytest.mark.parametrize("mode", ["emulate", "baseline"])
def test_results_do_not_depend_on_the_batch(mode):
    x = images(40, seed=3)
    x[-1] *= 4

    def by(model, sizes):
        return torch.cat([model(part) for part in x.split(sizes)])

    models = {unit: rc.emulate_(small_net(), unit) for unit in (UNIT, TensorCore.hopper_fp8())}
    rc.calibrate_(models[UNIT], batches_of(2, 8))
    for model in models.values():
        for layer in emulated_layers(model).values():
            layer.mode = mode
    with torch.no_grad():
        assert torch.equal(by(models[UNIT], [39, 1]), by(models[UNIT], [20, 20]))
        assert not torch.equal(*(by(models[TensorCore.hopper_fp8()], sizes) for sizes in ([39, 1], [20, 20])))


def test_1024_and_one_against_512():
    """A last batch of one image has its own scale call by call, and the calibrated one otherwise."""
    x, data = row_batches(1, 1025, seed=5)[0], row_batches(2, 64)
    for unit, same in ((UNIT, True), (TensorCore.hopper_fp8(), False)):
        model = rc.emulate_(mlp(), unit)
        if same:
            rc.calibrate_(model, data)
        with torch.no_grad():
            ragged, even = (torch.cat([model(part) for part in x.split(size)]) for size in (1024, 512))
        assert torch.equal(ragged, even) == same


def test_uncalibrated_layers_are_refused_by_name():
    model = rc.emulate_(small_net(), UNIT)
    with pytest.raises(RecoupError, match=r"layer 'stem' .* has no activation scale.*'stem': True"):
        model(images(2))
    rc.restore_(model)
    rc.calibrate_(model, batches_of(1, 4))  # in float the ends are left out
    rc.emulate_(model, UNIT)
    with pytest.raises(RecoupError, match="layer 'stem'"):
        model(images(2))
    rc.calibrate_(model, batches_of(1, 4))
    assert model(images(2)).isfinite().all()


def test_scales_travel(tmp_path):
    model = rc.calibrate_(rc.emulate_(small_net(), UNIT), batches_of(2, 4))
    expected = model(images(3))
    rc.save(model, tmp_path / "chip.safetensors")
    loaded = rc.load(tmp_path / "chip.safetensors", small_net(seed=7)).eval()
    assert torch.equal(loaded(images(3)), expected)
    fresh = rc.emulate_(small_net(seed=8), UNIT)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(images(3)), expected)
    state = model.state_dict()
    state._metadata["stem"]["recoup"]["activation_scale"] = -1.0
    with pytest.raises(RuntimeError, match=r"stem\.activation_scale is -1\.0"):
        fresh.load_state_dict(state)
    assert rc.emulate_(rc.restore_(model), UNIT)(images(3)).equal(expected)  # restore_ keeps what was measured


def test_calibrating_anew_takes_the_gain():
    model = rc.calibrate_(rc.emulate_(small_net(), UNIT), batches_of(2, 4))
    rc.tensorcore.correct_gain_(model, batches_of(2, 8))
    assert model.stem.gain is not None
    with pytest.warns(RecoupWarning, match="calibrate_: undid gain"):
        rc.calibrate_(model, batches_of(2, 4))
    model.stem.gain = torch.ones(8)  # by hand
    rc.calibrate_(model, batches_of(2, 4))
    assert model.stem.gain is None


def test_gradients_on_the_unit_and_profiles():
    unit = UNIT.replace(backward="unit", operands=("e4m3fn", "float16"), amax=16.0)
    model = rc.calibrate_(rc.emulate_(small_net(), unit), batches_of(2, 4))
    model(images(4)).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert len(rc.tensorcore.profile(model, [images(4)], outputs=64)) == len(emulated_layers(model))


def test_attentions_are_scaled_call_by_call_and_it_is_said():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.products = nn.Linear(8, 8), AttentionProducts()

        def forward(self, x):
            y = self.linear(x)[:, None]
            return self.products(y, y, y)

    model, x = Net(), torch.randn(3, 5, 8)
    with pytest.warns(RecoupWarning, match="1 layers are attention products, whose operands are scaled call by call"):
        rc.emulate_(model, UNIT)
    rc.calibrate_(model, [x])
    assert model.linear.activation_scale is not None
    assert getattr(model.products, "activation_scale", None) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert model(x).isfinite().all()


def test_the_card_and_the_words():
    assert CARD.works_on_scales(UNIT)
    assert not CARD.works_on_scales(TensorCore())
    assert "calibrated scales" in CARD.title(UNIT)
    assert needs_scales(UNIT)
    assert not needs_scales(TensorCore())
    assert needing_scales({"stem": (None, UNIT), "fc": (TensorCore(),)}) == ["stem"]


def test_a_known_scale():
    x = torch.tensor([1.0, -3.0, 1e38, float("nan"), float("inf")])
    y, scale = quantize_operand(x, "e4m3fn", 448.0, None, scale=2.0**-10)
    assert y[:3].tolist() == [448.0, -448.0, 448.0]
    assert scale.tolist() == [2.0**-10]
    assert y[3:].isnan().tolist() == [True, False]
    with pytest.raises(RecoupError, match="scale must be a number above 0"):
        quantize_operand(x, "e4m3fn", 448.0, None, scale=0.0)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"scale": "once"}, "scale must be one of 'call', 'calibrated'"),
        ({"scale": "calibrated", "operands": "bfloat16"}, "activations in bfloat16 have no scale: set amax"),
    ],
)
def test_bad_input(options, told):
    with pytest.raises(RecoupError, match=told):
        TensorCore(**options)


@pytest.mark.parametrize("options", [{"activations": "unsigned"}, {"activations": "unsigned", "negative": "float"}])
def test_operands_are_signed_by_themselves(options):
    """Nothing of a float operand clips: words about integer codes change no scale."""
    scales = []
    for given in ({}, options):
        model = rc.calibrate_(rc.emulate_(mlp(), UNIT), row_batches(2, 5), **given)
        scales.append([layer._calibrated() for layer in model if hasattr(layer, "activation_scale")])
    assert scales[0] == scales[1]
    assert len(scales[0]) == 2
