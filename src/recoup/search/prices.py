"""What policies cost: each option of each group, the layers outside the space, and limits relative or with a unit."""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from recoup.costs import COUNTED, NO_HARDWARE, PRICED, energy_on, spent_on, steps_on, told_in_float
from recoup.dies import able, area_on, least_units, told
from recoup.errors import RecoupError
from recoup.knapsack import Choice, Quantity, choose
from recoup.network.sites import Map, Site
from recoup.network.systolic import Array
from recoup.search.spaces import Group, title
from recoup.silicon.tables import Tables

CostFunction = Callable[[Site, Any], float]
"""A cost of the user's own: ``cost(site, config)`` of one layer, config None being float; additive over layers."""
UNITS: dict[str, Mapping[str, float]] = {
    "cycles": {"cycles": 1, "kcycles": 1e3, "Mcycles": 1e6},
    "traffic": {"B": 1, "kB": 1e3, "MB": 1e6, "bytes": 1},
    "bits": {"bits": 1},
    "energy": {"pJ": 1, "nJ": 1e3, "uJ": 1e6},
    "area": {"um2": 1, "mm2": 1e6},
}
"""Of each cost, the units that a limit may have, in the unit it is counted in."""
GATES = {"NAND2": 1.0, "kNAND2": 1e3}
"""Those of areas without a Liberty file."""


@dataclass(frozen=True)
class Prices:
    """The costs of a space on an array.

    Attributes:
        quantities: cost -> what a knapsack adds up.
        runs_on: for each option of each group, the hardware any of which runs it.
        notes: what no option is for, so that it is counted as float, and what is in no energy and no area.
    """

    quantities: Mapping[str, Quantity]
    runs_on: tuple[tuple[tuple[str, ...], ...], ...]
    notes: tuple[str, ...] = ()

    def of(self, options: Sequence[int]) -> dict[str, float]:
        """Every cost of a policy."""
        return {name: self.one(name, options) for name in self.quantities}

    def one(self, name: str, options: Sequence[int]) -> float:
        """A cost of a policy. An area is that of the cheapest die on which every layer runs, of units of any of the
        space's configs: each once, however many layers run on it."""
        quantity = self.quantities[name]
        if not quantity.units:
            return quantity.of(options)
        runs_on = (row[option] for row, option in zip(self.runs_on, options, strict=True))
        needed = [[unit for unit in units if unit in quantity.units] for units in runs_on]
        return quantity.of(options, least_units(needed, quantity.units)[0])

    @cached_property
    def first(self) -> Mapping[str, float]:
        """Cost of the space's first option everywhere."""
        return self.of((0,) * len(self.runs_on))


def prices(
    groups: Sequence[Group], sizes: Map, costs: Sequence[str | CostFunction], array: Array, tables: Tables | None = None
) -> Prices:
    """Count every option of every group.

    Energy and area are those of `recoup.costs.cost`. A layer outside the groups has neither: it is in float, and the
    same in every policy. An option without one of them, such as float, is refused where it stands beside others: it
    would always be the cheapest.

    Args:
        groups: with their options.
        sizes: of the network's layers, those outside the groups too.
        costs: names or functions.
        array: that cycles are counted on.
        tables: areas and energies of units; None: areas of plain gates, and no energies.

    Raises:
        RecoupError: a cost that is none, or that an option does not have; an option whose hardware does not say what it
            costs, or a layer whose sizes are not known; a cost of one's own that gives no number.
    """
    tables = tables or Tables()
    sites = {site.name: site for site in sizes.sites}
    inside = {layer for group in groups for layer in group.layers}
    lost = [layer for layer in inside if layer not in sites]
    if lost:
        raise RecoupError(f"search: the sizes of layer {lost[0]!r} are not known, so no policy can be priced")
    macs = sum(site.macs for site in sizes.sites)
    quantities, notes = {}, []
    outside = [site.name for site in sizes.sites if site.name not in inside]
    table = _Table(groups, sites, array, tables)
    if outside and any(asked in COUNTED for asked in costs if isinstance(asked, str)):
        notes.append(f"Outside the space {told_in_float([sites[name] for name in outside])}.")
    for asked in costs:
        if isinstance(asked, str) and asked in PRICED:
            quantities[asked], without = table.quantity(asked)
            floating = [*outside, *without.pop(NO_HARDWARE, [])]
            without |= {NO_HARDWARE: floating} if floating else {}
            notes += [f"not in {asked}: {told(without)}"] if without else []
            continue
        name, count = _named(asked, array, macs)
        each = [[math.fsum(count(sites[n], o) for n in g.layers) for o in g.options] for g in groups]
        rest = math.fsum(count(sites[layer], None) for layer in outside)
        quantities[name] = Quantity(each, rest=rest)
    return Prices(quantities, table.runs_on("area" in quantities), tuple(notes))


