"""Norms whose inputs their format does not hold are named, with the remedy; others are not."""

import warnings

import pytest
import torch
from torch import nn

import recoup as rc

LABELS = torch.tensor([0, 1, 0, 1])
WIDE = rc.Float.ieee(8, 4, subnormals=False, rounding="zero")


def by_pixels(scale):
    x = scale * torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(108, 2))
    model[0].running_var.fill_(scale**2)
    return model.eval(), [(x, LABELS)]


def by_features(kind, scale):
    x = scale * torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    return nn.Sequential(kind(32), nn.Linear(32, 2)).eval(), [(x, LABELS)]


MAKE = [by_pixels, lambda scale: by_features(nn.LayerNorm, scale), lambda scale: by_features(nn.RMSNorm, scale)]


@pytest.mark.filterwarnings("ignore:lightnorm.correct_gain_. .* gave only beta")
@pytest.mark.parametrize("make", MAKE)
@pytest.mark.parametrize(("scale", "share"), [(1e6, "9"), (1e-6, "100")])
def test_inputs_that_saturate_or_vanish_are_named(make, scale, share):
    model, batches = make(scale)
    rc.emulate_(model, rc.LightNorm())
    said = rf"inputs saturate, or vanish, in the norm's forward format in 1 layers: 0 {share}[0-9.]* %: give LightNorm"
    with pytest.warns(rc.RecoupWarning, match=f"evaluate: {said}"):
        rc.evaluate(model, batches)
    with pytest.warns(rc.RecoupWarning, match=f"repair_: {said}"):
        rc.repair_(model, batches)


@pytest.mark.parametrize("make", MAKE)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_inputs_within_the_format_are_not(make, scale):
    model, batches = make(scale)
    rc.emulate_(model, rc.LightNorm())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rc.evaluate(model, batches)


@pytest.mark.parametrize("scale", [1e6, 1e-6])
@pytest.mark.parametrize("config", [rc.LightNorm(forward=WIDE, statistics=None), rc.LightNorm.range()])
def test_the_remedy_helps(scale, config):
    for make in MAKE[:1] if scale < 1 else MAKE:  # eps is added to what is small
        model, batches = make(scale)
        rc.emulate_(model, config)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            rc.evaluate(model, batches)
        y = model(batches[0][0])
        rc.restore_(model)
        z = model(batches[0][0])
        assert scale < 1 or (y - z).norm() < 0.5 * z.norm()
