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
from recoup.pipeline.transport import DistributedTransport, LocalTransport
from recoup.pipeline.worker import Worker

__all__ = ["Metrics", "Plan", "Samples", "initialize", "run", "run_local", "ticks"]


@dataclass(frozen=True, slots=True)
class Metrics:
    """What a run measured on one rank.

    Attributes:
        losses: of every sample, on the last rank; elsewhere empty.
        samples: that went all through this rank in this process: after a restart those since the checkpoint.
        seconds: that they took, filling and draining included.
        utilisation: N / (N + 2 R - 2), the share of ticks in which a rank works.
    """

    losses: list[float]
    samples: int
    seconds: float
    utilisation: float

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
    start = time.perf_counter()
    try:
        for t in range(ticks(N, ranks)):
            for worker in workers:
                worker.tick(t, N)
    finally:
        for worker in workers:
            worker.finish()
    seconds = time.perf_counter() - start
    return Metrics(workers[-1].losses, N, seconds, N / ticks(N, ranks))


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
        folder: where checkpoints are kept, shared by all ranks; a run of the same plan that was interrupted goes on
            from there and ends with the weights of one that was not. None: no checkpoints.
        every: ticks between checkpoints.
        timeout: seconds after which a silent neighbour is an error.
        device: of this rank's part.

    Returns:
        This rank's metrics. Afterwards the model holds all ranks' newest weights, on every rank.

    Raises:
        RecoupError: torch.distributed is not initialized; a plan that does not fit the number of processes; a process
            that died or is silent; a loss or a gradient that is not finite (with the sample and the stage); checkpoints
            of another run, or damaged ones. The model then holds this rank's newest weights.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise RecoupError(
            "pipeline.run: torch.distributed is not initialized: start with torchrun and call "
            "pipeline.runtime.initialize()"
        )
    every = integer("pipeline.run", "every", every, (1, 1 << 31))
    if not 0 < timeout < float("inf"):
        raise RecoupError(f"pipeline.run(timeout={timeout!r}): timeout must be a number of seconds above 0")
    rank, ranks, N = dist.get_rank(), dist.get_world_size(), _some(samples)
    plan.check(ranks)
    device = torch.device(device)
    transport = DistributedTransport(timedelta(seconds=timeout), device)
    worker = plan.worker(rank, ranks, transport, samples, device)
    keeper = None if folder is None else _keeper(Path(folder), plan, worker, ranks, N, transport)
    begun = 0 if keeper is None else keeper.resume()
    transport.barrier("begin")  # a rank that starts late is not a rank that is stuck
    before, start = worker.core.steps, time.perf_counter()
    transport.expect(*worker.expected(N))
    try:
        for t in range(begun, ticks(N, ranks)):
            if keeper is not None and t > begun and t % every == 0:
                worker.hold(t, N)
                keeper.save(t)
            worker.tick(t, N)
        transport.settle()
    finally:
        worker.finish()
    seconds = time.perf_counter() - start
    _share(plan, worker, ranks, transport)
    transport.close()
    return Metrics(worker.losses, worker.core.steps - before, seconds, N / ticks(N, ranks))


def _keeper(folder: Path, plan: Plan, worker: Worker, ranks: int, N: int, transport: DistributedTransport) -> Keeper:
    worker.keeps = True
    return Keeper(folder, worker, plan.identity(ranks, N), transport.barrier)


@torch.no_grad()
def _share(plan: Plan, worker: Worker, ranks: int, transport: DistributedTransport) -> None:
    """Every rank's parameters and buffers to all ranks."""
    children = plan.children
    for owner, piece in enumerate(plan.pieces(ranks)):
        for index in piece:
            for value in children[index][1].state_dict().values():
                there = value.detach().to(transport.device).contiguous()
                transport.broadcast(there, owner)
                if owner != worker.rank:
                    value.copy_(there)
