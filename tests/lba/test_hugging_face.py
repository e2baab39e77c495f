"""Models of Hugging Face transformers: everything that multiplies is converted, reachable, and given back."""

import copy
import functools
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F

import recoup as rc
from recoup import lba
from recoup.lba import LBA
from recoup.lba.hugging_face import LBAConv1D, LBAInterfaceAttention
from recoup.lba.repair import fitted_chunk
from recoup.network.emulated import emulated_layers
from recoup.network.hugging_face import asks_interface, in_words_of_the_interface

transformers = pytest.importorskip("transformers")

NEAR, NARROW = LBA.fp32(), LBA.biased(3, 4)
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
TOKENS = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(0))
PADDING = torch.ones(2, 9, dtype=torch.long).index_fill(1, torch.arange(3), 0)


def gpt2():
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50, n_positions=16)
    return transformers.GPT2LMHeadModel(config), {"input_ids": TOKENS}


def bert():
    config = transformers.BertConfig(**SIZES, vocab_size=50)
    return transformers.BertForSequenceClassification(config), {"input_ids": TOKENS, "attention_mask": PADDING}


def vit():
    config = transformers.ViTConfig(**SIZES, image_size=8, patch_size=4)
    return transformers.ViTForImageClassification(config), {"pixel_values": torch.rand(2, 3, 8, 8)}


def llama():
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2, vocab_size=50)
    return transformers.LlamaForCausalLM(config), {"input_ids": TOKENS, "attention_mask": PADDING}


ATTENTION = {
    gpt2: "transformer.h.0.attn",
    bert: "bert.encoder.layer.0.attention.self",
    llama: "model.layers.0.self_attn",
}


def built(make, implementation="sdpa"):
    torch.manual_seed(0)
    model, inputs = make()
    model.set_attn_implementation(implementation)
    return model.eval(), inputs


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("make", [gpt2, bert, vit, llama])
def test_everything_is_converted_and_given_back(make, implementation):
    model, inputs = built(make, implementation)
    before, kinds = logits(model, inputs), [type(module) for module in model.modules()]
    state = copy.deepcopy(model.state_dict())
    rc.emulate_(model, NARROW)
    layers = emulated_layers(model)
    attention = [name for name, layer in layers.items() if isinstance(layer, LBAInterfaceAttention)]
    assert len(attention) == 2
    assert list(model.state_dict()) == list(state)
    assert not torch.equal(logits(model, inputs), before)
    for name, layer in layers.items():
        layer.mode = "float" if name not in attention else "emulate"
    narrow = logits(model, inputs)
    assert not torch.equal(narrow, before)  # the products alone
    for layer in layers.values():
        layer.mode = "float"
    assert torch.equal(logits(model, inputs), before)
    rc.restore_(model)
    assert [type(module) for module in model.modules()] == kinds
    assert torch.equal(logits(model, inputs), before)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("make", [gpt2, bert, vit, llama])
def test_it_is_the_same_network_at_full_precision(make, implementation):
    model, inputs = built(make, implementation)
    before = logits(model, inputs)
    rc.emulate_(model, NEAR)
    shown = slice(None)
    got = logits(model, inputs)
    if make is llama:  # rows of padding see nothing and hold what each implementation puts there
        shown = PADDING.bool()
    torch.testing.assert_close(got[shown], before[shown])  # another order of sums


@pytest.mark.parametrize("make", list(ATTENTION))
def test_each_attention_is_reached_by_name_with_its_own_config(make):
    model, inputs = built(make)
    name = ATTENTION[make]
    other = name.replace(".0.", ".1.")
    rc.emulate_(model, None, {name: NARROW, other: NEAR})
    layers = emulated_layers(model)
    assert {n: layer.config for n, layer in layers.items()} == {name: NARROW, other: NEAR}
    seen = []
    layers[name].register_forward_hook(lambda *_: seen.append(1))
    narrow = logits(model, inputs)
    assert seen == [1]
    layers[name].mode = "float"
    assert not torch.equal(logits(model, inputs), narrow)
    rc.restore_(model)
    rc.emulate_(model, NARROW, {f"re:.*{name.split('.')[-1]}": None})
    assert not {name, other} & set(emulated_layers(model))
    rc.restore_(model)
    with pytest.raises(rc.RecoupError, match=r"Attention\) has no operand scales: run calibrate_"):
        rc.emulate_(model, None, {name: rc.NBSMT()})


def test_the_products_are_those_of_attention():
    model, _ = built(llama)
    rc.emulate_(model, None, {ATTENTION[llama]: NARROW})
    layer, seen = emulated_layers(model)[ATTENTION[llama]], []
    layer.o_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    hidden, rotary = torch.randn(1, 5, 32), (torch.ones(1, 5, 8), torch.zeros(1, 5, 8))
    with torch.no_grad():
        layer(hidden, position_embeddings=rotary, attention_mask=None)
        q, k, v = (
            part(hidden).view(1, 5, -1, 8).transpose(1, 2) for part in (layer.q_proj, layer.k_proj, layer.v_proj)
        )
        wanted = lba.attention(q, k, v, NARROW, causal=True, scale=layer.scaling)
    assert torch.equal(seen[0], wanted.transpose(1, 2).reshape(1, 5, 32))


