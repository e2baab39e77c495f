"""One rank of a pipeline: the stages it holds, the samples under way in it, and what it does in a tick.

Legend: R ranks, this one r; S stages in all; N samples. In tick t rank r forwards sample k = t - r, then sends sample
j = t - 2 (R - 1) + r back and updates. So the rank itself is 2 (R - 1 - r) updates late; what a stage's delay exceeds
that by, the ring of weights adds.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from recoup.errors import RecoupError
from recoup.pipeline.finite import scalar
from recoup.pipeline.simulator import Simulator
from recoup.pipeline.state import random_state, set_random_state
from recoup.pipeline.transport import Packet, Transport


@dataclass(slots=True)
class UnderWay:
    """A sample between its forward and its backward: what entered the rank, as leaves, and what left it.

    ``before`` is what its forward pass found beside the weights, where that may be needed to run it again.
    """

    entered: Packet
    left: Any
    before: dict[str, dict[str, Tensor]] | None = None


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
        keeps: whether `state` will be called: buffers and random states of samples under way are then kept.
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
        self._held: dict[str, Packet] = {}
        self.keeps, self.waited = False, 0.0
        core.run = lambda packet: part(*packet)
        lateness(rank, ranks, core.delays, core.update_size)

    @property
    def last(self) -> bool:
        """Whether this rank computes the loss."""
        return self.rank == self.ranks - 1

    def tick(self, t: int, samples: int) -> None:
        """The forward of one sample and the backward of another, as far as there are any."""
        k, j = t - self.rank, t - 2 * (self.ranks - 1) + self.rank
        if 0 <= k < samples:
            self.forward(k, (self.inputs(k),) if self.rank == 0 else self._activation())
        if 0 <= j < samples:
            self.backward(j)

    def forward(self, k: int, entered: Packet) -> None:
        """Send sample k on, through the weights that its stages' delays prescribe."""
        before = self._surroundings() if self.keeps else None
        sample = self.run(k, entered)
        sample.before = before
        self.under_way[k] = sample
        if not self.last:
            self._waiting("send_activation", sample.left)

    def run(self, k: int, entered: Packet) -> UnderWay:
        """The forward pass of sample k; also how samples under way are rebuilt after a restart."""
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
            pairs = [(x, g) for x, g in zip(floating, self._gradient(), strict=True) if x.requires_grad]
            roots, flow = [x for x, _ in pairs], [g for _, g in pairs]
        self.core.begin()
        self.core.show_newest(j // self.core.update_size)
        torch.autograd.backward(roots, flow)
        self.core.update(f"step {j} (rank {self.rank})")  # before the gradient leaves: it looks whether it is finite
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

    def _activation(self) -> Packet:
        return self._held.pop("activation") if "activation" in self._held else self._waiting("receive_activation")

    def _gradient(self) -> Packet:
        return self._held.pop("gradient") if "gradient" in self._held else self._waiting("receive_gradient")

    def _waiting(self, call: str, *arguments: Packet) -> Any:
        """A call of the transport; its time is not work."""
        begun = time.perf_counter()
        try:
            return getattr(self.transport, call)(*arguments)
        finally:
            self.waited += time.perf_counter() - begun

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
        under_way = [
            (k, [x.detach().clone() for x in sample.entered], sample.before) for k, sample in self.under_way.items()
        ]
        losses = torch.tensor(self.losses, dtype=torch.float64)
        held = {name: list(packet) for name, packet in self._held.items()}
        return {"core": self.core.state_dict(), "under way": under_way, "held": held, "losses": losses}

    def load(self, state: dict[str, Any]) -> None:
        """The inverse of `state`.

        Samples under way are forwarded again, through the very weights they had seen, and with the buffers and random
        states that they had found.
        """
        device = next(self.part.parameters()).device
        self.core.load_state_dict(state["core"])
        self.losses = state["losses"].tolist()
        self._held = {name: tuple(x.to(device) for x in packet) for name, packet in state["held"].items()}
        now = self._surroundings()
        for k, entered, before in state["under way"]:
            self._surround(before)
            self.under_way[k] = self.run(k, tuple(x.to(device) for x in entered))
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
