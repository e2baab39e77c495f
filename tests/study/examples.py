"""A small study and its results, for tests."""

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from recoup.lightnorm import LightNorm
from recoup.lightnorm.cost import widths
from recoup.nbsmt.config import NBSMT
from recoup.study import Recipe, Results, State
from recoup.study.machine import Machine
from recoup.study.measures.lightnorm import TrafficRow
from recoup.study.measures.nbsmt import CycleRow, LayerRow
from recoup.study.repairs import FLOAT
from recoup.study.results import AccuracyRow, ShiftRow
from recoup.study.rows import FlipsRow

BASELINE = "8-bit"
NBSMT_STATES = (State.NONE, "recalibrated at 8 bit", "recalibrated on hardware", "paired", "bias correction")
TWO, FOUR = NBSMT(threads=2), NBSMT(threads=4)
ACCURACY = {  # of each state, by config: what a study of a real network looks like
    repr(TWO): (91.5, 91.2, 91.25, 91.55, 91.45),
    repr(FOUR): (90.25, 90.4, 91.2, 91.6, 91.0),
}


def with_accuracy(made: Results, rows: Iterable[AccuracyRow], churn: int = 0, **changes: Any) -> Results:
    """A study with other accuracies, and the fewest images that they flip, or ``churn`` more in either direction."""
    rows, bare = tuple(rows), {}
    for row in rows:
        if row.state == State.NONE:
            bare.setdefault(row.config, []).append(row)
    flips = []
    for row in rows:
        for name, others in bare.items():
            if (name, State.NONE) == (row.config, row.state) or name not in (FLOAT, BASELINE, "wide", row.config):
                continue
            other = others[0] if len(others) == 1 else next(o for o in others if row.seed in (o.seed, None))
            less = round((other.top1 - row.top1) / 100 * row.count)
            seen = {"lost": max(less, 0) + churn, "won": max(-less, 0) + churn, "count": row.count}
            about = {"config": row.config, "state": row.state, "seed": row.seed, "against": name}
            flips.append(FlipsRow(**about, against_state=State.NONE, **seen, low=0.0, high=0.0))
    return made.model_copy(update={"accuracy": rows, "flips": tuple(flips), **changes})


def small_recipe(out: Path, **changes: Any) -> Recipe:
    """A study of an untrained network that takes a second."""
    values: dict[str, Any] = {
        "model": "digits_net",
        "data": "digits",
        "calibration": {"images": 32, "batch_size": 16, "seeds": [3, 5]},
        "test": {"limit": 40, "batch_size": 20},
        "configs": ["nbsmt-4t"],
        "profile_images": 16,
        "cpu_threads": 1,
        "out": str(out),
    }
    return Recipe.build({**values, **changes})


def results(seeds: tuple[int, ...] = (0, 1, 2), layers: int = 6, name: str = "conv") -> Results:
    """Made-up results of a made-up study."""
    recipe = Recipe.build(
        {
            "model": f"recoup.models:{name}",
            "weights": "resnet20.th",
            "data": "cifar10:data",
            "calibration": {"seeds": list(seeds)},
        }
    )
    accuracy = [_row(FLOAT, State.NONE, None, 91.73)]
    for index, seed in enumerate(seeds):
        jitter = 0.04 * (index - (len(seeds) - 1) / 2)
        accuracy += [
            _row(BASELINE, State.NONE, seed, 91.7 + jitter),
            _row(BASELINE, "recalibrated at 8 bit", seed, 91.4 + jitter),
        ]
        for config, values in ACCURACY.items():
            accuracy += [_row(config, state, seed, v + jitter) for state, v in zip(NBSMT_STATES, values, strict=True)]
    made = Results(
        date="2026-01-02T03:04:05+00:00",
        recipe=recipe,
        machine=Machine(
            cpu="A processor", cores=2, torch_threads=2, device="cpu", backend="int8", isa="AMX",
            reason="exact on this CPU", system="Linux", python="3.11.7", torch="2.13.0", recoup="0.1.0",
        ),
        model_name="CifarResNet",
        parameters=269_722,
        weights_sha256="ab" * 32,
        data_name="cifar10",
        test_images=10_000,
        calibration_images=1024,
        augmented=True,
        accuracy=tuple(accuracy),
        layers=tuple(_layer(config, f"{name}{i}", i) for config in (TWO, FOUR) for i in range(layers)),
        cycles=tuple(
            _cycles(config, f"{name}{i}", i) for config in (TWO, FOUR) for i in range(-1 if layers else 0, layers)
        ),
        shifts=tuple(
            ShiftRow(config=repr(config), layer=f"bn{i}", mean=0.01 * config.threads * (i + 1), variance=0.97)
            for config in (TWO, FOUR)
            for i in range(layers)
        ),
        notes=("emulate_: 1 layers run one thread because grouped: x",),
        seconds=412.3,
    )  # fmt: skip
    return with_accuracy(made, accuracy, churn=60)


def norm_results(layers: int = 4, top1: tuple[float, float, float] = (89.5, 90.0, 91.5)) -> Results:
    """The same study with LightNorm units as well."""
    made = results()
    configs = (LightNorm(), LightNorm.fp10(block=32, shared="max"))
    recipe = Recipe.build({**made.recipe.model_dump(mode="json"), "configs": ["nbsmt-4t", *map(repr, configs)]})
    rows = [row for row in made.accuracy if row.config != repr(TWO)]
    for config in configs:
        rows.append(_row(repr(config), State.NONE, 0, top1[0]))
        for state, value in (("recalibrated on hardware", top1[1]), ("paired", top1[2])):
            rows += [_row(repr(config), state, seed, value) for seed in (0, 1, 2)]
    traffic = []
    for config in configs:
        each = {name: round(bits * 8192) for name, bits in asdict(widths(config, 32)).items()}
        place = {"kind": "BatchNorm2d", "emulated": True, "channels": 32, "elements": 8192}
        traffic += [TrafficRow(config=repr(config), name=f"bn{i}", **place, **each) for i in range(layers)]
    return with_accuracy(made, rows, recipe=recipe, tables={**made.tables, "traffic": tuple(traffic)})


def _row(config: str, state: State, seed: int | None, top1: float) -> AccuracyRow:
    return AccuracyRow(config=config, state=state, seed=seed, top1=top1, top5=99.6, count=10_000, seconds=2.5)


def _layer(config: NBSMT, name: str, index: int) -> LayerRow:
    threads = 1 if index == 0 else config.threads  # the first layer is throttled
    return LayerRow(
        config=repr(config), name=name, kind="Conv2d", weight_shape=(16, 16, 3, 3), output_shape=(16, 32, 32),
        threads=threads, policy=config.policy, macs=2_359_296, collisions=0.1 * threads, lossy=0.2, utilization=0.8,
        error=0.0 if threads == 1 else 1e-4 * 3**index, mean_shift=1e-5, zero_activations=0.4, wide_activations=0.3,
        saturated=0.001, zero_weights=0.05, wide_weights=0.8,
    )  # fmt: skip


def _cycles(config: NBSMT, name: str, index: int) -> CycleRow:
    threads = 1 if index == 0 else config.threads
    return CycleRow(
        config=repr(config), name=name, emulated=index >= 0, threads=threads if index >= 0 else 1, M=1024, C=16, N=16,
        taps=9, groups=1, cycles=9216 // (threads if index >= 0 else 1), single=9216, macs=2_359_296,
        activation_bytes=16384, weight_bytes=2304, output_bytes=16384,
    )  # fmt: skip
