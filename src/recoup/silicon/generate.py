"""From a config to its hardware, by the wing's card."""

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

from recoup.errors import RecoupError
from recoup.silicon.measured import Measured
from recoup.wings import cards, wing_of


def build(config: Any, **options: Any) -> Measured:
    """The hardware of a config: the module that computes bit for bit what its emulation does.

    Args:
        config: a config of any wing that has hardware.
        **options: of the wing's generator, such as ``array=(16, 16)``, ``registers="product"``, ``operands=Float``.

    Raises:
        RecoupError: no hardware can have this config, or the wing's hardware has no such option.
    """
    generator = generator_of(config)
    known = inspect.signature(generator.build).parameters
    legal = [name for name, parameter in known.items() if parameter.kind is parameter.KEYWORD_ONLY]
    for name, value in options.items():
        if name not in legal:
            raise RecoupError(
                f"silicon.build({config!r}, {name}={value!r}): no such option; legal are {', '.join(legal) or 'none'}"
            )
    return Measured.of(generator.build(config, **options))


def generator_of(config: Any) -> Any:
    """The module that generates a config's hardware.

    Raises:
        RecoupError: no config, or its wing has no hardware.
    """
    card = wing_of(config, "silicon.build")
    if card.rtl is None:
        known = ", ".join(kind.__name__ for kind, other in cards().items() if other.rtl is not None)
        raise RecoupError(f"silicon.build({config!r}): {card.config.__name__} has no hardware; {known or 'none'} have")
    return importlib.import_module(card.rtl)


def options_of(config: Any) -> Mapping[str, Any]:
    """The options of a config's generator, with their defaults."""
    known = inspect.signature(generator_of(config).build).parameters
    return {n: p.default for n, p in known.items() if p.kind is p.KEYWORD_ONLY}
