"""One rank of a pipeline: the stages it holds, the samples under way in it, and what it does in a tick.

Legend: R ranks, this one r; S stages in all; N samples. In tick t rank r forwards sample k = t - r, then sends sample
j = t - 2 (R - 1) + r back and updates. So the rank itself is 2 (R - 1 - r) updates late; what a stage's delay exceeds
that by, the ring of weights adds.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from recoup.errors import RecoupError
from recoup.pipeline.finite import scalar
from recoup.pipeline.simulator import Simulator
from recoup.pipeline.state import random_state, set_random_state
from recoup.pipeline.transport import Transport


@dataclass(slots=True)
class UnderWay:
    """A sample between its forward and its backward: what entered the rank, as a leaf, and what left it.

    ``before`` is what its forward pass found beside the weights, where that may be needed to run it again.
    """

    entered: Tensor
    left: Tensor
    before: dict[str, dict[str, Tensor]] | None = None


class Worker:
    """A rank.

    Args:
        part: the rank's modules: maps one tensor to one tensor.
        core: a `Simulator` over ``part`` with this rank's stages and delays: its rings, optimizer and live weights.
        rank, ranks: r and R.
        transport: links to the neighbours.
        inputs: sample number -> x, on the first rank.
        targets: sample number -> y, on the last.

    Attributes:
        keeps: whether `state` will be called: buffers and random states of samples under way are then kept.
    """

    def __init__(
        self,
        part: nn.Module,
        core: Simulator,
        rank: int,
        ranks: int,
        transport: Transport,
        inputs: Callable[[int], Tensor],
        targets: Callable[[int], Any],
    ) -> None:
        self.part, self.core, self.rank, self.ranks, self.transport = part, core, rank, ranks, transport
        self.inputs, self.targets = inputs, targets
        self.under_way: dict[int, UnderWay] = {}
        self.losses: list[float] = []
        self._held: dict[str, Tensor] = {}
        self.keeps = False
        lateness(rank, ranks, core.delays)

    @property
    def last(self) -> bool:
        """Whether this rank computes the loss."""
        return self.rank == self.ranks - 1

    def tick(self, t: int, samples: int) -> None:
        """The forward of one sample and the backward of another, as far as there are any."""
        k, j = t - self.rank, t - 2 * (self.ranks - 1) + self.rank
        if 0 <= k < samples:
            self.forward(k, self.inputs(k) if self.rank == 0 else self._activation())
        if 0 <= j < samples:
            self.backward(j)

    def forward(self, k: int, entered: Tensor) -> None:
        """Send sample k on, through the weights that its stages' delays prescribe."""
        before = self._surroundings() if self.keeps else None
        sample = self.run(k, entered)
        sample.before = before
        self.under_way[k] = sample
        if not self.last:
            self.transport.send_activation(sample.left)

    def run(self, k: int, entered: Tensor) -> UnderWay:
        """The forward pass of sample k; also how samples under way are rebuilt after a restart."""
        entered = entered.detach()
        self.core.check(entered)
        if self.rank and entered.is_floating_point():
            entered.requires_grad_()
        self.core.show(k)
        with torch.enable_grad():
            left = self.part(entered.clone())  # it may write to its input, and what entered must stay as it was
        if not isinstance(left, Tensor):
            raise RecoupError(
                f"pipeline: rank {self.rank}'s part of the model gives a {type(left).__name__}; every child of the "
                "model must map one tensor to one tensor"
            )
        return UnderWay(entered, left)

    def backward(self, j: int) -> None:
        """Bring sample j's gradient through, and update."""
        sample = self.under_way.pop(j)
        root, flow = (self._loss(j, sample), None) if self.last else (sample.left, self._gradient())
        self.core.attach()
        self.core.show_newest(j)
        root.backward(flow)
        self.core.refuse_gradient(f"step {j} (rank {self.rank})")
        if self.rank:
            gradient = sample.entered.grad
            self.transport.send_gradient(torch.zeros_like(sample.entered) if gradient is None else gradient)
        self.core.update()

    def _loss(self, j: int, sample: UnderWay) -> Tensor:
        """Sample j's loss."""
        with torch.enable_grad():
            value = scalar(self.core.loss(sample.left, self.targets(j)))
        number = value.item()
        if not math.isfinite(number):
            where = f"step {j} (rank {self.rank}, the last stage)"
            if self.rank and not sample.entered.isfinite().all():
                raise RecoupError(
                    f"pipeline: the loss of {where} is {number}: what came from rank {self.rank - 1} is not finite, so "
                    f"the fault is before stage {self.core.first}; nothing was updated"
                )
            self.core.refuse_loss(number, sample.entered.detach(), where)
        self.losses.append(number)
        return value

    def finish(self) -> None:
        """Leave the newest weights in the part, and no gradient; whatever happened."""
        self.core.settle()
        self.core.clear()

    def _activation(self) -> Tensor:
        return self._held.pop("activation") if "activation" in self._held else self.transport.receive_activation()

    def _gradient(self) -> Tensor:
        return self._held.pop("gradient") if "gradient" in self._held else self.transport.receive_gradient()

    def hold(self, t: int, samples: int) -> None:
        """Take in what was sent in the tick before t, to be used in t."""
        if self.rank and 0 <= t - self.rank < samples:
            self._held["activation"] = self._activation()
        if not self.last and 0 <= t - 2 * (self.ranks - 1) + self.rank < samples:
            self._held["gradient"] = self._gradient()

    def expected(self, samples: int) -> tuple[int, int]:
        """How many activations and gradients the neighbours are still to send."""
        forwards = self.core.steps + len(self.under_way)
        activations = samples - forwards if self.rank else 0
        gradients = 0 if self.last else samples - self.core.steps
        return activations - ("activation" in self._held), gradients - ("gradient" in self._held)

    def state(self) -> dict[str, Any]:
        """At the boundary of two ticks, after `hold`: everything of this rank, packets in flight included."""
        under_way = [(k, sample.entered.detach().clone(), sample.before) for k, sample in self.under_way.items()]
        losses = torch.tensor(self.losses, dtype=torch.float64)
        return {"core": self.core.state_dict(), "under way": under_way, "held": dict(self._held), "losses": losses}

    def load(self, state: dict[str, Any]) -> None:
        """The inverse of `state`.

        Samples under way are forwarded again, through the very weights they had seen, and with the buffers and random
        states that they had found.
        """
        device = next(self.part.parameters()).device
        self.core.load_state_dict(state["core"])
        self.losses = state["losses"].tolist()
        self._held = {name: packet.to(device) for name, packet in state["held"].items()}
        now = self._surroundings()
        for k, entered, before in state["under way"]:
            self._surround(before)
            self.under_way[k] = self.run(k, entered.to(device))
            self.under_way[k].before = before
        self._surround(now)

    def _surroundings(self) -> dict[str, dict[str, Tensor]]:
        buffers = {name: buffer.clone() for name, buffer in self.part.named_buffers()}
        return {"buffers": buffers, "random": random_state(next(self.part.parameters()).device)}

    @torch.no_grad()
    def _surround(self, with_: dict[str, dict[str, Tensor]]) -> None:
        for name, buffer in self.part.named_buffers():
            kept = with_["buffers"][name].to(buffer.device)
            if not torch.equal(buffer, kept):  # a graph may hold it, and notices a write
                buffer.copy_(kept)
        set_random_state(with_["random"], next(self.part.parameters()).device)


