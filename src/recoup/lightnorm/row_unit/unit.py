"""LightNorm's units for norms of rows: the forward pass of a layer norm or RMS norm, as `recoup.lightnorm.rows` has it.

One block of a row's features a cycle, a feature without blocks. Pass 1 reads x, rounds it to blocks (which memory
keeps) and takes the row's statistics over all lanes; then the divider settles mu, r = 1/s and their product; pass 2
reads the blocks back and writes y, with gamma and beta of the block's features. It is the forward unit of a batch norm
with one channel however many lanes it has; an RMS norm's has no sum, no mean, no beta, and of a chunk one extremum.

Legend: G lanes, the features of a block; D features; K chunks of equal length, a multiple of G.
"""

from dataclasses import dataclass, replace
from typing import Any, Self

from recoup.errors import RecoupError
from recoup.gates.module import Module, Port
from recoup.lightnorm.config import LightNorm
from recoup.lightnorm.row_unit.letter import RowLetter
from recoup.lightnorm.rtl_conventional import FORMATS, conventional, conventional_rms
from recoup.lightnorm.rtl_forward import Forward

__all__ = ["Rows"]

KINDS = ("layer", "rms")


@dataclass(frozen=True)
class Rows(RowLetter, Forward):
    """The unit: what it is made of, its ports and schedule, and what it computes."""

    @classmethod
    def of_kind(cls, kind: str, config: LightNorm, elements: int, eps: float) -> Self:
        """The unit of a layer norm ("layer") or an RMS norm ("rms"); errors as in `recoup.lightnorm.rtl.build`."""
        centred = kind == "layer"
        config = config.replace(axis="channel") if centred else config.replace(axis="channel", difference=None)
        unit = replace(cls.of(config, elements, eps), centred=centred)
        least = max(unit.lanes, 2) * config.chunks
        if elements < least:
            raise RecoupError(f"silicon: elements={elements}: a row of {config!r} has {least} features or more")
        if not unit.centred and config.scale != "gaussian":
            raise RecoupError(f"silicon: {config!r}: an RMS norm's scale is 'gaussian', not {config.scale!r}")
        return unit

    @property
    def kind(self) -> str:
        """Of norm."""
        return "layer" if self.centred else "rms"

    @property
    def title(self) -> str:
        """In tables."""
        if self.centred:
            return f"layer norm, {super().title}"
        return f"RMS norm, {super().title}".replace("x - mu exact, ", "")

    def module(self) -> Module:
        """Ports and schedule around the gates."""
        least = "D, a multiple of K G, is 2 K at least"
        protocol = {
            "pass 1": "a block of the row a cycle with collect = 1, in the features' order; y shows the block that "
            "memory keeps one clock edge later; first = 1 with the row's first block, chunk = 1 with a chunk's; after "
            f"a chunk's last block a cycle with fold = 1, first = 1 in the row's first. {least}",
            "extrema": "new_largest tells, a clock edge after a block, which of its elements are, in their order, the "
            "chunk's largest magnitude so far: the last of a chunk is its first largest",
            "divider": f"one cycle with settle = 1, then {self.settling} cycles with constant = A(m) / K held; from "
            "then on reciprocal shows r",
            "pass 2": "normalise = 1, a block at stored a cycle, gamma of its features beside it; xhat in the same "
            "cycle, y one clock edge later",
        }
        if self.centred:
            protocol["pass 1"] = protocol["pass 1"].replace(
                "a cycle with fold = 1, first = 1 in the row's first",
                "two cycles with fold = 1, the second with low = 1, and first = 1 in the row's first",
            )
            protocol["extrema"] = (
                "new_largest and new_smallest tell, a clock edge after a block, which of its elements are, in their "
                "order, the chunk's largest or smallest so far: the last of a chunk is its first maximum or minimum"
            )
            protocol["divider"] = (
                f"one cycle with settle = 1, then {self.settling} cycles, with count = D and constant = C(m) / K held; "
                "from then on mean and reciprocal show mu and r"
            )
            protocol["pass 2"] = protocol["pass 2"].replace("gamma of", "gamma and beta of")
        made = conventional if self.centred else conventional_rms
        return (
            super()
            .module()
            .replace(
                name=f"lightnorm_{self.kind}",
                protocol=protocol,
                cleared=tuple(f"{name}_late" for name in ("collect", "fold")),
                baselines=lambda: {title: made(form, title) for title, form in FORMATS.items()},
            )
        )

    def _ports(self) -> list[Port]:
        absent = () if self.centred else ("low", "count", "mean", "new_smallest")
        meanings: dict[str, Any] = {
            "gamma": "F(gamma) of the block's features, pass 2",
            "beta": "F(beta) of the block's features, pass 2",
            "first": "the row's first block; in a fold cycle the first chunk's",
            "chunk": "the chunk's first block",
            "collect": "a block of pass 1",
            "count": "D",
            "reciprocal": "the row's r = S(1/s), without sign",
            "mean": "the row's mu",
        }
        if not self.centred:
            meanings["fold"] = "the chunk's largest magnitude is added to R"
            meanings["constant"] = f"A(m) / K in units of 2^{self.constants[0]}"
            meanings["new_largest"] = "this element's magnitude is the chunk's largest so far"
        return [
            replace(port, meaning=meanings.get(port.name, port.meaning))
            for port in super()._ports()
            if port.name not in absent
        ]
