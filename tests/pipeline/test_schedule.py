"""Delays, utilisation and memory against a simulation of workers and mailboxes; the plans of the Gantt picture."""

import io
import re

import numpy as np
import pytest

from recoup.errors import RecoupError
from recoup.pipeline import activations, constant_delays, delays, gantt, schedule, utilisation, weight_versions

STAGES = [1, 2, 3, 5, 8]


def run_fine_grained(S, N):
    """Mailboxes and ticks: (version at forward, version at backward) by stage and sample; ticks; most samples held."""
    forwards = {(0, k): k for k in range(N)}  # (stage, sample): tick it can start
    backwards, seen, updates, held, most = {}, {}, [0] * S, [0] * S, [0] * S
    tick = 0
    while len(seen) < S * N or any(len(versions) < 2 for versions in seen.values()):
        for s in range(S):
            for k in [k for (stage, k), at in forwards.items() if stage == s and at == tick]:
                del forwards[s, k]
                seen[s, k] = [updates[s]]
                held[s] += 1
                most[s] = max(most[s], held[s])
                if s == S - 1:
                    backwards[s, k] = tick
                else:
                    forwards[s + 1, k] = tick + 1
            for k in [k for (stage, k), at in backwards.items() if stage == s and at == tick]:
                del backwards[s, k]
                seen[s, k].append(updates[s])
                updates[s] += 1
                held[s] -= 1
                if s:
                    backwards[s - 1, k] = tick + 1
        tick += 1
    return seen, tick, most


def run_1f1b(S, N):
    """PipeDream: S - s forwards to fill, then a backward and a forward in turn, one pass a slot, nothing drained."""
    forwards, backwards = {(0, k): 0 for k in range(N)}, {}
    seen, updates, turn = {}, [0] * S, [[0, 0] for _ in range(S)]
    slot = 0
    while updates[0] < N:
        for s in range(S):
            i, j = turn[s]  # next backward, next forward
            back = j - i == min(S - s, N - i)  # full, or nothing left to send in
            if back and backwards.get((s, i), slot + 1) <= slot:
                seen[s, i].append(updates[s])
                updates[s] += 1
                turn[s][0] += 1
                if s:
                    backwards[s - 1, i] = slot + 1
            elif not back and forwards.get((s, j), slot + 1) <= slot:
                seen[s, j] = [updates[s]]
                turn[s][1] += 1
                if s == S - 1:
                    backwards[s, j] = slot + 1
                else:
                    forwards[s + 1, j] = slot + 1
        slot += 1
    return seen


@pytest.mark.parametrize("S", STAGES)
def test_fine_grained_delays_are_those_of_ticking_workers(S):
    N = 3 * S + 4
    seen, ticks, most = run_fine_grained(S, N)
    for (s, k), versions in seen.items():
        assert versions == [max(0, k - delays(S)[s]), k]
    assert utilisation(S, N) == N * S / (ticks * S)
    assert utilisation(S, N, "fill-and-drain") == N / ticks
    assert most == activations(S)
    assert sum(activations(S)) == S * S


@pytest.mark.parametrize("S", STAGES)
def test_1f1b_delays_are_those_of_alternating_workers(S):
    for (s, k), versions in run_1f1b(S, 3 * S + 4).items():
        assert versions == [max(0, k - delays(S, "1f1b")[s]), k]


def test_constant_delays_and_versions():
    assert constant_delays(3, 5) == [5, 5, 5]
    assert weight_versions([4, 2, 0], stash=True) == [5, 3, 1]
    assert weight_versions([4, 2, 0]) == [1, 1, 1]


def test_delays_may_be_any_integers():
    assert schedule.check_delays(np.array([3, 0]), 2) == [3, 0]


PLANS = {
    "pipelined": lambda S, N, _: schedule._pipelined(S, N),
    "1f1b": schedule._one_forward_one_backward,
    "fill-and-drain": schedule._fill_and_drain,
}


