"""Gains against their closed form in numpy, chunks, and the underflow switch."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import recoup as rc
from recoup import lba
from recoup.errors import RecoupError
from recoup.formats import Float
from recoup.gains import _Fit
from recoup.lba import LBA
from recoup.lba.repair import fitted_chunk
from recoup.models.attention import AttentionProducts
from recoup.network.emulated import emulated_layers, running
from tests.networks import batches_of, small_net

SHRINKING = LBA.biased(4, 3, bias=4)


def one_layer(layer) -> Any:
    model = nn.Sequential(copy.deepcopy(layer))
    model.eval()
    rc.emulate_(model, SHRINKING)
    return model


@pytest.mark.parametrize("weigh", ["outputs", "rows"])
@pytest.mark.parametrize("per", ["channel", "layer"])
@pytest.mark.parametrize(
    ("layer", "shape"), [(nn.Linear(40, 5), (30, 40)), (nn.Conv2d(4, 6, 3, groups=2, bias=False), (3, 4, 8, 8))]
)
def test_gain_is_the_least_squares_factor(layer, shape, per, weigh):
    torch.manual_seed(0)
    model, batches = one_layer(layer), [torch.randn(shape).relu() for _ in range(2)]
    inner = model[0]
    bias = 0 if inner.bias is None else inner.bias.detach().double().numpy()
    sums = [[], []]
    for x in batches:
        for mode, kept in zip(("emulate", "baseline"), sums, strict=True):
            with running(model, mode), torch.no_grad():
                kept.append(model(x).movedim(1, -1).reshape(-1, inner.weight.shape[0]).double().numpy() - bias)
    y, z = (np.concatenate(kept) for kept in sums)
    axis = 0 if per == "channel" else None
    weight = 1 / np.square(z).mean(1, keepdims=True) if weigh == "rows" else 1
    expected = np.broadcast_to((weight * y * z).sum(axis) / (weight * y * y).sum(axis), inner.weight.shape[:1])
    lba.correct_gain_(model, batches, per, weigh=weigh)
    np.testing.assert_allclose(inner.gain.numpy(), expected, rtol=1e-5)  # the hook subtracts the bias in float32
    assert weigh == "rows" or inner.gain.mean() > 1.02  # truncation shrinks


def test_one_token_of_a_thousand_whose_products_saturate_decides_a_gain_unless_rows_count_alike():
    """As in trained transformers: the first token of a line is far larger than the others."""
    torch.manual_seed(0)
    layer: Any = nn.Linear(32, 4, bias=False)
    x = torch.randn(1000, 32)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(4, 32))
        x[0] = 200 * layer.weight[0]
        model = rc.emulate_(nn.Sequential(layer).eval(), LBA.m7e4())
        lba.correct_gain_(model, [x])
        assert layer.gain[0] > 10
        lba.correct_gain_(model, [x], weigh="rows")
        assert 1 < layer.gain[0] < 1.3
        lba.correct_gain_(model, [x[1:], torch.zeros(3, 32)], weigh="rows")  # a row of zeros has no say
        assert bool(((layer.gain > 1) & (layer.gain < 1.1)).all())
    with pytest.raises(RecoupError, match=r"weigh='row'\): weigh must be one of 'outputs', 'rows'"):
        lba.correct_gain_(model, [x], weigh="row")  # type: ignore[arg-type]


def test_gain_reduces_the_error_and_can_be_taken_back():
    model, batches = small_net(), batches_of(2, 8)
    with torch.no_grad():
        exact = [model(x) for x in batches]
        rc.emulate_(model, LBA.biased(4, 5))
        before = [model(x) for x in batches]
        lba.correct_gain_(model, batches)
        after = [model(x) for x in batches]
        error = [sum(float((y - z).square().sum()) for y, z in zip(ys, exact, strict=True)) for ys in (before, after)]
        assert error[1] < 0.5 * error[0]
        state = copy.deepcopy(model.state_dict())
        for layer in model.modules():
            if hasattr(layer, "gain"):
                layer.gain = None
        assert all(torch.equal(model(x), y) for x, y in zip(batches, before, strict=True))
        model.load_state_dict(state)
        assert all(torch.equal(model(x), y) for x, y in zip(batches, after, strict=True))


def test_channels_that_are_always_zero_keep_their_gain():
    layer = nn.Linear(6, 3)
    with torch.no_grad():
        layer.weight[1] = 0
    model = one_layer(layer)
    with pytest.warns(rc.RecoupWarning, match="1 channels of 1 layers gave only zeros"):
        lba.correct_gain_(model, [torch.rand(4, 6)])
    assert model[0].gain[1] == 1


def test_a_failing_fit_leaves_the_gains_as_they_were():
    model = one_layer(nn.Linear(6, 3))
    lba.correct_gain_(model, [torch.rand(4, 6)])
    before = model[0].gain.clone()
    with pytest.raises(RecoupError, match=r"batch 1 .* holds NaN or infinity"):
        lba.correct_gain_(model, [torch.rand(4, 6), torch.full((4, 6), torch.nan)])
    assert torch.equal(model[0].gain, before)
    with pytest.raises(RecoupError, match="per must be 'channel' or 'layer'"):
        lba.correct_gain_(model, [torch.rand(4, 6)], "row")  # type: ignore[arg-type]
    with pytest.raises(RecoupError, match="no layer on a narrow accumulator"):
        lba.correct_gain_(nn.Linear(2, 2), [torch.rand(4, 2)])


def test_chunks_follow_the_length_of_the_sums():
    model = rc.emulate_(small_net(), LBA.m7e4())
    lba.choose_chunks_(model)
    found = {layer.weight[0].numel(): layer.config for layer in emulated_layers(model).values()}
    assert {terms: config.chunk for terms, config in found.items()} == {terms: fitted_chunk(terms) for terms in found}
    longest = found[max(found)]
    assert longest.product == Float.lba(4, 7, bias=10 + round(np.log2(longest.chunk) / 2))
    lba.choose_chunks_(rc.emulate_(rc.restore_(model), LBA.m7e4()), rescale=False)
    assert all(layer.config.product == LBA().product for layer in model.modules() if hasattr(layer, "gain"))


def test_sums_of_the_fit_lie_where_the_layer_does():
    layer = rc.emulate_(nn.Linear(4, 3, device="meta"), LBA())
    fit = _Fit(layer, "channel")  # type: ignore[arg-type]
    assert fit.cross.device.type == fit.square.device.type == fit.gain.device.type == "meta"


def test_underflow_switches_in_attention_too():
    model = rc.emulate_(nn.Sequential(AttentionProducts()), LBA())
    lba.set_underflow_(model, False)
    assert not model[0].config.underflow
    lba.set_underflow_(model, True)
    assert model[0].config == LBA()
    with pytest.raises(RecoupError, match="no layer on a narrow accumulator"):
        lba.set_underflow_(nn.Linear(2, 2), True)


def test_underflow_switches_in_every_layer():
    model = rc.emulate_(small_net(), LBA.biased(4, 3))
    x = batches_of(1, 4)[0] * 0.01
    with torch.no_grad():
        on = model(x)
        lba.set_underflow_(model, False)
        off = model(x)
        lba.set_underflow_(model, True)
        assert torch.equal(model(x), on)
    assert not torch.equal(on, off)


@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_a_gain_does_not_outlive_its_weight(kind):
    torch.manual_seed(0)
    if kind == "conv":
        model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval(), torch.rand(2, 3, 6, 6)
        fuse = torch.nn.utils.fusion.fuse_conv_bn_eval
    else:
        model, x = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval(), torch.rand(5, 3)
        fuse = torch.nn.utils.fusion.fuse_linear_bn_eval
    rc.emulate_(model, LBA.biased(3, 4), {"1": None})
    fuse(*model)
    rc.lba.correct_gain_(model, [x])
    with pytest.raises(RecoupError, match=r"layer '0'.*its weight is being replaced.*a gain that belongs to the old"):
        fuse(*model)
    with pytest.raises(RecoupError, match="weight is being replaced"):
        model[0].weight = nn.Parameter(torch.zeros_like(model[0].weight))
    kept = model[0].gain.clone()
    model.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(model[0].gain, kept)
    model[0].gain = None
    fuse(*model)
