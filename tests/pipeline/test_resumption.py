"""States that others interfered with, gradients that break within an update, and inputs that are no plain tensors."""

import copy
from collections import UserDict
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from recoup.errors import RecoupError
from recoup.pipeline import Batched, Run, Simulator, delays
from recoup.pipeline.plan import Plan
from recoup.pipeline.runtime import run_local

STAGES = [["0"], ["1", "2"]]


def network(seed=0, p=0.0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), nn.Sequential(nn.Tanh(), nn.Dropout(p)), nn.Linear(5, 2)).double()


def simulator(model, **options):
    return Simulator(model, STAGES, delays(2), 0.1, mitigation="lwpv+sc", **options)


def samples(count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(1, 3, dtype=torch.float64, generator=generator) for _ in range(count)]
    return [(x, torch.tensor([k % 2])) for k, x in enumerate(drawn)]


def same(model, other):
    return all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_weights_written_before_a_resume_do_not_matter():
    one, other = network(), network()
    first = simulator(one)
    for x, y in samples(4):
        first.step(x, y)
    state = first.state_dict()
    second = simulator(other)
    other.load_state_dict(network(3).state_dict())
    with pytest.raises(RecoupError, match=r"0\.weight was written to .* or use its load_state_dict"):
        second.step(*samples(1)[0])
    second.load_state_dict(state)
    for x, y in samples(3, seed=2):
        assert first.step(x, y) == second.step(x, y)
    assert same(one, other)


def test_a_deep_copy_is_refused():
    first = simulator(network())
    with pytest.raises(RecoupError, match="a copy would train the model that this one trains: make a new Simulator"):
        copy.deepcopy(first)


def test_gradients_of_others_are_not_part_of_a_state():
    one, other = network(), network()
    first, second = simulator(one), simulator(other)
    x, y = samples(1)[0]
    first.step(x, y)
    cross_entropy(one(x), y).backward()
    state = first.state_dict()
    assert not state["gradient"].any()
    second.load_state_dict(state)
    for x, y in samples(3, seed=2):
        first.step(x, y)
        second.step(x, y)
    assert same(one, other)
    grouped = simulator(network(), update_size=2)
    grouped.step(x, y)
    cross_entropy(grouped.model(x), y).backward()
    with pytest.raises(RecoupError, match="gradients were changed between the samples"):
        grouped.state_dict()


def broken(output: Tensor, y: Tensor) -> Tensor:
    """A finite loss whose gradient is not."""
    return cross_entropy(output, y) + (output.sum() * 0).sqrt()


def test_a_broken_gradient_within_an_update_names_its_own_step_and_goes_away():
    one, other = network(), network()
    first, second = (simulator(model, update_size=3) for model in (one, other))
    for k, (x, y) in enumerate(samples(6)):
        if k in (1, 3):
            first.loss = broken
            with pytest.raises(RecoupError, match=f"gradient of step {k} is not finite"):
                first.step(x, y)
            first.loss = cross_entropy
        assert first.step(x, y) == second.step(x, y)
    assert same(one, other)


class Lazy(nn.Module):
    """Makes a buffer when it is first called, and a longer one where that is needed."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("made", None)
        self.register_buffer("grown", torch.zeros(0))
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        if self.made is None:
            self.made = torch.ones(1)
        if len(self.grown) < x.shape[1]:
            self.grown = torch.zeros(x.shape[1])
        return self.layer(x + self.grown) * self.made


def test_buffers_that_a_pass_makes_or_replaces():
    model = Lazy()
    unit = Simulator(model, [["layer"], []], [2, 0], 0.1)
    for x, y in samples(4):
        unit.step(x.float(), y)
    assert len(model.grown) == 3


@dataclass
class Packed:
    """An input that torch's tree does not open."""

    x: Tensor


class Takes(nn.Module):
    """A network behind an opener of inputs."""

    def __init__(self, opened) -> None:
        super().__init__()
        self.opened, self.body = opened, network()

    def forward(self, packed):
        return self.body(self.opened(packed))


@pytest.mark.parametrize(
    ("pack", "opened"),
    [
        (Packed, lambda packed: packed.x),
        (lambda x: UserDict(x=x), lambda packed: packed["x"]),
        (lambda x: x.numpy().copy(), torch.as_tensor),
        (lambda x: {"x": [x]}, lambda packed: packed["x"][0]),
    ],
)
def test_inputs_of_any_kind(pack, opened):
    model, plain = Takes(opened), network()
    unit = Simulator(model, [["body.0"], ["body.1", "body.2"]], delays(2), 0.1, mitigation="sc")
    other = Simulator(plain, STAGES, delays(2), 0.1, mitigation="sc")
    for x, y in samples(4):
        assert unit.step(pack(x), y) == other.step(x, y)


