"""Outputs kept and given again: the same bits whatever was changed in between, and never another layer's."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import recoup as rc
from recoup.network import derived
from recoup.network.replay import Outputs, replaying
from tests.networks import images, small_net


class Odd(nn.Module):
    """Everything that a cache by name or by order would get wrong: a shortcut, a layer that runs twice, one that runs
    by a functional call, writes into outputs in place and past the version counter, and a strided view."""

    def __init__(self):
        super().__init__()
        self.first, self.twice = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.spare, self.head = nn.Conv2d(4, 4, 1), nn.Linear(4, 5)

    def forward(self, x):
        a = F.relu_(self.first(x))
        b = self.twice(a)
        b.data.mul_(0.5)
        c = self.twice(b + a)[:, :, ::2]
        c = F.conv2d(c, self.spare.weight) + self.spare(c)
        return self.head(c.mean((2, 3)).add_(self.first.bias))


@pytest.fixture
def calls(monkeypatch):
    """Which layers were really computed, in order."""
    found = []
    for kind in (nn.Conv2d, nn.Linear):
        own = kind.forward

        def forward(self, x, own=own):
            found.append(self)
            return own(self, x)

        monkeypatch.setattr(kind, "forward", forward)
    monkeypatch.setattr(derived, "patched", lambda _: {})  # counting changes nothing of what they compute
    return found


def test_a_second_pass_computes_nothing_again_and_gives_the_same_bits(calls):
    torch.manual_seed(0)
    model, (x,) = Odd().eval(), images(4)[:4].split(4)
    outputs = Outputs()
    with torch.no_grad():
        expected = model(x)
        calls.clear()
        with replaying(model, outputs):
            runs = [model(x) for _ in range(4)]
            assert calls[:5] == [model.first, model.twice, model.twice, model.spare, model.head]
            assert calls[5:] == [model.spare] * 3  # whose input has gaps
        assert all(torch.equal(run, expected) for run in runs)
        assert torch.equal(model(x), expected)
    assert "forward" not in model.first.__dict__


class Alike(nn.Module):
    """Outputs that are equal and not one: a layer runs twice on the same input, two layers have the same weights, and
    one output of each pair is written into."""

    def __init__(self):
        super().__init__()
        self.conv, self.query, self.key = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 4), nn.Linear(4, 4)
        self.key.load_state_dict(self.query.state_dict())

    def forward(self, x):
        a, b = self.conv(x), self.conv(x)
        a.add_(1)
        c = (a * b).mean((2, 3))
        query, key = self.query(c), self.key(c)
        return query.mul_(0.5) + 3 * key


@pytest.mark.parametrize("keep", [True, False])
def test_equal_outputs_are_written_into_one_by_one(keep):
    torch.manual_seed(0)
    model, x, outputs = Alike().eval(), images(2), Outputs()
    with torch.no_grad():
        expected = model(x)
        with replaying(model, outputs):
            runs = [model(x) for _ in range(2)]
        with replaying(model, outputs, keep=keep):
            runs += [model(x) for _ in range(2)]
            runs[2].zero_()  # the caller's own
        for run in (runs[0], runs[1], runs[3]):
            assert torch.equal(run, expected)


CHANGES = [
    "weight",
    "data",
    "bias",
    "dilation",
    "hardware",
    "threads",
    "order",
    "float",
    "input",
    "layout",
    "none",
    "copy",
]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from(CHANGES), min_size=1, max_size=8), st.sampled_from([0, 40_000, 1 << 30]))
def test_whatever_was_changed_the_bits_are_those_without(changes, most):
    model, x = small_net(), images(6)
    rc.calibrate_(model, [x])
    outputs = Outputs(most)
    for number, change in enumerate(changes):
        outputs.begin()
        names = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
        name = names[1 + number % (len(names) - 1)]
        layer = dict(model.named_modules())[name]
        assert isinstance(layer, nn.Conv2d)
        with torch.no_grad():
            if change == "weight":
                layer.weight.mul_(1.25)
            elif change == "data":
                layer.weight.data[:1].neg_()
            elif change == "bias" and layer.bias is not None:
                layer.bias.add_(0.125)
            elif change == "dilation":
                layer.dilation = (2, 2) if layer.kernel_size == (1, 1) else layer.dilation
            elif change in ("hardware", "threads"):
                rc.restore_(model)
                rc.emulate_(model, None, {name: rc.NBSMT(2 if change == "hardware" else 4)})
            elif change == "order" and hasattr(layer, "order"):
                layer.order = torch.arange(layer.in_channels).flip(0)
            elif change == "float":
                rc.restore_(model)
            elif change == "input":
                x = x.flip(0).contiguous()
            elif change == "layout":
                x = x.contiguous(memory_format=torch.channels_last)
            elif change == "copy":
                with replaying(model, outputs):
                    model = copy.deepcopy(model)
                for module in model.modules():
                    module.__dict__.pop("forward", None)
            expected = model(x)
            with replaying(model, outputs):
                assert torch.equal(model(x), expected)
                assert torch.equal(model(x), expected)
        assert outputs.held <= most


def test_memory_is_bounded_first_layers_stay_and_what_nobody_asked_for_goes():
    model, x = Odd().eval(), images(4)
    size = 4 * 4 * x.shape[2] * x.shape[3] * 4
    outputs = Outputs(2 * size)
    with torch.no_grad(), replaying(model, outputs):
        outputs.begin()
        model(x)
        assert 0 < outputs.held <= 2 * size
        outputs.begin()
        outputs.begin()
        assert outputs.held == 0


def test_lasting_outputs_stay_and_leave_a_quarter():
    model, x = Odd().eval(), images(4)
    outputs = Outputs(1 << 20)
    with torch.no_grad(), replaying(model, outputs, lasting=True):
        model(x)
    held = outputs.held
    assert 0 < held == outputs.lasting <= (1 << 20) * 3 // 4
    for _ in range(3):
        outputs.begin()
    assert outputs.held == held


def test_gradients_hooks_and_derived_classes_are_as_without():
    class Doubled(nn.Conv2d):
        def forward(self, input):  # noqa: A002
            self.runs = getattr(self, "runs", 0) + 1
            return 2 * super().forward(input)

    torch.manual_seed(0)
    model = nn.Sequential(Doubled(3, 4, 1), nn.Conv2d(4, 4, 1)).eval()
    seen = []
    model[1].register_forward_hook(lambda *_: seen.append(1))
    x, outputs = images(2), Outputs()
    with replaying(model, outputs):
        with torch.no_grad():
            model(x)
            model(x)
        assert model[0].runs == 2
        assert len(seen) == 2
        model(x).sum().backward()
    assert model[1].weight.grad is not None


def test_what_an_error_ended_is_not_kept():
    model, x = small_net(), images(4)
    rc.calibrate_(model, [x])
    rc.emulate_(model, rc.NBSMT(2))
    outputs = Outputs()
    with torch.no_grad(), replaying(model, outputs):
        held = outputs.held
        with pytest.raises(rc.RecoupError, match="NaN"):
            model(x * float("nan"))
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                assert "forward" in module.__dict__
    assert held == 0
    assert not any("forward" in module.__dict__ for module in model.modules())


class Times(torch.Tensor):
    """A weight that multiplies by more than its bytes."""

    factor = 1.0

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is F.linear:
            x, weight, *rest = args
            return weight.factor * F.linear(x, weight.as_subclass(torch.Tensor), *rest)
        return super().__torch_function__(func, types, args, kwargs or {})


def negated(x):
    """-x, whose bytes are x's: the imaginary part of a conjugate."""
    found = torch.complex(torch.zeros_like(x), x).conj().imag
    assert found.is_neg()
    return found


@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_tensors_that_are_more_than_their_bytes_are_computed(calls):
    layer, x, outputs = nn.Linear(4, 4), torch.rand(3, 4), Outputs()
    weight = layer.weight.detach().clone()
    with torch.no_grad(), replaying(layer, outputs):
        for value in (weight, negated(weight), weight.to_sparse_csr()):
            layer.weight = nn.Parameter(value)
            assert torch.equal(layer(x), F.linear(x, value, layer.bias))
        layer.weight = nn.Parameter(weight.as_subclass(Times))
        for layer.weight.factor in (2.0, 3.0):
            assert torch.equal(layer(x), layer.weight.factor * F.linear(x, weight, layer.bias))
        calls.clear()
        layer.weight = nn.Parameter(weight)
        for value in (x, negated(x), x.to_sparse_csr()):
            assert torch.equal(layer(value), F.linear(value, weight, layer.bias))
        assert len(calls) == 2
