"""Hardware configurations in studies: their titles, and layer maps from the command line."""

import re

from recoup.errors import RecoupError
from recoup.grammar import Config, as_config, constructors, examples, parse_config, presets
from recoup.wings import cards, wing_of

__all__ = ["Config", "as_config", "constructors", "examples", "layer_option", "parse_config", "presets", "title"]


def layer_option(text: str) -> tuple[str, str | None]:
    """NAME=CONFIG as a layer map's entry."""
    name, equals, config = _rpair(text)
    if not equals:
        preset = next(iter(presets()))
        raise RecoupError(f"--layers {text!r}: must be NAME=CONFIG, for example re:layer1.*={preset} or fc=float")
    return name, None if config == "float" else config


def _rpair(text: str) -> tuple[str, str, str]:
    """Split at the '=' before the config: a config's own arguments hold '=' too, a regular expression may."""
    names = [*presets(), *(name for card in cards().values() for name in card.callables), "float"]
    known = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
    found = re.search(rf"=(?=(?:{known})(?:\(|$))", text) or re.search(r"=(?=[A-Za-z_][\w.-]*(?:\(|$))", text)
    return (text[: found.start()], "=", text[found.end() :]) if found else text.rpartition("=")


def title(config: Config) -> str:
    """How tables call a configuration: what it is, and what differs from the defaults; the wing's card knows.

    >>> title(parse_config("LBA.biased(5, 5, chunk=64)"))
    'M5E5 (11 bits), chunk 64'
    """
    return wing_of(config, "title").title(config)
