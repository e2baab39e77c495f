"""Pipelined backpropagation over the processes of torch.distributed, bit for bit as the simulator.

Started by torchrun: ``torchrun --nproc-per-node 4 --max-restarts 3 train.py``; gloo on CPUs, NCCL on GPUs.
"""

import io
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from recoup.errors import RecoupError
from recoup.files import write_atomically
from recoup.formats.fields import integer
from recoup.pipeline.mitigation import Mitigation
from recoup.pipeline.schedule import check_delays
from recoup.pipeline.simulator import Rate, Simulator
from recoup.pipeline.stages import resolve
from recoup.pipeline.transport import DistributedTransport, LocalTransport, Transport
from recoup.pipeline.worker import Worker, local_stages, pieces

MANIFEST = "pipeline.json"


class Samples(Protocol):
    """What a run trains on, in order: ``samples[k] = (x, y)`` with its batch dimension.

    x is read on the first rank, y on the last.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Tensor, Any]: ...


@dataclass(frozen=True, slots=True)
class Metrics:
    """What a run measured on one rank.

    Attributes:
        losses: of every sample, on the last rank; elsewhere empty.
        samples: that this process ran, after a restart the rest.
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


@dataclass(frozen=True, slots=True)
class Plan:
    """A pipeline over R ranks: the arguments of a `Simulator`, and where the model is cut.

    Attributes:
        model: an nn.Sequential whose children each map one tensor to one tensor; every rank has consecutive ones.
        stages, delays, lr, momentum, weight_decay, mitigation, loss: see `Simulator`. A stage lies within a rank, and
            its delay is at least the rank's own, 2 (R - 1 - r): the fine-grained delays fit any number of ranks.
        cut: children for every rank, consecutive; None: as even as possible.
    """

    model: nn.Sequential
    stages: Sequence[Sequence[str]]
    delays: Sequence[int]
    lr: Rate
    momentum: float = 0.9
    weight_decay: float = 0.0
    mitigation: Mitigation | str = "none"
    loss: Callable[[Any, Any], Tensor] = nn.functional.cross_entropy
    cut: Sequence[int] | None = None

    def worker(self, rank: int, ranks: int, transport: Transport, samples: Samples, device: torch.device) -> Worker:
        """A rank's worker.

        Raises:
            RecoupError: a model that is no nn.Sequential, stages, delays or a cut that do not fit the ranks.
        """
        if not isinstance(self.model, nn.Sequential):
            raise RecoupError(
                f"pipeline.Plan: the model is a {type(self.model).__name__}; a pipeline over processes needs an "
                "nn.Sequential whose children map one tensor to one tensor"
            )
        resolve(self.model, self.stages)  # the whole model's checks, on every rank
        delays = check_delays(self.delays, len(self.stages))
        where = self._pieces(ranks)
        mine = local_stages(self.model, self.stages, where, rank)
        part = nn.Sequential()
        children = list(self.model.named_children())
        for index in where[rank]:
            part.add_module(*children[index])
        core = Simulator(
            part.to(device),
            [self.stages[s] for s in mine],
            [delays[s] for s in mine],
            self.lr,
            self.momentum,
            self.weight_decay,
            self.mitigation,
            self.loss,
            first=mine[0],
        )
        return Worker(
            part,
            core,
            rank,
            ranks,
            transport,
            lambda k: samples[k][0].to(device),
            lambda k: _moved(samples[k][1], device),
        )

    def _pieces(self, ranks: int) -> list[range]:
        children = len(self.model)
        if self.cut is None:
            if not 1 <= ranks <= children:
                raise RecoupError(f"pipeline.Plan: {children} children of the model cannot feed {ranks} ranks")
            return pieces(children, ranks)
        if len(self.cut) != ranks or sum(self.cut) != children or min(self.cut) < 1:
            raise RecoupError(
                f"pipeline.Plan(cut={list(self.cut)}): the cut must give each of the {ranks} ranks at least one of the "
                f"model's {children} children"
            )
        bounds = [sum(self.cut[:r]) for r in range(ranks + 1)]
        return [range(a, b) for a, b in pairwise(bounds)]


def _moved(y: Any, device: torch.device) -> Any:
    return y.to(device) if isinstance(y, Tensor) else y


def ticks(samples: int, ranks: int) -> int:
    """Ticks until the pipeline is empty again: N + 2 R - 2."""
    return samples + 2 * (ranks - 1)


