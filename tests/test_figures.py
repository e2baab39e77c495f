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
PIPELINE = (ROOT / "docs" / "pipeline.md").read_text("utf-8")


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


@pytest.mark.parametrize(("epochs", "blocks", "data"), [(3, 4, ""), (2, 9, ""), (1, 19, ""), (2, 4, "cifar10")])
def test_pipeline(epochs, blocks, data):
    """Paired by seed, with Student's 95 % interval over five seeds."""
    last = {
        (row["method"], row["seed"]): row["top1"]
        for row in lines("pipeline_converged.jsonl")
        if (row.get("epochs"), row["epoch"], row["blocks"]) == (epochs, epochs - 1, blocks)
        and "batch" not in row["method"]
        and row.get("data", "fashion-mnist") == (data or "fashion-mnist")
    }
    pages = paper("pipeline"), (ROOT / "docs" / "pipeline.md").read_text("utf-8"), *([] if data else [README])
    for method, of in (("LWPv+SC", pages), ("PB", pages[:2])):
        less = [last[method, seed] - last["SGDM, no delay", seed] for seed in range(5)]
        half = 2.776 * statistics.stdev(less) / math.sqrt(5)
        figure = f"{statistics.mean(less):+.2f} ± {half:.2f}"
        assert all(figure in page for page in of), figure


def of_pipeline(log: str, value: str = "top1", **setting: Any) -> list[float]:
    """The values at the end of some runs; NaN: diverged."""
    rows = [r for r in lines(log) if setting.items() <= r.items() and r["epoch"] == r["epochs"] - 1]
    assert [r["seed"] for r in rows] == sorted({r["seed"] for r in rows})
    return [math.nan if r[value] is None else r[value] for r in rows]


DIGITS = ((1, 30, 0.032), (1, 90, 0.032), (8, 30, 0.016))


@pytest.mark.parametrize("method", ["SGDM", "PB", "stash", "SC", "stash+SC", "LWP", "LWPv+SC", "LWPw+SC", "SpecTrain"])
def test_pipeline_of_digits(method):
    """The table's row: accuracy / loss of the runs that did not diverge."""
    cells = []
    for update, delay, rate in DIGITS:
        run = {"method": method, "delay": 0 if method == "SGDM" else delay, "update_size": update, "rate": rate}
        top1, loss = (of_pipeline("pipeline_digits.jsonl", value, **run) for value in ("top1", "loss"))
        assert len(top1) == len(loss) == 5
        kept, losses = ([v for v in values if math.isfinite(v)] for values in (top1, loss))
        lost = f" ({5 - len(kept)} of 5 diverged)" if len(kept) < 5 else ""
        cell = (
            f"{statistics.mean(kept):.1f} ± {statistics.stdev(kept):.1f} / {statistics.mean(losses):.3f}"
            if kept
            else ""
        )
        cells.append(cell + lost if kept else "diverged")
    assert f"| {method} | {' | '.join(cells)} |\n" in PIPELINE


@pytest.mark.parametrize(
    ("method", "late", "rate"),
    [
        *(("nothing", late, 0.002) for late in ("fine-grained", "1F1B")),
        *(("coasting, stash", late, 0.002) for late in ("fine-grained", "1F1B")),
        ("SC", "fine-grained", 0.004),
        ("SC", "1F1B", 0.001),
    ],
)
def test_pipeline_of_text(method, late, rate):
    """Nats per character, and less those without a delay, with Student's 95 % interval over five seeds."""
    own = of_pipeline("pipeline_text.jsonl", "nats", method=method, delays=late, rate=rate)
    exact = of_pipeline("pipeline_text.jsonl", "nats", method="no delay", rate=0.016)
    less = [a - b for a, b in zip(own, exact, strict=True)]
    half = 2.776 * statistics.stdev(less) / math.sqrt(5)
    cells = f"{statistics.mean(own):.3f} ± {statistics.stdev(own):.3f} | {statistics.mean(less):+.3f} ± {half:.3f} |"
    assert len(less) == 5
    assert any(line.startswith(f"| {method} | ") and cells in line for line in PIPELINE.splitlines())


@pytest.mark.parametrize(
    ("epochs", "method"),
    [*((1, method) for method in ("none", "sc", "lwpv", "lwpv+sc")), *((2, method) for method in ("none", "lwpv+sc"))],
)
def test_pipeline_of_cifar10(epochs, method):
    """Top-1, and its difference to SGDM's of the same seed."""
    own, exact = (of_pipeline("pipeline_cifar10.jsonl", method=m, epochs=epochs) for m in (method, "sgdm"))
    less = [a - b for a, b in zip(own, exact, strict=True)]
    assert f"{told(own)} ({statistics.mean(less):+.2f} ± {statistics.stdev(less):.2f})" in PIPELINE
    assert told(exact) in PIPELINE
    assert epochs == 2 or method not in ("none", "lwpv+sc") or told(own) in paper("pipeline")


def test_tensor_cores_of_a_card():
    """What an H100 gave: every output of every comparison."""
    rows = json.loads((RESULTS / "tensorcore_gpu.json").read_text("utf-8"))["bits"]["card"]
    assert not any(row["different"] for row in rows)
    outputs = sum(row["outputs"] for row in rows)
    for page in ("docs/tensorcore.md", "docs/guides/gpu.md"):
        assert f"{len(rows)} comparisons" in (ROOT / page).read_text("utf-8")
        assert f"{outputs:,} outputs" in (ROOT / page).read_text("utf-8")
    assert f"{outputs:,} outputs" in README
