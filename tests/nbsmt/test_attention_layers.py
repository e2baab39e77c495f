"""Attention on the shared multiplier: both products against the integers of `port`, calibration, networks whole."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import recoup as rc
from recoup.formats import Int
from recoup.models.attention import AttentionProducts
from recoup.models.transformer import CharGPT
from recoup.nbsmt import NBSMT, AttentionScales, attention
from recoup.nbsmt.attention_layers import NBSMTAttentionProducts
from recoup.nbsmt.hugging_face import NBSMTInterfaceAttention
from recoup.nbsmt.product_ops import _plain, batched, product_backward
from recoup.nbsmt.weights import weight_operand
from recoup.network.emulated import emulated_layers, running
from recoup.network.sites import survey
from recoup.network.systolic import Array
from tests.nbsmt import port
from tests.tiers import slow_but

CONFIGS = [
    NBSMT(1),
    NBSMT(2),
    NBSMT(2, "S+aW", "half_up", "adjacent"),
    NBSMT(2, "W", port=4),
    NBSMT(2, "S", "zero"),
    NBSMT(4, "S+Aw", pairing="adjacent", port=4),
    NBSMT(4),
    NBSMT(4, "A", "half_up"),
    NBSMT(2, accumulator=Int(14, overflow="saturate")),
    NBSMT(4, "S+W", accumulator=Int(13, overflow="wrap")),
]
SCALES = AttentionScales(0.01, 0.02, 1 / 255, 0.015)
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
TOKENS = torch.randint(50, (3, 9), generator=torch.Generator().manual_seed(0))
PADDING = torch.ones(3, 9, dtype=torch.long).index_fill(1, torch.arange(3), 0)


def heads(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_integers(x, w, scales, config, signed):
    """The product of float operands [M, K] and [K, N] by numpy and `port`'s integers."""
    (s, t), low = (np.float32(one) for one in scales), -128 if signed else 0
    a = np.clip(np.rint(x.numpy() / s), low, low + 255).astype(int).tolist()
    b = np.clip(np.rint(w.numpy() / t), -128, 127).astype(int).tolist()
    register = config.accumulator
    bits = (None, "saturate") if register is None else (register.bits, register.overflow)
    fields = (config.threads, config.policy, config.rounding, config.pairing)
    sums, _ = port.matmul(a, b, *fields, config.port if signed else "unsigned", *bits)
    return torch.from_numpy(np.asarray(sums, np.float64).astype(np.float32) * np.float32(s * t))


@pytest.mark.parametrize("config", CONFIGS, ids=repr)
@pytest.mark.parametrize("signed", [True, False])
def test_a_product_is_that_of_integers(config, signed):
    x, w = heads(2, 3, 7, seed=1), heads(2, 7, 5, seed=2)
    x = x if signed else torch.softmax(3 * x, -1)
    x[:, :, 2] = 0
    scales = (0.011, 0.013) if signed else (1 / 255, 0.013)
    scales = tuple(float(np.float32(s)) for s in scales)
    got = batched(x, w, scales, config, 128 if signed else 0, "test", "q k")
    expected = torch.stack([by_integers(x[i], w[i], scales, config, signed) for i in range(2)])
    assert torch.equal(got, expected)


def test_torchs_operators_lay_out_the_same_operands():
    x, zero, config = heads(6, 9), 128, NBSMT(4, "S+aW")
    operand = weight_operand(torch.randint(-128, 128, (5, 9)).to(torch.int8), config, zero)
    plain, faults = _plain(x, 0.02, zero, config, operand)
    emitted = rc.nbsmt.cpu.operands(x, 0.02, config, operand.activations, torch.float32, zero=zero)[0]
    assert torch.equal(plain, emitted)
    assert faults == 0
    assert _plain(x, 0.02, 0, config, operand)[1] == 1


