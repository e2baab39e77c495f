"""What a config of a study puts under the network: itself, or with the layer map's configs a mix of several wings; and
what a policy puts there."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from recoup.network.wing import FLOAT, STAGES, Baseline, Card, Repair
from recoup.policy import Policy
from recoup.storage.digest import of_text
from recoup.study.configs import Config, title
from recoup.study.repairs import NONE
from recoup.wings import cards, wing_of


def baseline_of(config: Config) -> Config | None:
    """The baseline hardware of a config's wing; None is the float network."""
    of = wing_of(config, "baseline").baseline.of
    return None if of is None else of(config)


def needs_scales(config: Config | None) -> bool:
    """Whether hardware works on activation scales, which calibration images decide."""
    return config is not None and wing_of(config, "calibration").works_on_scales(config)


def scaled_once_emulated(config: Config | None) -> bool:
    """Whether a config works on activation scales, of a wing that is seedless otherwise: all its layers do, the first
    and the last too, so they are calibrated once they are emulated."""
    return needs_scales(config) and wing_of(config, "calibration").seedless


def has_work(config: Config, model: nn.Module) -> bool:
    """Whether a float network has something for a config's hardware; of hardware for products that is not asked."""
    card = wing_of(config, "study")
    return not card.needs_norms or any(card.stand_in(module) is not None for module in model.modules())


def name_of(config: Config | Policy) -> str:
    """Of the rows in results: a config's text, a policy's name."""
    return config.name if isinstance(config, Policy) else repr(config)


@dataclass(frozen=True, slots=True)
class Hardware:
    """What the layers of a network run on, where a study names one of its configs or policies.

    Attributes:
        config: as the study names it: the hardware of all layers that the layer map does not mention, or a policy.
        layers: the configs that layers really run on, each with how many layers it has (0: not counted).
        digest: of which layer runs on what; "" where that was not found out.
        idle: repairs that the network has nothing for, each with its wing's config class, where that was found out.
    """

    config: Config | Policy
    layers: tuple[tuple[Config, int], ...]
    digest: str = ""
    idle: tuple[tuple[type, str], ...] = ()

    @classmethod
    def plain(cls, config: Config | Policy) -> "Hardware":
        """A config alone, or a policy as far as it says."""
        own = dict.fromkeys(filter(None, config.values())) if isinstance(config, Policy) else (config,)
        return cls(config, tuple((one, 0) for one in own))

    @classmethod
    def found(cls, config: Config | Policy, running: Mapping[str, Config]) -> "Hardware":
        """From the configs of all emulated layers by name; the study's own comes first."""
        counts = {} if isinstance(config, Policy) else {repr(config): (config, 0)}
        for one in running.values():
            counts[repr(one)] = (one, counts.get(repr(one), (one, 0))[1] + 1)
        digest = of_text(repr(sorted((layer, repr(one)) for layer, one in running.items())))
        return cls(config, tuple(pair for pair in counts.values() if pair[1]), digest)

    def on(self, model: nn.Module) -> "Hardware":
        """The same, knowing which repairs a network that runs on it has nothing for."""
        own = ((card.config, repair) for card in self.cards for repair in card.repairs)
        return replace(self, idle=tuple((kind, one.name) for kind, one in own if not one.applies(model)))

    @property
    def conditional(self) -> bool:
        """Whether the network decides which repairs there are."""
        return any(repair.conditional for card in self.cards for repair in card.repairs)

    @property
    def name(self) -> str:
        """Of its rows in results."""
        return name_of(self.config)

    @property
    def key(self) -> str:
        """In the store: of a policy what it is, not how it is called, so that nothing is measured twice."""
        return f"policy {self.digest}" if isinstance(self.config, Policy) else self.name

    @property
    def configs(self) -> list[Config]:
        """The configs that layers run on."""
        return [config for config, _ in self.layers]

    def of(self, kind: type) -> list[Config]:
        """Those of one wing, by its config class."""
        return [config for config in self.configs if type(config) is kind]

    @property
    def cards(self) -> list[Card]:
        """The wings present, in the order in which they were registered."""
        present = {type(config) for config in self.configs}
        return [card for config, card in cards().items() if config in present]

    @property
    def mixed(self) -> bool:
        """Whether it is of several wings, or a policy, which may be: its layers are its own, so it has no baseline but
        float."""
        return len(self.cards) > 1 or isinstance(self.config, Policy)

    @property
    def title(self) -> str:
        """How tables call it: the config, or what it is a mix of, with how many layers run on each.

        >>> from recoup.study.configs import parse_config
        >>> lba, nbsmt = parse_config("lba-m7e4"), parse_config("nbsmt-4t")
        >>> Hardware.found(lba, {"fc": lba, "conv1": nbsmt, "conv2": nbsmt}).title
        'mix of M7E4 (12 bits), chunk 16 (1 layer) and 4 threads, S+A (2 layers)'
        """
        if isinstance(self.config, Policy):
            return f"{self.config.name} ({'; '.join(map(_counted, self.layers))})"
        if len(self.layers) == 1:
            return title(self.configs[0])
        parts = [f"{title(config)} ({_layers(count)})" for config, count in self.layers]
        return f"mix of {', '.join(parts[:-1])} and {parts[-1]}"

    @property
    def baseline(self) -> Baseline:
        """What its accuracy is compared with: its wing's baseline; a mix has float alone."""
        return FLOAT if self.mixed else self.cards[0].baseline

    @property
    def compared(self) -> Config | None:
        """The baseline's hardware; None is the float network."""
        if self.mixed:
            return None
        own = type(self.config) is self.cards[0].config
        return baseline_of(self.config if own else self.configs[0])

    @property
    def scaled(self) -> bool:
        """Whether calibration images decide what it computes, without any repair."""
        return any(map(needs_scales, self.configs))

    @property
    def repairs(self) -> list[Repair]:
        """Those of all wings present that are not idle, of a mix in the order of the stages and without those measured
        on baselines."""
        merged: dict[str, list[Repair]] = {}
        for kind, repair in ((card.config, repair) for card in self.cards for repair in card.repairs):
            if not (self.mixed and repair.on_baseline) and (kind, repair.name) not in self.idle:
                merged.setdefault(repair.name, []).append(repair)
        found = [_merged(same) for same in merged.values()]
        return sorted(found, key=_place) if self.mixed else found

    def repair(self, state: str) -> Repair | None:
        """The repair that a state is, if this hardware has it."""
        return next((repair for repair in self.repairs if repair.name == state), None)

    def applies(self, state: str) -> bool:
        """Whether a state exists for this hardware."""
        return state == NONE or self.repair(state) is not None

    def in_order(self, states: Sequence[str]) -> list[str]:
        """Those of some states that exist here: as they come, of a mix in the order of the stages."""
        own = [state for state in states if self.applies(state)]
        order = [NONE, *(repair.name for repair in self.repairs)]
        return sorted(own, key=order.index) if self.mixed else own

    @property
    def quoted(self) -> list[str]:
        """The repairs that a verdict may quote, by preference: fixed on the cards, not picked by their results.

        Of a mix first what `recoup.repair_` does by default, of what studies measure, if that has a name, then the
        wings' in turn.
        """
        lists = [list(card.quoted or [repair.name for repair in card.repairs]) for card in self.cards]
        if len(lists) == 1:
            return [name for name in lists[0] if self.applies(name)]
        plan = {name for card in self.cards for name in card.plan if name in (card.default or card.plan)}
        whole = [one.name for one in self.repairs if {part.name for part in one.parts or (one,)} == plan]
        turns = [name for turn in range(max(map(len, lists))) for names in lists for name in names[turn : turn + 1]]
        return [name for name in dict.fromkeys([*whole, *turns]) if self.applies(name)]

    def sentence(self, state: str) -> str:
        """How a verdict calls a state."""
        found = self.repair(state)
        return state if found is None else found.sentence


