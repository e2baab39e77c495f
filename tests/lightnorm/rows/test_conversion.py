"""Transformers under LightNorm: conversion both ways, look-alikes, the gain in the ledger and in files, costs."""

import copy
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import recoup as rc
from recoup.errors import RecoupError, RecoupWarning
from recoup.lightnorm import LightLayerNorm, LightNorm, LightRMSNorm, correct_gain_, traffic
from recoup.lightnorm.cost import Operations, Widths, widths
from recoup.network.row_norms import is_row_norm, like_rms_norm

TOKENS = torch.randint(0, 40, (4, 12), generator=torch.Generator().manual_seed(0))
NORMS = ["blocks.0.ln1", "blocks.0.ln2", "blocks.1.ln1", "blocks.1.ln2", "lnf"]


def gpt():
    torch.manual_seed(0)
    return rc.models.chargpt(40, layers=2, width=24, heads=2, context=12).eval()


class LlamaLike(nn.Module):
    """What most language models of transformers call SomethingRMSNorm."""

    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states):
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * hidden_states.to(input_dtype)


class GemmaRMSNorm(LlamaLike):
    """Another function under such a name: 1 + weight."""

    def forward(self, hidden_states):
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return (1.0 + self.weight) * hidden_states.to(input_dtype)


class Mine(nn.LayerNorm):
    def size(self):
        return self.normalized_shape


class ChannelsFirst(nn.LayerNorm):
    def forward(self, input):  # noqa: A002
        return super().forward(input.transpose(1, -1)).transpose(1, -1)


def test_emulate_and_restore():
    model = gpt()
    exact, before = model(TOKENS), copy.deepcopy(model.state_dict())
    rc.emulate_(model, LightNorm())
    assert [name for name, module in model.named_modules() if isinstance(module, LightLayerNorm)] == NORMS
    assert list(model.state_dict()) == list(before)
    changed = model(TOKENS)
    assert not torch.equal(changed, exact)
    loss = nn.functional.cross_entropy(changed.flatten(0, 1), TOKENS.flatten())
    loss.backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())
    rc.restore_(model)
    assert type(model.lnf) is nn.LayerNorm
    assert torch.equal(model(TOKENS), exact)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_layers_by_name():
    model = gpt()
    rc.emulate_(model, LightNorm.range(), {"lnf": None, "re:blocks.*ln1": LightNorm(block=8)})
    assert type(model.lnf) is nn.LayerNorm
    assert model.blocks[0].ln1.config == LightNorm(block=8)
    with pytest.raises(RecoupError, match=r"layer 'blocks.0.ln1'.*is emulated already"):
        rc.emulate_(model, LightNorm())
    with pytest.raises(RecoupError, match=r"layer '0' .*10 features; 8 chunks need at least 16"):
        rc.emulate_(nn.Sequential(nn.LayerNorm(10), nn.LayerNorm(32)), LightNorm())


def test_the_fused_path_of_torch_s_encoder_runs_the_unit():
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    x = torch.randn(2, 5, 16)
    rc.emulate_(encoder, LightNorm())
    with torch.no_grad():
        fast = encoder(x)
    assert torch.equal(fast, encoder(x).detach())
    rc.restore_(encoder)
    assert not torch.equal(fast, encoder(x))


def test_subclasses_and_look_alikes():
    model = nn.Sequential(Mine(16), LlamaLike(16), GemmaRMSNorm(16), ChannelsFirst(16))
    x = torch.randn(2, 16, 16)
    exact = model(x)
    with pytest.warns(RecoupWarning) as told:
        rc.emulate_(model, LightNorm.range())
    assert isinstance(model[0], Mine)
    assert isinstance(model[0], LightLayerNorm)
    assert model[0].size() == (16,)
    assert isinstance(model[1], LlamaLike)
    said = str(told[0].message)
    assert "LightNorm does not know what they compute: 2 (GemmaRMSNorm)" in said
    assert "a subclass may compute something else: 3 (ChannelsFirst)" in said
    rms = LightRMSNorm(16, 1e-6, config=LightNorm.range())
    rms.load_state_dict({"weight": model[1].weight})
    assert torch.equal(model[1](x), rms(x))
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    rc.restore_(model)
    assert [type(layer) for layer in model] == [Mine, LlamaLike, GemmaRMSNorm, ChannelsFirst]
    assert torch.equal(model(x), exact)
    with warnings.catch_warnings():  # a layer map's None says nothing
        warnings.simplefilter("error")
        rc.emulate_(model, LightNorm(), {"2": None, "3": None})


def test_a_look_alike_with_a_matrix_is_refused():
    layer = LlamaLike(16)
    layer.weight = nn.Parameter(torch.ones(2, 16))
    with pytest.raises(RecoupError, match=r"layer 'norm' \(LlamaLike\): its weight \[2, 16\] is no vector"):
        rc.emulate_(nn.ModuleDict({"norm": layer}), LightNorm())