def lateness(rank: int, ranks: int, delays: Sequence[int]) -> int:
    """Updates that a rank itself is late.

    Raises:
        RecoupError: a stage in it has a smaller delay.
    """
    late = 2 * (ranks - 1 - rank)
    short = [delay for delay in delays if delay < late]
    if short:
        raise RecoupError(
            f"pipeline: rank {rank} of {ranks} is {late} updates late, and a stage in it has a delay of {short[0]}; "
            "use fewer ranks, or delays of at least that"
        )
    return late


def pieces(children: int, ranks: int) -> list[range]:
    """Consecutive children for every rank, as even as possible, the larger ones first."""
    short, longer = divmod(children, ranks)
    bounds = [0]
    for rank in range(ranks):
        bounds.append(bounds[-1] + short + (rank < longer))
    return [range(a, b) for a, b in pairwise(bounds)]


def local_stages(
    names: Sequence[str], stages: Sequence[Sequence[str]], pieces_: Sequence[range], rank: int
) -> list[int]:
    """The indices of the stages whose modules lie in a rank; stages without modules belong to the rank before them.

    Args:
        names: of the model's children.
        stages: of the whole pipeline.
        pieces_: the children of every rank.
        rank: which one.

    Raises:
        RecoupError: a stage with modules in two ranks, or a rank without a stage.
    """
    owner = {names[i]: r for r, piece in enumerate(pieces_) for i in piece}
    found: list[int] = []
    at = 0
    for index, stage in enumerate(stages):
        ranks = {owner[name.split(".")[0]] for name in stage if name.split(".")[0] in owner}
        if len(ranks) > 1:
            raise RecoupError(
                f"pipeline: stage {index} ({', '.join(stage)}) has modules in ranks {sorted(ranks)}; cut the model "
                "between stages"
            )
        at = ranks.pop() if ranks else at
        if at == rank:
            found.append(index)
    if not found:
        raise RecoupError(
            f"pipeline: {len(stages)} stages leave rank {rank} of {len(pieces_)} without one: use fewer ranks"
        )
    return found
