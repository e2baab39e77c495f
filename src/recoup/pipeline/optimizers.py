"""Optimizers for gradients that come late: what they keep, how they step, and where they are heading.

A rule tells the change u' of a step, w' = w - eta u', and the direction u that its state points to before the coming
gradient is known: predictions go along it. Everything is element by element on lists of tensors, one a stage, so that
the bits do not depend on how many stages lie together.

Legend: t updates so far, g the gradient, D how late it is.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import inf
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from recoup.errors import RecoupError
from recoup.fields import Value
from recoup.pipeline.lists import each

Parts = list[Tensor]
Slots = Mapping[str, Parts]


@runtime_checkable
class Rule(Protocol):
    """An optimizer: a frozen value whose repr can be pasted back.

    Attributes:
        slots: names of what it keeps for every weight, zero at the start.
        memory: b, by which what was learnt of a gradient fades in a step: the momentum.
    """

    slots: ClassVar[tuple[str, ...]]

    @property
    def memory(self) -> float:
        """How much of a gradient's part in the direction is left a step later."""
        ...

    def change(self, t: int, g: Parts, w: Parts, old: Slots, new: Slots, late: Sequence[float] | None, /) -> Parts:
        """Write the next state into ``new``; u', which may be a part of it. ``g`` may be overwritten.

        ``late``: D of Spike Compensation of every stage; None: none.
        """
        ...

    def direction(self, t: int, w: Parts, slots: Slots, /) -> Parts:
        """u, from what is known after t updates; tensors that must not be written to."""
        ...


def spike(momentum: float, delay: float) -> tuple[float, float]:
    """The coefficients of Spike Compensation in float64: a = m^D, b = (1 - m^D) / (1 - m); for m = 1: 1 and D.

    Every gradient's total contribution is right from D updates on; D = 0 is SGD with momentum, D = 1 Nesterov's.
    """
    a = momentum**delay
    return a, delay if momentum == 1 else (1 - a) / (1 - momentum)


def coasting(memory: float, delay: float) -> float:
    """T = b (1 - b^D) / (1 - b): how far the weights go in D updates whose gradients are all zero; D for b = 1."""
    return memory * spike(memory, delay)[1]


@dataclass(frozen=True, slots=True)
class SGDM(Value):
    """SGD with momentum.

        g' = g + wd w,   v' = m v + g',   u' = a v' + b g' with Spike Compensation, else v';   u = v

    Attributes:
        momentum, weight_decay: m, to 1, and wd; the decay acts on the newest weights.

    Raises:
        RecoupError: a field that is not a number from 0, infinite, or a momentum above 1.
    """

    momentum: float = 0.9
    weight_decay: float = 0.0
    slots: ClassVar[tuple[str, ...]] = ("velocity",)

    def __post_init__(self) -> None:
        _numbers(self, momentum=1.0, weight_decay=inf)

    @property
    def memory(self) -> float:
        """The momentum."""
        return self.momentum

    @torch.no_grad()
    def change(self, _: int, g: Parts, w: Parts, old: Slots, new: Slots, late: Sequence[float] | None, /) -> Parts:
        """See `Rule`."""
        if self.weight_decay:
            each._foreach_add_(g, w, alpha=self.weight_decay)
        v = _moved(old["velocity"], new["velocity"])
        each._foreach_mul_(v, self.momentum)
        each._foreach_add_(v, g)
        spikes = self.spikes(late)
        if spikes is None:
            return v
        change = each._foreach_mul(v, [a for a, _ in spikes])
        each._foreach_mul_(g, [b for _, b in spikes])
        each._foreach_add_(change, g)
        return list(change)

    def spikes(self, late: Sequence[float] | None) -> list[tuple[float, float]] | None:
        """Coefficients a and b of every stage; None: the change is the velocity."""
        return None if late is None else [spike(self.momentum, D) for D in late]

    def direction(self, _: int, __: Parts, slots: Slots, /) -> Parts:
        """See `Rule`."""
        return slots["velocity"]


@dataclass(frozen=True, slots=True)
class Nesterov(SGDM):
    """SGD with Nesterov's momentum: u' = g' + m v', which is Spike Compensation of D + 1 for gradients D late."""

    def spikes(self, late: Sequence[float] | None) -> list[tuple[float, float]] | None:
        """Those of D + 1."""
        return [(self.momentum, 1.0)] if late is None else [spike(self.momentum, D + 1) for D in late]

    @torch.no_grad()
    def change(self, t: int, g: Parts, w: Parts, old: Slots, new: Slots, late: Sequence[float] | None, /) -> Parts:
        """See `Rule`."""
        return SGDM.change(self, t, g, w, old, new, [0.0] * len(g) if late is None else late)