def test_conv1d_is_a_linear_layer_of_the_transposed_weight():
    model, inputs = built(gpt2)
    rc.emulate_(model, NARROW)
    layer = emulated_layers(model)["transformer.h.0.mlp.c_fc"]
    assert isinstance(layer, LBAConv1D)
    x = torch.randn(2, 3, 32)
    linear = lba.LBALinear(32, 128, config=NARROW)
    with torch.no_grad():
        linear.weight.copy_(layer.weight.t())
        linear.bias.copy_(layer.bias)
    assert torch.equal(layer(x), linear(x))
    with torch.no_grad():
        layer.bias.normal_()
    rc.lba.correct_gain_(model, [inputs])
    assert layer.gain.shape == (128,)
    rows = {row.name: row for row in lba.profile(model, [inputs], outputs=16)}
    assert (rows["transformer.h.0.mlp.c_fc"].terms, rows["transformer.h.0.mlp.c_fc"].kind) == (32, "Conv1D")
    rc.restore_(model)
    rc.lba.choose_chunks_(rc.emulate_(model, NARROW))
    assert emulated_layers(model)["transformer.h.0.mlp.c_fc"].config.chunk == fitted_chunk(32)
    x.requires_grad_()
    emulated_layers(model)["transformer.h.0.mlp.c_fc"](x).sum().backward()
    assert x.grad is not None
    assert layer.weight.grad.shape == (32, 128)


@pytest.mark.parametrize("make", [gpt2, llama])
def test_copies_and_pickles_compute_the_same(make):
    model, inputs = built(make)
    before = logits(model, inputs)
    rc.emulate_(model, NARROW)
    narrow = logits(model, inputs)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin, inputs), narrow)
        assert torch.equal(logits(rc.restore_(twin), inputs), before)
    assert torch.equal(logits(model, inputs), narrow)


@pytest.mark.parametrize("make", [gpt2, bert, llama])
def test_an_attention_chosen_by_hand_is_kept_and_given_back(make):
    model, inputs = built(make)
    before = logits(model, inputs)
    model.set_attn_implementation(lba.register_transformers(NARROW, "recoup_by_hand"))
    by_hand = logits(model, inputs)
    assert not torch.equal(by_hand, before)
    assert torch.equal(logits(rc.restore_(model), inputs), before)
    model.set_attn_implementation("recoup_by_hand")
    rc.emulate_(model, NEAR)
    assert emulated_layers(model)[ATTENTION[make]].config == NARROW
    for name, layer in emulated_layers(model).items():
        if isinstance(layer, LBAInterfaceAttention):
            assert ATTENTION[make].split(".")[-1] in name
        else:
            layer.mode = "float"
    assert torch.equal(logits(model, inputs), by_hand)
    assert torch.equal(logits(rc.restore_(model), inputs), before)


def test_what_cannot_be_read_is_refused():
    model, _ = built(llama)
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(
        rc.RecoupError, match=r"self_attn' \(LlamaAttention\).*'flex_attention'.*set_attn_implementation"
    ):
        rc.emulate_(model, NARROW)
    assert not emulated_layers(model)
    model.config._attn_implementation = "sdpa"
    rc.emulate_(model, NARROW)
    layer = emulated_layers(model)[ATTENTION[llama]]
    with pytest.raises(rc.RecoupError, match=r"layer 'model\.layers.0.self_attn'.*has softcap, which"):
        layer(torch.randn(1, 2, 32), position_embeddings=(torch.ones(1, 2, 8),) * 2, attention_mask=None, softcap=30.0)


def test_a_bias_of_the_scores_is_added():
    q = torch.randn(1, 2, 4, 8)
    bias, mask = torch.randn(1, 2, 4, 4), torch.ones(4, 4, dtype=torch.bool).tril()
    unit = functools.partial(lba.attention, config=NEAR)
    for given, expected in [
        (None, F.scaled_dot_product_attention(q, q, q, bias)),
        (mask, F.scaled_dot_product_attention(q, q, q, bias.masked_fill(~mask, -torch.inf))),
        (torch.zeros(4, 4), F.scaled_dot_product_attention(q, q, q, bias)),
    ]:
        y, _ = in_words_of_the_interface(
            torch.nn.Identity(), q, q, q, given, unit, "t", is_causal=False, position_bias=bias
        )
        torch.testing.assert_close(y.transpose(1, 2), expected)


def test_hardware_of_scales_says_that_attention_stays_in_float():
    model, _ = built(gpt2)
    assert asks_interface(type(model.transformer.h[0].attn))
    assert not asks_interface(torch.nn.MultiheadAttention)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        model.lm_head.activation_scale = 0.1
        rc.emulate_(model, rc.NBSMT())
    told = " ".join(str(warning.message) for warning in seen)
    assert "because they are not calibrated (calibrate_ did not see them)" in told
    assert "transformer.h.1.mlp.c_fc (Conv1D)" in told
    assert "transformer.h.0.attn (GPT2Attention)" in told


def test_training_goes_through():
    model, inputs = built(bert)
    rc.emulate_(model.train(), NARROW)
    model(**inputs, labels=torch.tensor([0, 1])).loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "layer.0" in n)
