"""What a network costs on hardware, layer by layer: one vector over all wings, from sizes and configs alone."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from recoup.errors import RecoupError
from recoup.network.checks import is_module
from recoup.network.emulated import Emulated
from recoup.network.reached import say_missed
from recoup.network.selection import UNMATCHED, Selection
from recoup.network.sites import Map, Site, Spent, float_class, in_float, is_site, survey
from recoup.network.systolic import Array
from recoup.network.uncounted import Uncounted
from recoup.policy import Policy
from recoup.wings import cards, wing_of

NO_TABLES = (
    "energy and area of a network are not counted; recoup.silicon measures those of one unit (build(config).area(), "
    ".energy(operands))"
)
COUNTED: tuple[str, ...] = ("cycles", "traffic", "bits")
"""Costs that are counted from shapes, always there."""
PRICED: tuple[str, ...] = ("energy", "area")
"""Costs that would need the area and energy of every unit."""


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
    """

    name: str
    kind: str
    hardware: str
    macs: int
    cycles: int
    traffic: float
    accumulator: int
    known: bool = True

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
        absent: cost -> why it is not known.
    """

    array: Array
    layers: tuple[LayerCost, ...]
    uncounted: tuple[Uncounted, ...] = ()
    units: tuple[str, ...] = ()
    absent: Mapping[str, str] = field(default_factory=dict)

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
    def energy(self) -> None:
        """Not counted; see ``absent``."""
        return

    @property
    def area(self) -> None:
        """Not counted; see ``absent``."""
        return

    def to_dict(self) -> dict[str, Any]:
        """Array, layers and totals as plain values."""
        totals = {name: getattr(self, name) for name in (*COUNTED, *PRICED, "macs")}
        lists = {name: [part.to_dict() for part in getattr(self, name)] for name in ("layers", "uncounted")}
        array = dataclasses.asdict(self.array)
        return {"array": array, **totals, **lists, "units": list(self.units), "absent": dict(self.absent)}

    def __str__(self) -> str:
        lines = [f"{self.cycles:,} cycles, {self.traffic:,.0f} bytes, {self.bits:.2f} bits an accumulator"]
        if self.uncounted:
            lines.append("not counted: " + ", ".join(f"{part.name} ({part.kind})" for part in self.uncounted))
        lines += [f"{name}: {why}" for name, why in self.absent.items()]
        return "\n".join(lines)


def cost(
    model: nn.Module,
    policy: Policy | Mapping[str, Any] | None,
    shape: Any,
    array: Array | None = None,
    *,
    liberty: Any = None,
) -> Cost:
    """The cost of a network on some hardware, whether or not that hardware is under its layers now.

        cycles   of an output-stationary array: `recoup.network.systolic.layer_cycles`, threads and chunks included
        traffic  bytes in and out: inputs, weights and outputs once a call, in the hardware's width; of a norm, its
                 feature map read and written
        bits     sum over layers of multiply-accumulates x accumulator bits, over all multiply-accumulates

    A layer that the policy leaves in float runs on the same array: one multiply-accumulate a cycle and element, 32 bits
    a number and an accumulator. All of this is our model [our definition], a function of shapes and configs alone.

    Args:
        model: any module; it runs once, in eval mode, to learn the sizes.
        policy: which layer runs on what; None: as the model is.
        shape: of one image, such as (3, 32, 32), or a batch as in `recoup.network.batches`. Costs are of the batch.
        array: of processing elements, 16 x 16 by default.
        liberty: the cell library of energies and areas.

    Raises:
        RecoupError: a key of the policy that names no layer, or a layer that its config cannot take; a bad shape;
            ``liberty`` where there are no tables.

    >>> from recoup import NBSMT
    >>> model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.Conv2d(64, 64, 3))
    >>> cost(model, Policy({"1": NBSMT(threads=4)}), (3, 12, 12)).cycles
    3152
    """
    if liberty is not None:
        raise RecoupError(f"cost(liberty={liberty!r}): {NO_TABLES}")
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
    return of_map(sizes, chosen, array)


def of_map(sizes: Map, chosen: Mapping[str, Any], array: Array) -> Cost:
    """The cost of surveyed layers under ``chosen``: layer -> config, others in float."""
    layers = tuple(_layer(site, chosen.get(site.name), array) for site in sizes.sites)
    units = tuple(smallest_units({config for config in chosen.values() if config is not None}))
    absent = dict.fromkeys(PRICED, NO_TABLES)
    return Cost(array, layers, sizes.uncounted, units, absent)


def _layer(site: Site, config: Any, array: Array) -> LayerCost:
    spent = spent_on(site, config, array)
    hardware = "float" if config is None else repr(config)
    found = spent or in_float(site, array)
    counted = {part: getattr(found, part) for part in ("cycles", "traffic", "accumulator")}
    return LayerCost(site.name, site.kind, hardware, site.macs, **counted, known=spent is not None)


def spent_on(site: Site, config: Any, array: Array) -> Spent | None:
    """What a layer costs on a config's hardware, None being float; None where the wing does not say."""
    if config is None:
        return in_float(site, array)
    count = wing_of(config, "cost").cost
    return None if count is None else count(site, config, array)


def smallest_units(configs: set[Any]) -> list[str]:
    """The hardware that some configs need: of those that run each other, the ones that none of the others runs."""
    ordered = sorted(configs, key=repr)
    left = [config for config in ordered if not any(_runs(other, config) for other in ordered if other != config)]
    return [repr(config) for config in left]


def _runs(unit: Any, config: Any) -> bool:
    """Whether a unit runs a config that it was not built for, and is not run by it in turn."""
    card = wing_of(unit, "cost")
    return type(unit) is type(config) and card.runs(unit, config) and not card.runs(config, unit)


def able(unit: Any, config: Any) -> bool:
    """Whether hardware that was built for one config runs another."""
    return type(unit) is type(config) and (unit == config or wing_of(unit, "cost").runs(unit, config))


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
                f"{purpose}: {config!r} cannot take layer {name!r}, a {float_class(modules[name]).__name__}"
            )
    return found


def takes(kind: type, module: nn.Module) -> bool:
    """Whether the hardware of a config class stands in for a module, as it is in float."""
    card, float_kind = cards().get(kind), float_class(module)
    return card is not None and (float_kind in card.layers or card.adapt(float_kind) is not None)


def beside(model: nn.Module, sizes: Map) -> tuple[Uncounted, ...]:
    """Layers that hardware for products takes and whose sizes `survey` cannot know: attention of transformers."""
    known = {part.name for part in (*sizes.sites, *sizes.uncounted)}
    kinds = [card.config for card in cards().values() if card.multiplies]
    return tuple(
        Uncounted(name, f"{float_class(module).__module__}.{float_class(module).__qualname__}", 0, None)
        for name, module in model.named_modules()
        if name not in known and not is_site(module) and any(takes(kind, module) for kind in kinds)
    )