@pytest.mark.parametrize("config", [NBSMT(2), NBSMT(4, "S+W")], ids=repr)
def test_attention_is_its_two_products_with_masks_grouped_queries_and_more_keys_than_tokens(config):
    q, k, v = heads(2, 4, 3, 8), heads(2, 2, 6, 8, seed=1), heads(2, 2, 6, 8, seed=2)
    mask = torch.ones(2, 1, 3, 6, dtype=torch.bool)
    mask[0, :, :, :2] = False  # padding on the left
    got = attention(q, k, v, config, SCALES, mask=mask, causal=True)
    later = torch.ones(3, 6, dtype=torch.bool).triu(4)
    for b in range(2):
        for h in range(4):
            x, keys, values = q[b, h] * (1 / 8**0.5), k[b, h // 2], v[b, h // 2]
            scores = by_integers(x, keys.T.contiguous(), SCALES.of("q k"), config, True)
            p = torch.softmax(scores.masked_fill(later | ~mask[b, 0], -torch.inf), -1)
            assert torch.equal(got[b, h], by_integers(p, values, SCALES.of("p v"), config, False))
    blind = attention(q, k, v, config, SCALES, mask=torch.zeros(3, 6, dtype=torch.bool))
    assert torch.equal(blind, torch.zeros_like(q))


def test_gradients_pass_straight_through_where_no_code_is_clipped():
    q, k, v = (heads(2, 5, 8, seed=i).requires_grad_() for i in range(3))
    fine = AttentionScales(0.02, 0.03, 1 / 255, 0.03)
    attention(q, k, v, NBSMT(2), fine).square().sum().backward()
    given = [t.grad for t in (q, k, v)]
    for t in (q, k, v):
        t.grad = None
    torch.nn.functional.scaled_dot_product_attention(q, k, v).square().sum().backward()
    for t, grad in zip((q, k, v), given, strict=True):
        assert grad is not None
        assert t.grad is not None
        assert float((grad - t.grad).norm() / t.grad.norm()) < 0.25
    x, w = torch.tensor([[[3.0, 0.5]]], requires_grad=True), torch.tensor([[[1.0], [9.0]]], requires_grad=True)
    batched(x, w, (0.01, 0.05), NBSMT(1), 128, "test", "q k").sum().backward()
    assert x.grad.tolist() == [[[0.0, np.float32(127 * 0.05)]]]  # 3.0 is beyond 1.27, and 9.0 beyond 6.35
    assert w.grad.flatten().tolist() == pytest.approx([1.27, 0.0])


def test_what_does_not_fit_is_refused():
    q = heads(2, 5, 8)
    with pytest.raises(rc.RecoupError, match=r"block: q k\^T: k .* holds NaN or infinity"):
        attention(q, q * torch.nan, q, NBSMT(2), SCALES, layer="block")
    with pytest.raises(rc.RecoupError, match=r"q k\^T: q .* holds NaN or infinity"):
        attention(q * torch.inf, q, q, NBSMT(2), SCALES)
    with pytest.raises(rc.RecoupError, match="scales must be an AttentionScales of four numbers above 0"):
        attention(q, q, q, NBSMT(2), (1.0, 0.0, 1.0, 1.0))
    with pytest.raises(rc.RecoupError, match="config must be an NBSMT"):
        attention(q, q, q, rc.LBA(), SCALES)
    with pytest.raises(rc.RecoupError, match="has no operand scales: run calibrate_"):
        NBSMTAttentionProducts(NBSMT(2))(q, q, q)
    with pytest.raises(rc.RecoupError, match="takes float32; k is"):
        attention(q, q.half(), q, NBSMT(2), SCALES)


def gpt():
    torch.manual_seed(0)
    model = CharGPT(20, layers=2, width=16, heads=2, context=12).eval()
    return model, torch.randint(20, (4, 12), generator=torch.Generator().manual_seed(1))


def test_calibration_measures_what_the_products_multiply_and_leaves_the_scales_of_layers():
    model, x = gpt()
    plain, before = copy.deepcopy(model), model(x).detach()
    rc.calibrate_(plain, [x], {r"re:.*attention": None})
    assert plain.blocks[0].attention.operand_scales is None
    rc.calibrate_(model, [x])
    assert {n: getattr(m, "activation_scale", None) for n, m in model.named_modules()} == {
        n: getattr(m, "activation_scale", None) for n, m in plain.named_modules()
    }
    assert torch.equal(model(x), before)
    seen = []
    with model.blocks[1].attention.register_forward_pre_hook(lambda _, args: seen.append(args)), torch.no_grad():
        model(x)
    q, k, v = (t.numpy().astype(np.float64) for t in seen[0][:3])
    scores = np.where(np.tril(np.ones((12, 12), bool)), q @ k.swapaxes(2, 3) / 8**0.5, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    largest = [np.abs(t).max((1, 2, 3)).mean() for t in (q / 8**0.5, k, p, v)]
    expected = [value / steps for value, steps in zip(largest, (127, 127, 255, 127), strict=True)]
    assert model.blocks[1].attention.operand_scales == pytest.approx(expected, rel=1e-5)
    rc.emulate_(model, NBSMT(2))
    again = model.blocks[1].attention.operand_scales
    rc.calibrate_(model, [x])
    assert model.blocks[1].attention.operand_scales == again
    broken = gpt()[0]
    qkv = broken.get_submodule("blocks.0.qkv")
    assert isinstance(qkv, torch.nn.Linear)
    qkv.weight.data.zero_()
    qkv.bias.data[:16] = 0
    qkv.bias.data[16:] = 1
    with pytest.raises(rc.RecoupError, match=r"q of attention 'blocks.0.attention' was only zeros"):
        rc.calibrate_(broken, [x])


def test_heads_of_a_call_without_a_batch_are_no_images():
    x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0)) * torch.tensor([[[1.0]], [[4.0]], [[9.0]]])
    found = []
    for value in (x, x[None], x[None, None], x[2]):  # three heads, and the one that is largest alone
        model = nn.Sequential(Mixed())
        rc.calibrate_(model, [value])
        found.append(model.get_submodule("0.products").operand_scales)
    assert found[1:3] == found[:1] * 2
    expected = float(x.abs().max()) / 127
    for scales in (found[0], found[3]):
        assert scales[:2] + scales[3:] == pytest.approx((expected / 8**0.5, expected, expected))


