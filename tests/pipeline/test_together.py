"""Ranks measure while all of them run: the cut isolates what is slow, nothing is changed, all hear of a failure."""

import copy
import socket
import sys
import time
from fractions import Fraction
from itertools import accumulate, combinations, pairwise

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from recoup.errors import RecoupError
from recoup.pipeline import SGDM, delays, stage_times, together
from recoup.pipeline.cutting import Joint
from recoup.pipeline.rings import Rings
from recoup.pipeline.runtime import Balanced, balanced, rank_times
from recoup.pipeline.together import _cut, _scaled
from recoup.pipeline.wallclock import Times, joined, period
from tests.fresh import Fresh
from tests.pipeline.ranks import network, plan, samples
from tests.pipeline.test_timing import Waits

SLOW = [["0"], ["2"], ["4"], ["6"]]


def slow():
    """Of four stages the last takes forty milliseconds."""
    torch.manual_seed(2)
    layers = [nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), Waits(6, 4)]
    return nn.Sequential(*layers)


@pytest.fixture
def alone():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # pyright: ignore[reportPrivateImportUsage]
    yield
    dist.destroy_process_group()


def test_one_rank(alone):
    model = network()
    before = copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    found = balanced(plan(model, "lwpv+sc"), samples(), rounds=1)
    assert isinstance(found, Balanced)
    assert found.plan.cut == [4]
    assert found.plan.model is model
    assert found.rate == 1 / found.ranks[0].total > 0
    assert joined(found.stages, [5])[0].total == pytest.approx(found.ranks[0].total)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


