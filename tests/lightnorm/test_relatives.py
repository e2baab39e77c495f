"""Batch norms that are not exactly torch's three: subclasses, SyncBatchNorm, and what converters of others leave."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import FileStore

import recoup as rc
from recoup.lightnorm.layers import LightNorm2d
from recoup.network.emulated import emulated_layers
from recoup.network.norms import has_norms, is_batch_norm, tracking_norms
from tests.networks import images, small_net


class Initialized(nn.BatchNorm2d):
    """Another constructor, a method and a property more, nothing computed otherwise."""

    kind = "own"

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-3, momentum=0.2)
        self.extra = 7

    @property
    def doubled(self) -> int:
        return 2 * self.extra

    def scale_(self, factor: float) -> None:
        self.weight.data.mul_(factor)

    def extra_repr(self) -> str:
        return f"own, {self.num_features}"


class Mixin:
    def name(self) -> str:
        return type(self).__name__


class Mixed(Mixin, nn.BatchNorm2d):
    pass


class Activated(nn.BatchNorm2d):
    """As timm's BatchNormAct2d: its forward does more."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return torch.relu(super().forward(input))


class Frozen(nn.BatchNorm2d):
    """Never in training mode."""

    def train(self, mode: bool = True) -> "Frozen":  # noqa: ARG002
        return super().train(False)


class Checked(nn.BatchNorm2d):
    def _check_input_dim(self, input: Tensor) -> None:  # noqa: A002
        if input.dim() < 2:
            raise ValueError("too few")


class Reports(nn.BatchNorm2d):
    def report(self) -> str:
        return super().extra_repr()


CONFIG = rc.LightNorm(chunks=2)


def expected(float_norm: nn.Module, x: Tensor, mode: bool) -> Tensor:
    """What a plain LightNorm2d of the same parameters gives."""
    twin = LightNorm2d(x.shape[1], float_norm.eps, float_norm.momentum, config=CONFIG)
    twin.load_state_dict(float_norm.state_dict())
    return twin.train(mode)(x)


@pytest.mark.parametrize("kind", [Initialized, Mixed, nn.SyncBatchNorm])
@pytest.mark.parametrize("mode", [True, False])
def test_subclasses_without_a_forward_of_their_own_are_converted_and_come_back(kind, mode):
    torch.manual_seed(0)
    model, x = nn.Sequential(kind(4)), torch.randn(8, 4, 5, 5)
    with torch.no_grad():
        model[0].weight.uniform_(0.5, 2)
        model[0].running_mean.normal_()
    model.train(mode)
    other = copy.deepcopy(model)
    keys, wanted = list(model.state_dict()), expected(model[0], x, mode)
    rc.emulate_(model, CONFIG)
    assert list(emulated_layers(model)) == ["0"]
    assert list(model.state_dict()) == keys
    assert has_norms(model)
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for twin in [model, *twins]:
        assert torch.equal(twin(x), wanted)
        assert type(twin[0]) is type(model[0])
    for twin in [model, *twins]:
        rc.restore_(twin)
        assert type(twin[0]) is kind
    rc.restore_(other)
    rc.emulate_(other, CONFIG)
    other[0].mode = "float"
    assert torch.equal(other(x), nn.functional.batch_norm(
        x, *([None, None] if mode else [other[0].running_mean, other[0].running_var]), other[0].weight, other[0].bias,
        mode, 0.1, other[0].eps))  # fmt: skip


def test_what_a_subclass_adds_is_there_while_it_is_emulated():
    model = rc.emulate_(nn.Sequential(Initialized(4), Mixed(4)), CONFIG)
    assert (model[0].kind, model[0].doubled, model[1].name()) == ("own", 14, "LightNorm2d")
    model[0].scale_(3.0)
    assert torch.equal(model[0].weight, torch.full((4,), 3.0))


@pytest.mark.parametrize("kind", [Activated, Frozen, Checked, Reports])
def test_subclasses_that_may_compute_something_else_are_named(kind):
    model = nn.Sequential(kind(4), nn.BatchNorm2d(4))
    with pytest.warns(rc.RecoupWarning, match=rf"subclass may compute something else: 0 \({kind.__name__}\)"):
        rc.emulate_(model, CONFIG)
    assert list(emulated_layers(model)) == ["1"]
    with pytest.raises(rc.RecoupError, match=f"'0' is a {kind.__name__}; LightNorm stands in for BatchNorm1d"):
        rc.emulate_(rc.restore_(model), CONFIG, {"0": CONFIG})


@pytest.fixture
def group(tmp_path):
    dist.init_process_group("gloo", store=FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_synchronized_norms_of_several_processes_are_named(group, monkeypatch):
    model = nn.Sequential(nn.SyncBatchNorm(4), nn.BatchNorm2d(4))
    rc.emulate_(model, CONFIG)
    assert list(emulated_layers(model)) == ["0", "1"]
    rc.restore_(model)
    monkeypatch.setattr(dist, "get_world_size", lambda *_: 2)
    with pytest.warns(rc.RecoupWarning, match=r"no stand-in .*synchronize_\): 0 \(SyncBatchNorm\)"):
        rc.emulate_(model, CONFIG)
    assert list(emulated_layers(model)) == ["1"]


def test_converters_of_batch_norms_leave_emulated_ones():
    model, x = small_net(), images(4)
    rc.emulate_(model, CONFIG)
    before = model(x)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert list(emulated_layers(converted)) == list(tracking_norms(small_net()))
    assert torch.equal(converted(x), before)
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    assert all(is_batch_norm(module) for module in emulated_layers(model).values())
    assert not is_batch_norm(model.stem)
