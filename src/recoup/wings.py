"""The wings there are: config class -> card.

>>> sorted(config.__name__ for config in cards())
['LBA', 'LightNorm', 'NBSMT', 'TensorCore']

A wing of your own is known from the moment its card is registered:

    recoup.wings.register(Card(config=Trunc, layers={nn.Linear: TruncLinear}))
"""

from typing import Any

from torch import nn

from recoup.errors import RecoupError
from recoup.lba.wing import CARD as LBA_CARD
from recoup.lightnorm.wing import CARD as LIGHTNORM_CARD
from recoup.nbsmt.wing import CARD as NBSMT_CARD
from recoup.network.emulated import Emulated
from recoup.network.wing import FLOAT, Baseline, Card, Phase, Repair
from recoup.tensorcore.wing import CARD as TENSORCORE_CARD

__all__ = [
    "FLOAT",
    "Baseline",
    "Card",
    "Emulated",
    "Phase",
    "Repair",
    "cards",
    "forget",
    "is_config",
    "register",
    "wing_of",
]

RESERVED = ("Float", "Int", "float")
_CARDS: dict[type, Card] = {card.config: card for card in (NBSMT_CARD, LBA_CARD, LIGHTNORM_CARD, TENSORCORE_CARD)}


def cards() -> dict[type, Card]:
    """Every card by its config class, in the order in which they were registered."""
    return dict(_CARDS)


def register(card: Card) -> Card:
    """Make a wing known to emulation, studies, reports and the command line. Its own card may be registered again.

    Raises:
        RecoupError: no card; a preset or constructor that another wing has; a preset whose repr is not read back.
    """
    if not isinstance(card, Card):
        raise RecoupError(f"wings.register({card!r}): must be a recoup.wings.Card")
    for name in (*card.presets, *card.callables):
        if name in RESERVED:
            raise RecoupError(
                f"wings.register: {name!r} means a number format or a layer left in float; take another name"
            )
    for name, preset in card.presets.items():
        if type(preset) is not card.config:
            raise RecoupError(f"wings.register: preset {name!r} is {preset!r}, which is no {card.config.__name__}")
    others = [other for config, other in _CARDS.items() if not _same(config, card.config)]
    for kind in ("presets", "callables"):
        taken = {name: other for other in others for name in getattr(other, kind)}
        for name in getattr(card, kind):
            if name in taken and getattr(card, kind)[name] is not getattr(taken[name], kind)[name]:
                raise RecoupError(
                    f"wings.register: {name!r} is taken by {taken[name].config.__name__}; give {card.config.__name__} "
                    "another name"
                )
    again = any(_same(config, card.config) for config in _CARDS)
    known = [(card.config, card) if _same(config, card.config) else (config, own) for config, own in _CARDS.items()]
    for plain, emulated in card.layers.items():
        if "float_class" not in vars(emulated):
            emulated.float_class = plain  # type: ignore[attr-defined]
        if card.baseline.of is not None:
            emulated.tells_baseline = True  # type: ignore[attr-defined]
    _CARDS.clear()
    _CARDS.update(known if again else [*known, (card.config, card)])  # one that is there keeps its place
    return card


def forget(config: type) -> None:
    """Take a registered wing out again, as tests do.

    Raises:
        RecoupError: no wing of that config.
    """
    if not isinstance(config, type) or _CARDS.pop(config, None) is None:
        raise RecoupError(f"wings.forget({config!r}): no such wing")


def _same(one: type, other: type) -> bool:
    """The same class, or the same module loaded again."""
    return one is other or (one.__module__, one.__qualname__) == (other.__module__, other.__qualname__)


def wing_of(config: Any, purpose: str) -> Card:
    """The card of a config.

    Raises:
        RecoupError: a config of no registered wing; the message names those there are.
    """
    try:
        return _CARDS[type(config)]
    except KeyError:
        known = ", ".join(wing.__name__ for wing in _CARDS)
        read = "; texts are read by recoup.study.parse_config, and by Policy" if isinstance(config, str) else ""
        raise RecoupError(f"{purpose}: {config!r} is no configuration of a wing ({known}) and not None{read}") from None


def told_takers(kind: type[nn.Module]) -> str:
    """Which hardware there is for a class of layers: ``a BatchNorm2d is for LightNorm (such as lightnorm)``."""
    able = [card for card in _CARDS.values() if card.for_class(kind) is not None]
    named = (card.config.__name__ + "".join(f" (such as {name})" for name in list(card.presets)[:1]) for card in able)
    return f"a {kind.__name__} is for {' or '.join(named) or 'no hardware there is: leave it in float (null, None)'}"


def is_config(value: Any) -> bool:
    """Whether a value is a config of a registered wing."""
    return type(value) in _CARDS
