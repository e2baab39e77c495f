"""What a network costs on hardware, layer by layer: one vector over all wings, from sizes and configs alone.

Energy and area come from the units that recoup.silicon generates, each measured once on a stated draw of operands; see
`recoup.silicon.tables` and `recoup.dies`.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from recoup.dies import Die, able, smallest_units, told  # noqa: F401 -- able is one of this module's names
from recoup.errors import RecoupError
from recoup.network.checks import is_module
from recoup.network.derived import replaced
from recoup.network.emulated import Emulated
from recoup.network.reached import say_missed
from recoup.network.selection import UNMATCHED, Selection
from recoup.network.sites import Map, Site, Spent, float_class, in_float, is_site, survey
from recoup.network.systolic import Array
from recoup.network.uncounted import Uncounted
from recoup.policy import Policy
from recoup.silicon.tables import Tables
from recoup.wings import cards, told_takers, wing_of

FLOAT = "float"
NO_HARDWARE = "in float, for which no hardware is generated"
NOT_RUN = "its wing does not say in how many steps the hardware that it generates runs it"
COUNTED: tuple[str, ...] = ("cycles", "traffic", "bits")
"""Costs that are counted from shapes, always there."""
PRICED: tuple[str, ...] = ("energy", "area")
"""Costs that are made of the area and the energy of every unit, which take a synthesis the first time."""


@dataclass(frozen=True, slots=True)
class LayerCost:
    """One layer for one batch.

    Attributes:
        name, kind: within the model, and its float class.
        hardware: the config's repr, or "float".
        macs: multiply-accumulates, zero padding included; 0 of a norm.
        cycles: on the array; a norm runs beside it and has none.
        traffic: bytes between memory and the hardware, each number once; of a norm, its feature map in and out.
        accumulator: bits; 0 of a norm.
        known: whether the hardware's wing says what it costs; what it does not say is counted as in float.
        steps: cycles of a generated unit, of all units together; None where no generated unit runs the layer.
        energy: picojoules; None where it is not known.
    """

    name: str
    kind: str
    hardware: str
    macs: int
    cycles: int
    traffic: float
    accumulator: int
    known: bool = True
    steps: int | None = None
    energy: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, slots=True)
class Cost:
    """A network for one batch: its layers in order of execution, and totals.

    Attributes:
        array: the array.
        layers: what is counted.
        uncounted: what else multiplies, in no number here.
        units: the hardware that must be on the die, each once: a unit that runs other configs too stands for them.
        die: what measures the area when it is asked for.
        unmeasured: why layers have no energy: reason -> their names.
    """

    array: Array
    layers: tuple[LayerCost, ...]
    uncounted: tuple[Uncounted, ...] = ()
    units: tuple[str, ...] = ()
    die: Die | None = field(default=None, repr=False, compare=False)
    unmeasured: Mapping[str, tuple[str, ...]] = field(default_factory=dict, compare=False)

    @property
    def cycles(self) -> int:
        """Of all layers, one after the other."""
        return sum(layer.cycles for layer in self.layers)

    @property
    def macs(self) -> int:
        """Multiply-accumulates."""
        return sum(layer.macs for layer in self.layers)

    @property
    def traffic(self) -> float:
        """Bytes."""
        return sum(layer.traffic for layer in self.layers)

    @property
    def bits(self) -> float:
        """The mean width of the accumulators, weighted by multiply-accumulates."""
        return sum(layer.macs * layer.accumulator for layer in self.layers) / max(self.macs, 1)

    @property
    def in_float(self) -> tuple[str, ...]:
        """Layers that no hardware runs: cycles, traffic and bits are counted as in float, one multiply-accumulate a
        cycle and 32 bits a number; they are in no energy and no area."""
        return tuple(layer.name for layer in self.layers if layer.hardware == FLOAT)

    @property
    def energy(self) -> float | None:
        """Picojoules of the layers whose units have an energy; ``absent`` names the others. None where none has."""
        found = [layer.energy for layer in self.layers if layer.energy is not None]
        return math.fsum(found) if found else None

    @property
    def area(self) -> float | None:
        """Of all units that must be on the die, each kind once and as many of it as the array has: um2 with a Liberty
        file, else NAND2-equivalents. ``absent`` names what is not in it. None where nothing is.

        Measured when it is asked for; the first time takes a synthesis a unit, seconds to a minute.
        """
        return None if self.die is None else self.die.area

    @property
    def absent(self) -> dict[str, str]:
        """Of energy and area, what is not in them and why; a cost that has everything is not there."""
        why = {"energy": told(self.unmeasured), "area": "" if self.die is None else self.die.absent}
        return {name: text for name, text in why.items() if text}

    def to_dict(self) -> dict[str, Any]:
        """Array, layers and totals as plain values."""
        totals = {name: getattr(self, name) for name in (*COUNTED, *PRICED, "macs")}
        lists = {name: [part.to_dict() for part in getattr(self, name)] for name in ("layers", "uncounted")}
        array = dataclasses.asdict(self.array)
        told = {"in_float": list(self.in_float), "units": list(self.units), "absent": self.absent}
        return {"array": array, **totals, **lists, **told}

    def __str__(self) -> str:
        lines = [f"{self.cycles:,} cycles, {self.traffic:,.0f} bytes, {self.bits:.2f} bits an accumulator"]
        if self.uncounted:
            lines.append("not counted: " + ", ".join(f"{part.name} ({part.kind})" for part in self.uncounted))
        if self.in_float:
            lines.append(told_in_float(self))
        if self.die is None or not self.die.tables.liberty:  # an area would take a synthesis
            return "\n".join([*lines, *([f"energy: {told(self.unmeasured)}"] if self.unmeasured else [])])
        found = {"pJ": self.energy, "um2": self.area}
        lines += [", ".join(f"{value:,.0f} {unit}" for unit, value in found.items() if value is not None)]
        return "\n".join(filter(None, [*lines, *(f"not in {name}: {why}" for name, why in self.absent.items())]))


def cost(
    model: nn.Module,
    policy: Policy | Mapping[str, Any] | None,
    shape: Any,
    array: Array | None = None,
    *,
    liberty: str | Path | Sequence[str | Path] | None = None,
) -> Cost:
    """The cost of a network on some hardware, whether or not that hardware is under its layers now.

        cycles   of an output-stationary array: `recoup.network.systolic.layer_cycles`, threads and chunks included
        traffic  bytes in and out: inputs, weights and outputs once a call, in the hardware's width; of a norm, its
                 feature map read and written
        bits     sum over layers of multiply-accumulates x accumulator bits, over all multiply-accumulates

        energy   sum over layers of a unit's picojoules a step x the layer's steps: cycles in which units work for it
        area     sum over the distinct units on the die, a unit that runs other configs too once, of its area x how many
                 of it the array has: rows x cols of what multiplies, one of a norm

    A layer that the policy leaves in float runs on the same array: one multiply-accumulate a cycle and element, 32 bits
    a number and an accumulator. It has no energy and no area, because no hardware is generated for it; neither has what
    a config's generator refuses. ``absent`` names them, and sums are of the rest. All of this is our model [our
    definition], a function of shapes and configs alone: operands are an ordinary layer's
    (`recoup.silicon.tables.ordinary`), elements that idle cost nothing, a layer pays the energy of its own config's
    unit also where a larger one on the die runs it; memories and wires are in neither.

    Args:
        model: any module; it runs once, in eval mode, to learn the sizes.
        policy: which layer runs on what; None: as the model is.
        shape: of one image, such as (3, 32, 32), or a batch as in `recoup.network.batches`. Costs are of the batch.
        array: of processing elements, 16 x 16 by default.
        liberty: the cell library of energies and areas, a path or several. Energies are measured at once, a second to
            a minute a config the first time. None: no energies, and areas in NAND2-equivalents.

    Raises:
        RecoupError: a key of the policy that names no layer, or a layer that its config cannot take; a bad shape;
            a ``liberty`` that cannot be read.

    >>> from recoup import NBSMT
    >>> model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.Conv2d(64, 64, 3))
    >>> cost(model, Policy({"1": NBSMT(threads=4)}), (3, 12, 12)).cycles
    3152
    """
    array = array or Array()
    if not isinstance(array, Array):
        raise RecoupError(
            f"cost(array={array!r}): array must be a recoup.network.systolic.Array, such as Array(16, 16)"
        )
    is_module(model, "cost")
    chosen = assigned(model, policy, "cost")
    sizes = survey(model, shape, "cost")
    sizes = Map(sizes.sites, (*sizes.uncounted, *beside(model, sizes)))
    ran = {site.name for site in sizes.sites}
    idle = {name: module for name, module in model.named_modules() if name in chosen and name not in ran}
    say_missed({n: m for n, m in idle.items() if is_site(m)}, len(chosen), "cost", refuse=False)
    return of_map(sizes, chosen, array, Tables(liberty))


def of_map(sizes: Map, chosen: Mapping[str, Any], array: Array, tables: Tables) -> Cost:
    """The cost of surveyed layers under ``chosen``: layer -> config, others in float."""
    layers, built, unbuilt, unmeasured = [], [], {}, {}
    written = {key: repr(config) for key, config in {id(config): config for config in chosen.values()}.items()}
    for site in sizes.sites:
        config = chosen.get(site.name)
        hardware = FLOAT if config is None else written[id(config)]
        layer, no_steps, no_energy = _layer(site, config, hardware, array, tables)
        layers.append(layer)
        if no_energy:
            unmeasured.setdefault(no_energy, []).append(site.name)
        if no_steps:
            unbuilt.setdefault(no_steps, []).append(site.name)
        else:
            built.append(config)
    reasons = [{why: tuple(names) for why, names in found.items()} for found in (unbuilt, unmeasured)]
    units = tuple(smallest_units({config for config in chosen.values() if config is not None}))
    die = Die(tuple(dict.fromkeys(built)), reasons[0], array, tables)
    return Cost(array, tuple(layers), sizes.uncounted, units, die, reasons[1])


def _layer(site: Site, config: Any, written: str, array: Array, tables: Tables) -> tuple[LayerCost, str, str]:
    """A layer's cost, why no generated unit runs it, and why it has no energy."""
    spent = spent_on(site, config, array)
    found = spent or in_float(site, array)
    counted = {part: getattr(found, part) for part in ("cycles", "traffic", "accumulator")}
    steps, no_steps = _steps(site, config, spent, tables)
    energy, no_energy = _energy(config, steps, no_steps, tables)
    named = {"known": spent is not None, "steps": steps, "energy": energy}
    return LayerCost(site.name, site.kind, written, site.macs, **counted, **named), no_steps, no_energy