@pytest.mark.parametrize(("S", "N", "update"), [(1, 1, 1), (1, 5, 2), (4, 8, 4), (3, 7, 3), (5, 9, 2), (2, 3, 50)])
@pytest.mark.parametrize("name", list(PLANS))
def test_plans_can_be_carried_out(name, S, N, update):
    plan = PLANS[name](S, N, update)
    at = {(s, k, backward): slot for slot, s, k, backward in plan}
    assert len(at) == len(plan) == 2 * S * N  # every pass once
    assert set(at) == {(s, k, b) for s in range(S) for k in range(N) for b in (False, True)}
    assert len({(slot, s) for slot, s, *_ in plan}) == len(plan)  # one pass a slot and worker
    assert min(at.values()) == 0
    for k in range(N):
        for s in range(S - 1):
            assert at[s, k, False] < at[s + 1, k, False]
            assert at[s + 1, k, True] < at[s, k, True]
        assert at[S - 1, k, False] < at[S - 1, k, True]
    if name != "pipelined":
        check_drained(at, S, N, update, name)


def check_drained(at, S, N, update, name):
    for s in range(S):
        for first in range(update, N, update):  # the whole update is over before the next sample comes
            before, after = range(first - update, first), range(first, min(first + update, N))
            assert max(at[s, k, True] for k in before) < min(at[s, k, False] for k in after)
        for k in range(N):
            slot = at[s, k, False]
            held = sum(at[s, j, False] <= slot < at[s, j, True] for j in range(N))
            assert held <= (S - s if name == "1f1b" else update)
    sizes = [min(update, N - first) for first in range(0, N, update)]
    assert max(at.values()) + 1 == sum(2 * (size + S - 1) for size in sizes)  # no slot is wasted


@pytest.mark.parametrize("S", STAGES)
def test_the_pipelined_plan_has_the_delays(S):
    at = {(s, k, backward): slot for slot, s, k, backward in schedule._pipelined(S, 3 * S)}
    for s, D in enumerate(delays(S)):
        for k in range(3 * S):
            forward = at[s, k, False]
            assert sum(at[s, j, True] < forward for j in range(3 * S)) == max(0, k - D)


def test_the_figure_draws_every_pass_and_says_how_busy():
    S, N = 3, 6
    figure = gantt(S, N, 2)
    figure.savefig(io.BytesIO(), format="png")  # warnings are errors
    ends = {"pipelined": 2 * (N + 2 * S - 2), "1F1B": 3 * 2 * (2 + S - 1), "fill": 3 * 2 * (2 + S - 1)}
    assert len(figure.axes) == 3
    for axes, (title, end) in zip(figure.axes, ends.items(), strict=True):
        assert len(axes.texts) == len(axes.collections) == 2 * S * N
        said = axes.get_title(loc="left")
        assert said.startswith(title)
        assert re.search(r"\((\d+)% busy\)", said).group(1) == f"{100 * 2 * N / end:.0f}"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: delays(0), r"pipeline.delays\(stages=0\): stages must be an integer from 1"),
        (lambda: delays(2.0), r"stages=2\.0"),
        (lambda: delays(2, "gpipe"), "schedule must be one of 'fine-grained', '1f1b'"),
        (lambda: constant_delays(2, -1), r"delay=-1\): delay must be an integer from 0"),
        (lambda: schedule.check_delays([1, 2], 3), "2 delays for 3 stages"),
        (lambda: schedule.check_delays(4, 3), "delays=4 is no list"),
        (lambda: schedule.check_delays([0, True], 2), r"delays\[1\]=True"),
        (lambda: utilisation(2, 0), "samples=0"),
        (lambda: utilisation(0, 1), "stages=0"),
        (lambda: utilisation(1, 1, "1f1b"), "schedule='1f1b'"),
        (lambda: gantt(0), "stages=0"),
        (lambda: gantt(2, 0), "samples=0"),
        (lambda: gantt(2, 2, 0), "update=0"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(RecoupError, match=message):
        call()
