"""The states of a network in which accuracy is measured: what was done to it after the hardware was switched on.

A state is named by a repair of the wings present (`recoup.wings.Card.repairs`), or it is `NONE`: the bare hardware.
"""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

from recoup.errors import RecoupError
from recoup.network.wing import BARE, Card, Repair
from recoup.network.wing import FLOAT as FLOAT_BASELINE
from recoup.wings import cards, wing_of

NONE = BARE
MEANING = "The checkpoint's own BatchNorm statistics; nothing repaired."
MEANING_WITHOUT_NORMS = "The hardware alone; nothing repaired. The network has no BatchNorm statistics."
FLOAT = FLOAT_BASELINE.name  # the row of the float network; those of other baselines are called as their card says


class State(str):
    """The name of a state of some registered wing.

    >>> State("paired").needs_norms
    True
    >>> State(State.NONE).needs_norms
    False

    Raises:
        RecoupError: a name that no wing's card has.
    """

    __slots__ = ()
    NONE = NONE

    def __new__(cls, name: str) -> "State":
        if name not in states(cards().values()):
            legal = ", ".join(repr(state) for state in states(cards().values()))
            raise RecoupError(f"state {name!r}: must be one of {legal}")
        return super().__new__(cls, name)

    @property
    def needs_norms(self) -> bool:
        """Whether the state is about BatchNorm statistics, so that a network without them has no such state."""
        return any(repair.needs_norms for repair in self._repairs(cards().values()))

    def applies(self, config: Any) -> bool:
        """Whether the state exists for a config's hardware."""
        return self == NONE or wing_of(config, "state").repair(self) is not None

    def _repairs(self, present: Iterable[Card]) -> list[Repair]:
        return [repair for card in present if (repair := card.repair(self)) is not None]


def states(present: Iterable[Card]) -> list[str]:
    """`NONE` and every repair of some wings, each name once."""
    return list(dict.fromkeys([NONE, *(repair.name for card in present for repair in card.repairs)]))


def default(present: Iterable[Card], *, baselines: bool = True) -> list[str]:
    """What a study measures unless its recipe says otherwise.

    ``baselines``: whether there are baselines to measure repairs on; without, as for policies, such repairs are left
    out.
    """
    pairs = ((name, card.repair(name)) for card in present for name in card.default)
    names = (name for name, repair in pairs if baselines or repair is None or not repair.on_baseline)
    return list(dict.fromkeys([NONE, *names]))


def meaning(state: str, configs: Sequence[Any], norms: bool = True) -> str:
    """What a state means under some hardware: each wing's sentences, once where wings say the same, after
    their names where they begin otherwise.

    ``norms``: whether the network has batch norm statistics.
    """
    if state == NONE:
        return MEANING if norms else MEANING_WITHOUT_NORMS
    wings = dict.fromkeys(wing_of(config, "state").config for config in configs)
    found = {wing: one for wing in wings if (one := cards()[wing].repair(state)) is not None}
    firsts = sorted((repair.meaning.partition(". ")[0].removesuffix(".") for repair in found.values()), key=len)
    if not all(longer.startswith(shorter) for shorter, longer in pairwise(firsts)):
        return " ".join(f"{wing.__name__}: {repair.meaning}" for wing, repair in found.items())
    said: list[str] = []
    for repair in found.values():
        for text in repair.meaning.removesuffix(".").split(". "):
            if not any(other.startswith(text) for other in said):
                said.append(text)
    return ". ".join(said) + "."
