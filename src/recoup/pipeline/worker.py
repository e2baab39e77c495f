"""One rank of a pipeline: the stages it holds, the samples under way in it, and what it does in a tick.

Legend: R ranks, this one r; S stages in all; N samples, of which this run begins with sample b. In tick t rank r
forwards sample k = b + t - r, then sends sample j = b + t - 2 (R - 1) + r back and updates. So the rank itself is
2 (R - 1 - r) updates late; what a stage's delay exceeds that by, the ring of weights adds.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from recoup.errors import RecoupError
from recoup.pipeline.finite import scalar
from recoup.pipeline.packets import Packet
from recoup.pipeline.portable import Moved, buffers_of, needed, put_together, taken_apart
from recoup.pipeline.simulator import Simulator
from recoup.pipeline.state import random_state
from recoup.pipeline.transport import Transport


@dataclass(slots=True)
class UnderWay:
    """A sample between its forward and its backward: what entered the rank, as leaves, and what left it.

    ``found`` is what its forward pass found beside the weights, where states are kept.
    """

    entered: Packet
    left: Any
    found: dict[str, dict[str, Tensor]] | None = None


class Worker:
    """A rank.

    Args:
        part: the rank's modules: maps the tensors of a packet to those of the next; on the last rank to an output.
        core: a `Simulator` over ``part`` with this rank's stages and delays: its rings, optimizer and live weights.
        rank, ranks: r and R.
        transport: links to the neighbours.
        inputs: sample number -> x, on the first rank.
        targets: sample number -> y, on the last.

    Attributes:
        begun: the first sample of this run.
        updated: called with k after the update of sample k - 1, before its gradient leaves: when rank 0 calls it, all
            others have. Where it is set, `state` may be called in it.
        waited: seconds spent in the transport.
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
        self.begun, self.waited = 0, 0.0
        self.updated: Callable[[int], None] | None = None
        self._moved = Moved()
        core.run = lambda packet: part(*packet)
        lateness(rank, ranks, core.delays, core.update_size)

    @property
    def last(self) -> bool:
        """Whether this rank computes the loss."""
        return self.rank == self.ranks - 1

    def tick(self, t: int, samples: int) -> None:
        """The forward of one sample and the backward of another, as far as there are any; t counts in this run."""
        k, j = (self.begun + t - late for late in (self.rank, 2 * (self.ranks - 1) - self.rank))
        if self.begun <= k < samples:
            self.forward(k, (self.inputs(k),) if self.rank == 0 else self._waiting("receive_activation"))
        if self.begun <= j < samples:
            self.backward(j)

    def forward(self, k: int, entered: Packet) -> None:
        """Send sample k on, through the weights that its stages' delays prescribe."""
        found = self._surroundings() if self.updated else None
        sample = self._run(k, entered)
        if found is not None:
            sample.found = found
            self._moved.note(self.part, found["buffers"], forward=True)
        self.under_way[k] = sample
        if not self.last:
            self._waiting("send_activation", sample.left)

    def _run(self, k: int, entered: Packet) -> UnderWay:
        entered = tuple(x.detach() for x in entered)
        self.core.check(entered)
        for x in entered if self.rank else ():
            if x.is_floating_point():
                x.requires_grad_()
        self.core.show(k // self.core.update_size)
        with torch.enable_grad(), self.core.forward(k):
            left = self.part(*(x.clone() for x in entered))  # it may write to its input, which must stay as it was
        return UnderWay(entered, left if self.last else self._packet(left))

    def _packet(self, left: Any) -> Packet:
        """What leaves a rank that is not the last."""
        left = left if isinstance(self.part, GraphModule) else (left,)
        for x in left:
            if not isinstance(x, Tensor):
                raise RecoupError(
                    f"pipeline: rank {self.rank}'s part of the model gives a {type(x).__name__}; every child of an "
                    "nn.Sequential must map one tensor to one tensor, and what crosses a cut must be a tensor"
                )
        return tuple(left)

    def backward(self, j: int) -> None:
        """Bring sample j's gradient through, and update."""
        sample = self.under_way.pop(j)
        if self.last:
            roots, flow = [self._loss(j, sample)], None
        else:
            floating = [x for x in sample.left if x.is_floating_point()]
            pairs = [
                (x, g) for x, g in zip(floating, self._waiting("receive_gradient"), strict=True) if x.requires_grad
            ]
            roots, flow = [x for x, _ in pairs], [g for _, g in pairs]
        self.core.begin()
        self.core.show_newest(j // self.core.update_size)
        found = self._buffers() if self.updated else None
        torch.autograd.backward(roots, flow)
        self.core.update(f"step {j} (rank {self.rank})")  # before the gradient leaves: it looks whether it is finite
        if self.updated and found is not None:
            self._moved.note(self.part, found, forward=False)
            self.updated(j + 1)
        if self.rank:
            entered = [x for x in sample.entered if x.is_floating_point()]
            self._waiting("send_gradient", tuple(torch.zeros_like(x) if x.grad is None else x.grad for x in entered))

    def _loss(self, j: int, sample: UnderWay) -> Tensor:
        """Sample j's loss."""
        with torch.enable_grad(), self.core.rings.loss():
            value = scalar(self.core.loss(sample.left, self.targets(j)))
        number = value.item()
        if not math.isfinite(number):
            where = f"step {j} (rank {self.rank}, the last stage)"
            if self.rank and not all(x.isfinite().all() for x in sample.entered):
                raise RecoupError(
                    f"pipeline: the loss of {where} is {number}: what came from rank {self.rank - 1} is not finite, so "
                    f"the fault is before stage {self.core.first}; nothing was updated"
                )
            self.core.refuse_loss(number, tuple(x.detach() for x in sample.entered), where)
        self.losses.append(number)
        return value

    def finish(self) -> None:
        """Leave the newest weights in the part, and no gradient; whatever happened."""
        self.core.finish()

    def _waiting(self, call: str, *arguments: Packet) -> Any:
        """A call of the transport; its time is not work."""
        begun = time.perf_counter()
        try:
            return getattr(self.transport, call)(*arguments)
        finally:
            self.waited += time.perf_counter() - begun

    def expected(self, samples: int) -> tuple[int, int]:
        """How many activations and gradients the neighbours are still to send."""
        forwards = self.core.steps + len(self.under_way)
        return samples - forwards if self.rank else 0, 0 if self.last else samples - self.core.steps

    def state(self) -> dict[str, Any]:
        """Between two samples, in `updated`: everything of this rank, by names, for these or other ranks."""
        found = next(iter(self.under_way.values())).found if self.under_way else None
        kept = taken_apart(self.core)
        kept["buffers"] = self._moved.between(kept["buffers"], None if found is None else found["buffers"])
        kept["random"] = kept["random"] if found is None else found["random"]
        return {**kept, "losses": torch.tensor(self.losses, dtype=torch.float64) if self.last else None}

    def needed(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Of another rank's state, what this one takes up."""
        return needed(self.core, state)

    def load(self, states: Sequence[Mapping[str, Any]]) -> None:
        """The inverse of `state`, of all ranks; the run begins with the sample that comes next.

        Raises:
            RecoupError: states that lack something of this rank's; nothing is changed.
        """
        put_together(self.core, states, last=self.last)
        self.begun = self.core.steps
        if self.last:
            self.losses = next(state["losses"] for state in states if state["losses"] is not None).tolist()

    def _surroundings(self) -> dict[str, dict[str, Tensor]]:
        return {"buffers": self._buffers(), "random": random_state(next(self.part.parameters()).device)}

    def _buffers(self) -> dict[str, Tensor]:
        return {name: buffer.clone() for name, buffer in buffers_of(self.part).items()}


def lateness(rank: int, ranks: int, delays: Sequence[int], update_size: int = 1) -> int:
    """Updates that a rank itself is late: 2 (R - 1 - r) samples.

    Raises:
        RecoupError: a stage in it has a smaller delay.
    """
    late = -(-2 * (ranks - 1 - rank) // update_size)
    short = [delay for delay in delays if delay < late]
    if short:
        raise RecoupError(
            f"pipeline: rank {rank} of {ranks} is {late} updates late, and a stage in it has a delay of {short[0]}; "
            "use fewer ranks, or delays of at least that"
        )
    return late
