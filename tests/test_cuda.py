"""On a GPU every wing's layers, gradients and statistics are the CPU's to the bit, whatever torch computes around them.

The kernels have tests of their own (``test_gpu.py`` of each wing); these are layers in networks, and all that torch's
own operations do on the way: a division by a plain number is another one on CUDA.
"""

import copy
import dataclasses

import pytest
import torch
from torch import nn

import recoup as rc
from recoup.formats import Float, Int
from recoup.lba import LBA
from recoup.lightnorm import LightLayerNorm, LightNorm, LightNorm2d, LightRMSNorm
from recoup.models import mobilenet_v1, resnet20
from recoup.models.attention import AttentionProducts
from recoup.models.transformer import chargpt
from recoup.nbsmt import NBSMT
from recoup.network.emulated import emulated_layers
from recoup.pipeline import Simulator
from recoup.tensorcore import TensorCore
from tests.pipeline.networks import convolutional, images, make, rates

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")
DEVICE = "cuda"
E5M2 = Float.parse("e5m2").replace(overflow="saturate")


@pytest.fixture(autouse=True)
def _float32_products(monkeypatch):
    """torch's own convolutions take 10 bits of a float32 on a GPU unless they are told not to."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


MULTIPLIERS = {
    "nbsmt": NBSMT(2),
    "nbsmt, saturating": NBSMT(2, "A", accumulator=Int(16, overflow="saturate")),
    "nbsmt, four threads wrap": NBSMT(4, "S+W", accumulator=Int(14, overflow="wrap")),
    "nbsmt, port 4": NBSMT(4, port=4),
    "lba": LBA(),
    "lba, integers": LBA(None, Int(14, overflow="saturate"), 16, scale=2.0**-6),
    "lba, float32": LBA.fp32(),
    "hopper": TensorCore.hopper_fp8(),
    "hopper, promoted": TensorCore.hopper_fp8(promotion=64),
    "ampere": TensorCore.ampere_bf16(),
}
NORMS = {
    "fp10": LightNorm(),
    "range": LightNorm.range(chunks=3),
    "e5m2": LightNorm(Float.parse("bfloat16"), E5M2, None, 3, 5),
    "places": LightNorm(axis="place"),
    "difference": LightNorm(difference=Float.parse("fp10_154")),
}


class SignedNet(nn.Module):
    """Convolutions whose inputs are negative too, of one and of two axes, and a linear layer."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 9, (1, 3), stride=2, groups=3)
        self.flat, self.last = nn.Conv1d(9, 7, 2, dilation=2), nn.Linear(7 * 16, 5)
        self.act, self.gate = nn.SiLU(), nn.Tanh()

    def forward(self, x):
        """[N, 3, 9, 9] to [N, 5]."""
        x = self.gate(self.second(self.act(self.first(x))))
        return self.last(self.act(self.flat(x.flatten(2)[..., :18])).flatten(1))


def seen(model, x):
    """What every emulated layer was given and gave on the GPU, as CPU tensors."""
    found = {}

    def note(layer, arguments, options, y):
        kept = [v.detach().cpu().clone() if isinstance(v, torch.Tensor) else v for v in arguments]
        found[layer] = (kept, dict(options), y.detach().cpu().clone())

    layers = emulated_layers(model).values()
    handles = [layer.register_forward_hook(note, with_kwargs=True) for layer in layers]
    model.to(DEVICE)(x.to(DEVICE))
    for handle in handles:
        handle.remove()
    model.cpu()
    assert set(found) == set(layers)
    return found


@pytest.mark.parametrize("name", MULTIPLIERS)
@pytest.mark.filterwarnings("ignore::recoup.RecoupWarning")  # layers in groups run one thread; registers that saturate
@pytest.mark.parametrize("network", ["relu", "signed", "transformer", "depthwise"])
def test_layers_that_multiply_give_the_cpus_bits(network, name):
    torch.manual_seed(0)
    if network == "transformer":
        model, x = chargpt(20, 2, 16, 2, 24), torch.randint(20, (3, 16))
    else:
        model = {"relu": resnet20, "signed": SignedNet, "depthwise": mobilenet_v1}[network]()
        x = torch.randn(2, 3, 9, 9) if network == "signed" else torch.rand(2, 3, 32, 32)
    model.eval()
    with torch.inference_mode():
        rc.calibrate_(model, [x])
        rc.emulate_(model, MULTIPLIERS[name])
        for layer, (arguments, options, y) in seen(model, x).items():
            expected = layer(*arguments, **options)
            if isinstance(layer, AttentionProducts):  # between the two products is torch's softmax, a device's own
                assert (expected - y).norm() < 0.01 * expected.norm(), layer
            else:
                assert torch.equal(expected, y), layer


