"""A pipeline over processes: what is trained, with what, and which process holds which part of the model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from recoup.errors import RecoupError
from recoup.network.checks import is_module
from recoup.pipeline.cutting import Children, Cutting, Links
from recoup.pipeline.mitigation import Mitigation
from recoup.pipeline.optimizers import Rule
from recoup.pipeline.schedule import check_delays
from recoup.pipeline.seeded import Streams, random_layers
from recoup.pipeline.simulator import Rate, Simulator
from recoup.pipeline.stages import resolve
from recoup.pipeline.transport import Transport
from recoup.pipeline.worker import Worker, lateness
from recoup.storage.digest import of_batches, of_model


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
        model: any model that `traced.Chain` can follow, cut between stages; or an nn.Sequential, cut between its
            children, if each maps one tensor to one tensor. Every rank has consecutive ones.
        stages, delays, lr, momentum, weight_decay, mitigation, loss: see `Simulator`. A stage lies within a rank, and
            its delay is at least the rank's own, 2 (R - 1 - r) samples: fine-grained delays fit any number of ranks.
        cut: stages, of an nn.Sequential children, for every rank; None: as even as possible. `runtime.balanced`
            measures which is fastest.
        update_size, optimizer, clip, seed: see `Simulator`.
    """

    model: nn.Module
    stages: Sequence[Sequence[str]]
    delays: Sequence[int]
    lr: Rate
    momentum: float = 0.9
    weight_decay: float = 0.0
    mitigation: Mitigation | str = "none"
    loss: Callable[[Any, Any], Tensor] = nn.functional.cross_entropy
    cut: Sequence[int] | None = None
    update_size: int = 1
    optimizer: Rule | None = None
    clip: float | None = None
    seed: int = 0

    def cutting(self) -> Cutting:
        """How the model is taken apart."""
        if not isinstance(self.model, nn.Module):
            raise RecoupError(f"pipeline.Plan: the model is a {type(self.model).__name__}; it must be an nn.Module")
        return (
            Children(self.model, self.stages)
            if isinstance(self.model, nn.Sequential)
            else Links(self.model, self.stages)
        )

    def check(self, ranks: int) -> None:
        """Everything that can be checked without a device, for all ranks: every rank fails, none is left waiting.

        Raises:
            RecoupError: a model that cannot be cut so, stages, delays or a cut that do not fit the ranks.
        """
        self._checked(self.cutting(), ranks)

    def _checked(self, cutting: Cutting, ranks: int) -> list[range]:
        is_module(self.model, "Plan")
        resolve(self.model, self.stages)
        delays = check_delays(self.delays, len(self.stages))
        where = self.pieces(ranks, cutting)
        for rank in range(ranks):
            lateness(rank, ranks, [delays[s] for s in cutting.stages(where, rank)], self.update_size)
            if not any(p.requires_grad for p in cutting.part(where, rank).parameters()):
                raise RecoupError(
                    f"pipeline.Plan: no parameter of rank {rank} of {ranks} ({cutting.shown(where, rank)}) requires a "
                    "gradient; choose another cut or fewer ranks"
                )
        return where

    def worker(
        self,
        rank: int,
        ranks: int,
        transport: Transport,
        samples: Samples,
        device: torch.device,
        kind: type[Worker] = Worker,
    ) -> Worker:
        """A rank's worker; raises what `check` and `Simulator` raise."""
        cutting = self.cutting()
        where = self._checked(cutting, ranks)
        mine, part = cutting.stages(where, rank), cutting.part(where, rank)
        here = {name for name, _ in part.named_modules(remove_duplicate=False)}
        core = Simulator(
            part.to(device),
            [[name for name in self.stages[s] if name in here] for s in mine],
            [self.delays[s] for s in mine],
            self.lr,
            self.momentum,
            self.weight_decay,
            self.mitigation,
            self.loss,
            update_size=self.update_size,
            optimizer=self.optimizer,
            clip=self.clip,
            seed=self.seed,
            first=mine[0],
        )
        layers = random_layers(self.model, self.stages)  # of the whole: the stage of some is in another rank
        core.streams = Streams(part, {name: s for name, s in layers.items() if name in here}, self.seed)
        return kind(
            part,
            core,
            rank,
            ranks,
            transport,
            lambda k: samples[k][0].to(device),
            lambda k: _moved(samples[k][1], device),
        )

    def pieces(self, ranks: int, cutting: Cutting | None = None) -> list[range]:
        """The indices of the stages, of an nn.Sequential children, of every rank."""
        cutting = self.cutting() if cutting is None else cutting
        count, what = cutting.count, cutting.what
        if self.cut is None:
            if not 1 <= ranks <= count:
                raise RecoupError(f"pipeline.Plan: {count} {what} of the model cannot feed {ranks} ranks")
            return cutting.even(ranks)
        if len(self.cut) != ranks or sum(self.cut) != count or min(self.cut) < 1:
            raise RecoupError(
                f"pipeline.Plan(cut={list(self.cut)}): the cut must give each of the {ranks} ranks at least one of the "
                f"model's {count} {what}"
            )
        bounds = [sum(self.cut[:r]) for r in range(ranks + 1)]
        return [range(a, b) for a, b in pairwise(bounds)]

    def share(self, ranks: int, rank: int) -> nn.Module:
        """The modules of a rank, whose weights it sends to all others at the end."""
        cutting = self.cutting()
        return cutting.part(self.pieces(ranks, cutting), rank)

    def identity(self, samples: Samples) -> dict[str, Any]:
        """What a checkpoint must agree with, as JSON: rates of a schedule at nine updates, the loss by its name.

        Not the ranks and the cut: a run goes on over others. The model by its modules' classes and settings and by its
        weights at the start, the samples by some of them.
        """
        how, count = (
            Mitigation.of(self.mitigation, "Plan"),
            len(samples),
        )
        updates = sorted({count * i // 8 for i in range(9)})
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
            "update_size": self.update_size,
            "optimizer": repr(self.optimizer),
            "clip": self.clip,
            "seed": self.seed,
            "modules": {name: described(module) for name, module in self.model.named_modules()},
            "weights at the start": of_model(self.model),
            "samples": count,
            "order of the samples": order(samples),
        }


def described(module: nn.Module) -> str:
    """A module's class and its own settings, as its repr says them, without its children's."""
    return f"{type(module).__module__}.{type(module).__qualname__}({module.extra_repr()})"


def order(samples: Samples, most: int = 64) -> str:
    """A digest of up to ``most`` samples, evenly spaced, each with its number; the random state stays as it is.

    Samples that are drawn anew whenever they are asked for have none: "drawn anew".
    """
    count = len(samples)
    numbers = sorted({count * i // most for i in range(most)} | {count - 1})
    with torch.random.fork_rng():
        once, again = of_batches([samples[numbers[-1]]]), of_batches([samples[numbers[-1]]])
        return of_batches((k, *samples[k]) for k in numbers) if once == again else "drawn anew"


def _moved(y: Any, device: torch.device) -> Any:
    return y.to(device) if isinstance(y, Tensor) else y
