"""Transformers under LightNorm: conversion both ways, look-alikes and what only is called so, costs."""

import copy
import functools
import pickle
import warnings

import pytest
import torch
from torch import nn

import recoup as rc
from recoup.errors import RecoupError, RecoupWarning
from recoup.lightnorm import LightLayerNorm, LightNorm, LightRMSNorm, traffic
from recoup.lightnorm.cost import Operations, Widths, widths
from recoup.network.row_norms import is_row_norm, like_rms_norm, looks_like_norm

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


class Olmo2Like(LlamaLike):
    """Scaled before it is rounded."""

    def forward(self, hidden_states):
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return (self.weight * hidden_states).to(input_dtype)


class T5Like(LlamaLike):
    """In half precision where the weight is."""

    def forward(self, hidden_states):
        variance = hidden_states.to(torch.float32).pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)

        if self.weight.dtype in [torch.float16, torch.bfloat16]:
            hidden_states = hidden_states.to(self.weight.dtype)

        return self.weight * hidden_states


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


DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.mark.parametrize("kind", [LlamaLike, Olmo2Like, T5Like, nn.RMSNorm])
@pytest.mark.parametrize("weight", DTYPES)
@pytest.mark.filterwarnings("ignore:Mismatch dtype")  # torch's RMS norm takes them, and says that it is slower
def test_the_output_has_the_dtype_of_the_float_norm_s(kind, weight):
    for given in DTYPES:
        x = torch.randn(2, 16, generator=torch.Generator().manual_seed(0)).to(given)
        layer = kind(16).to(weight)
        expected = layer(x)
        y = rc.emulate_(layer, LightNorm.range())(x)
        assert y.dtype == expected.dtype, given
        assert float((y - expected).double().detach().norm() / expected.double().detach().norm()) < 0.5
        y.sum().backward()
        assert layer.weight.grad.dtype == weight


def test_look_alikes_are_copied_pickled_and_compiled():
    unit, x = rc.emulate_(T5Like(16).bfloat16(), LightNorm.range()), torch.randn(2, 16).half()
    for other in (
        copy.deepcopy(unit),
        pickle.loads(pickle.dumps(unit)),
        torch.compile(copy.deepcopy(unit), backend="aot_eager", fullgraph=True),
    ):
        assert other(x).dtype == torch.bfloat16
        assert torch.equal(other(x), unit(x))
    rc.restore_(unit)
    assert vars(unit).keys() == vars(T5Like(16)).keys()


def test_parameters_that_a_norm_does_not_use_stay_unused():
    class Biased(nn.RMSNorm):
        def __init__(self, size):
            super().__init__(size)
            self.bias = nn.Parameter(torch.ones(size))

    x = torch.randn(2, 16)
    for kind in (Biased, LlamaLike):
        layer = kind(16)
        layer.bias = nn.Parameter(torch.ones(16))
        plain = LightRMSNorm(16, 1e-6 if kind is LlamaLike else None, config=LightNorm())
        plain.load_state_dict({"weight": layer.weight})
        rc.emulate_(layer, LightNorm())
        assert torch.equal(layer(x), plain(x))
    assert [name for name, _ in LightRMSNorm(16).named_parameters()] == ["weight"]
    assert not hasattr(LightRMSNorm(16), "bias")


def doubled(forward):
    @functools.wraps(forward)
    def wrapper(self, hidden_states):
        return 2 * forward(self, hidden_states)

    return wrapper


class NotAFunction:
    """What stands under forward in a class of a compiler's."""

    def __get__(self, instance, owner=None):
        return LlamaLike.forward.__get__(instance, owner)


def test_what_is_a_row_norm():
    assert like_rms_norm(LlamaLike)
    assert not any(map(like_rms_norm, (GemmaRMSNorm, nn.RMSNorm, nn.Linear)))
    assert all(map(is_row_norm, (nn.LayerNorm(4), nn.RMSNorm(4), ChannelsFirst(4), LlamaLike(4))))
    assert not any(map(is_row_norm, (nn.GroupNorm(2, 4), nn.BatchNorm1d(4), GemmaRMSNorm(4))))


def test_a_forward_that_is_more_than_the_norm_s():
    kind = type("LlamaRMSNorm", (LlamaLike,), {})
    assert like_rms_norm(kind)
    for forward in (doubled(LlamaLike.forward), NotAFunction(), functools.partialmethod(LlamaLike.forward)):
        kind.forward = forward  # what was found before does not stay
        assert not like_rms_norm(kind)
        layer = kind(16)
        with pytest.raises(RecoupError, match="LightNorm does not know what they compute"):
            rc.emulate_(layer, LightNorm())
        assert not is_row_norm(layer)
    del kind.forward
    assert like_rms_norm(kind)


def test_norms_of_other_kinds_are_named():
    class RMSNormGated(LlamaLike):
        def forward(self, hidden_states, gate=None):
            return super().forward(hidden_states) * (1.0 if gate is None else gate.sigmoid())

    class AdaLayerNormZero(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.norm = nn.Linear(4, 32), nn.LayerNorm(16, elementwise_affine=False)

        def forward(self, x, steps):
            scale, shift = self.linear(steps).chunk(2, -1)
            return self.norm(x) * (1 + scale) + shift

    class FrozenBatchNorm2d(nn.Module):
        pass

    class PreLayerNormBlock(nn.Sequential):
        pass

    class TextAdaRmsNorm(nn.Module):
        pass

    class NoRMSNormal(nn.Module):
        pass

    block = PreLayerNormBlock(nn.LayerNorm(16))
    odd = {
        "gated": RMSNormGated(16),
        "ada": AdaLayerNormZero(),
        "frozen": FrozenBatchNorm2d(),
        "text": TextAdaRmsNorm(),
    }
    model = nn.ModuleDict({**odd, "block": block, "none": NoRMSNormal()})
    with pytest.warns(RecoupWarning) as told:
        rc.emulate_(model, LightNorm())
    (said,) = [str(one.message) for one in told]
    assert "4 layers left in float, because LightNorm does not know what they compute" in said
    for name, layer in odd.items():
        assert f"{name} ({type(layer).__name__})" in said
    assert isinstance(model["ada"].norm, LightLayerNorm)
    assert not looks_like_norm(block)


class Named(LlamaLike):
    def extra_repr(self):
        return "nothing of use"


@pytest.mark.parametrize("kind", [LlamaLike, Named])
@pytest.mark.parametrize(
    ("eps", "said"),
    [
        (-1.0, r"\(variance_epsilon=-1.0\): variance_epsilon must be a number from 0 to 1"),
        (None, r"\(variance_epsilon=None\): variance_epsilon must be a number from 0 to 1"),
        (torch.tensor([1e-6]), r"its variance_epsilon is a tensor \[1\].* set variance_epsilon = float"),
        (nn.Parameter(torch.tensor(1e-6)), r"its variance_epsilon is a tensor \[\].* leave it in float"),
    ],
)
def test_an_eps_that_no_unit_adds(kind, eps, said):
    layer = kind(16)
    layer.variance_epsilon = eps
    with pytest.raises(RecoupError, match=rf"layer 'norm' \({kind.__name__} \[16\]\): .*{said}"):
        rc.emulate_(nn.ModuleDict({"norm": layer}), LightNorm())
    assert type(layer) is kind


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
