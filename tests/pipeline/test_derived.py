"""Modules that keep tensors computed from their weights: which are refused, which are not, and that looking is free.

What is accepted must be right: overwritten under the graph, its gradient to the input is that of the newest weights.
"""

import copy
import importlib
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from recoup import models
from recoup.errors import RecoupError
from recoup.pipeline import Simulator, norms
from recoup.pipeline.derived import refuse_derived_weights
from tests.fresh import Fresh


def check(model, x, parameters=None):
    refuse_derived_weights(model, x, list(model.parameters()) if parameters is None else parameters)


class Standardized(nn.Conv2d):
    """Weight standardization as everyone writes it."""

    def forward(self, input):  # noqa: A002
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / w.std((1, 2, 3), keepdim=True)
        return F.conv2d(input, w, self.bias)


class Scaled(nn.Linear):
    """Weights in units of a constant."""

    def forward(self, input):  # noqa: A002
        return F.linear(input, self.weight * 2, self.bias)


class Cast(nn.Linear):
    """Autocast within the model."""

    def forward(self, input):  # noqa: A002
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(input)


class Exponential(nn.Module):
    """A scale kept as its logarithm: what multiplies the input is derived."""

    def __init__(self):
        super().__init__()
        self.log = nn.Parameter(torch.zeros(3))

    def forward(self, x):
        return x * self.log.exp()


class Checkpointed(nn.Linear):
    def __init__(self, reentrant):
        super().__init__(3, 3)
        self.reentrant = reentrant

    def forward(self, input):  # noqa: A002
        return checkpoint(super().forward, input, use_reentrant=self.reentrant)


class Offloaded(nn.Linear):
    def forward(self, input):  # noqa: A002
        with torch.autograd.graph.save_on_cpu():
            return super().forward(input)


def line(*shape):
    return torch.randn(*(shape or (2, 3)), generator=torch.Generator().manual_seed(0))


REFUSED = {
    "weight standardization": (lambda: Standardized(2, 2, 2), (1, 2, 4, 4), "1 saves weights derived"),
    "scaled": (lambda: Scaled(3, 3), (2, 3), "1 saves weights derived"),
    "cast": (lambda: Cast(3, 3), (2, 3), "1 saves weights derived"),
    "exponential": (Exponential, (2, 3), "1 saves weights derived"),
    "spectral norm by hook": (lambda: nn.utils.spectral_norm(nn.Linear(3, 3)), (2, 3), "saves weights derived"),
    "weight norm": (lambda: parametrizations.weight_norm(nn.Linear(3, 3)), (2, 3), "1 is parametrized"),
    "spectral norm": (lambda: parametrizations.spectral_norm(nn.Linear(3, 3)), (2, 3), "1 is parametrized"),
    "checkpoint": (lambda: Checkpointed(False), (2, 3), "1 runs under saved-tensor hooks"),
    "reentrant checkpoint": (lambda: Checkpointed(True), (2, 3), "has activation checkpoints"),
    "offloaded": (lambda: Offloaded(3, 3), (2, 3), "1 runs under saved-tensor hooks"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_refused_by_name(name):
    make, shape, message = REFUSED[name]
    model = nn.Sequential(nn.GroupNorm(1, shape[1]), make())
    with pytest.raises(RecoupError, match=rf"pipeline: .*{message}.*mitigation='stash'"):
        check(model, line(*shape))


def test_the_simulator_refuses_them_with_a_delay_and_no_stash_only():
    def step(delay, how):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 3), Scaled(3, 3))
        return Simulator(net, [["0"], ["1"]], [delay, 0], 0.1, 0.9, 0.0, how).step(line(), torch.tensor([0, 1]))

    with pytest.raises(RecoupError, match="1 saves weights derived"):
        step(2, "sc")
    assert step(2, "stash") == step(0, "sc")  # the first step has no stale weights yet


def test_a_first_layer_may_derive_its_weights_as_no_gradient_goes_through_it():
    check(nn.Sequential(Scaled(3, 3), nn.Linear(3, 3)), line())


