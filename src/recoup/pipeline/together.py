"""What stages and ranks take while all ranks run, and the cut that follows: measured by all processes at once.

Times measured alone are too short: ranks of one machine share its caches and its way to memory, a rank of a pipeline
has several samples under way whose activations leave the caches, and packets take time. So every process measures while
the others do, first the stages of the whole model, then, in a trial of the pipeline itself, its own part.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import accumulate, pairwise
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from recoup.errors import RecoupError
from recoup.fields import integer
from recoup.network.copies import copied
from recoup.pipeline.cutting import Joint
from recoup.pipeline.packets import Packet
from recoup.pipeline.plan import Plan, Samples
from recoup.pipeline.timing import finished, stage_times
from recoup.pipeline.traced import chain
from recoup.pipeline.transport import DistributedTransport, refuse_uninitialized
from recoup.pipeline.wallclock import Times, balance, fitting, joined, period
from recoup.pipeline.worker import Worker, lateness

TRIALS = 3  # cuts that are tried at most
COUNT = 24  # samples of a trial

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Balanced:
    """A plan with a measured cut.

    Attributes:
        plan: what was asked, with its ``cut``.
        ranks: seconds of every rank for one sample, while all ran; ``backward`` has the update in it.
        stages: seconds of every stage, those of a rank together what the rank took.
    """

    plan: Plan
    ranks: list[Times]
    stages: list[Times]

    @property
    def rate(self) -> float:
        """Samples a second that they promise: one a `wallclock.period`."""
        return 1 / period(self.ranks)


class Clocked(Worker):
    """A rank that notes what its forwards and backwards take: without waiting, with the processor's time of packets."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.forwards: list[float] = []
        self.backwards: list[float] = []
        self._packets = self._received = 0.0

    def forward(self, k: int, entered: Packet) -> None:
        """See `Worker`."""
        self.forwards.append(self._received + self._clocked(lambda: super(Clocked, self).forward(k, entered)))
        self._received = 0.0

    def backward(self, j: int) -> None:
        """See `Worker`."""
        self.backwards.append(self._clocked(lambda: super(Clocked, self).backward(j)))

    def _clocked(self, run: Callable[[], None]) -> float:
        finished()
        begun, waited, packets = time.perf_counter(), self.waited, self._packets
        run()
        finished()
        return time.perf_counter() - begun - (self.waited - waited) + self._packets - packets

    def _waiting(self, call: str, *arguments: Packet) -> Any:
        begun = time.thread_time()
        try:
            return super()._waiting(call, *arguments)
        finally:
            spent = time.thread_time() - begun
            self._packets += spent
            if call == "receive_activation":  # before the forward that it belongs to
                self._received = spent

    def times(self) -> Times:
        """Medians of all but the first ones, which compile and check; of backwards with and without an update, by how
        many there are of each."""
        size = self.core.update_size
        others = [each for k, each in enumerate(self.backwards, 1) if k % size]
        backward = _usual(self.backwards[size - 1 :: size]) / size
        return Times(_usual(self.forwards), backward + (_usual(others) * (size - 1) / size if others else 0.0))


def _usual(seconds: list[float]) -> float:
    return max(0.0, statistics.median(seconds[2:] or seconds[-1:]))


def rank_times(
    plan: Plan, samples: Samples, *, timeout: float = 300.0, device: torch.device | str = "cpu"
) -> list[Times]:
    """Seconds of every rank for one sample in a trial of a plan; call it in every process of torch.distributed.

    The trial runs the pipeline itself, at a rate of zero on a copy of the model, over the first 24 samples, again and
    again up to the second update, with rings that are as full as after many updates; what ranks wait for each other is
    not in it. Random generators stay as they are.

    Returns:
        A `Times` a rank, the same everywhere, a sample's part of the update in ``backward``.

    Raises:
        RecoupError: as `runtime.run`.
    """
    refuse_uninitialized("rank_times")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    plan.check(ranks)
    trial, device = replace(plan, model=copied(plan.model, "pipeline"), lr=0.0), torch.device(device)
    count = min(len(samples), COUNT)
    if not count:
        raise RecoupError("pipeline.rank_times: there are no samples to try")
    with torch.random.fork_rng(), DistributedTransport(timedelta(seconds=timeout), device) as transport:
        worker = trial.worker(rank, ranks, transport, _Again(samples, count), device, Clocked)
        count = max(count, 2 * plan.update_size)
        updates = max(plan.delays) + 2  # a pipeline that has just begun finds its older weights in the caches
        worker.core.skip(updates)
        worker.begun = updates * plan.update_size
        end = worker.begun + count
        try:
            transport.barrier("begin")
            transport.expect(*worker.expected(end))
            for t in range(count + 2 * (ranks - 1)):
                worker.tick(t, end)
            transport.settle()
        finally:
            worker.finish()
        transport.barrier("end")
        transport.close()
    assert isinstance(worker, Clocked)
    return _everywhere(worker.times)