def test_an_input_without_tensors_is_named():
    model = Takes(lambda rows: torch.tensor(rows, dtype=torch.float64))
    unit = Simulator(model, [["body.0"], ["body.1", "body.2"]], delays(2), 0.1)
    with pytest.raises(RecoupError, match="no tensor was found in the input, a list"):
        unit.step([[1.0, 2.0, 3.0]], torch.tensor([0]))


class Adds(nn.Module):
    """Writes to its input."""

    def forward(self, x: Tensor) -> Tensor:
        return x.add_(1.0)


def test_the_first_check_leaves_the_input_alone():
    model = nn.Sequential(Adds(), nn.Linear(3, 2))
    x = torch.zeros(1, 3)
    Simulator(model, [["1"], []], [1, 0], 0.1).step(x, torch.tensor([0]))
    assert torch.equal(x, torch.ones(1, 3))  # once, by the model itself


def test_a_rank_that_begins_in_place():
    def build():
        torch.manual_seed(5)
        return nn.Sequential(nn.Linear(3, 5), nn.ReLU(inplace=True), nn.Linear(5, 2)).double()

    one, other = build(), build()
    stages, late = [["0"], ["1", "2"]], [2, 0]
    run_local(Plan(one, stages, late, 0.1, mitigation="sc", cut=[1, 2]), samples(6), 2)
    unit = Simulator(other, stages, late, 0.1, mitigation="sc")
    for x, y in samples(6):
        unit.step(x, y)
    assert same(one, other)


def test_a_loss_that_reaches_weights_itself():
    def penalised(model):
        return lambda output, y: cross_entropy(output, y) + 0.5 * model[2].weight.pow(2).sum()

    one, other = network(), network()
    run_local(Plan(one, STAGES, delays(2), 0.1, mitigation="lwpv", loss=penalised(one), cut=[1, 2]), samples(6), 2)
    unit = Simulator(other, STAGES, delays(2), 0.1, mitigation="lwpv", loss=penalised(other))
    for x, y in samples(6):
        unit.step(x, y)
    assert same(one, other)


def batched(p=0.0, **options):
    models = [network(seed, p) for seed in range(2)]
    return models, Batched(models, STAGES, [Run([2, 0], "sc", 0.1, **options), Run([2, 0], "lwpv", 0.1, **options)])


def test_batched_runs_with_dropout_go_on_bit_for_bit():
    _, first = batched(0.5)
    _, second = batched(0.5)
    x, y = torch.randn(2, 1, 3, dtype=torch.float64), torch.zeros(2, 1, dtype=torch.int64)
    first.step(x, y)
    state = first.state_dict()
    wanted = [first.step(x, y) for _ in range(3)]
    torch.manual_seed(99)
    second.load_state_dict(state)
    assert all(torch.equal(second.step(x, y), losses) for losses in wanted)


def test_an_incomplete_state_of_batched_runs_changes_nothing():
    _, first = batched()
    before = first.weights(0)
    state = first.state_dict()
    del state["blocks"]["2.bias"]
    state["blocks"]["0.weight"]["w"] += 1
    with pytest.raises(RecoupError, match=r"2\.bias"):
        first.load_state_dict(state)
    assert all(torch.equal(before[name], now) for name, now in first.weights(0).items())
    with pytest.raises(RecoupError, match="no state of a Batched"):
        first.load_state_dict([])  # type: ignore[arg-type]


def test_spike_compensation_whose_momentum_vanishes():
    late = [1100, 0]  # 0.5^1100 is 0 in float64
    x, y = samples(1)[0]
    models = [network()]
    together = Batched(models, STAGES, [Run(late, "sc", 0.1, momentum=0.5)])
    alone = network()
    unit = Simulator(alone, STAGES, late, 0.1, 0.5, mitigation="sc")
    for _ in range(2):
        unit.step(x, y)
        together.step(x[None], y[None])
    found = together.weights(0)
    for name, weights in alone.named_parameters():  # products of a batch sum in another order
        torch.testing.assert_close(found[name], weights.detach(), rtol=1e-12, atol=1e-12)


def test_infinite_rates_are_refused():
    models = [network()]
    together = Batched(models, STAGES, [Run([2, 0], "none", lambda _: float("inf"))])
    with pytest.raises(RecoupError, match="learning rate of run 0 in step 0 is inf"):
        together.step(torch.zeros(1, 1, 3, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.int64))


def test_numpy_delays_are_numbers():
    from recoup.training.pipelined import _delays

    assert _delays(np.array([2, 0]), 2) == [2, 0]
    assert all(type(delay) is int for delay in _delays(np.array([2, 0]), 2))
