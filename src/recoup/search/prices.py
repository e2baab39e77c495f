"""What policies cost: each option of each group, the layers outside the space, and limits relative or with a unit."""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from recoup.costs import COUNTED, NO_TABLES, PRICED, able, spent_on
from recoup.errors import RecoupError
from recoup.knapsack import Choice, Quantity, choose
from recoup.network.sites import Map, Site
from recoup.network.systolic import Array
from recoup.search.spaces import Group, title

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


@dataclass(frozen=True)
class Prices:
    """The costs of a space on an array.

    Attributes:
        quantities: cost -> what a knapsack adds up.
        runs_on: for each option of each group, the hardware any of which runs it.
        first: cost of the space's first option everywhere.
    """

    quantities: Mapping[str, Quantity]
    runs_on: tuple[tuple[tuple[str, ...], ...], ...]
    first: Mapping[str, float]

    def of(self, options: Sequence[int]) -> dict[str, float]:
        """Every cost of a policy."""
        return {name: quantity.of(options) for name, quantity in self.quantities.items()}


def prices(groups: Sequence[Group], sizes: Map, costs: Sequence[str | CostFunction], array: Array) -> Prices:
    """Count every option of every group.

    Args:
        groups: with their options.
        sizes: of the network's layers, those outside the groups too.
        costs: names or functions.
        array: that cycles are counted on.

    Raises:
        RecoupError: a cost that is none, or that needs tables that are not there; an option whose hardware does not say
            what it costs, or a layer whose sizes are not known; a cost of one's own that gives no number.
    """
    sites = {site.name: site for site in sizes.sites}
    inside = {layer for group in groups for layer in group.layers}
    lost = [layer for layer in inside if layer not in sites]
    if lost:
        raise RecoupError(f"search: the sizes of layer {lost[0]!r} are not known, so no policy can be priced")
    macs = sum(site.macs for site in sizes.sites)
    quantities = {}
    for asked in costs:
        name, count = _named(asked, array, macs)
        each = [[math.fsum(count(sites[n], o) for n in g.layers) for o in g.options] for g in groups]
        rest = math.fsum(count(site, None) for site in sizes.sites if site.name not in inside)
        quantities[name] = Quantity(each, rest=rest)
    configs = {option for group in groups for option in group.options if option is not None}
    units = sorted(configs, key=repr)
    runs_on = tuple(
        tuple(() if o is None else tuple(repr(u) for u in units if able(u, o)) for o in group.options)
        for group in groups
    )
    zero = (0,) * len(groups)
    return Prices(quantities, runs_on, {name: quantity.of(zero) for name, quantity in quantities.items()})


def _named(asked: str | CostFunction, array: Array, macs: int) -> tuple[str, CostFunction]:
    if callable(asked):
        return getattr(asked, "__name__", type(asked).__name__), _checked(asked)
    if asked in PRICED:
        raise RecoupError(f"search: cost {asked!r}: {NO_TABLES}")
    if asked not in COUNTED:
        raise RecoupError(
            f"search: cost {asked!r}: must be one of {', '.join(COUNTED)}, or a function of site and config"
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
        value = function(site, config)
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
    """

    priced: Prices
    most: Mapping[str, float]
    most_units: int | None

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
        return choose(objective, limits, runs_on=self.priced.runs_on if most is not None else None, most_units=most)

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
) -> Program:
    """Costs and limits of a space, all of which are known before anything is measured.

    Raises:
        RecoupError: a cost or a limit that is none; limits that no policy keeps: the cheapest is named.
    """
    asked = [cost] if isinstance(cost, str) or callable(cost) else list(cost)
    if not asked:
        raise RecoupError("search: name a cost, such as 'cycles'")
    priced = prices(groups, sizes, asked, array or Array())
    program = Program(priced, limits_of(limits or {}, priced.first), most_units)
    if program.choose(next(iter(priced.quantities.values()))) is None:
        raise RecoupError(program.infeasible())
    return program


def limits_of(limits: Mapping[str, Any], first: Mapping[str, float]) -> dict[str, float]:
    """Limits as absolute values.

    Args:
        limits: cost -> a number, relative to the space's first option everywhere, or text with a unit.
        first: what that costs.

    Raises:
        RecoupError: a limit on a cost that is not counted, that is negative or NaN, or has another unit.
    """
    found = {}
    for name, limit in limits.items():
        if name not in first:
            raise RecoupError(f"search: limit on {name!r}: counted are {', '.join(first)}; add it to cost")
        if isinstance(limit, str):
            found[name] = _with_unit(name, limit)
            continue
        if isinstance(limit, bool) or not isinstance(limit, int | float) or not 0 <= limit < math.inf:
            raise RecoupError(
                f"search: limit {name}={limit!r}: must be a number of 0 or more, relative to the first option "
                "everywhere, or a text with a unit"
            )
        found[name] = limit * first[name]
    return found


def _with_unit(name: str, text: str) -> float:
    legal = UNITS.get(name, {name: 1})
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?(?:[eE][+-]?\d+)?)\s*([A-Za-z]\w*)\s*", text)
    if match is None or match[2] not in legal:
        raise RecoupError(f"search: limit {name}={text!r}: must be a number with a unit of {', '.join(legal)}")
    return float(match[1]) * legal[match[2]]
