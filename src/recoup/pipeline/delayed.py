"""Spike Compensation and weight prediction for delayed training loops that exist already."""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from recoup.errors import RecoupError
from recoup.fields import integer
from recoup.pipeline.mitigation import Mitigation
from recoup.pipeline.optimizer import StageOptimizer


class DelayedSGD(torch.optim.Optimizer):
    """SGD with momentum for gradients that come D updates late, as a torch optimizer.

    The loop delays, this compensates: `step` applies the mitigation's update to ``.grad``, and within `ahead` the
    parameters hold the weights that a forward pass should use. Learning-rate schedulers work as with torch's SGD.

    Args:
        params: parameters or groups; a group may have its own ``delay``, ``lr``, ``momentum`` and ``weight_decay``.
        lr, momentum, weight_decay: as of `Simulator`; all of a group's values may change between steps.
        delay: D in updates.
        mitigation: a `Mitigation` or its name. Stashing and SpecTrain concern the backward pass, which is the loop's.

    Raises:
        RecoupError: numbers out of range, stash or SpecTrain, a parameter that is not contiguous float32 or float64; a
            step within `ahead`, which would be lost; the state of another mitigation.

    Source: Kosson et al., MLSys 2021.

    >>> layer = torch.nn.Linear(2, 1)
    >>> optimizer = DelayedSGD(layer.parameters(), lr=0.1, delay=4, mitigation="lwpw+sc")
    >>> with optimizer.ahead():
    ...     loss = layer(torch.ones(1, 2)).sum()
    >>> loss.backward()  # through the newest weights; within `ahead`: through the predicted ones
    >>> optimizer.step()
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        delay: int,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        mitigation: Mitigation | str = "sc",
    ) -> None:
        self.mitigation = Mitigation.parse(mitigation) if isinstance(mitigation, str) else mitigation
        if self.mitigation.stash or self.mitigation.prediction == "spectrain":
            raise RecoupError(
                f"DelayedSGD(mitigation={self.mitigation!r}): stash and spectrain choose the backward pass's weights, "
                "which an optimizer cannot; use pipeline.Simulator"
            )
        self._of: dict[Tensor, tuple[tuple[Any, ...], StageOptimizer]] = {}
        self._within = False
        super().__init__(params, {"lr": lr, "delay": delay, "momentum": momentum, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters; checked as in the constructor."""
        super().add_param_group(param_group)
        try:
            _check(self.param_groups[-1])
        except RecoupError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One update of every parameter that has a gradient, which is left as it is."""
        self._outside("step")
        value = None
        if closure is not None:
            with torch.enable_grad():
                value = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    own = self._optimizer(parameter, group)
                    own.step(parameter.grad.detach().reshape(-1).clone(), float(group["lr"]))
                    self.state[parameter]["updates"] = own.updates
        return value

    @contextmanager
    def ahead(self) -> Iterator[None]:
        """Within it the parameters hold the predicted weights, after it the newest again, in place."""
        self._outside("ahead")
        pairs = []
        for group in self.param_groups:
            for parameter in group["params"]:
                own = self._optimizer(parameter, group)
                pairs.append((own.weights, own.weights.clone(), own.ahead(float(group["lr"]))))
        self._within = True
        try:
            with torch.no_grad():
                for weights, _, predicted in pairs:
                    weights.copy_(predicted)
            yield
        finally:
            self._within = False
            with torch.no_grad():
                for weights, newest, _ in pairs:
                    weights.copy_(newest)

    def state_dict(self) -> dict[str, Any]:
        """As of every torch optimizer, and the mitigation."""
        return {**super().state_dict(), "mitigation": repr(self.mitigation)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As of every torch optimizer; copies.

        Raises:
            RecoupError: the state of another mitigation, or of another optimizer; nothing is then changed.
        """
        other, mine = state_dict.get("mitigation"), repr(self.mitigation)
        if other != mine:
            raise RecoupError(f"DelayedSGD: the state is of mitigation {other}, here {mine}")
        super().load_state_dict(copy.deepcopy(state_dict))  # torch's own copies no tensors
        self._of.clear()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "mitigation": self.mitigation, "_of": {}, "_within": False}

    def _outside(self, name: str) -> None:
        if self._within:
            raise RecoupError(
                f"DelayedSGD.{name} within `ahead`: the parameters hold predicted weights, and leaving `ahead` would "
                "undo it; leave it first"
            )

    def _optimizer(self, parameter: Tensor, group: dict[str, Any]) -> StageOptimizer:
        """The parameter's own update, bound to its memory and to the state that torch saves and loads."""
        how, state = (group["delay"], group["momentum"]), self.state[parameter]
        made, own = self._of.get(parameter, (None, None))
        # .data has a version counter of its own: the graph of a forward within `ahead` stays usable.
        weights = parameter.data.view(-1)
        if own is None or made != how:  # the coefficients follow delay and momentum, which schedulers may change
            fixed = (0, group["momentum"], group["weight_decay"], self.mitigation)
            own = StageOptimizer(weights, [parameter.numel()], [group["delay"]], *fixed)
            self._of[parameter] = how, own
        own.weights, own.weight_decay = weights, group["weight_decay"]
        if "velocity" in state:
            own.velocity, own.before, own.updates = state["velocity"], state.get("before"), int(state["updates"])
        else:
            state["velocity"], state["updates"] = own.velocity, 0
            if own.before is not None:
                state["before"] = own.before
        return own


def _check(group: dict[str, Any]) -> None:
    group["delay"] = integer("DelayedSGD", "delay", group["delay"], (0, 1 << 20))
    for name, top in (("lr", float("inf")), ("momentum", 1.0), ("weight_decay", float("inf"))):
        if not 0 <= group[name] < top:
            raise RecoupError(f"DelayedSGD({name}={group[name]!r}): {name} must be from 0 to below {top:g}")
    for parameter in group["params"]:
        if parameter.dtype not in (torch.float32, torch.float64) or not parameter.is_contiguous():
            raise RecoupError(
                f"DelayedSGD: a parameter is {parameter.dtype} {list(parameter.shape)}; parameters must be "
                "contiguous float32 or float64"
            )
