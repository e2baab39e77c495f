"""The character GPT against plain torch, its checkpoints, its text, and nats per token."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import recoup as rc
from recoup.data.text import contexts
from recoup.errors import RecoupError
from recoup.evaluation import nats_per_token
from recoup.lba import LBA
from recoup.models import chargpt, load_chargpt


def network():
    torch.manual_seed(0)
    return chargpt(11, layers=2, width=8, heads=2, context=6).eval()


def test_logits_equal_those_written_out():
    model, tokens = network(), torch.arange(12).view(2, 6) % 11
    x = model.tok.weight[tokens] + model.pos.weight
    for block in model.blocks:
        q, k, v = block.qkv(block.ln1(x)).view(2, 6, 3, 2, 4).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) / 2 + torch.full((6, 6), -math.inf).triu(1)
        x = x + block.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(2, 6, 8))
        x = x + block.fc2(F.gelu(block.fc1(block.ln2(x))))
    torch.testing.assert_close(model(tokens), model.head(model.lnf(x)))
    changed = tokens.clone()
    changed[:, 4:] = 0
    torch.testing.assert_close(model(changed)[:, :4], model(tokens)[:, :4])  # causal


def test_attention_products_are_emulated_too():
    model = network()
    rc.emulate_(model, LBA.biased(3, 3))
    with torch.no_grad():
        together = model(torch.zeros(1, 6, dtype=torch.int64))
        rc.restore_(model)
        rc.emulate_(model, LBA.biased(3, 3), layers={"re:.*attention.*": None})
        linear_only = model(torch.zeros(1, 6, dtype=torch.int64))
    assert not torch.equal(together, linear_only)


def test_checkpoints(tmp_path):
    model = network()
    config = {"chars": list("abcdefghijk"), "layers": 2, "d": 8, "heads": 2, "ctx": 6}
    torch.save({"state_dict": model.state_dict(), "config": config}, tmp_path / "net.pt")
    loaded, alphabet = load_chargpt(tmp_path / "net.pt")
    assert alphabet == "abcdefghijk"
    tokens = torch.zeros(1, 6, dtype=torch.int64)
    assert torch.equal(loaded(tokens), model(tokens))
    torch.save({"config": config}, tmp_path / "bad.pt")
    with pytest.raises(RecoupError, match="no checkpoint of a chargpt"):
        load_chargpt(tmp_path / "bad.pt")
    with pytest.raises(RecoupError, match="width 9 must be a multiple of heads 2"):
        chargpt(width=9, heads=2)
    with pytest.raises(RecoupError, match=r"tokens \[1, 7\] must be \[B, T\] with T up to 6"):
        model(torch.zeros(1, 7, dtype=torch.int64))


def test_contexts_follow_each_other(tmp_path):
    (tmp_path / "text.txt").write_text("abcab" * 4)
    batches = contexts(tmp_path / "text.txt", "abc", 3, batch=4)
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    numbers = torch.tensor(["abc".index(c) for c in "abcab" * 4])
    assert torch.equal(x.flatten(), numbers[:18])
    assert torch.equal(y.flatten(), numbers[1:19])
    assert [len(part) for part, _ in batches] == [4, 2]
    (half,) = contexts(tmp_path / "text.txt", "abc", 3, first=0.5)
    assert torch.equal(half[0].flatten(), numbers[10:19])
    with pytest.raises(RecoupError, match="'c', which is not in the alphabet"):
        contexts(tmp_path / "text.txt", "ab", 3)
    with pytest.raises(RecoupError, match="less than a window"):
        contexts(tmp_path / "text.txt", "abc", 30)
    with pytest.raises(RecoupError, match="no text"):
        contexts(tmp_path / "absent.txt", "abc", 3)


class Constant(nn.Module):
    """Fixed logits of three tokens."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))

    def forward(self, tokens):
        return self.logits.expand(*tokens.shape, -1)


def test_nats_per_token_is_the_mean_cross_entropy():
    model = Constant([0.0, math.log(2.0), math.log(5.0)])  # probabilities 1/8, 1/4, 5/8
    tokens = torch.zeros(2, 2, dtype=torch.int64)
    batches = [(tokens, torch.tensor([[0, 1], [1, 2]])), (tokens[:1], torch.tensor([[2, 2]]))]
    expected = -(math.log(1 / 8) + 2 * math.log(1 / 4) + 3 * math.log(5 / 8)) / 6
    assert nats_per_token(model, batches) == pytest.approx(expected, rel=1e-6)
    with pytest.raises(RecoupError, match="do not fit"):
        nats_per_token(model, [(tokens, tokens[:1])])
    with pytest.raises(RecoupError, match="NaN or infinity"):
        nats_per_token(Constant([math.nan, 0.0, 0.0]), batches)
