"""Models of Hugging Face transformers: their norms are converted, or named, trained through and given back."""

import warnings

import pytest
import torch

import recoup as rc
from recoup.errors import RecoupWarning
from recoup.lightnorm import LightNorm
from recoup.lightnorm.rows.layers import LightRows

pytestmark = pytest.mark.slow  # importing transformers takes seconds
TOKENS = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(0))
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50}


def model_of(name):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if name == "GPT2":
        config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=50, n_positions=16)
        return transformers.GPT2LMHeadModel(config).eval()
    if name == "T5":
        config = transformers.T5Config(vocab_size=50, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2)
        return transformers.T5EncoderModel(config).eval()
    extra = {"num_key_value_heads": 2} if name != "Bert" else {}
    extra |= {"head_dim": 16} if name == "Gemma" else {}
    kind = getattr(transformers, f"{name}Model" if name == "Bert" else f"{name}ForCausalLM")
    return kind(getattr(transformers, f"{name}Config")(**SIZES, **extra)).eval()


@pytest.mark.parametrize(
    ("name", "norms"), [("Llama", 5), ("Mistral", 5), ("Qwen2", 5), ("Olmo2", 9), ("T5", 5), ("GPT2", 5), ("Bert", 5)]
)
def test_norms_are_converted_and_given_back(name, norms):
    model = model_of(name)
    exact = model(TOKENS)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error", RecoupWarning)
        rc.emulate_(model, LightNorm.range())
    assert sum(isinstance(module, LightRows) for module in model.modules()) == norms
    y = model(TOKENS)[0]
    assert not torch.equal(y, exact)
    near = float((y - exact).detach().norm() / exact.detach().norm()) < 0.5
    assert near or name == "Olmo2"  # it norms what a random network makes smaller than sqrt(eps); eps is added to s
    y.square().mean().backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())
    rc.repair_(model, [TOKENS])
    rc.restore_(model)
    assert torch.equal(model(TOKENS)[0], exact)


def test_what_only_is_called_so_is_named():
    model = model_of("Gemma")
    model.add_module("extra", torch.nn.LayerNorm(32))
    with pytest.warns(RecoupWarning, match=r"5 layers left in float.*model.norm \(GemmaRMSNorm\)"):
        rc.emulate_(model, LightNorm())
