"""What must be on a die for a network's layers: which units, each once, how many of each, and their area."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from recoup.knapsack import Quantity, choose
from recoup.network.systolic import Array
from recoup.silicon.tables import Figure, Tables
from recoup.wings import wing_of


def able(unit: Any, config: Any) -> bool:
    """Whether hardware that was built for one config runs another."""
    return type(unit) is type(config) and (unit == config or wing_of(unit, "cost").runs(unit, config))


def smallest_units(configs: Collection[Any]) -> list[str]:
    """The hardware that some configs need: of those that run each other, the ones that none of the others runs; of
    those that run one another both ways, the first by name."""
    ordered = sorted(configs, key=repr)
    left: list[Any] = []
    for place, config in enumerate(ordered):
        above = any(able(other, config) and not able(config, other) for other in ordered)
        same = any(able(other, config) and able(config, other) for other in ordered[:place])
        if not above and not same:
            left.append(config)
    return [repr(config) for config in left]


def area_on(config: Any, array: Array, tables: Tables) -> Figure:
    """The area of all units of a config on the die of an array."""
    one = tables.area(config)
    return one if one.value is None else Figure(one.value * wing_of(config, "cost").units_on(config, array))


def least_units(needed: Sequence[Collection[str]], areas: Mapping[str, float]) -> tuple[tuple[str, ...], float]:
    """The units of least area together of which each need is met by one, and that area.

    Args:
        needed: for each need the units any one of which meets it, one at least.
        areas: of units.
    """
    wanted = [sorted(units) for units in dict.fromkeys(map(frozenset, needed)) if units]
    if not wanted:
        return (), 0.0
    found = choose(Quantity([[0.0]] * len(wanted), areas), runs_on=[[units] for units in wanted])
    assert found is not None
    return found.units, found.value


@dataclass(frozen=True)
class Die:
    """The hardware of a policy on an array, measured when it is asked for: the first time takes a synthesis a unit.

    Attributes:
        configs: what layers run on, each once.
        unbuilt: further reasons why a part of the network has no area: reason -> the layers that it holds for.
        array: the array.
        tables: the areas of units.
    """

    configs: tuple[Any, ...]
    unbuilt: Mapping[str, tuple[str, ...]]
    array: Array
    tables: Tables

    @cached_property
    def _areas(self) -> dict[Any, Figure]:
        return {config: area_on(config, self.array, self.tables) for config in self.configs}

    @cached_property
    def _least(self) -> tuple[tuple[str, ...], float]:
        areas = {repr(config): one.value for config, one in self._areas.items() if one.value is not None}
        needed = [[repr(u) for u in self.configs if able(u, c) and repr(u) in areas] for c in self.configs]
        return least_units(needed, areas)

    @property
    def area(self) -> float | None:
        """Of the units of least area that run every config that can be built; None where none can be."""
        units, area = self._least
        return area if units else None

    @property
    def absent(self) -> str:
        """What has no area, and why; "" where everything has."""
        built = {repr(config): one.value is not None for config, one in self._areas.items()}
        reasons: dict[str, list[str]] = {}
        for config, one in self._areas.items():
            if one.why and not any(built[repr(unit)] for unit in self.configs if able(unit, config)):
                reasons.setdefault(one.why, []).append(repr(config))
        for why, names in self.unbuilt.items():
            reasons.setdefault(why, []).extend(names)
        return told(reasons)


def told(reasons: Mapping[str, Iterable[str]]) -> str:
    """Reasons and what each is about, in a line."""
    return "; ".join(f"{', '.join(names)}: {why}" for why, names in reasons.items())
