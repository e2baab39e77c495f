import pytest
import torch
import torch.nn.functional as F

import recoup as rc
from recoup import lba
from recoup.errors import RecoupError
from recoup.lba import FP8, LBA
from recoup.lba.attention_layers import LBAAttentionProducts
from recoup.models.attention import AttentionProducts
from recoup.network.emulated import emulated_layers

NEAR = LBA.fp32()


def heads(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("groups", [4, 2, 1])
def test_is_attention_at_full_precision(causal, groups):
    q, k, v = heads(2, 4, 7, 8), heads(2, groups, 7, 8, seed=1), heads(2, groups, 7, 5, seed=2)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    torch.testing.assert_close(lba.attention(q, k, v, NEAR, causal=causal), expected)  # another order of sums


def test_masks_and_scale():
    q, k, v = heads(2, 3, 5, 8), heads(2, 3, 6, 8, seed=1), heads(2, 3, 6, 8, seed=2)
    boolean = torch.rand(2, 1, 5, 6) > 0.4
    boolean[..., 0] = True
    added = torch.randn(5, 6)
    for mask in (boolean, added):
        expected = F.scaled_dot_product_attention(q, k, v, mask, scale=0.3)
        torch.testing.assert_close(lba.attention(q, k, v, NEAR, mask=mask, scale=0.3), expected)
    nothing = torch.zeros(5, 6, dtype=torch.bool)
    assert torch.equal(lba.attention(q, k, v, NEAR, mask=nothing), torch.zeros(2, 3, 5, 8))


def test_both_products_run_on_the_unit():
    q, k, v = heads(3, 40, 64), heads(3, 40, 64, seed=1), heads(3, 40, 64, seed=2)
    config = LBA.biased(5, 4)
    scores = lba.matmul(q * 0.125, k.transpose(1, 2), config)
    assert torch.equal(lba.attention(q, k, v, config), lba.matmul(torch.softmax(scores, -1), v, config))


def test_as_a_module():
    model, q = torch.nn.Sequential(AttentionProducts()), heads(2, 9, 8)
    expected = model[0](q, q, q, causal=True)
    rc.emulate_(model, LBA.biased(4, 4))
    assert list(emulated_layers(model)) == ["0"]
    assert torch.equal(model[0](q, q, q, causal=True), lba.attention(q, q, q, LBA.biased(4, 4), causal=True))
    model[0].mode = "baseline"
    assert torch.equal(model[0](q, q, q, causal=True), expected)
    rc.restore_(model)
    assert torch.equal(model[0](q, q, q, causal=True), expected)
    rc.emulate_(model, LBA(), {"0": LBA()})
    rc.restore_(model)


def test_gradients():
    q, k, v = (heads(2, 6, 8, seed=s).requires_grad_() for s in range(3))
    lba.attention(q, k, v, LBA(gradient="recursive_of"), causal=True, dropout=0.1).sum().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in (q, k, v))


def test_refused():
    with pytest.raises(RecoupError, match="do not fit"):
        lba.attention(heads(2, 3, 8), heads(2, 3, 7), heads(2, 3, 8), LBA())
    with pytest.raises(RecoupError, match="3 query heads are no multiple of 2"):
        lba.attention(heads(3, 4, 8), heads(2, 4, 8), heads(2, 4, 8), LBA())
    with pytest.raises(RecoupError, match=r"block: q k\^T: operand q .* NaN"):
        lba.attention(heads(2, 4, 8) * float("nan"), heads(2, 4, 8), heads(2, 4, 8), LBA(), layer="block")

    q, k = heads(2, 3, 5, 8), heads(2, 3, 6, 8)
    cases: list[tuple[str, tuple, dict]] = [
        (r"config must be an LBA, .* got 'm7e4'", (q, k, k, "m7e4"), {}),
        (
            r"mask must be boolean .* or floating .* got torch.int64",
            (q, k, k, LBA()),
            {"mask": torch.ones(5, 6).long()},
        ),
        (
            r"mask \[6, 5\] does not broadcast to the scores \[2, 3, 5, 6\]",
            (q, k, k, LBA()),
            {"mask": torch.ones(6, 5)},
        ),
        (r"mask \[4, 2, 3, 5, 6\] does not", (q, k, k, LBA()), {"mask": torch.ones(4, 2, 3, 5, 6)}),
        (r"k \[2, 3, 6, 8\] and v \[2, 1, 6, 8\] do not fit", (q, k, k[:, :1], LBA()), {}),
        ("do not fit", (q, k[:, :1], heads(2, 2, 6, 8), LBA()), {}),
        ("do not fit", (q, k, heads(3, 3, 6, 8), LBA()), {}),
        ("do not fit", (q, heads(3, 3, 6, 8), heads(3, 3, 6, 8), LBA()), {}),
        (r"k \[6, 8\] .* do not fit", (q, k[0, 0], k[0, 0], LBA()), {}),
    ]
    for told, arguments, options in cases:
        with pytest.raises(RecoupError, match=rf"block: .*{told}"):
            lba.attention(*arguments, **options, layer="block")
    with pytest.raises(RecoupError, match="config must be an LBA"):
        LBAAttentionProducts("m7e4")  # type: ignore[arg-type]


def test_no_keys_give_zeros():
    q, none = heads(2, 3, 5, 8), heads(2, 3, 0, 8)
    expected = F.scaled_dot_product_attention(q, none, none)
    assert torch.equal(lba.attention(q, none, none, LBA()), expected)
    assert torch.equal(lba.attention(q, none, none, LBA(operands=FP8), causal=True), expected)


def test_autocast():
    q, k, v = (heads(2, 6, 8, seed=s).bfloat16() for s in range(3))
    for config in (LBA(), LBA(operands=FP8)):
        expected = lba.attention(q.float(), k.float(), v.float(), config)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(lba.attention(q, k, v, config), expected)
        with pytest.raises(RecoupError, match=r"block.* takes float32; q is torch.bfloat16"):
            lba.attention(q, k, v, config, layer="block")


def test_hugging_face():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    tokens = torch.randint(50, (2, 11))
    padding = torch.ones(2, 11, dtype=torch.long)
    padding[1, :4] = 0
    with torch.no_grad():
        expected = [model(tokens).logits, model(tokens, attention_mask=padding).logits]
        model.set_attn_implementation(lba.register_transformers(NEAR, "recoup_near"))
        got = [model(tokens).logits, model(tokens, attention_mask=padding).logits]
        torch.testing.assert_close(got[0], expected[0])
        torch.testing.assert_close(got[1][padding.bool()], expected[1][padding.bool()])
        model.set_attn_implementation(lba.register_transformers(LBA.biased(2, 4)))
        assert not torch.equal(model(tokens).logits, expected[0])
