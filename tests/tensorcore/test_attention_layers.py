"""Attention and transformers on tensor cores: both products by hand, conversion, and what is given back."""

import copy

import pytest
import torch

import recoup as rc
from recoup import tensorcore
from recoup.errors import RecoupError
from recoup.models.attention import AttentionProducts
from recoup.network.emulated import emulated_layers
from recoup.tensorcore import TensorCore, matmul
from recoup.tensorcore.attention_layers import TensorCoreAttentionProducts
from recoup.tensorcore.hugging_face import TensorCoreConv1D, TensorCoreInterfaceAttention
from tests.tiers import slow_but

HOPPER, WIDE = TensorCore.hopper_fp8(), TensorCore.hopper_tf32()
E4M3 = rc.Float.parse("e4m3fn")


def heads(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def scaled(x):
    """An operand by the layers' equation, and its scale."""
    s = x.abs().max() / 448
    return rc.quantize(x / s, E4M3), s


def test_both_products_run_on_the_unit():
    q, k, v = (heads(2, 3, 5, 8, seed=i) for i in range(3))
    (a, s), (b, t) = scaled(q * 8**-0.5), scaled(k.mT)
    scores = matmul(a, b, HOPPER) * (s * t)
    (p, s), (c, t) = scaled(torch.softmax(scores, -1)), scaled(v)
    assert torch.equal(tensorcore.attention(q, k, v, HOPPER), matmul(p, c, HOPPER) * (s * t))


@pytest.mark.parametrize("causal", [False, True])
def test_it_is_near_torchs_with_grouped_queries_and_masks(causal):
    q, k, v = heads(2, 4, 5, 8), heads(2, 2, 5, 8, seed=1), heads(2, 2, 5, 8, seed=2)
    mask = torch.rand(5, 5, generator=torch.Generator().manual_seed(3)) < 0.7
    mask |= torch.eye(5, dtype=torch.bool)
    if causal:
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        got = tensorcore.attention(q, k, v, WIDE, causal=True)
    else:
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
        got = tensorcore.attention(q, k, v, WIDE, mask=mask)
    torch.testing.assert_close(got, expected, atol=4e-3, rtol=4e-3)


def test_the_module_has_modes_and_gradients():
    layer = TensorCoreAttentionProducts(HOPPER)
    q, k, v = (heads(2, 40, 64, seed=i).requires_grad_() for i in range(3))
    y = layer(q, k, v, causal=True)
    assert torch.equal(y, tensorcore.attention(q, k, v, HOPPER, causal=True))
    y.sum().backward()
    assert q.grad is not None
    assert bool(q.grad.isfinite().all())
    layer.mode = "baseline"
    assert 0 < float((layer(q, k, v, causal=True) - y).detach().abs().max()) < 0.05
    layer.mode = "float"
    assert torch.equal(layer(q, k, v, causal=True), AttentionProducts()(q, k, v, causal=True))


def test_what_does_not_fit_is_refused():
    with pytest.raises(RecoupError, match="do not fit"):
        tensorcore.attention(heads(2, 3, 8), heads(2, 3, 7), heads(2, 3, 8), HOPPER)
    with pytest.raises(RecoupError, match=r"block: q k\^T: q has 24 elements that are NaN or infinite"):
        tensorcore.attention(heads(2, 3, 8) * float("nan"), heads(2, 3, 8), heads(2, 3, 8), HOPPER, layer="block")
    with pytest.raises(RecoupError, match="config must be a TensorCore"):
        TensorCoreAttentionProducts("hopper")  # type: ignore[arg-type]
    with pytest.raises(RecoupError, match="takes float32; k is"):
        tensorcore.attention(heads(2, 3, 8), heads(2, 3, 8).half(), heads(2, 3, 8), HOPPER)


def transformer(kind):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if kind == "gpt2":
        config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50, n_positions=16)
        return transformers.GPT2LMHeadModel(config).eval()
    config = transformers.LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, num_key_value_heads=2,
        vocab_size=50,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("kind", slow_but(["gpt2"], ["gpt2", "llama"]))
def test_transformers_are_converted_profiled_and_given_back(kind):
    model, tokens = transformer(kind), torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(0))
    before, state = model(tokens).logits.detach(), copy.deepcopy(model.state_dict())
    rc.emulate_(model, WIDE)
    layers = emulated_layers(model)
    assert sum(isinstance(layer, TensorCoreInterfaceAttention) for layer in layers.values()) == 2
    assert any(isinstance(layer, TensorCoreConv1D) for layer in layers.values()) == (kind == "gpt2")
    got = model(tokens).logits.detach()
    assert not torch.equal(got, before)
    torch.testing.assert_close(got, before, atol=5e-3, rtol=5e-3)
    rows = [row.name for row in tensorcore.profile(model, [tokens], outputs=8)]
    assert sum(name.endswith("(q k^T)") for name in rows) == sum(name.endswith("(p v)") for name in rows) == 2
    for layer in layers.values():
        layer.mode = "float"
    assert torch.equal(model(tokens).logits, before)
    rc.restore_(model)
    assert torch.equal(model(tokens).logits, before)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
