"""Energy of a study's hardware on what its own network multiplies: operands of a few test images, all layers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from recoup.errors import RecoupError
from recoup.models.weights import file_and_key
from recoup.silicon.operands import capture, steps_of
from recoup.storage.digest import of_file
from recoup.study.hardware import Hardware, Quoted
from recoup.study.lab import Lab
from recoup.study.measures.silicon import Energies, EnergyRow, counterparts_of
from recoup.study.results import Results

IMAGES, LANES = 8, 64
Layers = Mapping[str, tuple[np.ndarray, ...]]
NO_OPERANDS = "its hardware takes no layer's operands, so there is no energy of real ones"
NO_NETWORK = "there is no network of its own operands"


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
    """Measure every config of a study whose hardware takes operands; what does not is listed with the reason, and so is
    a counterpart that cannot be measured.

    A layer's energy a step, on outputs drawn from it, counts as often as the layer has steps in an image. The network
    is in the state whose accuracy the report quotes. A counterpart that takes the same operands has the same; one that
    takes others has those of the network on the baseline that the config is compared with, in the state of the accuracy
    that stands beside it; where there is no such network, as of a policy, it is left out.

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
    missing: dict[str, dict[str, str]] = {}
    tool, library = "", ()
    for one in (one for one in results.present if len(one.configs) == 1):
        told(one.title)
        ask = _Asked(one, network, quoted, liberty, glitches, told)
        try:
            own = build(one.configs[0])
            if own.feed is None:
                raise RecoupError(NO_OPERANDS)
            found = _measured(own, one.configs[0], ask.own, ask)
        except RecoupError as error:
            left[one.name] = str(error)
            continue
        tool, library = found[0][0].tool, found[0][0].liberty
        failed: dict[str, str] = {}
        others = counterparts_of(own, failed) if baselines else []
        rows += [_row(one, own, False, found), *_counterparts(others, ask, failed)]
        if failed:
            missing[one.name] = failed
    return Energies(
        rows=tuple(rows), left=left, missing=missing, images=network.images, lanes=LANES, lower_bound=not glitches,
        tool=tool, liberty=library,
    )  # fmt: skip


class _Network:
    """The study's network, and what its layers multiply."""

    def __init__(self, results: Results) -> None:
        recipe = results.recipe
        path = recipe.weights
        if path is not None and results.weights_sha256 and of_file(file_and_key(path)[0]) != results.weights_sha256:
            raise RecoupError(f"{path}: is no longer the file that the study ran on (sha256 {results.weights_sha256})")
        self.lab = Lab(recipe)
        self.seed = recipe.calibration.seeds[0]
        self.batch = next(iter(self.lab.test.batches(IMAGES)))
        self.images = len(self.batch[0])

    def layers(self, config: Any, state: str) -> Layers:
        """Every emulated layer's operands under a config, in a state."""
        return capture(self.lab.repaired(config, state, self.seed), self.batch)


@dataclass(frozen=True)
class _Asked:
    """What is measured of a hardware, and how."""

    one: Hardware
    network: _Network
    quoted: Quoted
    liberty: Any
    glitches: bool
    told: Callable[[str], object]

    @cached_property
    def own(self) -> Layers:
        """Its operands, in the state that is quoted."""
        return self.network.layers(self.one.config, self.quoted(self.one, False)[0])

    @cached_property
    def compared(self) -> Layers | None:
        """Those of the baseline that it is compared with, in the state that is quoted of that; captured when needed."""
        compared = self.one.compared
        return None if compared is None else self.network.layers(compared, self.quoted(self.one, True)[0])


def _counterparts(others: list[Any], ask: _Asked, failed: dict[str, str]) -> list[EnergyRow]:
    """The energies of counterparts; of those that cannot be measured ``failed`` says why."""
    rows = []
    for module in others:
        try:
            if module.feed is None:
                raise RecoupError(NO_OPERANDS)
            fitting = _fitting(module, ask)
            if fitting is None:
                raise RecoupError(NO_NETWORK)
            rows.append(_row(ask.one, module, True, _measured(module, *fitting, ask)))
        except RecoupError as error:
            ask.told(f"  {module.title}: left out: {error}")
            failed[module.title] = str(error)
    return rows


def _measured(module: Any, config: Any, layers: Layers, ask: _Asked) -> list[tuple[Any, float]]:
    """A layer's energy each, and how many steps it has an image."""
    refused = {name: why for name, operands in layers.items() if (why := _refusal(module, operands))}
    if refused:
        raise RecoupError(f"{', '.join(refused)}: {next(iter(refused.values()))}")
    found = []
    for name, operands in layers.items():
        ask.told(f"  {module.title}: {name}")
        energy = module.energy(operands, ask.liberty, glitches=ask.glitches, lanes=LANES)
        found.append((energy, steps_of(config, operands) / ask.network.images))
    return found


def _fitting(module: Any, ask: _Asked) -> tuple[Any, Layers] | None:
    """The config and operands that a module takes: the hardware's own, or those on the baseline."""
    own, compared = ask.one.configs[0], ask.one.compared
    if _takes(module, ask.own):
        return own, ask.own
    if compared in (None, own) or ask.compared is None or not _takes(module, ask.compared):
        return None
    return compared, ask.compared


def _takes(module: Any, layers: Layers) -> bool:
    """Whether a module takes the operands of layers."""
    return module.feed is not None and _refusal(module, next(iter(layers.values()))) is None


def _refusal(module: Any, operands: tuple[np.ndarray, ...]) -> str | None:
    """Why a module does not take a layer's operands, or None."""
    try:
        module.feed(operands, 64, np.random.default_rng(0))
    except RecoupError as error:
        return str(error)
    return None


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