def steps_on(site: Site, config: Any, array: Array, tables: Tables) -> tuple[int | None, str]:
    """Cycles of a config's generated unit for a layer: as its wing says, or of one that multiplies and does not say,
    its multiply-accumulates by those of a step; None where no generated unit runs the layer, and why."""
    return _steps(site, config, spent_on(site, config, array), tables)


def _steps(site: Site, config: Any, spent: Spent | None, tables: Tables) -> tuple[int | None, str]:
    if config is None:
        return None, NO_HARDWARE
    card = wing_of(config, "cost")
    if card.rtl is None:
        return None, NOT_RUN
    if spent is not None and (spent.steps is not None or spent.no_steps):
        return spent.steps, spent.no_steps
    work = tables.work(config).value if card.multiplies and site.macs else None
    return (None, NOT_RUN) if work is None else (math.ceil(site.macs / work), "")


def energy_on(site: Site, config: Any, array: Array, tables: Tables) -> tuple[float | None, str]:
    """Picojoules of a layer on a config's hardware, or None and why it has none."""
    return _energy(config, *steps_on(site, config, array, tables), tables)


def _energy(config: Any, steps: int | None, no_steps: str, tables: Tables) -> tuple[float | None, str]:
    if config is None:
        return None, NO_HARDWARE
    one = tables.energy(config)
    if one.value is None:
        return None, one.why
    return (None, no_steps) if steps is None else (one.value * steps, "")


