"""What others put into torch's classes is told, never silently left out."""

import functools
import inspect

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import recoup as rc
from recoup.network.derived import patched
from recoup.network.replay import Outputs, replaying

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 20), nn.LayerNorm(20)
    ).eval()


def tripled(plain):
    """As instrumentation wraps it, under its name."""

    @functools.wraps(plain)
    def method(self, *args, **kwargs):
        return plain(self, *args, **kwargs) * 3

    return method


HARDWARE = {
    "lba": rc.LBA.m7e4(),
    "tensor core": rc.TensorCore.hopper_fp8(),
    "nbsmt": rc.NBSMT(threads=2),
    "lightnorm": rc.LightNorm(chunks=4),
}
PUT = [
    ("lba", nn.Conv2d, "forward", "0"),
    ("lba", nn.Conv2d, "_conv_forward", "0"),
    ("tensor core", nn.Linear, "forward", "3"),
    ("nbsmt", nn.Conv2d, "forward", "0"),
    ("lightnorm", nn.modules.batchnorm._BatchNorm, "forward", "1"),
    ("lightnorm", nn.LayerNorm, "forward", "4"),
]


@pytest.mark.parametrize(("hardware", "kind", "method", "name"), PUT)
def test_a_layer_whose_class_was_changed_stays_in_float_and_is_told(monkeypatch, hardware, kind, method, name):
    monkeypatch.setattr(kind, method, tripled(getattr(kind, method)))
    net = rc.calibrate_(network(), [X], layers={"0": True, "3": True})
    with pytest.warns(rc.RecoupWarning, match=rf"{kind.__name__}\.{method} is not torch's own .*: {name} \("):
        rc.emulate_(net, HARDWARE[hardware])
    assert not isinstance(net[int(name)], rc.wings.Emulated)
    with pytest.raises(rc.RecoupError, match=rf"layer '{name}' .* {kind.__name__}\.{method} is not torch's own"):
        rc.emulate_(rc.restore_(net), None, layers={name: HARDWARE[hardware]})


@pytest.mark.parametrize(("hardware", "kind", "method", "name"), PUT)
def test_a_class_that_is_changed_under_a_layer_on_hardware_is_told(monkeypatch, hardware, kind, method, name):
    net = rc.emulate_(rc.calibrate_(network(), [X], layers={"0": True, "3": True}), HARDWARE[hardware])
    labels = torch.zeros(4, dtype=torch.int64)
    rc.evaluate(net, [(X, labels)])
    monkeypatch.setattr(kind, method, tripled(getattr(kind, method)))
    with pytest.warns(rc.RecoupWarning, match=rf"^evaluate: .* do without them.*: {kind.__name__}\.{method}: {name}$"):
        rc.evaluate(net, [(X, labels)])


def test_outputs_of_a_changed_class_are_not_given_again(monkeypatch):
    net, outputs, ran = network(), Outputs(), []
    plain = nn.Conv2d.forward

    def counted(self, x):
        ran.append(self)
        return plain(self, x)

    monkeypatch.setattr(nn.Conv2d, "forward", counted)
    for _ in range(2):
        with torch.no_grad(), replaying(net, outputs):
            net(X)
    assert len(ran) == 2


def test_torchs_classes_as_they_are_and_other_classes_have_nothing_in_torchs_place(monkeypatch):
    kinds = [kind for kind in vars(nn).values() if inspect.isclass(kind) and issubclass(kind, nn.Module)]
    assert len(kinds) > 100
    assert not any(map(patched, kinds))
    own = type("Own", (nn.Conv2d,), {"forward": lambda _, x: x})
    monkeypatch.setattr(nn.Conv2d, "forward", lambda _, x: x)
    assert patched(own) == {}  # it has a forward of its own
    assert patched(type("Own", (nn.Conv2d,), {})) == {"forward": "Conv2d"}


def test_methods_that_torch_decorated_itself_are_its_own(monkeypatch):
    """Some are written under ``torch.no_grad`` or as context managers; what others put there is told."""
    kinds = (nn.parallel.DistributedDataParallel, parametrizations._Orthogonal, parametrizations._SpectralNorm)
    assert not any(map(patched, kinds))
    monkeypatch.setattr(nn.Linear, "forward", functools.wraps(nn.Linear.forward)(lambda _, x: x))
    monkeypatch.setattr(nn.Conv2d, "forward", torch.no_grad()(lambda _, x: x))
    assert patched(nn.Linear) == {"forward": "Linear"}
    assert patched(nn.Conv2d) == {"forward": "Conv2d"}


VERBS = {
    "evaluate": lambda net: rc.evaluate(net, [(X, torch.zeros(4, dtype=torch.int64))]),
    "recalibrate_": lambda net: rc.recalibrate_(net, [X]),
    "ema": lambda net: rc.recalibrate_(net, [X], method="ema"),
    "repair_": lambda net: rc.repair_(net, [X]),
    "correct_gain_": lambda net: rc.lba.correct_gain_(net, [X]),
    "cost": lambda net: rc.cost(net, None, X),
    "cycles": lambda net: rc.nbsmt.cycles(net, X),
}


@pytest.mark.parametrize("verb", VERBS)
def test_it_is_told_of_the_line_that_asked(monkeypatch, verb):
    net = rc.emulate_(network(), rc.LBA())
    monkeypatch.setattr(nn.Conv2d, "forward", tripled(nn.Conv2d.forward))
    with pytest.warns(rc.RecoupWarning, match="do without them") as told:
        VERBS[verb](net)
    assert {one.filename for one in told} == {__file__}


def test_the_linear_layer_of_transformers_is_one_of_them(monkeypatch):
    kind = pytest.importorskip("transformers.pytorch_utils").Conv1D
    assert not patched(kind)
    monkeypatch.setattr(kind, "forward", tripled(kind.forward))
    with pytest.warns(rc.RecoupWarning, match=r"Conv1D\.forward is not torch's own"):
        rc.emulate_(nn.Sequential(nn.Linear(3, 4), kind(4, 4)), rc.LBA())
