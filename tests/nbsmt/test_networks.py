"""Networks with negative inputs: transformers, and convolutions behind SiLU and hard swish, whole.

They calibrate, emulate, are repaired and evaluated, saved, loaded and given back; the weights are random.
"""

import copy

import pytest
import torch
from torch import Tensor, nn

import recoup as rc
from recoup.nbsmt.attention_layers import NBSMTAttention
from recoup.network.emulated import emulated_layers, running

TOKENS = torch.randint(50, (6, 9), generator=torch.Generator().manual_seed(0))
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


class Squeeze(nn.Module):
    """Squeeze and excitation: every channel by a factor that all of the image decides."""

    def __init__(self, channels: int, gate: type[nn.Module]) -> None:
        super().__init__()
        self.reduce, self.act = nn.Conv2d(channels, 4, 1), nn.SiLU()
        self.expand, self.gate = nn.Conv2d(4, channels, 1), gate()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.expand(self.act(self.reduce(x.mean((2, 3), keepdim=True)))))


class Inverted(nn.Module):
    """An inverted bottleneck: widen, filter channel by channel, squeeze, narrow."""

    def __init__(self, inputs: int, outputs: int, stride: int, act: type[nn.Module], gate: type[nn.Module]) -> None:
        super().__init__()
        wide, self.adds = 3 * inputs, stride == 1 and inputs == outputs
        self.widen = nn.Sequential(nn.Conv2d(inputs, wide, 1, bias=False), nn.BatchNorm2d(wide), act())
        depthwise = nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False)
        self.filter = nn.Sequential(depthwise, nn.BatchNorm2d(wide), act())
        self.squeeze = Squeeze(wide, gate)
        self.narrow = nn.Sequential(nn.Conv2d(wide, outputs, 1, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.narrow(self.squeeze(self.filter(self.widen(x))))
        return x + y if self.adds else y


def convolutional(act: type[nn.Module], gate: type[nn.Module]) -> nn.Module:
    """A stem, three inverted bottlenecks and a head."""
    blocks = [Inverted(8, 8, 1, act, gate), Inverted(8, 12, 2, act, gate), Inverted(12, 12, 1, act, gate)]
    head = [nn.Conv2d(12, 20, 1), act(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(20, 5)]
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), act(), *blocks, *head)
    with torch.no_grad():
        for _ in range(5):
            model(torch.randn(16, 3, 12, 12))
    return model.eval()


def efficientnet() -> tuple[nn.Module, list]:
    return convolutional(nn.SiLU, nn.Sigmoid), [(torch.randn(8, 3, 12, 12), torch.arange(8) % 5)]


def mobilenet_v3() -> tuple[nn.Module, list]:
    return convolutional(nn.Hardswish, nn.Hardsigmoid), [(torch.randn(8, 3, 12, 12), torch.arange(8) % 5)]


def gpt2() -> tuple[nn.Module, list]:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50, n_positions=16)
    return transformers.GPT2LMHeadModel(config).eval(), [(TOKENS, TOKENS.roll(-1, 1))]


def bert() -> tuple[nn.Module, list]:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(**SIZES, vocab_size=50)
    return transformers.BertForSequenceClassification(config).eval(), [(TOKENS, TOKENS[:, 0] % 2)]


def vit() -> tuple[nn.Module, list]:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(**SIZES, image_size=8, patch_size=4)
    return transformers.ViTForImageClassification(config).eval(), [(torch.randn(6, 3, 8, 8), torch.arange(6) % 2)]


def llama() -> tuple[nn.Module, list]:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2, vocab_size=50)
    return transformers.LlamaForCausalLM(config).eval(), [(TOKENS, TOKENS.roll(-1, 1))]


NETWORKS = {efficientnet: 16, mobilenet_v3: 16, gpt2: 9, bert: 14, vit: 14, llama: 15}
"""Layers on NB-SMT: all that multiply by weights but the first and the last, all of whose inputs are negative, too, and
two attentions each."""

CASES = [(make, threads) for make in NETWORKS for threads in (2, 4)]
FAST = (mobilenet_v3, 2)


def logits(model: nn.Module, batches: list) -> Tensor:
    with torch.no_grad():
        found = model(batches[0][0])
    return getattr(found, "logits", found)


@pytest.mark.filterwarnings("ignore::recoup.RecoupWarning")  # depthwise convolutions run one thread
@pytest.mark.parametrize(
    ("make", "threads"), [pytest.param(*case, marks=[] if case == FAST else pytest.mark.slow) for case in CASES]
)
def test_whole_networks(make, threads, tmp_path):
    torch.manual_seed(0)
    model, batches = make()
    float_state, plain = copy.deepcopy(model.state_dict()), logits(model, batches)
    metric = "nats" if make in (gpt2, llama) else "top1"
    rc.calibrate_(model, batches)
    rc.emulate_(model, rc.NBSMT(threads))
    layers = emulated_layers(model)
    assert len(layers) == NETWORKS[make]
    weighty = [layer for layer in layers.values() if not isinstance(layer, NBSMTAttention)]
    assert {layer.activation_zero for layer in weighty} == {128}
    with running(model, "baseline"):
        eight = logits(model, batches)
    shared = logits(model, batches)
    error = {name: float((y - plain).norm() / plain.norm()) for name, y in (("8 bit", eight), ("shared", shared))}
    assert error["8 bit"] < 0.12
    assert error["8 bit"] < error["shared"] < 0.6
    rc.repair_(model, batches)
    rc.evaluate(model, batches, metric)
    rows = rc.nbsmt.profile(model, batches)
    assert [row.name for row in rows if row.threads == threads]
    repaired = logits(model, batches)
    rc.save(model, tmp_path / "chip")
    other = make()[0]
    rc.load(tmp_path / "chip", other)
    assert torch.equal(logits(other, batches), repaired)
    rc.restore_(model)
    assert torch.equal(logits(model, batches), plain)
    assert all(torch.equal(value, float_state[name]) for name, value in model.state_dict().items())