@dataclass(frozen=True)
class _Table:
    """Energies and areas of a space."""

    groups: Sequence[Group]
    sites: Mapping[str, Site]
    array: Array
    tables: Tables

    @cached_property
    def units(self) -> list[Any]:
        """The configs of all options."""
        return sorted({option for group in self.groups for option in group.options if option is not None}, key=repr)

    @cached_property
    def areas(self) -> dict[str, float]:
        """Of the units that can be built, by their configs' reprs."""
        found = {repr(unit): area_on(unit, self.array, self.tables).value for unit in self.units}
        return {unit: area for unit, area in found.items() if area is not None}

    def runs_on(self, priced: bool) -> tuple[tuple[tuple[str, ...], ...], ...]:
        """For each option of each group the units that run it; with ``priced`` those that have an area, if any has."""
        return tuple(tuple(self._run(option, priced) for option in group.options) for group in self.groups)

    def _run(self, option: Any, priced: bool) -> tuple[str, ...]:
        every = () if option is None else tuple(repr(unit) for unit in self.units if able(unit, option))
        return tuple(unit for unit in every if unit in self.areas) or every if priced else every

    def quantity(self, cost: str) -> tuple[Quantity, dict[str, list[str]]]:
        """Energy or area, and why layers that have but one option are not in it: reason -> layers."""
        each, without = [], {}
        for group in self.groups:
            row = []
            for option in group.options:
                found = [self._energy(n, option) if cost == "energy" else self._built(n, option) for n in group.layers]
                for layer, (value, why) in zip(group.layers, found, strict=True):
                    if value is None and len(group.options) > 1:
                        raise RecoupError(_without(cost, option, layer, why))
                    if value is None:
                        without.setdefault(why, []).append(layer)
                row.append(math.fsum(value or 0.0 for value, _ in found))
            each.append(row)
        return Quantity(each, self.areas if cost == "area" else {}), without

    def _energy(self, layer: str, option: Any) -> tuple[float | None, str]:
        return energy_on(self.sites[layer], option, self.array, self.tables)

    def _built(self, layer: str, option: Any) -> tuple[float | None, str]:
        """0 where some unit with an area runs the layer: that is added once for all of them."""
        if option is None:
            return None, NO_HARDWARE
        if not any(unit in self.areas for unit in self._run(option, priced=True)):
            return None, self.tables.area(option).why
        steps, why = steps_on(self.sites[layer], option, self.array, self.tables)
        return (None, why) if steps is None else (0.0, "")


def _without(cost: str, option: Any, layer: str, why: str) -> str:
    if option is None:
        return (
            f"search: cost {cost!r}: layer {layer!r} has the option float, for which no hardware is generated: it "
            "would always be the cheapest. Take it out of the space, or give a function of site and config as the cost"
        )
    return f"search: cost {cost!r}: layer {layer!r} has none on {title(option)}: {why}"


def _named(asked: str | CostFunction, array: Array, macs: int) -> tuple[str, CostFunction]:
    if callable(asked):
        return getattr(asked, "__name__", type(asked).__name__), _checked(asked)
    if asked not in COUNTED:
        raise RecoupError(
            f"search: cost {asked!r}: must be one of {', '.join((*COUNTED, *PRICED))}, or a function of site and config"
        )

    def count(site: Site, config: Any) -> float:
        spent = spent_on(site, config, array)
        if spent is None:
            raise RecoupError(
                f"search: {title(config)} does not say what it costs, so layer {site.name!r} has no {asked!r}"
            )
        return site.macs * spent.accumulator / max(macs, 1) if asked == "bits" else getattr(spent, asked)

    return asked, count


def _checked(function: CostFunction) -> CostFunction:
    name = getattr(function, "__name__", type(function).__name__)

    def count(site: Site, config: Any) -> float:
        try:
            value = function(site, config)
        except Exception as error:
            raise RecoupError(
                f"search: cost {name} of layer {site.name!r} on {title(config)} failed: {type(error).__name__}: {error}"
            ) from error
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
            raise RecoupError(f"search: cost {name} of layer {site.name!r} on {title(config)} is {value!r}: 0 or more")
        return value

    return count