class Branching(nn.Module):
    """What torch.fx cannot follow."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x):
        return self.inner(x) if x.sum() > 0 else -self.inner(x)


def test_a_sequence_that_cannot_be_followed(alone):
    model = nn.Sequential(Branching(), nn.Linear(6, 4))
    found = balanced(plan(model, "none", stages=[["0"], ["1"]], delays=[2, 0]), samples(), rounds=1)
    assert found.plan.cut == [2]
    assert found.stages[0] == found.stages[1]
    assert joined(found.stages, [2])[0].total == pytest.approx(found.ranks[0].total)
    with pytest.raises(RecoupError, match=r"torch\.fx cannot follow Branching"):
        balanced(plan(Branching(), "none", stages=[["inner"]], delays=[0]), samples(), rounds=1)


@pytest.mark.parametrize("size", [1, 2, 3, 20])
def test_a_sample_has_its_part_of_the_update(alone, monkeypatch, size):
    own = Rings.advance

    def slowly(*arguments):
        time.sleep(0.06)
        return own(*arguments)

    monkeypatch.setattr(Rings, "advance", slowly)
    (rank,) = rank_times(plan(network(), "none", update_size=size, cut=[4]), samples()[:5])
    assert 0.06 / size <= rank.backward < 0.06 / size + 0.025
    first = together._stages(plan(network(), "none", update_size=size), samples(), 3, torch.device("cpu"))
    assert 0.06 / size <= sum(stage.update for stage in first) < 0.06 / size + 0.025


def test_what_is_refused(alone):
    with pytest.raises(RecoupError, match="balanced: there are no samples"):
        balanced(plan(network(), "none"), [])
    with pytest.raises(RecoupError, match="rank_times: there are no samples"):
        rank_times(plan(network(), "none"), [])
    with pytest.raises(RecoupError, match="rounds"):
        balanced(plan(network(), "none"), samples(), rounds=0)
    with pytest.raises(RecoupError, match=r"rank 0: .*is not finite"):
        balanced(plan(network(), "none"), [(x * torch.nan, y) for x, y in samples()], rounds=1)


def test_without_processes():
    with pytest.raises(RecoupError, match=r"pipeline\.balanced: torch\.distributed is not initialized"):
        balanced(plan(network(), "none"), samples())
    with pytest.raises(RecoupError, match=r"pipeline\.rank_times: torch\.distributed is not initialized"):
        rank_times(plan(network(), "none"), samples())


def test_whatever_fails_is_told_to_the_others_and_raised(alone, monkeypatch):
    told = []
    monkeypatch.setattr(dist, "all_gather_object", lambda _, mine: told.append(mine))
    with pytest.raises(ZeroDivisionError):
        together._everywhere(lambda: 1 / 0)
    assert told == [(None, "ZeroDivisionError: division by zero")]


def test_an_optimizer_of_ones_own_is_timed():
    x, y = samples()[0]
    assert len(stage_times(slow(), SLOW, x, y, optimizer=SGDM(0.5), delays=delays(4), rounds=1)) == 4


def test_cuts_are_in_units_and_ranks_share_what_they_took_among_their_stages():
    times = [Times(1, 2), Times(1, 1, 1), Times(3, 4), Times(1, 1)]
    joints = [(0, 0), (2, 1), (3, 3), (5, 4)]
    late = plan(network(), "none", delays=[6, 4, 2, 0])
    assert _cut(times, [*map(Joint._make, joints)], 2, late) == ([2, 3], [0, 1, 4])
    found = _scaled(times[:2], Times(4, 8))
    assert found == [Times(2, 4), Times(2, 4)]
    assert joined(found, [2]) == [Times(4, 8)]
    assert _scaled([Times(0, 0), Times(0, 0)], Times(1, 2)) == [Times(0.5, 1), Times(0.5, 1)]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 6)), min_size=2, max_size=7), st.integers(2, 4), st.data())
def test_a_cut_is_the_fastest_of_those_that_delays_allow(stages, ranks, data):
    ranks, size = min(ranks, len(stages)), data.draw(st.integers(1, 3))
    count, joints = len(stages), [Joint(s, s) for s in range(len(stages) + 1)]
    made = plan(network(), "none", delays=[delay for _, delay in stages], update_size=size)
    cut, _ = _cut([Times(seconds, 0) for seconds, _ in stages], joints, ranks, made)

    def parts(bounds):
        return [stages[a:b] for a, b in pairwise((0, *bounds, count))]

    def allowed(bounds):
        lates = [Fraction(2 * (ranks - 1 - r), size) for r in range(ranks)]
        return all(delay >= late for late, part in zip(lates, parts(bounds), strict=True) for _, delay in part)

    def slowest(bounds):
        return max(sum(seconds for seconds, _ in part) for part in parts(bounds))

    every = list(combinations(range(1, count), ranks - 1))
    found = tuple(accumulate(cut))[:-1]
    legal = [bounds for bounds in every if allowed(bounds)] or every
    assert found in legal
    assert slowest(found) == min(map(slowest, legal))


def work(rank, broken):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", "env://", rank=rank, world_size=2)
    data = [(x * torch.nan if broken and rank else x, y) for x, y in samples()[:8]]
    how = {"stages": SLOW, "delays": delays(4)}
    try:
        found = balanced(plan(slow(), "lwpv+sc", **how), data, rounds=1)
    except RecoupError as error:
        sys.stdout.write(str(error))
    else:
        seconds = [rank.total for rank in found.ranks]
        assert period(found.ranks) == max(seconds)
        sys.stdout.write(f"{found.plan.cut} {seconds}")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("broken", [pytest.param(False, marks=pytest.mark.slow), True])
def test_two_ranks_find_the_same(broken):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        where = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
    running = [Fresh(work, rank, broken, env=where) for rank in range(2)]
    one, two = (process.wait(60) for process in running)
    assert one.returncode == two.returncode == 0, one.stderr[-2000:] + two.stderr[-2000:]
    assert one.stdout == two.stdout
    if broken:
        assert one.stdout.startswith("pipeline: rank 1: pipeline: the gradient of")
        return
    cut, _, seconds = one.stdout.partition("] ")
    assert cut == "[6, 1"  # what takes long has a rank of its own
    fast, waits = map(float, seconds.strip("[]").split(", "))
    assert waits >= 0.039
    assert fast < waits
