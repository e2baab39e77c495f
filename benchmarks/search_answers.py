"""Claim: a search of ResNet-20's hardware finds a front that no uniform policy beats, and another budget is free.

NB-SMT with one, two or four threads on each of the 18 convolutions, narrow accumulators on the classifier, scored on
1,000 test images of CIFAR-10 and measured on 1,000 others with three draws of calibration images, in one process on one
thread. Four things are asked, and the results file says of each whether it holds: under three minutes of
CPU (of ResNet-20 alone); no uniform policy has less KL at its cost than some point of the front; measured over
predicted KL lies within the printed error bar; another budget is answered from the same folder without a measurement.
``--model resnet56`` asks the same of 54 convolutions, ``--model chargpt`` of a small GPT's 16 linear layers on narrow
accumulators, in nats a character. Networks and data are those found through RECOUP_DATA.

    OMP_NUM_THREADS=1 python benchmarks/search_answers.py              # into a new temporary folder
    OMP_NUM_THREADS=1 python benchmarks/search_answers.py --out DIR    # the records and the report stay there
    OMP_NUM_THREADS=1 python benchmarks/search_answers.py --model resnet56
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.measure import save
from recoup.data import root
from recoup.search.recipe import SearchRecipe
from recoup.search.results import PointRow, SearchResults
from recoup.search.running import How, Stage, run
from recoup.tasks.bench import capability

STAGES: tuple[Stage, ...] = ("score", "front", "run")
MOST_SECONDS = 180.0  # of ResNet-20
WEIGHTS = {"resnet20": "resnet20-12fca82f.th", "resnet56": "resnet56-4bfd9763.th"}
TEXT = "chargpt"


def budgets(model: str) -> tuple[float, float]:
    """Points of top-1, or nats."""
    return (0.01, 0.02) if model == TEXT else (0.5, 1.0)


def recipe(model: str, out: str, budget: float) -> SearchRecipe:
    """A search of docs/search.md."""
    values = _of_text() if model == TEXT else _of_images(model)
    return SearchRecipe.build({**values, "budget": budget, "out": out}, "benchmarks/search_answers.py")


def _of_images(model: str) -> dict[str, object]:
    return {
        "model": model,
        "weights": str(root() / "cifar10_models" / WEIGHTS[model]),
        "data": f"cifar10:{root() / 'cifar10'}",
        "test": {"limit": 1000, "seed": 0},
        "space": {
            "re:layer.*conv.*": ["NBSMT(threads=1)", "nbsmt-2t", "nbsmt-4t"],
            "linear": ["float", "lba-m7e4", "LBA.biased(5, 4)", "LBA.biased(4, 4)"],
        },
        "cost": "cycles",
    }


def _of_text() -> dict[str, object]:
    return {
        "model": TEXT,
        "weights": str(root() / "text" / "chargpt_tinyshakespeare.pt"),
        "data": f"text:{root() / 'text' / 'tinyshakespeare.txt'}",
        "space": {
            r"re:blocks\..*\.(qkv|proj|fc1|fc2)": [f"LBA.biased({mantissa}, 4)" for mantissa in (7, 6, 5, 4)],
        },
        "cost": "bits",
        "scoring": {"images": 64},
        "calibration": {"images": 64, "seeds": [0, 1]},
        "test": {"limit": 192},
    }


def timed(made: SearchRecipe, stage: Stage) -> tuple[SearchResults, dict[str, float]]:
    """A stage's results, CPU and wall seconds, and how many measurements it made."""
    lines: list[str] = []
    cpu, wall = time.process_time(), time.perf_counter()
    found = run(made, stage, How(progress=lines.append))
    spent = {"cpu_seconds": round(time.process_time() - cpu, 1), "seconds": round(time.perf_counter() - wall, 1)}
    print(f"{stage}: {spent['cpu_seconds']} s of CPU, {len(lines)} measurements", flush=True)
    return found, {**spent, "measurements": len(lines)}  # type: ignore[return-value] -- scores are not looked at


def beaten(front: list[PointRow], uniform: PointRow, cost: str) -> dict[str, object]:
    """The point of the front that costs no more than a uniform policy and has the least measured KL."""
    able = [point for point in front if point.costs[cost] <= uniform.costs[cost] * (1 + 1e-12)]  # summed otherwise
    best = min(able, key=lambda point: point.damage or 0.0)
    assert best.damage is not None
    assert uniform.damage is not None
    return {
        "uniform": uniform.name,
        cost: uniform.costs[cost],
        "kl": uniform.damage,
        "front": best.name,
        f"front_{cost}": best.costs[cost],
        "front_kl": best.damage,
        "holds": best.damage <= uniform.damage,
    }


def checks(found: SearchResults) -> dict[str, object]:
    """What the claim says about the front."""
    ratios = {p.name: p.damage / p.predicted for p in found.points if p.predicted and p.damage is not None}
    bar = found.error or 1.0
    inside = sum(1 / bar <= ratio <= bar for ratio in ratios.values())
    uniform = [beaten(found.front, point, found.costs[0]) for point in found.points if point.kind == "uniform"]
    return {
        "uniform": uniform,
        "dominates": all(one["holds"] for one in uniform),
        "error_bar": found.error,
        "rank": found.rank,
        "measured_over_predicted": ratios,
        "points_within": inside,
        "within": inside == len(ratios),
    }


def share(found: SearchResults, point: PointRow) -> float:
    """Of what the first option costs everywhere."""
    return point.costs[found.costs[0]] / found.first[found.costs[0]]


def answer(found: SearchResults) -> dict[str, object]:
    """The chosen point of a budget."""
    chosen = None if found.chosen is None else found.points[found.chosen]
    groups = [] if chosen is None else list(zip(found.groups, chosen.options, strict=True))
    return {
        "budget": found.budget,
        "float": found.floating,
        "chosen": None if chosen is None else chosen.model_dump(mode="json"),
        f"share_of_{found.costs[0]}": None if chosen is None else share(found, chosen),
        "layers": {group.name: group.options[option] for group, option in groups},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--model", choices=[*WEIGHTS, TEXT], default="resnet20")
    parser.add_argument("--out", help="a folder to keep; a new temporary one by default")
    model, out = parser.parse_args().model, parser.parse_args().out or tempfile.mkdtemp(prefix="recoup-search-")
    spent, (least, more) = {}, budgets(model)
    for stage in STAGES[:-1]:
        _, spent[stage] = timed(recipe(model, out, least), stage)
    found, spent[STAGES[-1]] = timed(recipe(model, out, least), STAGES[-1])
    again, spent["another budget"] = timed(recipe(model, out, more), "run")
    total = round(sum(spent[stage]["cpu_seconds"] for stage in STAGES), 1)
    found_checks = checks(found) | {
        "in_time": total <= MOST_SECONDS if model == "resnet20" else None,
        "nothing_measured_for_another_budget": spent["another budget"]["measurements"] == 0,
    }
    path = save(
        f"search_{model}",
        {
            "capability": capability(),
            "cpu_seconds": total,
            "stages": spent,
            "checks": found_checks,
            "answers": [answer(one) for one in (found, again)],
            "points": [point.model_dump(mode="json") for point in found.points],
            "probes": [probe.model_dump(mode="json") for probe in found.probes],
        },
    )
    for name in ("in_time", "dominates", "within", "nothing_measured_for_another_budget"):
        print(f"{name}: {found_checks[name]}")
    print(f"{total} s of CPU; written: {path}")


if __name__ == "__main__":
    main()
