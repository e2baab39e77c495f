"""Costs of a study's chips as rows, and what is not in them as sentences."""

from collections.abc import Mapping

from recoup.costs import Cost, told_in_float
from recoup.study.repairs import FLOAT
from recoup.study.rows import CostRow, PricedRow

Costs = Mapping[str, Cost]
"""By name, the float network's first."""


def rows_of(found: Costs, *, priced: bool) -> list[CostRow]:
    """The totals of each; energy and area where there is a cell library."""
    return [_row(name, one, priced=priced) for name, one in found.items()]


def _row(name: str, one: Cost, *, priced: bool) -> CostRow:
    totals = {total: getattr(one, total) for total in ("cycles", "traffic", "bits", "macs")}
    if not priced:
        return CostRow(config=name, **totals)
    return PricedRow(config=name, **totals, energy=one.energy, area=one.area)


def notes_of(found: Costs, *, priced: bool) -> list[str]:
    """What costs do not know or do not count, and what of every chip is in float."""
    unknown = dict.fromkeys(layer.hardware for one in found.values() for layer in one.layers if not layer.known)
    notes = [f"Costs: {name} does not say what it costs; its layers count as in float." for name in unknown]
    chips = {name: one for name, one in found.items() if name != FLOAT}
    if priced:
        notes += [
            f"Costs of {n}: not in {what}: {why}." for n, one in chips.items() for what, why in one.absent.items()
        ]
    notes += [f"Costs of {name}: {told_in_float(one)}." for name, one in chips.items() if one.in_float]
    parts = ", ".join(f"{part.name} ({part.kind})" for part in found[FLOAT].uncounted)
    return notes + ([f"Costs: not counted are {parts}."] if parts else [])