def spent_on(site: Site, config: Any, array: Array) -> Spent | None:
    """What a layer costs on a config's hardware, None being float; None where the wing does not say."""
    if config is None:
        return in_float(site, array)
    count = wing_of(config, "cost").cost
    return None if count is None else count(site, config, array)


def told_in_float(parts: Cost | Sequence[Site]) -> str:
    """The layers that no hardware runs, and how they are counted: those that multiply by name, norms by their number.

    Args:
        parts: a cost; or such layers themselves.
    """
    every = parts.layers if isinstance(parts, Cost) else parts
    found = [part for part in every if not isinstance(part, LayerCost) or part.hardware == FLOAT]
    names, norms = [part.name for part in found if part.macs], sum(not part.macs for part in found)
    what = [", ".join(names)] if names else []
    what += [f"{norms} norm{'s' * (norms > 1)}"] if norms else []
    told = "any layer" if isinstance(parts, Cost) and len(found) == len(every) else " and ".join(what)
    return f"no hardware runs {told}: counted as float, a multiply-accumulate a cycle and 32 bits a number"


def assigned(model: nn.Module, policy: Policy | Mapping[str, Any] | None, purpose: str) -> dict[str, Any]:
    """Layer -> config under a policy, as `recoup.emulate.emulate_` would give it, calibrated or not.

    Raises:
        RecoupError: a key that names no layer, or by name one that its config cannot take.
    """
    modules = dict(model.named_modules())
    if policy is None:
        return {name: module.config for name, module in modules.items() if isinstance(module, Emulated)}
    layers = policy if isinstance(policy, Policy) else Policy(policy)
    named = [name for name, module in modules.items() if any(takes(card.config, module) for card in cards().values())]
    chosen = Selection(layers, named, purpose, modules)
    found = {}
    for name in named:
        config = chosen.of(name)
        if config is UNMATCHED or config is None:
            continue
        if takes(type(config), modules[name]):
            found[name] = config
        elif name in layers:
            raise RecoupError(
                f"{purpose}: {config!r} cannot take layer {name!r}: {told_takers(float_class(modules[name]))}"
            )
    return found