def test_a_network_is_profiled_priced_repaired_saved_and_given_back(tmp_path):
    model, x = gpt()
    plain = model(x).detach()
    rc.calibrate_(model, [x])
    rc.emulate_(model, NBSMT(2))
    layer = emulated_layers(model)["blocks.0.attention"]
    assert isinstance(layer, NBSMTAttentionProducts)
    shared = model(x).detach()
    with running(model, "baseline"), torch.no_grad():
        assert 0 < float((model(x) - plain).norm()) < float((shared - plain).norm())
    with running(model, "float"):
        assert torch.equal(model(x), plain)
    rows = {row.name: row for row in rc.nbsmt.profile(model, [x])}
    scores, values = rows["blocks.0.attention (q k^T)"], rows["blocks.0.attention (p v)"]
    assert (scores.weight_shape, scores.macs) == ((12, 8), 2 * 12 * 12 * 8)
    assert (values.weight_shape, values.macs) == ((8, 12), 2 * 12 * 12 * 8)
    assert values.zero_activations > 0.45  # half of the keys lie ahead
    assert 0 < scores.error < 0.1
    assert scores.mean_shift == 0
    with pytest.warns(rc.RecoupWarning, match="2 attentions keep their order"):
        rc.nbsmt.reorder_(model, [x])
    rc.repair_(model, [x])
    repaired = model(x).detach()
    rc.save(model, tmp_path / "chip")
    assert torch.equal(rc.load(tmp_path / "chip", gpt()[0])(x), repaired)
    state, other = model.state_dict(), gpt()[0]
    rc.calibrate_(other, [x + 1 - x])
    rc.emulate_(other, NBSMT(2))
    other.load_state_dict(state)
    assert emulated_layers(other)["blocks.0.attention"].operand_scales == layer.operand_scales
    state._metadata["blocks.0.attention"]["recoup"]["operand_scales"] = (1.0, -1.0, 1.0, 1.0)
    with pytest.raises(RuntimeError, match=r"operand_scales is \(1\.0, -1\.0"):
        other.load_state_dict(state)
    rc.restore_(model)
    assert torch.equal(model(x), plain)
    assert type(model.blocks[0].attention) is AttentionProducts


