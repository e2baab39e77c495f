"""NB-SMT as ordinary matrix products: which activation operand meets which weight operand.

What a thread contributes depends on its own pair (x, w) and on n, the number of its partners that are active:

    g_0 = x w            alone on the multiplier
    g_1                  one partner: the policy decides which operand is reduced
    g_2 = g_3 = r(x) q(w)

A partner is active when its activation *and* its weight are non-zero. Sort every weight by the exact set B of its
partners whose weights are non-zero; then n counts the non-zero *activations* among B alone, and the contribution splits
into (a function of activations) x (a function of weights). Each such product is a `Group`; the emulated layer is one
convolution over the concatenated groups, with 8-bit activations, unsigned or signed as the codes are, and signed 8-bit
weights throughout.

Two threads need 2 groups, four threads 12 (16 for S+Aw). A group that meets no weight of a layer is dropped, so a
layer without zero weights costs 1 or 2.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from typing import Literal

from recoup.nbsmt.config import NBSMT

ActivationValue = Literal["0", "x", "r", "narrow", "wide"]
"""What a group takes of an activation: nothing, the code, the reduced code, or the code where it is narrow or wide."""

WeightValue = Literal["w", "q", "q-w"]
"""What a group takes of a weight: the code, the reduced code, or their difference."""

Partners = tuple[int, ...]
"""Partners of thread t, as offsets: offset u is thread (t + u) modulo the number of threads."""


@dataclass(frozen=True, slots=True)
class Activation:
    """An activation operand: ``values[n]`` where n (at most 2) of ``partners`` have a non-zero activation."""

    partners: Partners = ()
    values: tuple[ActivationValue, ActivationValue, ActivationValue] = ("x", "x", "x")


@dataclass(frozen=True, slots=True)
class Weight:
    """Part of a weight operand: ``value`` where exactly ``partners`` have non-zero weights (None: whatever they are).

    ``width`` keeps only the weights that fit 4 bits (``narrow``) or that do not (``wide``).
    """

    partners: Partners | None
    value: WeightValue = "w"
    width: Literal["any", "narrow", "wide"] = "any"


@dataclass(frozen=True, slots=True)
class Group:
    """One matrix product: an activation operand times the sum of disjoint parts of the weights."""

    activation: Activation
    weights: tuple[Weight, ...]


@lru_cache
def groups(config: NBSMT) -> tuple[Group, ...]:
    """The matrix products whose sum is NB-SMT's result, for one configuration.

    Args:
        config: threads and policy decide the groups; rounding and pairing only what r, q and a partner are.

    Returns:
        The groups. Every activation operand lies in the range of the codes, every weight operand in -128..127.
    """
    if config.threads == 1:
        return (Group(Activation(), (Weight(None),)),)
    if not config.zero_test:
        return _without_zero_test(config)
    return _two_threads(config) if config.threads == 2 else _four_threads(config)


def _without_zero_test(config: NBSMT) -> tuple[Group, ...]:
    """Every thread counts as active, so each operand is reduced by itself: one or two plain products."""

    def plain(value: ActivationValue, *weights: Weight) -> Group:
        return Group(Activation((), (value, value, value)), weights)

    if config.threads == 4:
        return (plain("r", Weight(None, "q")),)
    return {
        "A": (plain("r", Weight(None)),),
        "W": (plain("x", Weight(None, "q")),),
        "Aw": (plain("r", Weight(None, "w", "wide")), plain("x", Weight(None, "w", "narrow"))),
        "aW": (plain("narrow", Weight(None)), plain("wide", Weight(None, "q"))),
    }[config.policy]


def _two_threads(config: NBSMT) -> tuple[Group, ...]:
    alone, partner = (), (1,)
    whole = Activation()
    reduced = Activation(partner, ("x", "r", "r"))
    match config.policy:
        case "S" | "S+A":
            return (Group(whole, (Weight(alone),)), Group(reduced, (Weight(partner),)))
        case "S+Aw":
            exact = (Weight(alone), Weight(partner, "w", "narrow"))
            return (Group(whole, exact), Group(reduced, (Weight(partner, "w", "wide"),)))
    kept: ActivationValue = "narrow" if config.policy == "S+aW" else "0"
    moved: ActivationValue = "wide" if config.policy == "S+aW" else "x"
    return (
        Group(Activation(partner, ("x", kept, kept)), (Weight(None),)),
        Group(Activation(partner, ("0", moved, moved)), (Weight(alone), Weight(partner, "q"))),
    )


def _four_threads(config: NBSMT) -> tuple[Group, ...]:
    single = [(1,), (2,), (3,)]
    several = [*combinations((1, 2, 3), 2), (1, 2, 3)]
    if config.policy in ("S", "S+A"):
        out = [Group(Activation(), (Weight(()),))]
        out += [Group(Activation(b, ("x", "r", "r")), (Weight(b),)) for b in single]
        for b in several:
            out.append(Group(Activation(b, ("x", "r", "0")), (Weight(b),)))
            out.append(Group(Activation(b, ("0", "0", "r")), (Weight(b, "q"),)))
        return tuple(out)
    if config.policy == "S+Aw":
        out = [Group(Activation(), (Weight(()), *(Weight(b, "w", "narrow") for b in single)))]
        out += [Group(Activation(b, ("x", "r", "r")), (Weight(b, "w", "wide"),)) for b in single]
        for b in several:
            out.append(Group(Activation(b, ("x", "r", "0")), (Weight(b, "w", "wide"),)))
            out.append(Group(Activation(b, ("x", "x", "0")), (Weight(b, "w", "narrow"),)))
            out.append(Group(Activation(b, ("0", "0", "r")), (Weight(b, "q"),)))
        return tuple(out)
    kept: ActivationValue = "narrow" if config.policy == "S+aW" else "0"
    moved: ActivationValue = "wide" if config.policy == "S+aW" else "x"
    # With one possible partner x w is corrected by q - w, which fits 5 bits: one group fewer per partner.
    out = [Group(Activation(), (Weight(()), *(Weight(b) for b in single)))]
    out += [Group(Activation(b, ("0", moved, moved)), (Weight(b, "q-w"),)) for b in single]
    for b in several:
        out.append(Group(Activation(b, ("x", kept, "0")), (Weight(b),)))
        out.append(Group(Activation(b, ("0", moved, "r")), (Weight(b, "q"),)))
    return tuple(out)