def told_unfit(model: nn.Module, policy: Policy) -> str:
    """What a policy's keys match that its configs cannot take, as the end of a message; "" where there is nothing."""
    modules = dict(model.named_modules())
    named = [name for name, module in modules.items() if any(takes(kind, module) for kind in cards())]
    chosen = Selection(policy, named, "policy", modules)
    found: dict[tuple[str, type[nn.Module]], list[str]] = {}
    for name in named:
        config = chosen.of(name)
        if config is not UNMATCHED and config is not None and not takes(type(config), modules[name]):
            found.setdefault((type(config).__name__, float_class(modules[name])), []).append(name)
    return "".join(f"; {wing} is no hardware for {', '.join(n)}: {told_takers(c)}" for (wing, c), n in found.items())


def takes(kind: type, module: nn.Module) -> bool:
    """Whether the hardware of a config class stands in for a module, as it is in float."""
    card = cards().get(kind)
    if card is None or card.for_class(float_class(module)) is None:
        return False
    return isinstance(module, Emulated) or not replaced(module)


def beside(model: nn.Module, sizes: Map) -> tuple[Uncounted, ...]:
    """Layers that hardware for products takes and whose sizes `survey` cannot know: attention of transformers."""
    known = {part.name for part in (*sizes.sites, *sizes.uncounted)}
    kinds = [card.config for card in cards().values() if card.multiplies]
    return tuple(
        Uncounted(name, f"{float_class(module).__module__}.{float_class(module).__qualname__}", 0, None)
        for name, module in model.named_modules()
        if name not in known and not is_site(module) and any(takes(kind, module) for kind in kinds)
    )
