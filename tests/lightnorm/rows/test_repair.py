"""The gain of layer and RMS norms: the factor, when it is 1, the ledger, files and plans."""

import copy

import pytest
import torch
from torch import nn

import recoup as rc
from recoup.errors import RecoupError, RecoupWarning
from recoup.formats import quantize
from recoup.gains import Gained
from recoup.lightnorm import LightLayerNorm, LightNorm, LightRMSNorm, correct_gain_
from recoup.lightnorm.rows import passes
from tests.lightnorm.rows.test_conversion import TOKENS, gpt

KINDS = [nn.LayerNorm, nn.RMSNorm]


def filled(kind, size=32):
    torch.manual_seed(0)
    layer = kind(size)
    with torch.no_grad():
        for value in layer.parameters():
            value.normal_()
    return layer


def on_unit(layer, config, gain=None):
    """A copy on a unit, with a gain."""
    unit = rc.emulate_(copy.deepcopy(layer), config)
    unit.gain = gain
    return unit


def multiplied(layer, x, config):
    """F(gamma) xhat."""
    beta = getattr(layer, "bias", None)
    beta = torch.zeros_like(layer.weight) if beta is None else beta
    kind, eps = ("layer", layer.eps) if isinstance(layer, nn.LayerNorm) else ("rms", torch.finfo(x.dtype).eps)
    xhat = passes.forward(x, layer.weight, beta, None, kind, config, eps)[1]
    return quantize(layer.weight.detach().double(), config.forward) * xhat.double()


@torch.no_grad()
def fitted(layer, batches, config):
    """The equation of `correct_gain_`, batch by batch: gain_f = 1 + <z - y, p> / <p, p>, or 1."""
    cross = square = bare = left = torch.zeros(layer.weight.shape, dtype=torch.float64)
    kept = factor = None
    for x in batches:
        z, y = layer(x).double(), on_unit(layer, config)(x).double()
        p = multiplied(layer, x, config)
        cross, square = cross + ((z - y) * p).sum(0), square + (p * p).sum(0)
        factor = torch.where(square > 0, 1 + cross / square, 1.0).float()
        bare = bare + (z - y).square().sum(0)
        left = left + (z - on_unit(layer, config, factor)(x).double()).square().sum(0)
        kept = left < bare
    return torch.where(kept, factor, 1.0), kept


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", [LightNorm(), LightNorm(block=32), LightNorm.fp10()])
def test_the_gain_is_the_least_squares_factor(kind, config):
    layer = filled(kind)
    gamma, batches = layer.weight.clone(), [torch.randn(9, 32) * 3, torch.randn(5, 32) + 1]
    expected, kept = fitted(layer, batches, config)
    assert int(kept.sum()) > 0
    model = rc.emulate_(nn.Sequential(layer), config)
    correct_gain_(model, batches)
    assert layer.gain.dtype == torch.float32
    torch.testing.assert_close(layer.gain, expected, rtol=1e-6, atol=0)
    assert torch.equal(layer.weight, gamma)
    first = layer.gain
    assert torch.equal(correct_gain_(model, batches)[0].gain, first)  # replaces, does not build on


@pytest.mark.parametrize("kind", KINDS)
def test_no_feature_s_error_is_raised(kind):
    """Without blocks, which features share, on a batch that was seen: rounded to 1 it is, or it lowers the error."""
    layer, x, config = filled(kind), torch.randn(6, 32), LightNorm.fp10()
    with torch.no_grad():
        getattr(layer, "bias", layer.weight).mul_(8)  # a large beta, whose own rounding no gain mends
    z = layer(x).detach().double()
    bare = (z - on_unit(layer, config)(x).detach().double()).square().sum(0)
    model = correct_gain_(rc.emulate_(nn.Sequential(layer), config), [x])
    left = (z - model(x).detach().double()).square().sum(0)
    one = layer.gain == 1
    assert 0 < int(one.sum()) < 32
    assert bool((left[one] == bare[one]).all())
    assert bool((left[~one] < bare[~one]).all())


@pytest.mark.parametrize("kind", KINDS)
def test_features_without_gamma_keep_gain_1(kind):
    """Blocks round their beta by their neighbours' exponent, which is nothing that a gain mends."""
    layer = filled(kind)
    with torch.no_grad():
        layer.weight[::4] = 0.0
        layer.weight[1] = 1e-30  # zero in the unit's format
    model = rc.emulate_(nn.Sequential(layer), LightNorm(block=8))
    with pytest.warns(RecoupWarning, match="9 features of 1 layers gave only beta, keep gain 1"):
        correct_gain_(model, [torch.randn(9, 32)])
    assert bool((layer.gain[[*range(0, 32, 4), 1]] == 1).all())
    assert not bool((layer.gain == 1).all())


class Exponential(nn.Module):
    def forward(self, x):
        return x.exp()


def test_samples_that_are_not_finite_have_no_say():
    layer, x = filled(nn.LayerNorm), torch.randn(6, 32)
    model = rc.emulate_(nn.Sequential(Exponential(), layer), LightNorm())
    alone = correct_gain_(model, [x])[1].gain
    bad = torch.cat([x, torch.full((1, 32), 200.0)])
    with pytest.warns(RecoupWarning, match="32 outputs of 1 layers were NaN or infinite"):
        assert torch.equal(correct_gain_(model, [bad])[1].gain, alone)