def balanced(
    plan: Plan,
    samples: Samples,
    *,
    rounds: int = 9,
    timeout: float = 300.0,
    device: torch.device | str = "cpu",
) -> Balanced:
    """Cut a plan so that its slowest rank is as fast as can be; call it in every process of torch.distributed.

    Every process measures `stage_times` of the whole model at once with the others, which takes the memory of a
    `Simulator` in each; the cut that `balance` makes of their medians is tried with `rank_times`, and what ranks took
    corrects their stages' times, up to three times. The fastest cut that was tried is taken. Stages of an nn.Sequential
    that torch.fx cannot follow count alike before the first trial. Every rank has something to train; a plan's own
    ``cut`` is not looked at. Weights, buffers and random generators stay as they are.

    Args:
        plan: the same everywhere.
        samples: the same everywhere; the first ones are read.
        rounds: see `stage_times`.
        timeout, device: see `runtime.run`.

    Raises:
        RecoupError: as `runtime.run` and `stage_times`; more ranks than parts that a model can be cut into.
    """
    refuse_uninitialized("balanced")
    rounds = integer("pipeline.balanced", "rounds", rounds, (1, 1 << 31))
    ranks, place = dist.get_world_size(), torch.device(device)
    if not len(samples):
        raise RecoupError("pipeline.balanced: there are no samples to measure with")
    joints = plan.cutting().joints()
    if ranks >= len(joints):
        raise RecoupError(
            f"pipeline.balanced: {ranks} ranks, and the model can be cut into {len(joints) - 1} parts that have "
            "something to train: use fewer ranks"
        )
    times = _stages(plan, samples, rounds, place) if _followed(plan) else [Times(1, 1)] * len(plan.stages)
    best: Balanced | None = None
    tried: list[list[int]] = []
    while len(tried) < TRIALS:
        cut, where = _cut(times, joints, ranks, plan)
        if cut in tried:
            break
        tried.append(cut)
        made = replace(plan, cut=cut)
        found = rank_times(made, samples, timeout=timeout, device=place)
        parts = [times[a:b] for a, b in pairwise(where)]
        times = [one for part, rank in zip(parts, found, strict=True) for one in _scaled(part, rank)]
        if best is None or period(found) < period(best.ranks):
            best = Balanced(made, found, times)
    assert best is not None
    return best


class _Again:
    """The first samples over and over."""

    def __init__(self, samples: Samples, count: int) -> None:
        self._kept = [samples[k] for k in range(count)]

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, Any]:
        return self._kept[index % len(self._kept)]


def _followed(plan: Plan) -> bool:
    """Whether stages can be timed one by one; all but an nn.Sequential must."""
    if isinstance(plan.model, nn.Sequential):
        try:
            chain(plan.model, plan.stages)
        except RecoupError:
            return False
    return True


def _stages(plan: Plan, samples: Samples, rounds: int, device: torch.device) -> list[Times]:
    """Of the whole model, while all processes measure it."""
    x, y = samples[0]
    model = copied(plan.model, "pipeline").to(device)
    dist.barrier()

    def measure() -> list[Times]:
        return stage_times(
            model,
            plan.stages,
            x.to(device),
            y.to(device) if isinstance(y, torch.Tensor) else y,
            loss=plan.loss,
            mitigation=plan.mitigation,
            delays=plan.delays,
            optimizer=plan.optimizer,
            rounds=rounds,
        )

    found = [_median(stage) for stage in zip(*_everywhere(measure), strict=True)]
    return [replace(one, update=one.update / plan.update_size) for one in found]


def _everywhere(measure: Callable[[], Result]) -> list[Result]:
    """What every process found; where one fails, all do, and none waits for it."""
    own: Exception | None = None
    try:
        mine: tuple[Any, str | None] = measure(), None
    except RecoupError as error:
        mine = None, str(error)
    except Exception as error:  # raised below, once the others have heard
        mine, own = (None, f"{type(error).__name__}: {error}"), error
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, mine)
    if own is not None:
        raise own
    for rank, (_, error) in enumerate(told):
        if error is not None:
            raise RecoupError(f"pipeline: rank {rank}: {error}")
    return [found for found, _ in told]


def _median(times: Sequence[Times]) -> Times:
    return Times(
        *(statistics.median(getattr(one, part) for one in times) for part in ("forward", "backward", "update"))
    )


def _cut(times: Sequence[Times], joints: Sequence[Joint], ranks: int, plan: Plan) -> tuple[list[int], list[int]]:
    """Units for every rank, and the stages at which they begin, with the number of all; no stage's delay is less than
    its rank's, where that can be."""
    groups = joined(times, [b.stage - a.stage for a, b in pairwise(joints)])
    late = [lateness(rank, ranks, [], plan.update_size) for rank in range(ranks)]

    def fits(rank: int, a: int, b: int) -> bool:
        return all(delay >= late[rank] for delay in plan.delays[joints[a].stage : joints[b].stage])

    found = fitting(groups, ranks, fits) or balance(groups, ranks)  # which its trial refuses
    bounds = [joints[at] for at in accumulate(found, initial=0)]
    return [b.unit - a.unit for a, b in pairwise(bounds)], [bound.stage for bound in bounds]


def _scaled(stages: Sequence[Times], rank: Times) -> list[Times]:
    """Stages' times as parts of what their rank took."""
    forward, backward = sum(one.forward for one in stages), sum(one.backward + one.update for one in stages)
    even = 1 / len(stages)
    return [
        Times(
            rank.forward * (one.forward / forward if forward else even),
            rank.backward * ((one.backward + one.update) / backward if backward else even),
        )
        for one in stages
    ]
