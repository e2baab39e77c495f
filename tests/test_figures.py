"""README's and the papers' pages' own figures are those of the logs: each is computed here and looked for there."""

import json
import math
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
README = (ROOT / "README.md").read_text("utf-8")


def paper(name: str) -> str:
    return (ROOT / "docs" / "papers" / f"{name}.md").read_text("utf-8")


def lines(name: str) -> list[Any]:
    return [json.loads(line) for line in (RESULTS / name).read_text("utf-8").splitlines()]


def told(values: list[float]) -> str:
    """As tables write it: the mean, and the standard deviation where there are several."""
    mean = f"{statistics.mean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.2f}"


def grouped(name: str, seed: int, value: str) -> dict[tuple, list[float]]:
    """The values of a log by their key without the place of the seed."""
    found = defaultdict(list)
    for row in lines(name):
        key = row["key"]
        found[(*key[:seed], *key[seed + 1 :])].append(row[value])
    return found


@pytest.mark.parametrize(
    ("key", "page"),
    [
        ((20, 1, "float statistics", 0, False), "both"),
        ((20, 2, "float statistics", 0, False), "both"),
        ((20, 4, "float statistics", 0, False), "both"),
        ((20, 4, "paired", 1024, True), "both"),
        ((44, 4, "float statistics", 0, False), "paper"),
        ((44, 4, "paired", 1024, True), "paper"),
        ((56, 1, "float statistics", 0, False), "paper"),
        ((56, 2, "float statistics", 0, False), "paper"),
    ],
)
def test_nbsmt(key, page):
    figure = told(grouped("nbsmt_accuracy.jsonl", 1, "top1")[key])
    assert figure in paper("nbsmt")
    assert page == "paper" or figure in README or figure.partition(" ")[0] in README


@pytest.mark.parametrize(
    "key", [(None, None, "fp32", "none"), (7, 4, "fp32", "none"), (7, 4, "fp32", "gain per layer")], ids=str
)
def test_lba(key):
    figure = told(grouped("lba_accuracy.jsonl", 4, "value")[key])
    assert figure in README
    assert figure in paper("lba")


@pytest.mark.parametrize("network", ["ResNet-20", "MobileNet-v1 x0.25"])
@pytest.mark.parametrize("norm", ["batch norm", "range + FP10 + BFP4"])
def test_lightnorm(network, norm):
    figure = told(grouped("lightnorm_accuracy.jsonl", 3, "value")["trained", network, norm])
    assert figure in README
    assert figure in paper("lightnorm")


@pytest.mark.parametrize(("epochs", "blocks"), [(3, 4), (2, 9), (1, 19)])
def test_pipeline(epochs, blocks):
    """Paired by seed, with Student's 95 % interval over five seeds."""
    last = {
        (row["method"], row["seed"]): row["top1"]
        for row in lines("pipeline_converged.jsonl")
        if (row.get("epochs"), row["epoch"], row["blocks"]) == (epochs, epochs - 1, blocks)
        and "batch" not in row["method"]
        and row.get("data", "fashion-mnist") == "fashion-mnist"
    }
    for method, pages in (("LWPv+SC", (README, paper("pipeline"))), ("PB", (paper("pipeline"),))):
        less = [last[method, seed] - last["SGDM, no delay", seed] for seed in range(5)]
        half = 2.776 * statistics.stdev(less) / math.sqrt(5)
        figure = f"{statistics.mean(less):+.2f} ± {half:.2f}"
        assert all(figure in page for page in pages), figure


def test_tensor_cores_of_a_card():
    """What an H100 gave: every output of every comparison."""
    rows = json.loads((RESULTS / "tensorcore_gpu.json").read_text("utf-8"))["bits"]["card"]
    assert not any(row["different"] for row in rows)
    outputs = sum(row["outputs"] for row in rows)
    for page in ("docs/tensorcore.md", "docs/guides/gpu.md"):
        assert f"{len(rows)} comparisons" in (ROOT / page).read_text("utf-8")
        assert f"{outputs:,} outputs" in (ROOT / page).read_text("utf-8")
    assert f"{outputs:,} outputs" in README