def _layers(count: int) -> str:
    return f"{count} layer{'s' * (count > 1)}"


def _counted(pair: tuple[Config, int]) -> str:
    config, count = pair
    return f"{_layers(count)} on {title(config)}" if count else title(config)


def _merged(same: list[Repair]) -> Repair:
    """One repair of those that several wings call alike: each wing's way, once where they are the same."""
    ways = list({id(repair.apply): repair for repair in same}.values())
    if len(ways) == 1:
        return same[0]
    first = ways[0]
    return replace(Repair.combined(first.name, first.meaning, first.sentence, tuple(ways)), parts=first.parts)


def _place(repair: Repair) -> tuple[int, int]:
    return STAGES.index(repair.stage), len(repair.parts)


def references(hardware: Sequence[Hardware]) -> dict[str, Baseline]:
    """What each hardware's accuracy is compared with, by the hardware's name; ``name`` is that of the baseline's rows.

    Rows of one name are of one hardware: where baselines that differ are called alike, or like the float network, what
    they are is part of their names.
    """
    kinds: dict[str, set[str]] = {FLOAT.name: {repr(None)}}
    for one in hardware:
        if one.compared is not None:
            kinds.setdefault(one.baseline.name, set()).add(repr(one.compared))
    found = {}
    for one in hardware:
        baseline, compared = one.baseline, one.compared
        if compared is None:
            baseline = replace(baseline, name=FLOAT.name, title=FLOAT.title)
        elif len(kinds[baseline.name]) > 1:
            what = {field: f"{getattr(baseline, field)} ({compared!r})" for field in ("name", "title", "phrase")}
            baseline = replace(baseline, **what)
        found[one.name] = baseline
    return found


Quoted = Callable[[Hardware, bool], tuple[str, float | None]]
"""The state and top-1 that a report ends on for a hardware; with True, of the baseline of its unit."""
