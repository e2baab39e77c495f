"""Delays, utilisation and memory of a pipeline, and its picture.

Legend: S stages, N samples; a tick is one forward and one backward of a stage.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

from recoup.errors import RecoupError
from recoup.fields import boolean, choice, integer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Schedule = Literal["fine-grained", "1f1b"]
MAX_STAGES = 1 << 20


def delays(stages: int, schedule: Schedule = "fine-grained") -> list[int]:
    """Updates of every stage between a sample's forward and its backward.

        fine-grained: D_s = 2 (S - 1 - s)     every tick a stage does a forward of one and a backward of another sample
        1f1b:         D_s = S - 1 - s         one or the other

    Raises:
        RecoupError: stages below 1, or another schedule.

    >>> delays(4), delays(4, "1f1b")
    ([6, 4, 2, 0], [3, 2, 1, 0])
    """
    S = integer("pipeline.delays", "stages", stages, (1, MAX_STAGES))
    choice("pipeline.delays", "schedule", schedule, get_args(Schedule))
    step = 2 if schedule == "fine-grained" else 1
    return [step * (S - 1 - s) for s in range(S)]


def constant_delays(stages: int, delay: int) -> list[int]:
    """The same delay in every stage."""
    S = integer("pipeline.constant_delays", "stages", stages, (1, MAX_STAGES))
    return [integer("pipeline.constant_delays", "delay", delay, (0, MAX_STAGES))] * S


def _length(values: Any) -> int | None:
    """How many values there are; None of what has no length, such as a number or a tensor of no dimensions."""
    try:
        return len(values)
    except TypeError:
        return None


def check_delays(values: Sequence[int], stages: int) -> list[int]:
    """The delays as ints, or an error that names the stage."""
    if _length(values) is None:
        raise RecoupError(f"pipeline: delays={values!r} is no list; there must be one for each of {stages} stages")
    if len(values) != stages:
        raise RecoupError(f"pipeline: {len(values)} delays for {stages} stages; there must be one for each")
    return [integer("pipeline", f"delays[{s}]", value, (0, MAX_STAGES)) for s, value in enumerate(values)]


def utilisation(stages: int, samples: int, schedule: Literal["pipelined", "fill-and-drain"] = "pipelined") -> float:
    """Share of a pipeline's capacity that does work while N samples pass.

        fill-and-drain   N / (N + 2 S - 2)      for an update of N samples, emptied after each
        pipelined        the same for all N samples of the run: it fills and drains once

    A worker does a forward and a backward in each tick. Where a worker does one pass at a time and all forwards of an
    update come before its backwards, as in `gantt`, fill-and-drain and 1F1B reach N / (N + S - 1).

    >>> utilisation(34, 1, "fill-and-drain"), round(utilisation(34, 50_000), 4)
    (0.014925373134328358, 0.9987)
    """
    S, N = (
        integer("utilisation", "stages", stages, (1, MAX_STAGES)),
        integer("utilisation", "samples", samples, (1, 1 << 62)),
    )
    choice("utilisation", "schedule", schedule, ("pipelined", "fill-and-drain"))
    return N / (N + 2 * S - 2)


def activations(stages: int) -> list[int]:
    """Samples whose activations each stage holds: 2 (S - 1 - s) + 1; S^2 in all."""
    return [delay + 1 for delay in delays(stages)]


def weight_versions(values: Sequence[int], *, stash: bool = False) -> list[int]:
    """Copies of its weights that each stage of *hardware* keeps: a worker that holds one stage and runs in real time.

    That is the newest alone, or with stashing those of all samples under way, D + 1. A simulator, which has no time,
    keeps D + 2 rows a stage in any case: see `Simulator.memory`.
    """
    boolean("pipeline.weight_versions", "stash", stash)
    owner, legal = "pipeline.weight_versions", (0, MAX_STAGES)
    if _length(values) is None:
        raise RecoupError(f"{owner}(values={values!r}): values must be a list of delays")
    return [integer(owner, f"values[{s}]", value, legal) + 1 if stash else 1 for s, value in enumerate(values)]


def gantt(stages: int = 4, samples: int = 8, update: int = 4) -> "Figure":
    """Who works on what, tick by tick: pipelined backpropagation, 1F1B and fill-and-drain.

    Args:
        stages: workers, a row each.
        samples: how many pass.
        update: samples an update of the two synchronous schedules has; they drain after each.

    Raises:
        RecoupError: a number below 1.
    """
    from matplotlib.figure import Figure

    stages, samples, update = (
        integer("pipeline.gantt", name, value, (1, MAX_STAGES))
        for name, value in (("stages", stages), ("samples", samples), ("update", update))
    )
    figure = Figure(figsize=(10, 6.6), layout="constrained")
    plans = {
        "pipelined backpropagation: an update every tick, never drained": _pipelined(stages, samples),
        f"1F1B, drained after every {update} samples": _one_forward_one_backward(stages, samples, update),
        f"fill-and-drain, {update} samples an update": _fill_and_drain(stages, samples, update),
    }
    end = max(tick for plan in plans.values() for tick, *_ in plan) + 1
    for axes, (title, plan) in zip(figure.subplots(3, 1, sharex=True), plans.items(), strict=True):
        for tick, stage, sample, backward in plan:
            colour = "#e69f00" if backward else "#0072b2"
            axes.broken_barh([(tick, 0.92)], (stage - 0.42, 0.84), facecolors=colour, alpha=0.45 + 0.5 * (sample % 2))
            axes.text(tick + 0.46, stage, str(sample), ha="center", va="center", fontsize=7)
        busy = len(plan) / (stages * (max(tick for tick, *_ in plan) + 1))
        axes.set_title(f"{title} ({busy:.0%} busy)", loc="left", fontsize=9)
        axes.set_yticks(range(stages), [f"stage {s}" for s in range(stages)], fontsize=8)
        axes.set_xlim(0, end)
        axes.invert_yaxis()
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    figure.supxlabel("time, in forward or backward passes of one stage; blue: forward, orange: backward", fontsize=9)
    return figure


Slot = tuple[int, int, int, bool]  # time, stage, sample, whether backward


def _pipelined(S: int, N: int) -> list[Slot]:
    """Two slots a tick: the forward of sample k is in tick k + s, its backward in tick k + 2 (S - 1) - s."""
    forward = [(2 * (k + s), s, k, False) for k in range(N) for s in range(S)]
    return forward + [(2 * (k + 2 * (S - 1) - s) + 1, s, k, True) for k in range(N) for s in range(S)]


def _fill_and_drain(S: int, N: int, update: int) -> list[Slot]:
    plan, begin = [], 0
    for first in range(0, N, update):
        group = range(first, min(first + update, N))
        size = len(group)
        for i, k in enumerate(group):
            plan += [(begin + i + s, s, k, False) for s in range(S)]
            plan += [(begin + size + S - 1 + i + (S - 1 - s), s, k, True) for s in range(S)]
        begin += 2 * (size + S - 1)
    return plan


def _one_forward_one_backward(S: int, N: int, update: int) -> list[Slot]:
    """Every stage runs a pass as soon as its input is there: backward first, and at most S - s samples in flight."""
    plan: list[Slot] = []
    begin = 0
    for first in range(0, N, update):
        group = list(range(first, min(first + update, N)))
        done: dict[tuple[int, int, bool], int] = {}
        next_forward, next_backward = [0] * S, [0] * S
        time = begin
        while any(count < len(group) for count in next_backward):
            started: list[Slot] = []
            for s in range(S):
                i, j = next_backward[s], next_forward[s]
                ready = i < j and (s == S - 1 or done.get((s + 1, i, True), time) < time)
                if ready and done.get((s, i, False), time) < time:
                    started.append((time, s, group[i], True))
                    done[s, i, True] = time
                    next_backward[s] += 1
                elif j < len(group) and j - i < S - s and (s == 0 or done.get((s - 1, j, False), time) < time):
                    started.append((time, s, group[j], False))
                    done[s, j, False] = time
                    next_forward[s] += 1
            plan += started
            time += 1
        begin = time
    return plan