@dataclass(frozen=True)
class Program:
    """What a knapsack over a space has to keep, before anything is measured.

    Attributes:
        priced: every option's costs.
        most: cost -> the most it may be, absolute.
        most_units: how many kinds of hardware there may be; None: any number.
        count: the same costs of other groups of the network.
    """

    priced: Prices
    most: Mapping[str, float]
    most_units: int | None
    count: Callable[[Sequence[Group]], Prices]

    def choose(self, objective: Quantity, bounds: Iterable[tuple[Quantity, float]] = ()) -> Choice | None:
        """The choice of least ``objective`` that keeps every limit, and ``bounds`` too; None if there is none."""
        limits = [(self.priced.quantities[name], bound) for name, bound in self.most.items()]
        return self._chosen(objective, [*limits, *bounds])

    def allows(self, options: Sequence[int]) -> bool:
        """Whether a choice keeps every limit."""
        limits = [(_only(self.priced.quantities[name], options), bound) for name, bound in self.most.items()]
        nothing = Quantity([[0.0]] * len(options))
        runs_on = [[row[option]] for row, option in zip(self.priced.runs_on, options, strict=True)]
        return choose(nothing, limits, runs_on=runs_on, most_units=self.most_units) is not None

    def _chosen(self, objective: Quantity, limits: Sequence[tuple[Quantity, float]] = ()) -> Choice | None:
        most = self.most_units
        counted = most is not None or any(quantity.units for quantity in self.priced.quantities.values())
        return choose(objective, limits, runs_on=self.priced.runs_on if counted else None, most_units=most)

    def infeasible(self) -> str:
        """Why no choice keeps every limit: what the cheapest has."""
        cheapest = {}
        for name in self.most:
            found = self._chosen(self.priced.quantities[name])
            cheapest[name] = float("nan") if found is None else found.value
        told = "; ".join(f"{name} {cheapest[name]:,.6g} where {self.most[name]:,.6g} is asked" for name in cheapest)
        return f"search: no policy keeps every limit; alone, the cheapest has {told or 'too many units'}"


def _only(quantity: Quantity, options: Sequence[int]) -> Quantity:
    each = [[row[option]] for row, option in zip(quantity.each, options, strict=True)]
    return Quantity(each, quantity.units, quantity.rest)


def affordable(
    groups: Sequence[Group],
    sizes: Map,
    cost: str | CostFunction | Sequence[str | CostFunction],
    limits: Mapping[str, Any] | None,
    array: Array | None,
    most_units: int | None,
    liberty: Any = None,
) -> Program:
    """Costs and limits of a space, all of which are known before any network is measured.

    Raises:
        RecoupError: a cost or a limit that is none; limits that no policy keeps: the cheapest is named.
    """
    asked = [cost] if isinstance(cost, str) or callable(cost) else list(cost)
    if not asked:
        raise RecoupError("search: name a cost, such as 'cycles'")
    tables = Tables(liberty)
    count = partial(prices, sizes=sizes, costs=asked, array=array or Array(), tables=tables)
    priced = count(groups)
    program = Program(priced, limits_of(limits or {}, priced.first, tables.unit), most_units, count)
    if program.choose(next(iter(priced.quantities.values()))) is None:
        raise RecoupError(program.infeasible())
    return program


def limits_of(limits: Mapping[str, Any], first: Mapping[str, float], area: str = "um2") -> dict[str, float]:
    """Limits as absolute values.

    Args:
        limits: cost -> a number, relative to the space's first option everywhere, or text with a unit.
        first: what that costs.
        area: the unit of areas: um2, or NAND2.

    Raises:
        RecoupError: a limit on a cost that is not counted, that is negative or NaN, or has another unit.
    """
    found = {}
    for name, limit in limits.items():
        if name not in first:
            raise RecoupError(f"search: limit on {name!r}: counted are {', '.join(first)}; add it to cost")
        if isinstance(limit, str):
            found[name] = _with_unit(name, limit, area)
            continue
        if isinstance(limit, bool) or not isinstance(limit, int | float) or not 0 <= limit < math.inf:
            raise RecoupError(
                f"search: limit {name}={limit!r}: must be a number of 0 or more, relative to the first option "
                "everywhere, or a text with a unit"
            )
        found[name] = limit * first[name]
    return found


def _with_unit(name: str, text: str, area: str) -> float:
    legal = GATES if name == "area" and area in GATES else UNITS.get(name, {name: 1})
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?(?:[eE][+-]?\d+)?)\s*([A-Za-z]\w*)\s*", text)
    if match is None or match[2] not in legal:
        raise RecoupError(f"search: limit {name}={text!r}: must be a number with a unit of {', '.join(legal)}")
    return float(match[1]) * legal[match[2]]