def test_counts_are_those_of_every_slot():
    layer, config = nn.Sequential(AttentionProducts()), NBSMT(2, "S+aW", pairing="adjacent")

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.products: Any = layer[0]

        def forward(self, x):
            return self.products(x, x.flip(1), 2 * x)

    model, x = Net(), heads(2, 5, 7)
    rc.calibrate_(model, [x])
    rc.emulate_(model, config)
    row = rc.nbsmt.profile(model, [x])[0]
    scales, total = model.products.operand_scales, {"slots": 0, "collisions": 0, "lossy": 0, "active": 0}
    for b in range(2):
        a = np.clip(np.rint((x[b] * (1 / 7**0.5)).numpy() / np.float32(scales[0])), -128, 127).astype(int).tolist()
        w = np.clip(np.rint(x[b].flip(0).T.numpy() / np.float32(scales[1])), -128, 127).astype(int).tolist()
        _, found = port.matmul(a, w, 2, "S+aW", "nearest", "adjacent", 5)
        total = {name: total[name] + found[name] for name in total}
    assert row.collisions == total["collisions"] / total["slots"]
    assert row.lossy == total["lossy"] / total["active"]


def test_heads_run_all_threads_on_the_array():
    model, x = gpt()
    site = next(s for s in survey(model, x, "test").sites if s.kind == "AttentionProducts")
    card = rc.wings.wing_of(NBSMT(2), "test")
    assert card is not None
    assert card.cost is not None
    one, two = (card.cost(site, NBSMT(t), Array(4, 4)) for t in (1, 2))
    assert one.steps is not None
    assert two.steps is not None
    assert one.steps == 2 * two.steps == 4 * 2 * (12 * 12 * 8 + 12 * 8 * 12)
    assert two.cycles < one.cycles


def test_a_search_and_throttling_take_attention():
    model, x = gpt()
    data = [(x, x.roll(-1, 1))]
    space = rc.search.Space({r"re:blocks\..*\.attention": ["float", "NBSMT(threads=2)"]})
    assert [group.layers for group in space.groups(model)] == [("blocks.0.attention",), ("blocks.1.attention",)]
    bench = rc.search.bench.Bench(model, data, ("nats",), [x], "none", ["blocks.0.attention", "blocks.1.attention"])
    found = bench.measured({"blocks.0.attention": NBSMT(2)}, "test")
    assert found
    first, last = [nn.Linear(24, 24), nn.Unflatten(1, (3, 8))], [nn.Flatten(), nn.Linear(24, 4)]
    model = nn.Sequential(*first, Mixed(), *last)
    images = heads(16, 24)
    rc.calibrate_(model, [images])
    rc.emulate_(model, NBSMT(4))
    with running(model, "baseline"):
        labels = model(images).argmax(1)
    plan = rc.nbsmt.plan_throttling(model, [(images, labels)], 0.0)
    assert plan.after.top1 >= plan.baseline.top1
    assert set(plan.threads) <= {"2.products"}
    assert {layer.config.threads for layer in emulated_layers(model).values()} == {4}


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.products = AttentionProducts()

    def forward(self, x):
        return self.products(x, x, x)


def transformer(kind):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if kind == "gpt2":
        config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50, n_positions=16)
        return transformers.GPT2LMHeadModel(config).eval()
    if kind == "bert":
        return transformers.BertModel(transformers.BertConfig(**SIZES, vocab_size=50)).eval()
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2, vocab_size=50)
    return transformers.LlamaForCausalLM(config).eval()


def output(model, **inputs):
    with torch.no_grad():
        return model(**inputs)[0]


@pytest.mark.filterwarnings("ignore::recoup.RecoupWarning")
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", slow_but(["llama"], ["gpt2", "bert", "llama"]))
def test_transformers_of_every_kind(kind, implementation, tmp_path):
    model, inputs = transformer(kind), {"input_ids": TOKENS, "attention_mask": PADDING}
    model.set_attn_implementation(implementation)
    plain, own = output(model, **inputs), model.config
    rc.calibrate_(model, [inputs])
    assert torch.equal(output(model, **inputs), plain)
    assert all(getattr(m, "config", own) is own for n, m in model.named_modules() if n.endswith(("attn", "self")))
    rc.emulate_(model, NBSMT(2))
    found = [layer for layer in emulated_layers(model).values() if isinstance(layer, NBSMTInterfaceAttention)]
    assert len(found) == 2
    shown = PADDING.bool()
    shared = output(model, **inputs)
    assert 0 < float((shared - plain)[shown].norm() / plain[shown].norm()) < 0.5
    rows = [row.name for row in rc.nbsmt.profile(model, [inputs])]
    assert sum(name.endswith("(q k^T)") for name in rows) == sum(name.endswith("(p v)") for name in rows) == 2
    before = [layer.operand_scales for layer in found]
    rc.calibrate_(model, [inputs])
    assert [layer.operand_scales for layer in found] == before
    rc.save(model, tmp_path / "chip")
    assert torch.equal(output(rc.load(tmp_path / "chip", transformer(kind)), **inputs)[shown], shared[shown])
    rc.restore_(model)
    assert torch.equal(output(model, **inputs), plain)
    assert model.config is own