def test_what_is_a_row_norm():
    assert like_rms_norm(LlamaLike)
    assert not any(map(like_rms_norm, (GemmaRMSNorm, nn.RMSNorm, nn.Linear)))
    assert all(map(is_row_norm, (nn.LayerNorm(4), nn.RMSNorm(4), ChannelsFirst(4), LlamaLike(4))))
    assert not any(map(is_row_norm, (nn.GroupNorm(2, 4), nn.BatchNorm1d(4), GemmaRMSNorm(4))))


@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm])
def test_the_gain_is_the_least_squares_factor(kind):
    torch.manual_seed(0)
    layer = kind(32)
    with torch.no_grad():
        for value in layer.parameters():
            value.normal_()
    gamma = layer.weight.clone()
    batches = [torch.randn(9, 32) * 3, torch.randn(5, 32) + 1]
    z = torch.cat([layer(x) for x in batches]).detach().double().numpy()
    model = rc.emulate_(nn.Sequential(layer), LightNorm())
    y = torch.cat([model(x) for x in batches]).detach().double().numpy()
    beta = 0 if kind is nn.RMSNorm else layer.bias.detach().double().numpy()
    y, z = y - beta, z - beta
    square = (y * y).sum(0)
    expected = np.where(square > 0, (z * y).sum(0) / np.where(square > 0, square, 1), 1).astype(np.float32)
    correct_gain_(model, batches)
    assert layer.gain.dtype == torch.float32
    np.testing.assert_allclose(layer.gain.numpy(), expected, rtol=1e-6)
    assert torch.equal(layer.weight, gamma)
    shape = layer.gain * 1.0
    again = correct_gain_(model, batches)[0].gain  # replaces, does not build on
    assert torch.equal(again, shape)


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


def test_plans_by_what_was_taken():
    x = torch.randn(32, 16, generator=torch.Generator().manual_seed(0))
    mixed = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.LayerNorm(16)).eval()
    rc.repair_(rc.emulate_(copy.deepcopy(mixed), LightNorm()), [x])  # gain, then statistics
    only = rc.repair_(rc.emulate_(copy.deepcopy(mixed), LightNorm(), {"1": None}), [x])
    assert [line.name for line in rc.describe(only).lines] == ["2"]  # the batch norm in float is left alone
    both = rc.emulate_(copy.deepcopy(mixed), LightNorm())
    rc.recalibrate_(both, [x])
    with pytest.raises(RecoupError, match="batch norm statistics were repaired"):
        correct_gain_(both, [x])
    with pytest.raises(RecoupError, match=r"correct_gain_: the model has no layer or RMS norm"):
        correct_gain_(rc.emulate_(nn.Sequential(nn.BatchNorm1d(16)), LightNorm()), [x])


def test_the_gain_of_what_never_moves():
    model = rc.emulate_(nn.Sequential(nn.LayerNorm(16, elementwise_affine=False)), LightNorm())
    with pytest.warns(RecoupWarning, match="16 features of 1 layers gave only beta, keep gain 1"):
        correct_gain_(model, [torch.ones(4, 16)])
    assert torch.equal(model[0].gain, torch.ones(16))
    model.load_state_dict(model.state_dict())  # without a weight
    assert torch.equal(model[0].gain, torch.ones(16))


def test_costs():
    model = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), LlamaLike(16))
    config = LightNorm(shared="max")
    plain, narrow = (rc.cost(model, policy, (16,)) for policy in ({}, {"1": config, "2": config}))
    assert [layer.kind for layer in plain.layers] == ["Linear", "LayerNorm", "LlamaLike"]
    for one, other in zip(plain.layers[1:], narrow.layers[1:], strict=True):
        assert (one.traffic, other.traffic) == (2 * 16 * 4, 2 * 16 * 7.25 / 8)
    rc.emulate_(model, config)
    assert rc.cost(model, None, (16,)).layers[1:] == narrow.layers[1:]
    assert widths(config, 16, over="layer") == widths(config.replace(axis="place"), 16, places=3, over="rms")
    assert widths(config, 16, over="layer") == Widths(160, 160, 50, 3 * 7.25 + 2 * 6.5)
    rows = traffic(model, torch.zeros(3, 16)).layers
    assert [(row.kind, row.over, row.channels, row.elements) for row in rows] == [
        ("LayerNorm", "layer", 16, 48),
        ("LlamaLike", "rms", 16, 48),
    ]
    assert rows[0].blocks == 48 * 34.75
    assert rows[0].operations == Operations(144, 96, 96, 3, 0)
    assert rows[1].operations == Operations(0, 96, 48, 3, 0)
    assert rows[1].conventional_operations == Operations(48, 144, 0, 6, 3)
