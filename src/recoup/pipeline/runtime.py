"""Pipelined backpropagation over the processes of torch.distributed, bit for bit as the simulator.

Started by torchrun: ``torchrun --nproc-per-node 4 --max-restarts 3 train.py``; gloo on CPUs, NCCL on GPUs.
"""

import os
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from recoup.errors import RecoupError
from recoup.fields import integer
from recoup.pipeline.keeper import Keeper
from recoup.pipeline.plan import Plan, Samples
from recoup.pipeline.together import Balanced, balanced, rank_times
from recoup.pipeline.transport import DistributedTransport, LocalTransport, refuse_uninitialized
from recoup.pipeline.worker import Worker

__all__ = [
    "Balanced",
    "Metrics",
    "Plan",
    "Samples",
    "balanced",
    "initialize",
    "rank_times",
    "run",
    "run_local",
    "ticks",
]


@dataclass(frozen=True, slots=True)
class Metrics:
    """What a run measured on one rank.

    Attributes:
        losses: of every sample, on the last rank; elsewhere empty.
        samples: that went all through this rank in this process: after a restart those since the checkpoint.
        seconds: that they took, filling and draining included.
        busy: seconds of them in which this rank did not wait for others, as far as ``elapsed`` counts.
        elapsed: seconds since the end of this rank's first tick with work, which compiles and checks.
        scheduled: N / (N + 2 R - 2) of the N samples of this process, the share of ticks in which a rank has work.
    """

    losses: list[float]
    samples: int
    seconds: float
    busy: float
    elapsed: float
    scheduled: float

    @property
    def utilisation(self) -> float:
        """The measured share of its time in which this rank worked; 0 where nothing came after its first tick."""
        return self.busy / self.elapsed if self.elapsed else 0.0

    @property
    def rate(self) -> float:
        """Samples a second."""
        return self.samples / self.seconds if self.seconds else 0.0


def ticks(samples: int, ranks: int) -> int:
    """Ticks until the pipeline is empty again: N + 2 R - 2."""
    return samples + 2 * (ranks - 1)


def run_local(plan: Plan, samples: Samples, ranks: int) -> Metrics:
    """All ranks in one process, tick by tick: the runtime without processes. The model ends with the newest weights.

    Raises:
        RecoupError: as `run`.
    """
    plan.check(ranks)
    N = _some(samples)
    device = next(plan.model.parameters()).device
    links = LocalTransport.chain(ranks)
    workers = [plan.worker(rank, ranks, links[rank], samples, device) for rank in range(ranks)]
    clock = _Clock(workers)
    try:
        for t in range(ticks(N, ranks)):
            for worker in workers:
                worker.tick(t, N)
            clock.ticked()
    finally:
        for worker in workers:
            worker.finish()
    return Metrics(workers[-1].losses, N, *clock.read(), N / ticks(N, ranks))


class _Clock:
    """What some workers' time went into."""

    def __init__(self, workers: list[Worker]) -> None:
        self.workers, self.begun = workers, time.perf_counter()
        self.warm: tuple[float, float] | None = None

    def ticked(self) -> None:
        """After a tick: from the first with work on, time counts."""
        if self.warm is None and any(worker.under_way or worker.core.steps > worker.begun for worker in self.workers):
            self.warm = time.perf_counter(), self._waited()

    def _waited(self) -> float:
        return sum(worker.waited for worker in self.workers)

    def read(self) -> tuple[float, float, float]:
        """Seconds in all, seconds of work and seconds that count."""
        now = time.perf_counter()
        since, waited = self.warm or (now, self._waited())
        return now - self.begun, now - since - (self._waited() - waited), now - since


def _some(samples: Samples) -> int:
    if not len(samples):
        raise RecoupError("pipeline.run: there are no samples to train on")
    return len(samples)


def initialize(backend: str = "gloo", timeout: float = 300.0) -> None:
    """Join the processes that torchrun started: torch's ``init_process_group``, and sound after a restart.

    A restarted worker of torchrun finds the addresses of the attempt before in the shared store, and fails to connect
    to processes that are gone; here every attempt has keys of its own.

    Args:
        backend: ``gloo`` on CPUs, ``nccl`` on GPUs.
        timeout: seconds to wait for the others, and for collective operations.

    Raises:
        RecoupError: not started by torchrun.
    """
    if "RANK" not in os.environ:
        raise RecoupError("pipeline.initialize: not started by torchrun: torchrun --nproc-per-node 4 train.py")
    wait = timedelta(seconds=timeout)
    store, rank, ranks = next(dist.rendezvous("env://", timeout=wait))  # type: ignore[attr-defined]
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"recoup/attempt-{attempt}", store)  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=wait)


def run(
    plan: Plan,
    samples: Samples,
    *,
    folder: str | Path | None = None,
    every: int = 1000,
    timeout: float = 300.0,
    device: torch.device | str = "cpu",
) -> Metrics:
    """Train over all processes of torch.distributed, which must be initialized; call it in every one of them.

    Args:
        plan: the same everywhere.
        samples: the same everywhere; the first rank reads x, the last one y.
        folder: where checkpoints are kept, shared by all ranks; a run of the same plan that was interrupted, on any
            number of ranks, goes on from there and ends with the weights of one that was not. None: no checkpoints.
        every: samples between checkpoints; at whole updates.
        timeout: seconds after which a silent neighbour is an error.
        device: of this rank's part.

    Returns:
        This rank's metrics. Afterwards the model holds all ranks' newest weights, on every rank.

    Raises:
        RecoupError: torch.distributed is not initialized; a plan that does not fit the number of processes; a process
            that died or is silent; a loss or a gradient that is not finite (with the sample and the stage); checkpoints
            of another run, or damaged ones. The model then holds this rank's newest weights.
    """
    refuse_uninitialized("run")
    every = integer("pipeline.run", "every", every, (1, 1 << 31))
    if not 0 < timeout < float("inf"):
        raise RecoupError(f"pipeline.run(timeout={timeout!r}): timeout must be a number of seconds above 0")
    rank, ranks, N = dist.get_rank(), dist.get_world_size(), _some(samples)
    plan.check(ranks)
    device = torch.device(device)
    with DistributedTransport(timedelta(seconds=timeout), device) as transport:
        worker = plan.worker(rank, ranks, transport, samples, device)
        keeper = None if folder is None else Keeper(Path(folder), worker, plan.identity(samples), transport.barrier)
        try:
            if keeper is not None:
                keeper.resume()
                keeper.watch(every, N)
            transport.barrier("begin")  # a rank that starts late is not a rank that is stuck
            before, clock = worker.core.steps, _Clock([worker])
            transport.expect(*worker.expected(N))
            for t in range(ticks(N - worker.begun, ranks)):
                worker.tick(t, N)
                clock.ticked()
            transport.settle()
        finally:
            worker.finish()
            if keeper is not None:
                keeper.close()
        measured = clock.read()
        _share(plan, worker, ranks, transport)
        transport.close()
    left = N - worker.begun
    return Metrics(worker.losses, worker.core.steps - before, *measured, left / ticks(left, ranks))


@torch.no_grad()
def _share(plan: Plan, worker: Worker, ranks: int, transport: DistributedTransport) -> None:
    """Every rank's parameters and buffers to all ranks."""
    for owner in range(ranks):
        for value in plan.share(ranks, owner).state_dict().values():
            there = value.detach().to(transport.device).contiguous()
            transport.broadcast(there, owner)
            if owner != worker.rank:
                value.copy_(there)
