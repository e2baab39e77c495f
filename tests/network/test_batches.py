"""Batches that are mappings: keyword arguments of the model, or refused with what works."""

import re

import pytest
import torch
from torch import Tensor, nn

import recoup as rc
from recoup.network.batches import prepared

X, Y = torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 1, 0])


class Net(nn.Module):
    """Takes its input by a name."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.inner = nn.Conv2d(4, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 2)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Logits."""
        return self.head(self.norm(self.inner(self.conv(pixel_values).relu())).mean((2, 3)))


@pytest.mark.parametrize("verb", [rc.evaluate, rc.calibrate_, rc.recalibrate_, rc.repair_, list])
@pytest.mark.parametrize(
    ("batch", "pair"),
    [
        ({"image": X, "label": Y}, "[(batch['image'], batch['label']) for batch in loader]"),
        ({"image": X, "target": Y}, "[(batch['image'], batch['target']) for batch in loader]"),
        ({"pixel_values": X, "path": Y, "labels": Y}, "[(batch['pixel_values'], batch['labels']) for batch in loader]"),
    ],
)
def test_names_that_the_model_does_not_take(verb, batch, pair):
    model = rc.emulate_(Net().eval(), rc.LBA.m7e4())
    ask = (lambda model, loader: list(prepared(model, loader, "asked"))) if verb is list else verb
    with pytest.raises(rc.RecoupError) as refused:
        ask(model, [batch])
    text = str(refused.value)
    assert re.search(r"a batch is a mapping \(.*\), whose values go to the model by these names, but Net.forward", text)
    assert text.endswith(f"Pass pairs of input and label: {pair}")
    rc.evaluate(model, eval(pair, {"loader": [batch]}))  # noqa: S307 -- what is advised works


def test_names_that_it_takes():
    model = Net().eval()
    named, plain = (rc.evaluate(model, [batch]) for batch in ({"pixel_values": X, "labels": Y}, (X, Y)))
    assert named.top1 == plain.top1


def test_a_hook_may_give_the_names_that_the_model_takes():
    """What meets ``forward`` is what hooks with keyword arguments make of a batch."""
    model = Net().eval()
    plain = rc.evaluate(model, [(X, Y)])

    def renamed(_module, args, kwargs):
        return args, {"pixel_values": kwargs["image"]}

    model.register_forward_pre_hook(renamed, with_kwargs=True)
    assert rc.evaluate(model, [{"image": X, "path": Y, "labels": Y}]).top1 == plain.top1


def test_a_hook_that_cannot_is_none():
    model = Net().eval()
    model.register_forward_pre_hook(lambda *_: None)
    with pytest.raises(rc.RecoupError, match="a batch is a mapping"):
        rc.evaluate(model, [{"image": X, "labels": Y}])


def padded(pad=0, ends="right", eos=None):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.BertConfig(**sizes, vocab_size=20, pad_token_id=pad, eos_token_id=eos)
    tokens = torch.arange(18).view(3, 6) % 15 + 3
    tokens[1, -3:] = 0
    return transformers.BertModel(config).eval(), tokens if ends == "right" else tokens.flip(1)


@pytest.mark.parametrize("ends", ["right", "left"])
@pytest.mark.parametrize("as_mapping", [True, False])
def test_padding_without_a_mask_is_refused(ends, as_mapping):
    model, tokens = padded(ends=ends)
    batch = {"input_ids": tokens} if as_mapping else tokens
    said = r"calibrate_: batch 1 has padding \(token 0\) in 1 of its 3 sequences and no mask that hides it"
    with pytest.raises(rc.RecoupError, match=said):
        rc.calibrate_(model, [tokens.clamp_min(1), batch])
    assert not any(getattr(layer, "activation_scale", None) for layer in model.modules())


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")
def test_padding_without_a_mask_is_refused_of_what_torch_compile_made():
    model, tokens = padded()
    with pytest.raises(rc.RecoupError, match=r"calibrate_: batch 0 has padding \(token 0\)"):
        rc.calibrate_(torch.compile(model), [tokens])


def test_padding_under_a_mask_or_of_tokens_that_end_sequences_is_taken():
    model, tokens = padded()
    rc.calibrate_(model, [{"input_ids": tokens, "attention_mask": (tokens > 0).long()}])
    tokens[1, -3:-1] = 3  # one may be a word
    rc.calibrate_(model, [tokens])
    for other in (padded(pad=None), padded(eos=0), padded(eos=[0, 2])):
        rc.calibrate_(other[0], [other[1]])
