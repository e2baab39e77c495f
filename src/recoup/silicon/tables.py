"""Area and energy of one unit of any config, each measured once: what costs of networks are made of.

An energy is that of a step on ordinary operands [ours]: those of the wing's ``typical``, else, of a module whose ports
take plain integers, `recoup.gates.typical` at every port that follows no schedule. 64 runs of 64 steps, with glitches,
no wires, no clock gated. Results are kept as all of recoup.silicon's are, by design, tools, library and operands.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recoup.errors import RecoupError
from recoup.gates import typical
from recoup.gates.module import Inputs, Module, Port, pattern
from recoup.silicon.cells import library
from recoup.silicon.generate import build, generator_of
from recoup.silicon.vectors import scheduled

__all__ = ["LANES", "SEED", "STEPS", "Figure", "Tables", "ordinary"]

LANES, STEPS, SEED = 64, 64, 0
"""Runs, steps and the seed of the operands that energies are measured on."""
NO_LIBRARY = "energy needs a Liberty file (liberty=..., --liberty): plain gates have areas in NAND2-equivalents alone"


@dataclass(frozen=True, slots=True)
class Figure:
    """A number, or why there is none."""

    value: float | None
    why: str = ""


class Tables:
    """Areas and energies of units under one cell library, or of plain gates without energy.

    Args:
        liberty: a Liberty file, several that are read together, or None.

    Raises:
        RecoupError: a path that is none, or no file.
    """

    def __init__(self, liberty: str | Path | Sequence[str | Path] | None = None) -> None:
        paths = [] if liberty is None else [liberty] if isinstance(liberty, str | Path) else liberty
        good = isinstance(paths, Sequence) and all(isinstance(path, str | Path) for path in paths)
        if not good or (liberty is not None and not paths):
            raise RecoupError(f"liberty={liberty!r}: must be a path, several paths, or None")
        self.liberty = tuple(Path(path) for path in paths)
        if self.liberty:
            library(self.liberty)

    @property
    def unit(self) -> str:
        """Of areas: um2 with a library, else NAND2, two-input NANDs of plain gates."""
        return "um2" if self.liberty else "NAND2"

    def area(self, config: Any) -> Figure:
        """Of one unit of a config as `build` makes it by default."""
        return _figure(_area, config, self.liberty)

    def energy(self, config: Any) -> Figure:
        """Picojoules a step of one unit."""
        return _figure(_energy, config, self.liberty) if self.liberty else Figure(None, NO_LIBRARY)

    def work(self, config: Any) -> Figure:
        """Operations of a step of one unit."""
        return _figure(_work, config, self.liberty)


def _figure(measure: Any, config: Any, liberty: tuple[Path, ...]) -> Figure:
    try:
        return Figure(measure(config, liberty))
    except RecoupError as error:
        return Figure(None, str(error))


@functools.cache
def _area(config: Any, liberty: tuple[Path, ...]) -> float:
    return build(config).area(list(liberty) or None).area


@functools.cache
def _energy(config: Any, liberty: tuple[Path, ...]) -> float:
    module = build(config)
    return module.energy(ordinary(config, module), list(liberty), seed=SEED).step / 1e3


@functools.cache
def _work(config: Any, liberty: tuple[Path, ...]) -> float:  # noqa: ARG001 -- as the others
    return build(config).work


def ordinary(config: Any, module: Module) -> Inputs:
    """The inputs by port that a config's energy is measured on; see this file's first lines.

    Raises:
        RecoupError: the wing has no ``typical``, and a port takes codes of a format.
    """
    generator = np.random.default_rng(SEED)
    own = getattr(generator_of(config), "typical", None)
    if own is not None:
        return own(config, LANES, STEPS, generator)
    control = scheduled(module, STEPS, LANES)
    data = {p.name: _drawn(p, module, generator) for p in module.inputs if p.name not in control}
    return {**data, **control}


def _drawn(port: Port, module: Module, generator: np.random.Generator) -> np.ndarray:
    if port.legal is not None or port.element > 32:
        raise RecoupError(
            f"energy of {module.title}: the generator has no typical(config, lanes, steps, generator), and what "
            f"ordinary operands of port {port.name!r} are is not known"
        )
    draw = typical.weights if port.signed else typical.activations
    largest = 2.0 ** (port.element - port.signed) - 1
    codes = pattern(np.rint(draw((STEPS, LANES, port.parts), largest, generator)).astype(np.int64), port.element)
    return codes if port.parts > 1 else codes[..., 0]