@pytest.mark.filterwarnings("ignore::recoup.RecoupWarning")
def test_a_cache_of_keys_gives_what_one_call_gives_without_sharing():
    model = transformer("llama")
    rc.calibrate_(model, [TOKENS])
    rc.emulate_(model, NBSMT(1))
    whole = output(model, input_ids=TOKENS)
    with torch.no_grad():
        first = model(TOKENS[:, :6], use_cache=True)
        last = model(TOKENS[:, 6:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(last, whole[:, 6:], atol=2e-3, rtol=2e-2)


def test_what_is_not_emulated_is_not_calibrated():
    model = transformer("gpt2")
    model.set_attn_implementation("eager")  # whose function takes any option
    attn = model.transformer.h[0].attn
    hook = attn.register_forward_pre_hook(lambda _, args, kwargs: (args, {**kwargs, "softcap": 3.0}), with_kwargs=True)
    with pytest.warns(rc.RecoupWarning, match=r"1 attentions have softcap, .*: transformer\.h\.0\.attn"):
        rc.calibrate_(model, [TOKENS])
    hook.remove()
    assert getattr(attn, "operand_scales", None) is None
    assert model.transformer.h[1].attn.operand_scales is not None


@pytest.mark.parametrize(
    "config", [NBSMT(2, pairing="adjacent"), NBSMT(4, "aW", "zero", "adjacent", 4, Int(14)), NBSMT(1)]
)
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_adjacent_keys_keep_their_partners_whatever_comes_behind(kind, config):
    model, mask = transformer(kind), torch.ones_like(TOKENS)
    mask[1, 4:] = 0
    rc.calibrate_(
        model, [{"input_ids": TOKENS, "attention_mask": mask}], {"re:.*": True}
    )  # torch's sums depend on shapes
    rc.emulate_(model, config)
    with torch.no_grad():
        beside = model(input_ids=TOKENS, attention_mask=mask)[0]
        alone = model(input_ids=TOKENS[1:2, :4], attention_mask=mask[1:2, :4])[0]
    assert torch.equal(beside[1, :4], alone[0])
    if kind == "llama":  # a cache that grows token by token
        past, steps = None, []
        with torch.no_grad():
            for token in TOKENS[:1].split(1, 1):
                out = model(token, past_key_values=past, use_cache=True)
                past = out.past_key_values
                steps.append(out.logits)
            assert torch.equal(torch.cat(steps, 1), model(TOKENS[:1]).logits)


def test_gradients_have_the_strides_that_compiled_code_expects():
    """Keys come transposed; inductor asserts the strides of the fake."""
    x, w, grad = heads(2, 5, 4), heads(2, 7, 4, seed=1).transpose(1, 2), heads(2, 5, 7, seed=2)
    for given in ((x, w), (w.contiguous().transpose(1, 2)[:, :5], w.contiguous())):
        arguments = (grad, *given, 0.01, 0.01, 128)
        torch.library.opcheck(product_backward, arguments, test_utils="test_faketensor")
        for found, own in zip(product_backward(*arguments), given, strict=True):
            assert found.stride() == torch.empty_like(own).stride()


def test_gradients_are_whole_under_autocast():
    x, w, grad = heads(2, 5, 4), heads(2, 4, 7, seed=1), heads(2, 5, 7, seed=2)
    expected = product_backward(grad, x, w, 0.01, 0.01, 128)
    with torch.autocast("cpu", torch.bfloat16):
        found = product_backward(grad, x, w, 0.01, 0.01, 128)
    assert all(map(torch.equal, found, expected))
