"""Products in a module's own forward are told by its code, and named where hardware leaves them in float."""

import re
import warnings

import pytest
import torch
from torch import nn

import recoup as rc
from recoup.network.own_products import multiplies_itself

TOKENS = torch.randint(5, 50, (6, 9), generator=torch.Generator().manual_seed(0))
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 50}


def blended(q, k):
    return (q @ k.transpose(-2, -1)).softmax(-1)


class Written(nn.Module):
    """Attention as it stands in many a network; ``way`` says how its products are written."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.qkv, self.out = way, nn.Linear(8, 24), nn.Linear(8, 8)


class AtSign(Written):
    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out((q @ k.transpose(1, 2)).softmax(-1) @ v)


class InAMethod(Written):
    def attend(self, q, k, v):
        return torch.bmm(torch.baddbmm(q.new_zeros(1, 1, 1), q, k.transpose(1, 2)).softmax(-1), v)

    def forward(self, x):
        return self.out(self.attend(*self.qkv(x).chunk(3, -1)))


class InAFunction(Written):
    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out(torch.einsum("bts,bsd->btd", blended(q, k), v))


class OfTheBase(InAMethod):
    def forward(self, x):
        return super().forward(x) + 1


class Fused(Written):
    def forward(self, x):
        return self.out(nn.functional.scaled_dot_product_attention(*self.qkv(x).chunk(3, -1)))


class Plain(Written):
    """No product of its own: a child is called as a product is."""

    def __init__(self, way: str) -> None:
        super().__init__(way)
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return self.linear(self.qkv(x)[..., :8]) * x


class RotaryEmbedding(nn.Module):
    """Angles, as transformers makes them."""

    def forward(self, x):
        return (torch.ones(8, 1) @ x[:1, :1]).cos()


class PositionEmbeddingRandom(RotaryEmbedding):
    """SAM's."""


class RotaryEmbedding2D(RotaryEmbedding):
    pass


class RoPEAttention(AtSign):
    """Its name is that of angles, and of what uses them: SAM 2's."""


class PositionAttentionModule(InAMethod):
    """DANet's."""


NAMED = [RoPEAttention, PositionAttentionModule]


@pytest.mark.parametrize("kind", [*NAMED, AtSign, InAMethod, InAFunction, OfTheBase, Fused])
def test_they_are_named_under_hardware_for_products(kind):
    x = torch.randn(2, 4, 8)
    for config in (rc.NBSMT(), rc.LBA(), rc.TensorCore.hopper_fp8()):
        model = nn.Sequential(nn.Linear(8, 8), kind("own"), nn.Linear(8, 8))
        rc.calibrate_(model, [x])
        said = rf"1 layers with products in their own forward, which stay in float \({type(config).__name__} runs"
        with pytest.warns(rc.RecoupWarning, match=rf"{said} those of layers\): 1 \({kind.__name__}\)"):
            rc.emulate_(model, config)
        model(x)
        rc.restore_(model)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            rc.emulate_(model, config, layers={"1": None})
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # hardware for norms does not run them
        rc.emulate_(nn.Sequential(kind("own"), nn.LayerNorm(16)), rc.LightNorm())


TABLES = [RotaryEmbedding, PositionEmbeddingRandom, RotaryEmbedding2D]


@pytest.mark.parametrize("make", [lambda: Plain("none"), *TABLES, lambda: nn.Linear(2, 2), nn.Identity])
def test_what_has_none_is_not(make):
    assert not multiplies_itself(make())


class Flexible(nn.Module):
    def forward(self, q):
        from torch.nn.attention.flex_attention import flex_attention

        return flex_attention(q, q, q)


class InPlace(nn.Module):
    def forward(self, x):
        return x.new_zeros(x.shape).baddbmm_(x, x)


class Chain(nn.Module):
    def forward(self, x):
        return torch.linalg.multi_dot([x, x, x])


@pytest.mark.parametrize("kind", [Flexible, InPlace, Chain])
def test_products_by_their_other_names(kind):
    assert multiplies_itself(kind())


def _mpnet(transformers):
    return transformers.MPNetModel(transformers.MPNetConfig(**SIZES)), "attention.attn", "MPNetSelfAttention"


def _deberta(transformers):
    config = transformers.DebertaV2Config(**SIZES, relative_attention=True, pos_att_type=["c2p", "p2c"])
    return transformers.DebertaV2Model(config), "attention.self", "DisentangledSelfAttention"


@pytest.mark.parametrize("make", [_mpnet, _deberta])
def test_attention_that_does_not_ask_the_interface(make):
    model, name, kind = make(pytest.importorskip("transformers"))
    names = [re.escape(f"encoder.layer.{layer}.{name} ({kind})") for layer in range(2)]
    with pytest.warns(rc.RecoupWarning, match=f"2 layers with products .*: {', '.join(names)}$"):
        rc.emulate_(model.eval(), rc.LBA())


def test_attention_that_asks_it_is_not_named():
    transformers = pytest.importorskip("transformers")
    model = transformers.BertModel(transformers.BertConfig(**SIZES))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rc.emulate_(model.eval(), rc.LBA())


def test_attention_with_what_is_not_emulated_is_named_by_calibration():
    transformers = pytest.importorskip("transformers")
    config = transformers.Gemma2Config(**SIZES, head_dim=8, num_key_value_heads=2, attn_logit_softcapping=50.0)
    model = transformers.Gemma2ForCausalLM(config).eval()
    said = r"2 attentions have softcap, which is not emulated, and stay in float: model\.layers\.0\.self_attn, "
    with pytest.warns(rc.RecoupWarning, match=f"calibrate_: {said}"):
        rc.calibrate_(model, [TOKENS])
    rc.emulate_(model, rc.NBSMT())
    model(TOKENS)
    rc.restore_(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rc.calibrate_(model, [TOKENS], layers={"re:.*self_attn": None})
