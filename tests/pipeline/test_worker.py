"""A rank's state at any tick is enough to go on from, whatever its modules keep; and what a rank refuses."""

import copy
import io

import pytest
import torch
from torch import nn

from recoup.errors import RecoupError
from recoup.pipeline import Simulator, delays
from recoup.pipeline.norms import OnlineNorm2d
from recoup.pipeline.plan import Plan
from recoup.pipeline.runtime import run_local, ticks
from recoup.pipeline.transport import LocalTransport
from tests.pipeline.networks import images, rates

COUNT, RANKS = 14, 3
STAGES = [["0"], ["1"], ["2"], ["3"]]


def network(seed=0, dropout=0.3):
    """Statistics that move in the forward, others that move in the backward, frozen ones, and dropout."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 4, 3), OnlineNorm2d(4, 0.9, 0.9), nn.ReLU()),
        nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(dropout)),
        nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4).eval(), nn.ReLU()),
        nn.Sequential(nn.Flatten(), nn.Linear(4, 3)),
    )


def samples():
    return images(COUNT, shape=(2, 1, 7, 7))


def plan(model, **changes):
    return Plan(
        **{"model": model, "stages": STAGES, "delays": delays(4), "lr": rates, "mitigation": "lwpw+sc", **changes}
    )


def workers(model):
    links = LocalTransport.chain(RANKS)
    made = [plan(model).worker(rank, RANKS, links[rank], samples(), torch.device("cpu")) for rank in range(RANKS)]
    for worker in made:
        worker.keeps = True
    return made


def everything(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_statistics_are_those_of_the_simulator(ranks):
    model, other = network(dropout=0.0), network(dropout=0.0)
    losses = run_local(plan(model), samples(), ranks).losses
    simulator = Simulator(other, STAGES, delays(4), rates, mitigation="lwpw+sc")
    assert losses == [simulator.step(x, y) for x, y in samples()]
    assert same(everything(model), everything(other))


def test_a_state_at_every_tick():
    model = network()
    torch.manual_seed(9)
    whole = run_local(plan(model), samples(), RANKS).losses
    expected = everything(model)
    running, end = workers(network()), ticks(COUNT, RANKS)
    torch.manual_seed(9)
    for t in range(end):
        here = torch.get_rng_state()
        for worker in running:
            worker.hold(t, COUNT)
        file = io.BytesIO()
        torch.save([worker.state() for worker in running], file)
        fresh = network(seed=3)
        resumed = workers(fresh)
        file.seek(0)
        kept = torch.load(file, weights_only=True)
        torch.manual_seed(1)
        for worker, state in zip(resumed, kept, strict=True):
            worker.load(state)
        for tick in range(t, end):
            for worker in resumed:
                worker.tick(tick, COUNT)
        for worker in resumed:
            worker.finish()
        assert resumed[-1].losses == whole
        assert same(everything(fresh), expected)
        torch.set_rng_state(here)
        for worker in running:
            worker.tick(t, COUNT)


def test_what_the_neighbours_still_send():
    running = workers(network())
    for t in range(ticks(COUNT, RANKS)):
        for rank, worker in enumerate(running):
            forwards, backwards = max(0, min(COUNT, t - rank)), max(0, min(COUNT, t - 2 * (RANKS - 1) + rank))
            wanted = (COUNT - forwards if rank else 0, COUNT - backwards if rank < RANKS - 1 else 0)
            assert worker.expected(COUNT) == wanted
        for worker in running:
            worker.tick(t, COUNT)
    assert [worker.expected(COUNT) for worker in running] == [(0, 0)] * RANKS


class Breaks(nn.Module):
    """Breaks forward, or backward, passes from the third on."""

    def __init__(self, backward):
        super().__init__()
        self.count, self.backward = 0, backward

    def forward(self, x):
        self.count += 1
        if self.count >= 3 and self.backward:
            x = x * 1
            x.register_hook(lambda g: g * torch.inf)
            return x
        return x * torch.nan if self.count >= 3 else x


@pytest.mark.parametrize(
    ("place", "backward", "ranks", "told"),
    [
        (3, False, 2, r"step 2 \(rank 1, the last stage\) is nan: the output of module 3\.2 \(stage 3\)"),
        (0, False, 2, r"what came from rank 0 is not finite, so the fault is before stage 2"),
        (0, False, 1, r"is nan: the output of module 0\.3 \(stage 0\) is not finite"),
        (2, True, 2, r"the gradient of step 2 \(rank 1\) is not finite, first in stage 2"),
    ],
)
def test_what_is_not_finite_is_named(place, backward, ranks, told):
    model = network()
    model.get_submodule(str(place)).append(Breaks(backward))
    delayed = plan(model, mitigation="stash")  # no check of saved weights, which would be the first pass
    with pytest.raises(RecoupError, match=told):
        run_local(delayed, samples(), ranks)
    assert all(value.isfinite().all() for value in model.parameters())
    assert all(p.grad is None for p in model.parameters())


def test_a_part_that_gives_no_tensor():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(2), nn.LSTM(25, 3), nn.Linear(3, 3))
    made = plan(model, stages=[["0"], ["2"], ["3"]], delays=[4, 2, 0], mitigation="stash", cut=[3, 1])
    with pytest.raises(RecoupError, match="rank 0's part of the model gives a tuple"):
        run_local(made, samples(), 2)


def test_losses_that_are_none():
    with pytest.raises(RecoupError, match=r"the loss is torch.float32 \[2\]; it must be"):
        run_local(plan(network(), loss=lambda out, _: out.sum(1)), samples(), 2)


def test_a_state_is_not_changed_by_what_follows():
    running = workers(network())
    for t in range(9):
        for worker in running:
            worker.tick(t, COUNT)
    for worker in running:
        worker.hold(9, COUNT)
    before = [worker.state() for worker in running]
    copied = copy.deepcopy(before)
    for worker in running:
        worker.tick(9, COUNT)
    for one, other in zip(before, copied, strict=True):
        for name, packet in one["held"].items():
            assert all(map(torch.equal, packet, other["held"][name]))
        for a, b in zip(one["under way"], other["under way"], strict=True):
            assert all(map(torch.equal, a[1], b[1]))
        assert torch.equal(one["core"]["optimizer"]["weights"], other["core"]["optimizer"]["weights"])