@dataclass(frozen=True, slots=True)
class AdamW(Value):
    """Adam with decoupled weight decay, as `torch.optim.AdamW`.

        M' = b1 M + (1 - b1) g,   V' = b2 V + (1 - b2) g^2,   t' = t + 1
        u' = n / (sqrt(V' / (1 - b2^t')) + eps) + wd w,   n = (b1^D M' + (1 - b1^D) g) / (1 - b1^(t' + D))
        u  = (M / (1 - b1^t)) / (sqrt(V / (1 - b2^t)) + eps) + wd w,   0 at t = 0

    D is that of Spike Compensation (ours), 0 without: every gradient's part in the sum of numerators is then right from
    its arrival on, as SGD's; D = 1 is NAdam with a constant momentum.

    Attributes:
        betas: b1 and b2, from 0 to below 1.
        eps: above 0 or 0.
        weight_decay: wd.

    Raises:
        RecoupError: a field outside its range.

    Source: Loshchilov & Hutter, ICLR 2019.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    slots: ClassVar[tuple[str, ...]] = ("mean", "square")

    def __post_init__(self) -> None:
        betas = self.betas
        if not isinstance(betas, tuple | list) or len(betas) != 2 or not all(map(_below_one, betas)):
            raise RecoupError(f"{type(self).__name__}(betas={betas!r}): betas must be two numbers from 0 to below 1")
        object.__setattr__(self, "betas", tuple(map(float, betas)))
        _numbers(self, eps=inf, weight_decay=inf)

    @property
    def memory(self) -> float:
        """b1."""
        return self.betas[0]

    @torch.no_grad()
    def change(self, t: int, g: Parts, w: Parts, old: Slots, new: Slots, late: Sequence[float] | None, /) -> Parts:
        """See `Rule`."""
        (b1, b2), n = self.betas, len(g)
        mean, square = (_moved(old[name], new[name]) for name in self.slots)
        each._foreach_lerp_(mean, g, 1 - b1)
        each._foreach_mul_(square, b2)
        each._foreach_addcmul_(square, g, g, 1 - b2)
        scales = self._numerators(t, [None] * n if late is None else late)
        change = each._foreach_mul(mean, [m for m, _ in scales])
        if any(part for _, part in scales):
            each._foreach_mul_(g, [part for _, part in scales])
            each._foreach_add_(change, g)
        return self._scaled(t + 1, list(change), square, w)

    def _numerators(self, t: int, late: Sequence[float | None]) -> list[tuple[float, float]]:
        """What M' and g are multiplied by, for every stage."""
        b1, found = self.betas[0], []
        for D in (D or 0.0 for D in late):
            whole = 1 - b1 ** (t + 1 + D)
            found.append((b1**D / whole, (1 - b1**D) / whole))
        return found

    def _scaled(self, t: int, numerator: Parts, square: Parts, w: Parts) -> Parts:
        """A numerator, overwritten, over the root of the second moment; and the decay."""
        root = each._foreach_div(square, 1 - self.betas[1] ** t)
        each._foreach_sqrt_(root)
        each._foreach_add_(root, self.eps)
        each._foreach_div_(numerator, root)
        if self.weight_decay:
            each._foreach_add_(numerator, w, alpha=self.weight_decay)
        return numerator

    @torch.no_grad()
    def direction(self, t: int, w: Parts, slots: Slots, /) -> Parts:
        """See `Rule`."""
        if t == 0:
            return [torch.zeros_like(part) for part in w]
        numerator = list(each._foreach_div(slots["mean"], 1 - self.betas[0] ** t))
        return self._scaled(t, numerator, slots["square"], w)


@dataclass(frozen=True, slots=True)
class NAdamW(AdamW):
    """Adam with Nesterov's momentum and decoupled weight decay, as `torch.optim.NAdam`.

    With ``momentum_decay`` None the momentum is constant, and the numerator is AdamW's with D + 1 for D:
    (b1 M' + (1 - b1) g) / (1 - b1^(t' + 1)). Else it is torch's,

        mu_(t+1) M' / (1 - mu_1 ... mu_(t+1)) + (1 - mu_t) g / (1 - mu_1 ... mu_t),   mu_t = b1 (1 - 0.96^(t psi) / 2)

    and there is no Spike Compensation.

    Attributes:
        betas, eps, weight_decay: as of `AdamW`.
        momentum_decay: psi, or None.

    Source: Dozat, 2016.
    """

    momentum_decay: float | None = None

    def __post_init__(self) -> None:
        AdamW.__post_init__(self)
        if self.momentum_decay is not None:
            _numbers(self, momentum_decay=inf)

    def _numerators(self, t: int, late: Sequence[float | None]) -> list[tuple[float, float]]:
        psi, b1 = self.momentum_decay, self.betas[0]
        if psi is None:
            return AdamW._numerators(self, t, [1.0 + (D or 0.0) for D in late])
        if any(D is not None for D in late):
            raise RecoupError("NAdamW: Spike Compensation needs a constant momentum: use momentum_decay=None")
        now, following = _momenta(b1, psi, t + 1), _momenta(b1, psi, t + 2)
        return [(following[0] / (1 - following[1]), (1 - now[0]) / (1 - now[1]))] * len(late)


def _momenta(b1: float, psi: float, t: int) -> tuple[float, float]:
    """mu_t, and the product of mu_1 to mu_t."""
    products = _products(b1, psi)
    while len(products) <= t:
        products.append(products[-1] * _momentum(b1, psi, len(products)))
    return _momentum(b1, psi, t), products[t]


def _momentum(b1: float, psi: float, t: int) -> float:
    return b1 * (1 - 0.5 * 0.96 ** (t * psi))


@cache
def _products(b1: float, psi: float) -> list[float]:  # noqa: ARG001 -- a list for every pair
    """Products of the momenta so far; `_momenta` makes them longer."""
    return [1.0]


def _moved(old: Parts, new: Parts) -> Parts:
    """A state in its new place."""
    each._foreach_copy_(new, old)
    return new


def _below_one(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1


def _numbers(rule: Value, **limits: float) -> None:
    """Make fields floats, or say which is none from 0 to its limit."""
    for name, limit in limits.items():
        value = getattr(rule, name)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= limit or value == inf:
            above = "from 0" if limit == inf else f"from 0 to {limit:g}"
            raise RecoupError(f"{type(rule).__name__}({name}={value!r}): {name} must be a number {above}")
        object.__setattr__(rule, name, float(value))
