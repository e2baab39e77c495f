"""One rank of a pipeline: the stages it holds, the samples under way in it, and what it does in a tick.

Legend: R ranks, this one r; S stages in all; N samples. In tick t rank r forwards sample k = t - r, then sends sample
j = t - 2 (R - 1) + r back and updates. So the rank itself is 2 (R - 1 - r) updates late; what a stage's delay exceeds
that by, the ring of weights adds.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from recoup.errors import RecoupError
from recoup.pipeline.simulator import Simulator
from recoup.pipeline.transport import Transport


@dataclass(slots=True)
class UnderWay:
    """A sample between its forward and its backward: what entered the rank, as a leaf, and what left it."""

    entered: Tensor
    left: Tensor


class Worker:
    """A rank.

    Args:
        part: the rank's modules: maps one tensor to one tensor.
        core: a `Simulator` over ``part`` with this rank's stages and delays: its rings, optimizer and live weights.
        rank, ranks: r and R.
        transport: links to the neighbours.
        inputs: sample number -> x, on the first rank.
        targets: sample number -> y, on the last.
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
        late = 2 * (ranks - 1 - rank)
        short = [delay for delay in core.delays if delay < late]
        if short:
            raise RecoupError(
                f"pipeline: rank {rank} of {ranks} is {late} updates late, and a stage in it has a delay of "
                f"{short[0]}; use fewer ranks, or delays of at least that"
            )

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
        sample = self.run(k, entered)
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
            left = self.part(entered)
        return UnderWay(entered, left)

    def backward(self, j: int) -> None:
        """Bring sample j's gradient through, and update."""
        sample = self.under_way.pop(j)
        flow: Tensor | None
        if self.last:
            left = sample.left.detach().requires_grad_()
            with torch.enable_grad():
                value = self.core.loss(left, self.targets(j))
            (flow,) = torch.autograd.grad(value, left)
            self.losses.append(self.core.checked(value, f"step {j} (rank {self.rank}, the last stage)"))
        else:
            flow = self._gradient()
        self.core.attach()
        self.core.show_newest(j)
        sample.left.backward(flow)
        if self.rank:
            gradient = sample.entered.grad
            self.transport.send_gradient(torch.zeros_like(sample.entered) if gradient is None else gradient)
        self.core.update()

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

    def state(self) -> dict[str, Any]:
        """At the boundary of two ticks, after `hold`: everything of this rank, packets in flight included."""
        entered = {str(k): sample.entered.detach().clone() for k, sample in self.under_way.items()}
        losses = torch.tensor(self.losses, dtype=torch.float64)
        return {"core": self.core.state_dict(), "under way": entered, "held": dict(self._held), "losses": losses}

    def load(self, state: dict[str, Any]) -> None:
        """The inverse of `state`: samples under way are forwarded again, through the very weights they had seen."""
        self.core.load_state_dict(state["core"])
        self.losses, self._held = state["losses"].tolist(), dict(state["held"])
        self.under_way = {int(k): self.run(int(k), x) for k, x in state["under way"].items()}


def pieces(children: int, ranks: int) -> list[range]:
    """Consecutive children for every rank, as even as possible, the larger ones first."""
    short, longer = divmod(children, ranks)
    bounds = [0]
    for rank in range(ranks):
        bounds.append(bounds[-1] + short + (rank < longer))
    return [range(a, b) for a, b in pairwise(bounds)]


def local_stages(
    model: nn.Sequential, stages: Sequence[Sequence[str]], pieces_: Sequence[range], rank: int
) -> list[int]:
    """The indices of the stages whose modules lie in a rank; stages without modules belong to the rank before them.

    Raises:
        RecoupError: a stage with modules in two ranks, or a rank without a stage.
    """
    names = [name for name, _ in model.named_children()]
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
