"""YAML files read strictly, with errors that name the file, the line and the field."""

import difflib
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from recoup.errors import RecoupError

LARGEST = 1 << 20  # bytes; a recipe is a page, anything larger is another file given by mistake

DEEPEST = 20  # levels; a recipe has three

LAYER_MAPS = ("layers", "space")  # fields whose keys are layer names, which hold dots themselves

Place = tuple[str | int, ...]


@dataclass(frozen=True)
class Source:
    """A mapping read from YAML, and where each of its fields stands."""

    name: str
    values: dict[str, Any]
    lines: Mapping[Place, int] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path) -> "Source":
        """Read a file; see `read_yaml`."""
        try:
            if path.stat().st_size > LARGEST:
                raise RecoupError(f"{path}: larger than 1 MiB; that is no recipe")
            text = path.read_text("utf-8")
        except UnicodeDecodeError:
            raise RecoupError(f"{path}: not a text file; a recipe is YAML in UTF-8") from None
        except FileNotFoundError:
            raise RecoupError(f"{path}: no such file") from None
        except OSError as error:
            raise RecoupError(f"{path}: cannot be read ({error.strerror or error})") from None
        return read_yaml(text, str(path))

    def override(self, changes: list[str]) -> dict[str, Any]:
        """The values with ``dotted.key=YAML value`` changes applied; the source itself stays as it is."""
        values: dict[str, Any] = self.values
        for change in changes:
            key, equals, text = change.partition("=")
            if not equals or not key:
                raise RecoupError(f"--set {change!r}: must be key=value, for example calibration.images=512")
            field, _, rest = key.partition(".")
            parts = [field, rest] if rest and field in LAYER_MAPS else key.split(".")
            values = _changed(values, parts, _value(change, text), change)
        return values

    def where(self, place: Place) -> str:
        """``file, line 3`` of a field, or of the innermost part around it that the file has."""
        for depth in range(len(place), 0, -1):
            if place[:depth] in self.lines:
                return f"{self.name}, line {self.lines[place[:depth]]}"
        return self.name


def read_yaml(text: str, name: str) -> Source:
    """Parse YAML that must be a mapping with distinct keys.

    Raises:
        RecoupError: not YAML, or not such a mapping; the message names the line.
    """
    try:
        _check_depth(text, name)  # the rest recurses, and is slow at it
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        lines: dict[Place, int] = {}
        if root is not None:
            _collect(root, (), lines, name)
        values = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise RecoupError(f"{name}{line}: not YAML, or cut off: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise RecoupError(f"{name}: not YAML ({' '.join(str(error).split())})") from None
    except ValueError as error:  # a date or a number that is none
        if isinstance(error, RecoupError):
            raise
        raise RecoupError(f"{name}: not YAML ({error})") from None
    if not isinstance(values, dict):
        kind = "empty" if values is None else f"a {type(values).__name__}"
        raise RecoupError(f"{name}: {kind}, not a recipe; a recipe is a mapping with the keys model, data, ...")
    return Source(name, values, lines)


def refuse(error: ValidationError, source: Source, model: type[BaseModel]) -> RecoupError:
    """A pydantic error as one line: file, line, field, what is wrong, what is legal."""
    first = error.errors(include_url=False)[0]
    place: Place = tuple(part for part in first["loc"] if not _is_branch(part))
    dotted = ".".join(str(part) for part in place)
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        legal = list(_fields_at(model, place[:-1]))
        near = difflib.get_close_matches(str(place[-1]), legal, 1)
        hint = f"did you mean {near[0]}?" if near else f"legal are {', '.join(legal)}"
        what = f"unknown field; {hint}"
    elif first["type"] == "missing":
        what = "missing"
    else:
        what = first["msg"].removeprefix("Value error, ")
        given = repr(first["input"])
        if not isinstance(first["input"], dict | BaseModel) and first["type"] != "value_error":
            what = f"{what}; got {given if len(given) <= 60 else given[:57] + '...'}"
    return RecoupError(f"{source.where(place)}: {dotted + ': ' if dotted else ''}{what}{more}")


def _check_depth(text: str, name: str) -> None:
    depth, anchors = 0, set()
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        # A page of aliases unfolds to gigabytes, or into itself; one without an anchor is left to the parser.
        if isinstance(event, yaml.AliasEvent) and event.anchor in anchors:
            raise RecoupError(
                f"{name}, line {event.start_mark.line + 1}: *{event.anchor}: aliases are not read; write it out"
            )
        anchors.add(getattr(event, "anchor", None))
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise RecoupError(f"{name}, line {event.start_mark.line + 1}: nested too deep for a recipe")


def _collect(node: yaml.Node, place: Place, lines: dict[Place, int], name: str) -> None:
    if place:
        lines[place] = node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if key.value in seen:
                raise RecoupError(f"{name}, line {key.start_mark.line + 1}: {key.value!r} is given twice")
            seen.add(key.value) if isinstance(key.value, str) else None
            _collect(value, (*place, str(key.value)), lines, name)
            lines[(*place, str(key.value))] = key.start_mark.line + 1
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            _collect(value, (*place, index), lines, name)


def _value(change: str, text: str) -> Any:
    try:
        _check_depth(text, f"--set {change!r}")
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise RecoupError(f"--set {change!r}: {text!r} is not a YAML value") from None


def _changed(values: Any, parts: list[str], value: Any, change: str) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise RecoupError(f"--set {change!r}: there is no such field")
    head, *rest = parts
    return {**values, head: _changed(values.get(head) or {}, rest, value, change) if rest else value}


def _is_branch(part: Any) -> bool:
    """Pydantic adds the name of a union's branch or of a validator to a location; no field is called so."""
    return isinstance(part, str) and ("[" in part or part in ("bool", "int", "float", "str", "none"))


def _fields_at(model: Any, place: Place) -> list[str]:
    for part in place:
        fields = getattr(model, "model_fields", {})
        annotation = fields[part].annotation if part in fields else None
        options = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
        model = next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)
    return list(getattr(model, "model_fields", {}))