@pytest.mark.parametrize("name", ["lba", "lba, integers", "hopper", "hopper, promoted", "nbsmt", "nbsmt, port 4"])
def test_gradients_of_layers_that_multiply(name):
    """The straight-through parts are float products of torch; what the units compute backward is theirs."""
    torch.manual_seed(0)
    unit = MULTIPLIERS[name]
    if isinstance(unit, TensorCore):
        unit = unit.replace(backward="unit")
    model, x = nn.Sequential(nn.Linear(24, 9), nn.Linear(9, 8, bias=False), nn.Linear(8, 7)), torch.rand(6, 24)
    rc.calibrate_(model, [x])
    rc.emulate_(model, unit)
    assert emulated_layers(model)
    found = []
    for device in ("cpu", DEVICE):
        own = copy.deepcopy(model).to(device)
        given = x.to(device, copy=True).requires_grad_()
        own(given).square().sum().backward()
        found.append([given.grad.cpu(), own[1].weight.grad.cpu()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("kind", ["batch", "layer", "rms"])
def test_norms_train_to_the_cpus_bits(kind, name):
    torch.manual_seed(0)
    config = NORMS[name]
    if kind == "rms" and config.difference is not None:
        config = config.replace(difference=None)
    if kind == "batch":
        layer, x = LightNorm2d(6, config=config), torch.randn(5, 6, 7, 9) * 3
    else:
        layer, x = {"layer": LightLayerNorm, "rms": LightRMSNorm}[kind](48, config=config), torch.randn(33, 48) * 3
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn_like(p))
    g, found = torch.randn_like(x), []
    for device in ("cpu", DEVICE):
        own, given = copy.deepcopy(layer).to(device), x.to(device, copy=True).requires_grad_()
        steps = []
        for _ in range(2):
            y = own(given)
            y.backward(g.to(device))
            steps += [y.detach().cpu(), given.grad.cpu().clone(), *(p.grad.cpu().clone() for p in own.parameters())]
        steps += [v.cpu() for v in own.state_dict().values()]
        own.eval()
        steps.append(own(given).detach().cpu())
        found.append(steps)
    for index, (one, other) in enumerate(zip(*found, strict=True)):
        assert torch.equal(one, other), (index, (one - other).abs().max())


@pytest.mark.parametrize("mitigation", ["none", "stash", "sc", "lwpv+sc"])
def test_a_pipeline_of_cuda_graphs_is_the_eager_one(mitigation):
    nets = [convolutional().to(DEVICE)]
    nets.append(copy.deepcopy(nets[0]))
    replayed, eager = (
        make(net, rates, 0.9, 1e-2, mitigation, cuda_graph=graph)
        for net, graph in zip(nets, (True, False), strict=True)
    )
    assert isinstance(replayed, Simulator)
    for x, y in images(10):
        assert replayed.step(x.to(DEVICE), y.to(DEVICE)) == pytest.approx(eager.step(x.to(DEVICE), y.to(DEVICE)))
    for one, other in zip(*(net.state_dict().values() for net in nets), strict=True):
        torch.testing.assert_close(one, other)


def test_statistics_profiles_and_scores_of_a_network_on_the_gpu():
    torch.manual_seed(0)
    model, x, y = resnet20().eval(), torch.rand(8, 3, 32, 32), torch.arange(8)
    rc.calibrate_(model, [x])
    rc.emulate_(model, NBSMT(2))
    given, scores = x[:4], []
    for device in ("cpu", DEVICE):
        own = copy.deepcopy(model).to(device)
        data = [(given, y[:4]), (x[4:], y[4:])]
        rows = rc.nbsmt.profile(own, [given])
        rc.recalibrate_(own, [x])
        scores.append((rows, rc.evaluate(own, data)))
    assert scores[0][1].count == scores[1][1].count == 8
    assert scores[0][1].top1 == pytest.approx(scores[1][1].top1, abs=12.5)  # of eight images, one
    for one, other in zip(*(rows for rows, _ in scores), strict=True):  # the float layers before differ in last bits
        names = [field.name for field in dataclasses.fields(one) if isinstance(getattr(one, field.name), float)]
        for name in names:
            assert getattr(one, name) == pytest.approx(getattr(other, name), rel=1e-2, abs=1e-3), name


def test_what_is_saved_on_one_device_loads_on_the_other(tmp_path):
    torch.manual_seed(0)
    model, x = resnet20().eval(), torch.rand(2, 3, 32, 32)
    rc.calibrate_(model, [x])
    rc.emulate_(model, NBSMT(4))
    rc.save(model.to(DEVICE), tmp_path / "chip.safetensors")
    other = rc.load(tmp_path / "chip.safetensors", resnet20()).eval()
    assert {p.device.type for p in other.parameters()} == {"cpu"}
    with torch.inference_mode():
        assert torch.equal(model.cpu()(x), other(x))
