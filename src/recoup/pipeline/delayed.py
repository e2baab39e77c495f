"""Spike Compensation and weight prediction for delayed training loops that exist already."""

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from recoup.errors import RecoupError
from recoup.fields import integer, is_number
from recoup.pipeline.mitigation import Mitigation
from recoup.pipeline.optimizers import SGDM, Rule
from recoup.pipeline.update import StageOptimizer


class Delayed(torch.optim.Optimizer):
    """Any rule of `optimizers` for gradients that come D updates late, as a torch optimizer.

    The loop delays, this compensates: `step` applies the mitigation's update to ``.grad``, and within `ahead` the
    parameters hold the weights that a forward pass should use. Learning-rate schedulers work as with torch's own.

    Args:
        params: parameters or groups; a group may have its own ``optimizer``, ``delay`` and ``lr``.
        optimizer: the rule, such as ``AdamW()``.
        lr, delay: D in updates; all of a group's values may change between steps.
        mitigation: a `Mitigation` or its name. Stash, past and SpecTrain concern the backward pass, the loop's part.

    Raises:
        RecoupError: numbers out of range, a mitigation of the backward pass, an optimizer that is no rule, a parameter
            that is not contiguous float32 or float64; a step within `ahead`, which would be lost; the state of another
            mitigation.

    Source: Kosson et al., MLSys 2021, for SGD; for the others, see `optimizers`.

    >>> from recoup.pipeline import AdamW
    >>> layer = torch.nn.Linear(2, 1)
    >>> optimizer = Delayed(layer.parameters(), AdamW(), lr=1e-3, delay=4, mitigation="coasting")
    >>> with optimizer.ahead():
    ...     loss = layer(torch.ones(1, 2)).sum()
    >>> loss.backward()  # through the newest weights; within `ahead`: through the predicted ones
    >>> optimizer.step()
    """

    def __init__(
        self, params: Iterable[Any], optimizer: Rule, lr: float, delay: int, mitigation: Mitigation | str = "coasting"
    ) -> None:
        self._begin(mitigation)
        super().__init__(params, {"lr": lr, "delay": delay, "optimizer": optimizer})

    def _begin(self, mitigation: Mitigation | str) -> None:
        how = self.mitigation = Mitigation.of(mitigation, type(self).__name__)
        if how.stash or how.past or how.prediction == "spectrain":
            raise RecoupError(
                f"{type(self).__name__}(mitigation={how!r}): stash, past and spectrain choose the backward pass's "
                "weights, which an optimizer cannot; use pipeline.Simulator"
            )
        self._of: dict[Tensor, tuple[tuple[Any, ...], StageOptimizer]] = {}
        self._within = False

    def _rule(self, group: dict[str, Any]) -> Rule:
        """A group's rule."""
        rule = group["optimizer"]
        if not isinstance(rule, Rule) or isinstance(rule, type):
            raise RecoupError(
                f"{type(self).__name__}(optimizer={rule!r}): optimizer must be a rule such as pipeline.AdamW()"
            )
        return rule

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters; checked as in the constructor."""
        super().add_param_group(param_group)
        try:
            self._check(self.param_groups[-1])
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
        """As of every torch optimizer, and the mitigation; a group's rule as its repr."""
        state = {**super().state_dict(), "mitigation": repr(self.mitigation)}
        state["param_groups"] = [
            {name: repr(value) if isinstance(value, Rule) else value for name, value in group.items()}
            for group in state["param_groups"]
        ]
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As of every torch optimizer; copies.

        Raises:
            RecoupError: the state of another mitigation or rule, or of another optimizer; nothing is then changed.
        """
        other, mine = state_dict.get("mitigation"), repr(self.mitigation)
        if other != mine:
            raise RecoupError(f"{type(self).__name__}: the state is of mitigation {other}, here {mine}")
        state = copy.deepcopy(state_dict)  # torch's own copies no tensors
        for kept, group in zip(state["param_groups"], self.param_groups, strict=False):
            if kept.get("optimizer") != (repr(group["optimizer"]) if "optimizer" in group else None):
                raise RecoupError(
                    f"{type(self).__name__}: the state is of rule {kept.get('optimizer')}, here {group['optimizer']!r}"
                )
            if "optimizer" in group:
                kept["optimizer"] = group["optimizer"]
        super().load_state_dict(state)
        self._of.clear()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "mitigation": self.mitigation, "_of": {}, "_within": False}

    def _outside(self, name: str) -> None:
        if self._within:
            raise RecoupError(
                f"{type(self).__name__}.{name} within `ahead`: the parameters hold predicted weights, and leaving "
                "`ahead` would undo it; leave it first"
            )

    def _optimizer(self, parameter: Tensor, group: dict[str, Any]) -> StageOptimizer:
        """The parameter's own update, bound to its memory and to the state that torch saves and loads."""
        rule = self._rule(group)
        how, state = (group["delay"], rule), self.state[parameter]
        made, own = self._of.get(parameter, (None, None))
        # .data has a version counter of its own: the graph of a forward within `ahead` stays usable.
        weights = parameter.data.view(-1)
        if own is None or made != how:  # the coefficients follow delay and rule, which schedulers may change
            own = StageOptimizer(weights, [parameter.numel()], [group["delay"]], 0, 0, 0, self.mitigation, rule)
            self._of[parameter] = how, own
        own.weights = weights
        if "updates" in state:
            own.slots = {name: state[name] for name in rule.slots}
            own.before, own.updates = state.get("before"), int(state["updates"])
        else:
            state.update(own.slots, updates=0)
            if own.before is not None:
                state["before"] = own.before
        return own

    def _check(self, group: dict[str, Any]) -> None:
        owner = type(self).__name__
        group["delay"] = integer(owner, "delay", group["delay"], (0, 1 << 20))
        limits = [("lr", math.inf), ("momentum", 1.0), ("weight_decay", math.inf)]
        for name, top in limits:
            if name in group and not (is_number(group[name]) and 0 <= group[name] <= top and group[name] < math.inf):
                above = "from 0, and finite" if top == math.inf else f"from 0 to {top:g}"
                raise RecoupError(f"{owner}({name}={group[name]!r}): {name} must be {above}")
        self._rule(group)
        for parameter in group["params"]:
            if parameter.dtype not in (torch.float32, torch.float64) or not parameter.is_contiguous():
                raise RecoupError(
                    f"{owner}: a parameter is {parameter.dtype} {list(parameter.shape)}; parameters must be "
                    "contiguous float32 or float64"
                )


class DelayedSGD(Delayed):
    """SGD with momentum for gradients that come D updates late: `Delayed` with `optimizers.SGDM`.

    Args:
        params: parameters or groups; a group may have its own ``delay``, ``lr``, ``momentum`` and ``weight_decay``.
        lr, momentum, weight_decay: as of `Simulator`; all of a group's values may change between steps.
        delay, mitigation: as of `Delayed`.

    Raises:
        RecoupError: as of `Delayed`.

    >>> layer = torch.nn.Linear(2, 1)
    >>> optimizer = DelayedSGD(layer.parameters(), lr=0.1, delay=4, mitigation="lwpw+sc")
    >>> with optimizer.ahead():
    ...     loss = layer(torch.ones(1, 2)).sum()
    >>> loss.backward()
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
        self._begin(mitigation)
        defaults = {"lr": lr, "delay": delay, "momentum": momentum, "weight_decay": weight_decay}
        torch.optim.Optimizer.__init__(self, params, defaults)

    def _rule(self, group: dict[str, Any]) -> Rule:
        return SGDM(group["momentum"], group["weight_decay"])