def test_gains_of_all_hardware_are_of_one_kind():
    """What is told of gains holds for norms: a weight is not replaced under one."""
    for unit in (LightLayerNorm(16), LightRMSNorm(16)):
        assert isinstance(unit, Gained)
        unit.gain = torch.ones(16)
        with pytest.raises(RecoupError, match="it has a gain that belongs to the old one"):
            unit.weight = nn.Parameter(torch.ones(16))
        assert unit.fault("gain", torch.ones(15)) == "has shape [15]"


def test_the_gain_in_the_ledger(tmp_path):
    model, batches = gpt(), [TOKENS, TOKENS.flip(0)]
    exact, before = model(TOKENS), copy.deepcopy(model.state_dict())
    rc.emulate_(model, LightNorm())
    bare = model(TOKENS)
    rc.repair_(model, batches)  # by default
    repaired = model(TOKENS)
    assert not torch.equal(repaired, bare)
    assert "lnf: LightNorm(); gain (lightnorm.correct_gain_, 8 images)" in str(rc.describe(model))
    assert {name: value.shape for name, value in model.state_dict().items()} == {n: v.shape for n, v in before.items()}
    rc.save(model, tmp_path / "chip.safetensors")
    loaded = rc.load(tmp_path / "chip.safetensors", gpt())
    assert torch.equal(loaded(TOKENS), repaired)
    assert str(rc.describe(loaded)) == str(rc.describe(model))
    rc.undo_(model)
    assert torch.equal(model(TOKENS), bare)
    rc.repair_(model, batches, "gain")
    assert torch.equal(model(TOKENS), repaired)
    with pytest.warns(RecoupWarning, match="belonged to other weights"):
        model.load_state_dict({name: value + 1 for name, value in before.items()})
    assert model.lnf.gain is None
    model.load_state_dict(before)
    rc.restore_(model)
    assert torch.equal(model(TOKENS), exact)


def mixed():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.LayerNorm(16)).eval()


X = torch.randn(32, 16, generator=torch.Generator().manual_seed(0))


def repairs_of(model):
    """Layer -> the slots of what was done to it."""
    return {line.name: [one.split(" (")[0] for one in line.repairs] for line in rc.describe(model).lines}


def test_plans_by_what_was_taken():
    both = rc.repair_(rc.emulate_(mixed(), LightNorm()), [X])
    assert repairs_of(both) == {"1": ["statistics"], "2": ["gain"]}
    # In the order of the stages: the statistics were measured behind no gain, so they are those of a gain first.
    ordered = rc.emulate_(mixed(), LightNorm())
    rc.recalibrate_(correct_gain_(ordered, [X]), [X])
    assert all(map(torch.equal, both.state_dict().values(), ordered.state_dict().values()))
    assert torch.equal(both[2].gain, ordered[2].gain)
    rows_only = rc.repair_(rc.emulate_(mixed(), LightNorm(), {"1": None}), [X])
    assert repairs_of(rows_only) == {"2": ["gain"]}  # the batch norm in float is left alone
    assert torch.equal(rows_only[1].running_mean, mixed()[1].running_mean)
    channels_only = rc.repair_(rc.emulate_(mixed(), LightNorm(), {"2": None}), [X])
    assert repairs_of(channels_only) == {"1": ["statistics"]}


def test_plans_by_name_leave_out_what_a_wing_has_nothing_for():
    layers = {"0": rc.LBA.m7e4(), "2": None}
    model = rc.repair_(rc.emulate_(mixed(), LightNorm(), layers), [X], "gain+paired")
    assert repairs_of(model) == {"0": ["gain"], "1": ["statistics"]}
    with pytest.raises(RecoupError, match="the model has no layer or RMS norm on a LightNorm unit"):
        rc.repair_(rc.emulate_(mixed(), LightNorm(), {"2": None}), [X], "gain")


def test_the_gain_is_refused():
    both = rc.emulate_(mixed(), LightNorm())
    rc.recalibrate_(both, [X])
    with pytest.raises(RecoupError, match="batch norm statistics were repaired"):
        correct_gain_(both, [X])
    with pytest.raises(RecoupError, match=r"correct_gain_: the model has no layer or RMS norm"):
        correct_gain_(rc.emulate_(nn.Sequential(nn.BatchNorm1d(16)), LightNorm()), [X])


@pytest.mark.parametrize("mode", ["float", "baseline"])
def test_the_gain_of_layers_that_run_in_float_is_refused(mode):
    model = rc.emulate_(nn.Sequential(nn.LayerNorm(16), nn.LayerNorm(16)), LightNorm())
    correct_gain_(model, [X])
    before, model[1].mode = [layer.gain for layer in model], mode
    with pytest.raises(RecoupError, match=f"lightnorm.correct_gain_: 1 run in mode '{mode}'.*set mode = 'emulate'"):
        correct_gain_(model, [X])
    assert [layer.gain for layer in model] == before


def test_the_gain_of_what_never_moves():
    model = rc.emulate_(nn.Sequential(nn.LayerNorm(16, elementwise_affine=False)), LightNorm())
    with pytest.warns(RecoupWarning, match="16 features of 1 layers gave only beta, keep gain 1"):
        correct_gain_(model, [torch.ones(4, 16)])
    assert torch.equal(model[0].gain, torch.ones(16))
    model.load_state_dict(model.state_dict())  # without a weight
    assert torch.equal(model[0].gain, torch.ones(16))
