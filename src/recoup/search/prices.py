"""What policies cost: each option of each group, the layers outside the space, and limits relative or with a unit."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from recoup.costs import COUNTED, NO_TABLES, PRICED, able, spent_on
from recoup.errors import RecoupError
from recoup.knapsack import Quantity
from recoup.network.checks import instance
from recoup.network.sites import Site
from recoup.network.systolic import Array
from recoup.search.scoring import Scores
from recoup.search.spaces import title

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


def prices(scores: Scores, costs: Sequence[str | CostFunction], array: Array) -> Prices:
    """Count every option of every group.

    Raises:
        RecoupError: a cost that is none, or that needs tables that are not there; an option whose hardware does not say
            what it costs, or a layer whose sizes are not known; a cost of one's own that gives no number.
    """
    instance(scores, Scores, "search.front", "scores", "what recoup.search.score returned")
    sites = {site.name: site for site in scores.sizes.sites}
    inside = {layer for group in scores.groups for layer in group.layers}
    lost = [layer for layer in inside if layer not in sites]
    if lost:
        raise RecoupError(f"search: the sizes of layer {lost[0]!r} are not known, so no policy can be priced")
    macs = sum(site.macs for site in scores.sizes.sites)
    quantities = {}
    for asked in costs:
        name, count = _named(asked, array, macs)
        each = [[math.fsum(count(sites[n], o) for n in g.layers) for o in g.options] for g in scores.groups]
        rest = math.fsum(count(site, None) for site in scores.sizes.sites if site.name not in inside)
        quantities[name] = Quantity(each, rest=rest)
    configs = {option for group in scores.groups for option in group.options if option is not None}
    units = sorted(configs, key=repr)
    runs_on = tuple(
        tuple(() if o is None else tuple(repr(u) for u in units if able(u, o)) for o in group.options)
        for group in scores.groups
    )
    zero = (0,) * len(scores.groups)
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