def accumulator_of(parameter) -> Any:
    """The node that gathers a parameter's gradient: one while a graph holds it, a new one after."""
    return parameter.expand_as(parameter).grad_fn.next_functions[0][0]


def test_looking_leaves_no_graph_behind():
    """A node that is left would keep its stream, which a CUDA graph may not wait for, and its activations."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.MaxPool1d(2), nn.Linear(2, 2), nn.ReLU())
    kept = accumulator_of(model[0].weight)
    kept.metadata["kept"] = True
    assert accumulator_of(model[0].weight).metadata == {"kept": True}
    del kept
    check(model, torch.randn(1, 2, 4))
    for parameter in model.parameters():
        accumulator_of(parameter).metadata["looked"] = True
        assert not accumulator_of(parameter).metadata


def test_compiled_modules_are_refused():
    in_place, wrapped = nn.Linear(3, 3), nn.Sequential(torch.compile(nn.Linear(3, 3), backend="eager"))
    in_place.compile(backend="eager")
    for model, name in ((in_place, "the model itself"), (wrapped, "0")):
        with pytest.raises(RecoupError, match=f"pipeline: {name} is compiled"):
            check(model, line())


def test_offloading_around_the_step_is_refused():
    model = nn.Linear(3, 3)
    with torch.autograd.graph.save_on_cpu(), pytest.raises(RecoupError, match="the step runs under saved-tensor hooks"):
        check(model, line())


ACCEPTED = {
    "linear": (lambda: nn.Linear(3, 3), (2, 3)),
    "conv": (lambda: nn.Conv2d(2, 4, 3, stride=2, groups=2), (1, 2, 5, 5)),
    "transposed conv": (lambda: nn.ConvTranspose2d(2, 3, 3), (1, 2, 5, 5)),
    "group norm": (lambda: nn.GroupNorm(2, 4), (1, 4, 3, 3)),
    "layer norm": (lambda: nn.LayerNorm(3), (2, 3)),
    "rms norm": (lambda: nn.RMSNorm(3), (2, 3)),
    "batch norm": (lambda: nn.BatchNorm2d(4), (2, 4, 3, 3)),
    "batch norm in evaluation": (lambda: nn.BatchNorm2d(4).eval(), (2, 4, 3, 3)),
    "filter response": (lambda: norms.FilterResponseNorm2d(4), (1, 4, 3, 3)),
    "standardized": (lambda: norms.StandardizedConv2d(2, 4, 3), (1, 2, 5, 5)),
    "online": (lambda: norms.OnlineNorm2d(4), (1, 4, 3, 3)),
    "prelu": (lambda: nn.PReLU(3), (2, 3)),
    "attention": (lambda: nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True), (1, 3, 4)),
    "lstm": (lambda: nn.LSTM(3, 4), (5, 1, 3)),
}


@pytest.mark.parametrize("name", list(ACCEPTED))
def test_accepted(name):
    make, shape = ACCEPTED[name]
    check(make(), line(*shape))


def test_whole_networks_are_accepted():
    check(models.digits_net(norm="group"), line(1, 1, 8, 8))
    check(models.resnet20(norm="group", width=8), line(1, 3, 8, 8))


@pytest.mark.parametrize("name", ["linear", "conv", "transposed conv", "standardized", "lstm"])
def test_what_is_accepted_goes_back_through_the_newest_weights(name):
    """The gradient to the input follows the newest weights wherever it does not follow stored activations alone."""
    make, shape = ACCEPTED[name]
    torch.manual_seed(0)
    module, newer = make().double(), make().double()
    x = line(*shape).double().requires_grad_()
    y = module(x)
    y = y[0][0, :, 0] if name == "lstm" else y  # the cell's first step: its gates are stored, its weights are not
    for mine, theirs in zip(module.parameters(), newer.parameters(), strict=True):
        mine.data.copy_(theirs.detach())
    (found,) = torch.autograd.grad(y.sum(), x)
    if name == "lstm":
        gates = first_gates(name)
        torch.testing.assert_close(found[0, 0], gates @ newer.weight_ih_l0.detach(), rtol=0, atol=1e-12)
        return
    again = x.detach().requires_grad_()
    (expected,) = torch.autograd.grad(newer(again).sum(), again)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def first_gates(name):
    """The gradient of the first hidden unit after one step to the gates, at the old weights, by hand."""
    make, shape = ACCEPTED[name]
    torch.manual_seed(0)
    module = make().double()
    x = line(*shape).double()[0]
    gates = F.linear(x, module.weight_ih_l0, module.bias_ih_l0) + module.bias_hh_l0
    gates = gates.detach().requires_grad_()
    i, _, g, o = gates.chunk(4, 1)
    return torch.autograd.grad((o.sigmoid() * torch.tanh(i.sigmoid() * g.tanh()))[0, 0], gates)[0][0]


def test_frozen_parameters_are_constants():
    model = nn.Sequential(nn.Linear(3, 3), Scaled(3, 3))
    model[1].requires_grad_(False)
    check(model, line(), [p for p in model.parameters() if p.requires_grad])
    with pytest.raises(RecoupError, match="1 saves weights derived"):
        check(model.requires_grad_(True), line())


def test_what_comes_from_the_input_too_is_an_activation():
    class Gate(nn.Linear):
        def forward(self, input):  # noqa: A002
            gate = torch.sigmoid(F.linear(input, self.weight, self.bias))
            return input * gate

    check(Gate(3, 3), line())


def test_what_the_input_is_written_into_becomes_an_activation():
    class InPlace(nn.Linear):
        def forward(self, input):  # noqa: A002
            sums = self.bias.repeat(len(input), 1)  # of parameters alone, and then not any more
            sums.add_(F.linear(input, self.weight))
            return sums * input

    check(InPlace(3, 3), line().requires_grad_())


def test_inputs_may_be_containers():
    class Pair(nn.Linear):
        def forward(self, input):  # noqa: A002
            return super().forward(input["a"] * input["b"][0])

    check(Pair(3, 3), {"a": line(), "b": [line()]})


@pytest.mark.parametrize("fails", [False, True])
def test_buffers_random_numbers_gradients_and_hooks_are_as_before(fails):
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5), Scaled(3, 3) if fails else nn.Linear(3, 3))
    model[0](line())  # not the initial statistics
    buffers, weights = copy.deepcopy(dict(model.named_buffers())), copy.deepcopy(model.state_dict())
    seed = torch.get_rng_state()
    if fails:
        with pytest.raises(RecoupError, match="2 saves weights"):
            check(model, line())
    else:
        check(model, line())
    assert torch.equal(torch.get_rng_state(), seed)
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_an_error_of_the_model_leaves_no_trace():
    class Fails(nn.BatchNorm1d):
        def forward(self, input):  # noqa: A002
            super().forward(input)
            raise KeyError("no forward")

    model = nn.Sequential(Fails(3))
    with pytest.raises(KeyError, match="no forward"):
        check(model, line())
    assert model[0].running_mean.tolist() == [0, 0, 0]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    check(nn.Linear(3, 3), line())


def watched(compiler: bool) -> None:
    """A step that is watched, in a process with torch's compiler or without it."""
    if compiler:
        importlib.import_module("torch._dynamo")
    before = "torch._dynamo" in sys.modules
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    check(model, torch.ones(1, 4))
    with pytest.raises(RecoupError, match="saves weights derived from its parameters"):
        check(Standardized(3, 4, 3), torch.ones(1, 3, 5, 5))
    assert before == compiler == ("torch._dynamo" in sys.modules)


@pytest.mark.slow
@pytest.mark.parametrize("compiler", [False, True])
def test_watching_loads_no_compiler_and_works_beside_one(compiler):
    done = Fresh(watched, compiler).wait()
    assert done.returncode == 0, done.stderr[-2000:]
