"""Energy of a study's hardware on what its own network multiplies: operands of a few test images, all layers."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from recoup.errors import RecoupError
from recoup.silicon.operands import capture, steps_of
from recoup.storage.digest import of_file
from recoup.study.hardware import Hardware, Quoted
from recoup.study.lab import Lab
from recoup.study.measures.silicon import Energies, EnergyRow
from recoup.study.repairs import NONE
from recoup.study.results import Results

IMAGES, LANES = 8, 64
Layers = Mapping[str, tuple[np.ndarray, ...]]
NO_OPERANDS = "its hardware takes no layer's operands, so there is no energy of real ones"


def energies(
    results: Results,
    build: Callable[[Any], Any],
    quoted: Quoted,
    liberty: Any,
    *,
    baselines: bool = True,
    glitches: bool = True,
    told: Callable[[str], object] = len,
) -> Energies:
    """Measure every config of a study whose hardware takes operands; what does not is listed with the reason.

    A layer's energy a step, on outputs drawn from it, counts as often as the layer has steps in an image. The network
    is in the state whose accuracy the report quotes. A counterpart that takes other operands has those of the
    network on the baseline that the config is compared with; where there is none, as of a policy, it is left out.

    Args:
        results: the study.
        build: the hardware of a config.
        quoted: the state that the report ends on for a hardware, as in `recoup.study.measures.silicon`.
        liberty: as `recoup.silicon.Measured.energy` takes it.
        baselines: whether the conventional counterparts are measured too.
        glitches: False: zero delay, a lower bound.
        told: called with what is measured next.

    Raises:
        RecoupError: the network or its weights are no longer those of the study.
    """
    network = _Network(results)
    rows: list[EnergyRow] = []
    left: dict[str, str] = {}
    tool, library = "", ()
    for one in (one for one in results.present if len(one.configs) == 1):
        unit = one.configs[0]
        told(one.title)
        try:
            own = build(unit)
            if own.feed is None:
                raise RecoupError(NO_OPERANDS)
            modules = [own, *(own.counterparts().values() if baselines else ())]
            choices = {unit: network.layers(one.config, quoted(one, False)[0])}
            for module in modules:
                fitting = _fitting(module, choices, one, network)
                if fitting is None:
                    told(f"  {module.title}: left out, for there is no network of its own operands")
                    continue
                found = _measured(module, *fitting, network.images, liberty, glitches, told)
                rows.append(_row(one, module, module is not own, found))
                tool, library = found[0][0].tool, found[0][0].liberty
        except RecoupError as error:
            left[one.name] = str(error)
            rows = [row for row in rows if row.config != one.name]
    return Energies(
        rows=tuple(rows), left=left, images=network.images, lanes=LANES, lower_bound=not glitches,
        tool=tool, liberty=library,
    )  # fmt: skip


class _Network:
    """The study's network, and what its layers multiply."""

    def __init__(self, results: Results) -> None:
        recipe = results.recipe
        path = recipe.weights
        if path is not None and results.weights_sha256 and of_file(Path(path)) != results.weights_sha256:
            raise RecoupError(f"{path}: is no longer the file that the study ran on (sha256 {results.weights_sha256})")
        self.lab = Lab(recipe)
        self.seed = recipe.calibration.seeds[0]
        self.batch = next(iter(self.lab.test.batches(IMAGES)))
        self.images = len(self.batch[0])

    def layers(self, config: Any, state: str) -> Layers:
        """Every emulated layer's operands under a config, in a state."""
        return capture(self.lab.repaired(config, state, self.seed), self.batch)


def _measured(
    module: Any,
    config: Any,
    layers: Layers,
    images: int,
    liberty: Any,
    glitches: bool,
    told: Callable[[str], object],
) -> list[tuple[Any, float]]:
    """A layer's energy each, and how many steps it has an image."""
    found = []
    for name, operands in layers.items():
        told(f"  {module.title}: {name}")
        energy = module.energy(operands, liberty, glitches=glitches, lanes=LANES)
        found.append((energy, steps_of(config, operands) / images))
    return found


def _fitting(module: Any, choices: dict[Any, Layers], one: Hardware, network: _Network) -> tuple[Any, Layers] | None:
    """The config and operands that a module takes; those on the baseline are captured when they are needed."""
    for config in (one.configs[0], one.compared):
        if config is not None and config not in choices:
            choices[config] = network.layers(config, NONE)
        if config is not None and _takes(module, choices[config]):
            return config, choices[config]
    return None


def _takes(module: Any, layers: Layers) -> bool:
    try:
        module.feed(next(iter(layers.values())), 64, np.random.default_rng(0))
    except RecoupError:
        return False
    return True


def _row(one: Hardware, module: Any, counterpart: bool, found: list[tuple[Any, float]]) -> EnergyRow:
    """The sum over layers, each an energy and how many steps it has an image."""
    image, gated = (1e-9 * sum(getattr(e, name) * steps for e, steps in found) for name in ("step", "gated"))
    return EnergyRow(
        config=one.name,
        kind=type(one.configs[0]).__name__,
        counterpart=counterpart,
        module=module.title,
        image=image,
        gated=gated,
        operation=1e9 * image / (module.work * sum(steps for _, steps in found)),
        layers=len(found),
    )