def run_local(plan: Plan, samples: Samples, ranks: int) -> Metrics:
    """All ranks in one process, tick by tick: the runtime without processes. The model ends with the newest weights."""
    device = next(plan.model.parameters()).device
    links = LocalTransport.chain(ranks)
    workers = [plan.worker(rank, ranks, links[rank], samples, device) for rank in range(ranks)]
    start, N = time.perf_counter(), len(samples)
    try:
        for t in range(ticks(N, ranks)):
            for worker in workers:
                worker.tick(t, N)
    finally:
        for worker in workers:
            worker.core.settle()
    seconds = time.perf_counter() - start
    return Metrics(workers[-1].losses, N, seconds, N / ticks(N, ranks))


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
        RecoupError: torch.distributed is not initialized; a plan that does not fit the number of processes; a neighbour
            that died or is silent; a loss that is not finite (with the sample); checkpoints of another run.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise RecoupError(
            "pipeline.run: torch.distributed is not initialized: start with torchrun and call "
            "pipeline.runtime.initialize()"
        )
    every = integer("pipeline.run", "every", every, (1, 1 << 31))
    rank, ranks, N = dist.get_rank(), dist.get_world_size(), len(samples)
    device = torch.device(device)
    transport = DistributedTransport(timedelta(seconds=timeout), device)
    worker = plan.worker(rank, ranks, transport, samples, device)
    keeper = None if folder is None else _Keeper(Path(folder), worker, _identity(plan, ranks, N))
    begun = 0 if keeper is None else keeper.resume()
    start = time.perf_counter()
    try:
        for t in range(begun, ticks(N, ranks)):
            if keeper is not None and t > begun and t % every == 0:
                worker.hold(t, N)
                keeper.save(t)
            worker.tick(t, N)
        transport.settle()
    finally:
        worker.core.settle()
    seconds = time.perf_counter() - start
    _share(plan, worker, ranks)
    return Metrics(worker.losses, max(0, ticks(N, ranks) - begun), seconds, N / ticks(N, ranks))


@torch.no_grad()
def _share(plan: Plan, worker: Worker, ranks: int) -> None:
    """Every rank's parameters and buffers to all ranks."""
    where = plan._pieces(ranks)
    children = list(plan.model.children())
    for owner in range(ranks):
        for index in where[owner]:
            for value in children[index].state_dict().values():
                there = value.detach().contiguous()
                dist.broadcast(there, owner)
                if owner != worker.rank:
                    value.copy_(there)


def _identity(plan: Plan, ranks: int, samples: int) -> dict[str, Any]:
    mitigation = plan.mitigation if isinstance(plan.mitigation, str) else repr(plan.mitigation)
    stages = [list(stage) for stage in plan.stages]
    shapes = {name: list(p.shape) for name, p in plan.model.named_parameters()}
    numbers = {"momentum": plan.momentum, "weight_decay": plan.weight_decay, "samples": samples, "ranks": ranks}
    return {"stages": stages, "delays": list(plan.delays), "mitigation": mitigation, "shapes": shapes, **numbers}


class _Keeper:
    """Checkpoints of all ranks at one tick: a file a rank, and a manifest that is written when all are there."""

    def __init__(self, folder: Path, worker: Worker, identity: dict[str, Any]) -> None:
        self.folder, self.worker, self.identity = folder, worker, identity
        folder.mkdir(parents=True, exist_ok=True)

    def resume(self) -> int:
        """Load the last checkpoint, if there is one; the tick to go on with."""
        path = self.folder / MANIFEST
        tick = 0
        if path.exists():
            manifest = json.loads(path.read_text("utf-8"))
            for name, value in self.identity.items():
                if manifest["run"].get(name) != value:
                    raise RecoupError(
                        f"pipeline.run: {self.folder} holds another run's checkpoint: its {name} is "
                        f"{_short(manifest['run'].get(name))}, this one's {_short(value)}; choose another folder"
                    )
            tick = int(manifest["tick"])
            file = self._file(tick)
            try:
                self.worker.load(torch.load(file, weights_only=True, map_location="cpu"))
            except (OSError, RuntimeError, KeyError) as error:
                raise RecoupError(f"pipeline.run: {file.name} cannot be read ({error})") from None
        dist.barrier()
        return tick

    def save(self, tick: int) -> None:
        """Keep everything at the beginning of a tick; the previous checkpoint stays until this one is whole."""
        buffer = io.BytesIO()
        torch.save(self.worker.state(), buffer)
        write_atomically(self._file(tick), buffer.getvalue())
        dist.barrier()
        if self.worker.rank == 0:
            write_atomically(self.folder / MANIFEST, json.dumps({"tick": tick, "run": self.identity}))
        dist.barrier()
        for old in self.folder.glob(f"rank{self.worker.rank}-*.pt"):
            if old != self._file(tick):
                old.unlink()

    def _file(self, tick: int) -> Path:
        return self.folder / f"rank{self.worker.rank}-{tick}.pt"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
