"""Models of Hugging Face transformers: their norms are converted, or named, trained through and given back."""

import ast
import re
import types
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import recoup as rc
from recoup.errors import RecoupWarning
from recoup.lightnorm import LightLayerNorm, LightNorm, LightRMSNorm
from recoup.lightnorm.rows.layers import LightRows
from recoup.network.row_norms import output_dtype_of

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
    # Olmo 2 norms what a random network would make smaller than sqrt(eps), and here eps is added to s.
    extra |= {"initializer_range": 0.5} if name == "Olmo2" else {}
    kind = getattr(transformers, f"{name}Model" if name == "Bert" else f"{name}ForCausalLM")
    return kind(getattr(transformers, f"{name}Config")(**SIZES, **extra)).eval()


def torch_s(module):
    """The drop-in for torch's norm of the same parameters."""
    kind = LightLayerNorm if module.kind == "layer" else LightRMSNorm
    unit = kind(module.shape, module.epsilon, config=module.config)
    unit.load_state_dict(module.state_dict())
    return unit


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
    calls = []
    watched = [module.register_forward_hook(lambda *call: calls.append(call)) for module in model.modules()]
    y = model(TOKENS)[0]
    for hook in watched:
        hook.remove()
    own = [call for call in calls if isinstance(call[0], LightRows)]
    assert len(own) == norms
    for module, (x,), output in own:
        assert torch.equal(output, torch_s(module)(x))
    distance = float((y - exact).detach().norm() / exact.detach().norm())
    assert 0 < distance < 0.15
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


NORMS_OF = {
    "llama.modeling_llama": "LlamaRMSNorm",
    "olmo2.modeling_olmo2": "Olmo2RMSNorm",
    "t5.modeling_t5": "T5LayerNorm",
}


@pytest.mark.parametrize("module", NORMS_OF)
def test_the_output_has_the_dtype_of_the_float_norm_s(module):
    """Whatever rule a release of transformers has."""
    kind = getattr(pytest.importorskip(f"transformers.models.{module}"), NORMS_OF[module])
    dtypes = torch.float16, torch.bfloat16, torch.float32, torch.float64
    for weight in dtypes:
        layer = kind(32).to(weight)
        inputs = [torch.randn(2, 32).to(dtype) for dtype in dtypes]
        expected = [layer(x).dtype for x in inputs]
        rc.emulate_(layer, LightNorm())
        assert [layer(x).dtype for x in inputs] == expected


CLASS = re.compile(r"^class \w+\(.*\):\n(?:(?:[ \t].*)?\n)+", re.MULTILINE)


def is_taken(text):
    """Whether LightNorm takes a class by its code, of the class's text."""
    (made,) = ast.parse(text).body
    for method in made.body:
        if isinstance(method, ast.FunctionDef) and method.name == "forward" and not method.decorator_list:
            method.returns = None
            for argument in method.args.args:
                argument.annotation = None
            whole = [*ast.parse("import torch").body, method]  # what is imported is called otherwise than a method
            made_of = compile(ast.Module(whole, []), "", "exec").co_consts
            code = next(value for value in made_of if isinstance(value, types.CodeType))
            kind = type(made.name, (nn.Module,), {"forward": types.FunctionType(code, {})})
            return output_dtype_of(kind) is not None
    return False


def test_how_many_classes_are_taken():
    """The figure in docs/lightnorm.md."""
    transformers = pytest.importorskip("transformers")
    page = (Path(__file__).parents[3] / "docs/lightnorm.md").read_text()
    ((told, version),) = re.findall(r"\((\d+)\s+classes of transformers ([\d.]+)", page)
    if not transformers.__version__.startswith(f"{version}."):
        pytest.skip(f"the page has counted the classes of transformers {version}")
    files = sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py"))
    classes = [text for file in files for text in CLASS.findall(file.read_text()) if "variance_epsilon" in text]
    assert sum(map(is_taken, classes)) == int(told)
