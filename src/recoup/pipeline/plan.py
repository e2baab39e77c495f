"""A pipeline over processes: what is trained, with what, and which process holds which part of the model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from recoup.errors import RecoupError
from recoup.pipeline.mitigation import Mitigation
from recoup.pipeline.schedule import check_delays
from recoup.pipeline.simulator import Rate, Simulator
from recoup.pipeline.stages import resolve
from recoup.pipeline.transport import Transport
from recoup.pipeline.worker import Worker, lateness, local_stages, pieces


class Samples(Protocol):
    """What a run trains on, in order: ``samples[k] = (x, y)`` with its batch dimension.

    x is read on the first rank, y on the last.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Tensor, Any]: ...


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

    @property
    def children(self) -> list[tuple[str, nn.Module]]:
        """The model's children by name; a module that occurs twice is there twice."""
        return [(name, child) for name, child in self.model._modules.items() if child is not None]

    def check(self, ranks: int) -> None:
        """Everything that can be checked without a device, for all ranks: every rank fails, none is left waiting.

        Raises:
            RecoupError: a model that is no nn.Sequential, stages, delays or a cut that do not fit the ranks.
        """
        if not isinstance(self.model, nn.Sequential):
            raise RecoupError(
                f"pipeline.Plan: the model is a {type(self.model).__name__}; a pipeline over processes needs an "
                "nn.Sequential whose children map one tensor to one tensor"
            )
        resolve(self.model, self.stages)
        delays = check_delays(self.delays, len(self.stages))
        where, children = self.pieces(ranks), self.children
        for rank in range(ranks):
            mine = local_stages([name for name, _ in children], self.stages, where, rank)
            lateness(rank, ranks, [delays[s] for s in mine])
            names = [children[i][0] for i in where[rank]]
            if not any(p.requires_grad for i in where[rank] for p in children[i][1].parameters()):
                raise RecoupError(
                    f"pipeline.Plan: no parameter of rank {rank} of {ranks} (children {', '.join(names)}) requires a "
                    "gradient; choose another cut or fewer ranks"
                )

    def worker(self, rank: int, ranks: int, transport: Transport, samples: Samples, device: torch.device) -> Worker:
        """A rank's worker; raises what `check` and `Simulator` raise."""
        self.check(ranks)
        where, children = self.pieces(ranks), self.children
        mine = local_stages([name for name, _ in children], self.stages, where, rank)
        part = nn.Sequential()
        for index in where[rank]:
            part.add_module(*children[index])
        core = Simulator(
            part.to(device),
            [self.stages[s] for s in mine],
            [self.delays[s] for s in mine],
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

    def pieces(self, ranks: int) -> list[range]:
        """The indices of the children of every rank."""
        children = len(self.children)
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

    def identity(self, ranks: int, samples: int) -> dict[str, Any]:
        """What a checkpoint must agree with, as JSON: rates of a schedule at nine updates, the loss by its name."""
        how = Mitigation.parse(self.mitigation) if isinstance(self.mitigation, str) else self.mitigation
        updates = sorted({samples * i // 8 for i in range(9)})
        rates = [float(self.lr(k) if callable(self.lr) else self.lr) for k in updates]
        loss = getattr(self.loss, "__qualname__", type(self.loss).__qualname__)
        parameters = self.model.named_parameters()
        return {
            "stages": [list(stage) for stage in self.stages],
            "delays": list(self.delays),
            "mitigation": repr(how),
            "momentum": self.momentum,
            "weight_decay": self.weight_decay,
            "learning rates": rates,
            "loss": loss,
            "parameters": {name: [str(p.dtype), p.requires_grad, *p.shape] for name, p in parameters},
            "children of the ranks": [len(piece) for piece in self.pieces(ranks)],
            "samples": samples,
        }


def _moved(y: Any, device: torch.device) -> Any:
    return y.to(device) if isinstance(y, Tensor) else y
