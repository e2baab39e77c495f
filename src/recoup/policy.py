"""A policy: which layer runs on which hardware, as one value that is compared, kept in YAML and handed around."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from recoup.errors import RecoupError
from recoup.grammar import as_config, config_calls, presets, written
from recoup.network.checks import is_module
from recoup.network.emulated import emulated_layers
from recoup.network.selection import compiled
from recoup.storage.digest import of_text
from recoup.storage.files import write_atomically
from recoup.wings import cards

DEEPEST = 3  # of a policy's YAML


class Policy(Mapping[str, Any]):
    """An ordered layer map with a name, frozen: ``{"name" or "re:regular expression": config or None}``.

    The first key that matches a layer's whole name decides; None leaves the layer in float, and so do all layers that
    no key matches.

    Args:
        layers: the map; configs may be given as text.
        name: what tables call it.

    Raises:
        RecoupError: no map, a key that is no text, a value that is no config.

    >>> chip = Policy({"re:layer.*": "nbsmt-4t", "linear": "LBA.m7e4()"}, name="chip A")
    >>> Policy.from_yaml(chip.to_yaml()) == chip
    True
    >>> chip["linear"].chunk
    16
    """

    __slots__ = ("_layers", "name")

    def __init__(self, layers: Mapping[str, Any], name: str = "") -> None:
        if not isinstance(layers, Mapping):
            raise RecoupError(f"Policy: layers must be a map from names to configs; got {type(layers).__name__}")
        if not isinstance(name, str):
            raise RecoupError(f"Policy(name={name!r}): name must be text")
        for key in layers:
            compiled(key, "Policy")
        values = {key: None if value is None else as_config(value) for key, value in layers.items()}
        object.__setattr__(self, "_layers", values)
        object.__setattr__(self, "name", name)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"a Policy is frozen: {name!r} cannot be set")

    def __getitem__(self, key: str) -> Any:
        return self._layers[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Policy) and (self.name, [*self.items()]) == (other.name, [*other.items()])

    def __hash__(self) -> int:
        return hash((self.name, tuple(self.items())))

    def __repr__(self) -> str:
        return f"Policy({self._layers!r}, name={self.name!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return Policy, (self._layers, self.name)

    @classmethod
    def of(cls, model: nn.Module, name: str = "") -> "Policy":
        """The hardware of a model as it is: every emulated layer by its name."""
        is_module(model, "Policy.of")
        return cls({layer: module.config for layer, module in emulated_layers(model).items()}, name)

    @property
    def digest(self) -> str:
        """Of the map in its order, not of the name: what decides numbers."""
        return of_text(repr([(key, repr(value)) for key, value in self.items()]))

    def to_yaml(self) -> str:
        """The policy as YAML; `from_yaml` reads it back as the same policy.

        Raises:
            RecoupError: a config whose text is not read back.
        """
        layers = {key: None if value is None else written(value, "Policy") for key, value in self.items()}
        return yaml.safe_dump({"name": self.name, "layers": layers}, sort_keys=False, allow_unicode=True, width=110)

    @staticmethod
    def json_schema() -> dict[str, Any]:
        """The JSON schema of a policy's file, for editors and other tools; wings that are registered are in it.

        It takes whatever `from_yaml` takes, and refuses what it refuses but for what no schema sees: what stands
        between a config's parentheses, a regular expression that is none, a key that is given twice, aliases.

        >>> sorted(Policy.json_schema()["properties"])
        ['layers', 'name']
        """
        known = [name for card in cards().values() for name in (*card.presets, *card.renamed)]
        named, called = ("|".join(map(re.escape, sorted(names))) for names in (known, config_calls()))
        call = rf"^\s*({called})\s*\([\s\S]*\)\s*(#.*)?$"
        config = {
            "anyOf": [
                {"type": "null", "description": "in float"},
                {"enum": sorted(presets()), "description": "a preset"},
                {"type": "string", "pattern": rf"^\s*({named})\s*$", "description": "a preset, with spaces around it"},
                {"type": "string", "pattern": call, "description": "a config as Python writes it"},
            ]
        }
        layers = {"type": "object", "additionalProperties": config}
        return {
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            "title": "recoup policy",
            "description": "Which layer runs on what; the first key that matches a layer's whole name decides.",
            "type": "object",
            "required": ["layers"],
            "additionalProperties": False,
            "properties": {"name": {"type": ["string", "null"]}, "layers": layers},
        }

    def save(self, path: str | Path) -> None:
        """Write the YAML, whole or not at all."""
        write_atomically(Path(path), self.to_yaml())

    @classmethod
    def load(cls, path: str | Path) -> "Policy":
        """Read a policy's YAML file.

        Raises:
            RecoupError: no such file, or no policy in it.
        """
        try:
            text = Path(path).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RecoupError(f"{path}: cannot be read ({error})") from None
        return cls.from_yaml(text, str(path))

    @classmethod
    def from_yaml(cls, text: str, source: str = "policy") -> "Policy":
        """Read a policy: ``name`` and ``layers``.

        Raises:
            RecoupError: no YAML, aliases, a key given twice, unknown or missing keys, a value that is no config; the
                message begins with ``source``.
        """
        values = _read(text, source)
        if not isinstance(values, dict) or not {"layers"} <= values.keys() <= {"name", "layers"}:
            raise RecoupError(
                f"{source}: a policy has 'layers', a map from layer names to configs, and may have 'name'"
            )
        try:
            name = values.get("name")
            return cls(values["layers"], "" if name is None else name)
        except RecoupError as error:
            raise RecoupError(f"{source}: {error}") from None


def _read(text: str, source: str) -> Any:
    """The values of a YAML file without aliases; None where it is deeper than a policy."""
    try:
        events = list(yaml.parse(text, Loader=yaml.SafeLoader))
        aliased = any(isinstance(event, yaml.AliasEvent) or getattr(event, "value", "") == "<<" for event in events)
        flat = not aliased and sum(isinstance(event, yaml.CollectionStartEvent) for event in events) <= DEEPEST
        root = yaml.compose(text, Loader=yaml.SafeLoader) if flat else None
        values = yaml.safe_load(text) if flat else None
    except (yaml.YAMLError, RecursionError, ValueError) as error:  # a ValueError: a date or a number that is none
        raise RecoupError(f"{source}: not YAML ({str(error).splitlines()[0]})") from None
    if aliased:
        raise RecoupError(f"{source}: a policy has no YAML aliases")
    for node in [root, *(value for _, value in root.value)] if isinstance(root, yaml.MappingNode) else []:
        keys = [key.value for key, _ in node.value] if isinstance(node, yaml.MappingNode) else []
        if twice := next((key for number, key in enumerate(keys) if key in keys[:number]), None):
            raise RecoupError(f"{source}: {twice!r} is given twice")
    return values
