"""How long a pipeline over processes takes, from the times of its stages: balanced cuts, schedules and their periods.

Legend: R ranks; F_r, B_r and U_r seconds of rank r's forward, backward and update of one sample; L seconds of a hop.
"""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import inf

from recoup.errors import RecoupError
from recoup.fields import integer

Operation = Hashable
Timeline = Mapping[tuple[int, Operation], tuple[float, float]]  # (rank, operation): begin and end in seconds


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds that a stage, or a rank, takes for one sample.

    Attributes:
        forward, backward, update: numbers from 0.

    Raises:
        RecoupError: one that is not.
    """

    forward: float
    backward: float
    update: float = 0.0

    def __post_init__(self) -> None:
        for name in ("forward", "backward", "update"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < inf:
                raise RecoupError(f"pipeline.Times({name}={value!r}): {name} must be seconds from 0")

    @property
    def total(self) -> float:
        """All of it."""
        return self.forward + self.backward + self.update

    def __add__(self, other: "Times") -> "Times":
        return Times(self.forward + other.forward, self.backward + other.backward, self.update + other.update)


def balance(times: Sequence[Times], ranks: int) -> list[int]:
    """Stages for every rank, consecutive, so that the slowest rank is as fast as can be: the ``cut`` of a `plan.Plan`.

    Of several such cuts the one whose first ranks have the fewest stages. By dynamic programming over the stages.

    Raises:
        RecoupError: fewer stages than ranks.

    >>> balance([Times(1, 2), Times(1, 1), Times(1, 1), Times(4, 5)], 2)
    [3, 1]
    """
    if not isinstance(times, list | tuple) or not all(isinstance(one, Times) for one in times):
        raise RecoupError(f"pipeline.balance(times={times!r}): times must be a list of pipeline.Times, one a stage")
    S = len(times)
    R = integer("pipeline.balance", "ranks", ranks, (1, max(S, 1)), f" ({S} stages)")
    found = fitting(times, R, lambda *_: True)
    assert found is not None
    return found


def fitting(times: Sequence[Times], ranks: int, fits: Callable[[int, int, int], bool]) -> list[int] | None:
    """What `balance` does among the cuts whose every part, rank and the stages from one up to another, fits; None:
    there is none."""
    S, R = len(times), ranks
    before = [0.0, *accumulate(stage.total for stage in times)]
    # slowest[s]: of the best cut of the stages from s on among the ranks that are left
    slowest = [before[S] - before[s] if fits(R - 1, s, S) else inf for s in range(S + 1)]
    choices: list[list[int]] = []
    for left in range(2, R + 1):
        found, chosen = [inf] * (S + 1), [0] * (S + 1)
        for s in range(S - left + 1):
            for end in range(s + 1, S - left + 2):
                worst = max(before[end] - before[s], slowest[end])
                if worst < found[s] and fits(R - left, s, end):
                    found[s], chosen[s] = worst, end
        slowest = found
        choices.append(chosen)
    if slowest[0] == inf:
        return None
    bounds = [0]
    for chosen in reversed(choices):
        bounds.append(chosen[bounds[-1]])
    return [b - a for a, b in pairwise([*bounds, S])]


def joined(times: Sequence[Times], cut: Sequence[int]) -> list[Times]:
    """The times of every rank, from those of the stages."""
    if sum(cut) != len(times):
        raise RecoupError(f"pipeline: a cut of {list(cut)} does not fit the times of {len(times)} stages")
    bounds = [0, *accumulate(cut)]
    return [sum(times[a:b], Times(0, 0)) for a, b in pairwise(bounds)]


def period(ranks: Sequence[Times], latency: float = 0.0) -> float:
    """Seconds between two samples of the running pipeline.

        max(max_r (F + B + U)_r,  max_r ((F + B + U)_r + F_(r+1) + B_(r+1) + 2 L) / 3)

    A rank's activation goes to the next rank and its gradient comes back three ticks later, so latency costs nothing up
    to about half a tick. Where it is longer than that, the loops of several ranks matter too: see `pipelined`.
    """
    own = max(rank.total for rank in ranks)
    loops = [(a.total + b.forward + b.backward + 2 * latency) / 3 for a, b in pairwise(ranks)]
    return max([own, *loops])


def synchronous(ranks: Sequence[Times], samples: int, schedule: str = "fill-and-drain") -> float:
    """Seconds of one update of ``samples`` where the pipeline is drained after each.

    fill-and-drain:  sum F + (n - 1) max F + sum B + (n - 1) max B + max U
    1f1b:            sum (F + B) + (n - 1) max (F + B) + max U
    """
    n = integer("pipeline.synchronous", "samples", samples, (1, 1 << 62))
    if schedule not in ("fill-and-drain", "1f1b"):
        raise RecoupError(f"pipeline.synchronous(schedule={schedule!r}): must be 'fill-and-drain' or '1f1b'")
    F, B = [rank.forward for rank in ranks], [rank.backward for rank in ranks]
    passes = [f + b for f, b in zip(F, B, strict=True)]
    rest = max(F) + max(B) if schedule == "fill-and-drain" else max(passes)
    return sum(passes) + (n - 1) * rest + max(rank.update for rank in ranks)


def simulate(
    order: Sequence[Sequence[Operation]],
    duration: Callable[[int, Operation], float],
    dependencies: Callable[[int, Operation], Iterable[tuple[int, Operation]]],
    latency: float = 0.0,
) -> Timeline:
    """When every operation begins and ends, if every rank runs its own in order, as soon as what they need is there.

    Args:
        order: operations of each rank.
        duration: seconds of a rank's operation.
        dependencies: (rank, operation) that must have ended before; from another rank ``latency`` later.

    Raises:
        RecoupError: operations that wait for each other, or for one that nobody runs.
    """
    done: dict[tuple[int, Operation], tuple[float, float]] = {}
    at, free = [0] * len(order), [0.0] * len(order)
    while any(i < len(own) for i, own in zip(at, order, strict=True)):
        moved = False
        for rank, own in enumerate(order):
            while at[rank] < len(own):
                operation = own[at[rank]]
                needed = list(dependencies(rank, operation))
                if any(other not in done for other in needed):
                    break
                ready = [done[other][1] + (latency if other[0] != rank else 0.0) for other in needed]
                begin = max([free[rank], *ready])
                free[rank] = begin + duration(rank, operation)
                done[rank, operation] = begin, free[rank]
                at[rank], moved = at[rank] + 1, True
        if not moved:
            stuck = [(rank, own[i]) for rank, (i, own) in enumerate(zip(at, order, strict=True)) if i < len(own)]
            raise RecoupError(f"pipeline.simulate: {stuck} wait for each other, or for what nobody runs")
    return done


def timelines(ranks: Sequence[Times], samples: int, update: int = 4, latency: float = 0.0) -> dict[str, Timeline]:
    """When every forward, backward and update of a run begins and ends, pipelined, under 1F1B and fill-and-drain.

    Operations are ("forward" | "backward" | "update", number); the pipelined one's updates are part of its backwards.

    Args:
        ranks: times of every rank; see `joined`.
        samples: how many pass.
        update: samples an update of the two synchronous schedules has; they drain after each.
        latency: seconds of a hop.

    >>> done = timelines([Times(1, 2), Times(1, 2)], samples=2, update=2)["fill-and-drain"]
    >>> done[1, ("backward", 0)], done[0, ("backward", 1)]
    ((3.0, 5.0), (7.0, 9.0))
    """
    R = len(ranks)
    samples, update = (
        integer("pipeline.timelines", name, value, (1, 1 << 20))
        for name, value in (("samples", samples), ("update", update))
    )
    groups = [range(i, min(i + update, samples)) for i in range(0, samples, update)]
    orders = {
        "1F1B": [_drained(groups, R - 1 - rank) for rank in range(R)],
        "fill-and-drain": [_drained(groups, update) for _ in range(R)],
    }
    synchronous = {name: _timed(order, ranks, latency) for name, order in orders.items()}
    return {"pipelined": _running(ranks, samples, latency), **synchronous}


def pipelined(ranks: Sequence[Times], samples: int, latency: float = 0.0) -> float:
    """Seconds of a run of ``samples`` that never drains in between."""
    return max(end for _, end in _running(ranks, samples, latency).values())


def _running(ranks: Sequence[Times], samples: int, latency: float) -> Timeline:
    """A run that never drains, every update at the end of a backward."""
    joint = [Times(rank.forward, rank.backward + rank.update) for rank in ranks]
    return _timed([_never_drained(rank, len(ranks), samples) for rank in range(len(ranks))], joint, latency)


def _timed(order: Sequence[Sequence[Operation]], ranks: Sequence[Times], latency: float) -> Timeline:
    """When the operations of every rank begin and end."""

    def needs(rank: int, operation: Operation) -> list[tuple[int, Operation]]:
        kind, k = _kind(operation)
        if kind == "forward":
            return [(rank - 1, operation)] if rank else []
        if kind == "backward":
            return [(rank + 1, operation)] if rank < len(ranks) - 1 else [(rank, ("forward", k))]
        return []

    return simulate(order, lambda rank, operation: getattr(ranks[rank], _kind(operation)[0]), needs, latency)


def _kind(operation: Operation) -> tuple[str, int]:
    assert isinstance(operation, tuple)
    return operation


def _never_drained(rank: int, R: int, samples: int) -> list[Operation]:
    """A forward and a backward a tick, as `worker.Worker.tick`'s."""
    found: list[Operation] = []
    for t in range(samples + 2 * (R - 1)):
        k, j = t - rank, t - 2 * (R - 1) + rank
        found += [("forward", k)] * (0 <= k < samples) + [("backward", j)] * (0 <= j < samples)
    return found


def _drained(groups: Sequence[range], ahead: int) -> list[Operation]:
    """Of every update's samples first ``ahead`` forwards, then one and a backward in turn, then what is left."""
    found: list[Operation] = []
    for number, group in enumerate(groups):
        first = min(ahead, len(group))
        found += [("forward", k) for k in group[:first]]
        for k, j in zip(group[first:], group, strict=False):
            found += [("forward", k), ("backward", j)]
        found += [("backward", k) for k in group[len(group) - first :]]
        found.append(("update", number))
    return found
