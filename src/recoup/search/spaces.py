"""What may run on what: layers with their options, in groups that decide together."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from recoup.costs import takes
from recoup.errors import RecoupError
from recoup.grammar import as_config
from recoup.network.emulated import emulated_layers
from recoup.network.selection import UNMATCHED, Selection
from recoup.network.sites import float_class
from recoup.policy import Policy
from recoup.wings import cards, told_takers, wing_of

FLOAT = "float"


@dataclass(frozen=True, slots=True)
class Group:
    """Layers that run on the same option.

    Attributes:
        name: the first layer's, with how many more there are.
        layers: their names in the model's order.
        options: configs, None being float.
    """

    name: str
    layers: tuple[str, ...]
    options: tuple[Any, ...]

    def titles(self) -> list[str]:
        """The options as tables call them."""
        return list(titles(self.options).values())


@dataclass(frozen=True)
class Space:
    """The options of every layer: ``{"name" or "re:regular expression": [config or None, ...]}``, first match wins.

    Args:
        layers: the map; configs may be given as text, and None (or "float") is the layer in float. The first option of
            every layer together is what limits are relative to.
        same: lists of keys whose layers decide together; they must have the same options.
        at_most: ``{"units": n}``: how many kinds of hardware there may be, float not counted; a unit that runs another
            config too (four threads run two) counts for it.

    Raises:
        RecoupError: no layer, no option, one given twice, a value that is no config, a limit that is none.

    >>> from recoup import LBA, NBSMT
    >>> space = Space({"re:layer.*": [NBSMT(1), NBSMT(2), "nbsmt-4t"], "linear": [None, LBA.m7e4()]})
    """

    layers: Mapping[str, Sequence[Any]]
    same: Sequence[Sequence[str] | str] = ()
    at_most: Mapping[str, int] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.layers, Mapping) or not self.layers:
            raise RecoupError("Space: layers must be a map from names or 're:...' to lists of options, and not empty")
        checked = {key: _options(key, options) for key, options in self.layers.items()}
        object.__setattr__(self, "layers", checked)
        same = tuple((keys,) if isinstance(keys, str) else tuple(keys) for keys in self.same)
        object.__setattr__(self, "same", same)
        limits = dict(self.at_most or {})
        for name, most in limits.items():
            if name != "units" or isinstance(most, bool) or not isinstance(most, int) or most < 1:
                raise RecoupError(f"Space(at_most={limits!r}): legal is {{'units': 1 or more}}")
        object.__setattr__(self, "at_most", limits)

    @property
    def most_units(self) -> int | None:
        """How many kinds of hardware there may be."""
        return (self.at_most or {}).get("units")

    @property
    def hardware(self) -> set[type]:
        """The config classes of all options."""
        return {type(option) for options in self.layers.values() for option in options if option is not None}

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        layers = {key: [FLOAT if o is None else repr(o) for o in options] for key, options in self.layers.items()}
        return {"layers": layers, "same": [list(keys) for keys in self.same], "at_most": dict(self.at_most or {})}

    def groups(self, model: nn.Module) -> tuple[Group, ...]:
        """The groups of a network, in its order.

        Raises:
            RecoupError: an emulated network; a key that matches nothing, or nothing that is left; an option that a
                layer cannot take; layers that are to decide together and have other options, or are in two such lists.
        """
        if emulated_layers(model):
            raise RecoupError("search: the model is emulated already: restore_ it first")
        modules = dict(model.named_modules())
        able = [name for name, module in modules.items() if any(takes(kind, module) for kind in cards())]
        chosen = Selection(self.layers, able, "search", modules)
        found: dict[str, tuple[Any, ...]] = {}
        for name in able:
            options = chosen.of(name)
            if options is not UNMATCHED and self._is_meant(name, modules[name], options):
                found[name] = options
        for key in self.layers:
            if not any(chosen.keys(name)[0] == key for name in found):
                raise RecoupError(
                    f"search: the space's key {key!r} is left no layer: keys before it take what it matches"
                )
        return self._joined(found)

    def _is_meant(self, name: str, module: nn.Module, options: Sequence[Any]) -> bool:
        """Whether a layer is in the space: by a pattern, if any option takes it; then all must."""
        unfit = [option for option in options if option is not None and not takes(type(option), module)]
        hardware = [option for option in options if option is not None]
        if unfit and (name in self.layers or len(unfit) < len(hardware)):
            stands = ", ".join(kind.__name__ for kind in wing_of(unfit[0], "search").layers)
            raise RecoupError(
                f"search: {unfit[0]!r} cannot take layer {name!r}: {told_takers(float_class(module))}; "
                f"{type(unfit[0]).__name__} stands in for {stands}"
            )
        return not unfit

    def _joined(self, found: Mapping[str, tuple[Any, ...]]) -> tuple[Group, ...]:
        leader: dict[str, int] = {}
        for number, keys in enumerate(self.same):
            members = [n for n in found if Selection(dict.fromkeys(keys), found, "search: same").of(n) is not UNMATCHED]
            for name in members:
                if name in leader:
                    raise RecoupError(f"search: layer {name!r} is in two lists of same")
                if found[name] != found[members[0]]:
                    raise RecoupError(
                        f"search: {members[0]!r} and {name!r} are to decide together and have other options"
                    )
                leader[name] = number
        groups: dict[Any, list[str]] = {}
        for name in found:
            groups.setdefault(leader.get(name, name), []).append(name)
        return tuple(Group(_name(names), tuple(names), found[names[0]]) for names in groups.values())


def _options(key: Any, options: Any) -> tuple[Any, ...]:
    if not isinstance(key, str):
        raise RecoupError(f"Space: a key is a layer's name or 're:...'; got {key!r}")
    if isinstance(options, str | Mapping) or not isinstance(options, Iterable):
        raise RecoupError(f"Space: {key!r} must have a list of options; got {options!r}")
    read = tuple(None if option is None or option == FLOAT else as_config(option) for option in options)
    if not read or len(set(read)) < len(read):
        raise RecoupError(f"Space: {key!r} must have one option or more, each once; got {list(options)!r}")
    return read


def _name(layers: Sequence[str]) -> str:
    return layers[0] if len(layers) == 1 else f"{layers[0]} and {len(layers) - 1} more"


def title(option: Any) -> str:
    """How tables call an option."""
    return FLOAT if option is None else wing_of(option, "search").title(option)


def titles(options: Iterable[Any]) -> dict[Any, str]:
    """How tables call some options, each differently: options of one title have their repr behind it."""
    plain = {option: title(option) for option in options}
    several = {name for name in plain.values() if list(plain.values()).count(name) > 1}
    return {o: f"{name} ({o!r})" if name in several else name for o, name in plain.items()}


def policy_of(groups: Sequence[Group], options: Sequence[int], name: str = "") -> Policy:
    """The policy of a choice: every layer by its own name."""
    pairs = zip(groups, options, strict=True)
    return Policy({layer: group.options[o] for group, o in pairs for layer in group.layers}, name)


def uniform(groups: Sequence[Group]) -> dict[Any, tuple[int, ...]]:
    """Policies that take one option wherever there is one, of those that at least half of the groups have: option ->
    choice. Groups without it take their first. `titles` names them."""
    every = [option for group in groups for option in group.options]
    return {
        option: tuple(group.options.index(option) if option in group.options else 0 for group in groups)
        for option in dict.fromkeys(every)
        if 2 * every.count(option) >= len(groups)
    }
