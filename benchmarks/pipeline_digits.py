"""Claim: Spike Compensation and Linear Weight Prediction win back what pipelined backpropagation loses.

A residual MLP of 16 stages (width 32, layer norm) on scikit-learn's digits; seeds 0 to 4 of every method in batched
networks. SGDM has no delay; the others D_s = 2 (15 - s) <= 30 updates, times the factor of a delay sweep. Learning rate
and momentum follow the scaling rule from (eta_r, 0.9) at batch 32, and the rate falls linearly to zero: 3 epochs at
batch one; 12 at update size 8, which is a batch of 8 with its mean loss, D counted in updates. SGDM alone decides on
eta_r at batch one: of a grid of factors of sqrt 2 it does its best from 0.032 to 0.064, and both ends are shown; update
size 8 is shown at three rates. Accuracy is the last point's, the loss the mean over the last epoch, both of the runs
that did not diverge; differences are paired by seed.

    python benchmarks/pipeline_digits.py    # goes on where it stopped (results/pipeline_digits.jsonl), then writes
                                            # results/pipeline_digits.json and pipeline_digits_delay.svg
"""

import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from scipy import stats

from benchmarks.log import Log
from benchmarks.measure import RESULTS, save
from recoup.pipeline import Mitigation
from recoup.plots.pipeline import delay_figure
from recoup.study.measures.pipeline import PB, SGDM, Case, Setting, study

SEEDS = range(5)
AT_ONCE = 25  # runs in one network; the rings of more leave the processor's cache
METHODS = {
    SGDM: Mitigation(),
    PB: Mitigation(),
    "stash": Mitigation(stash=True),
    "SC": Mitigation.parse("sc"),
    "stash+SC": Mitigation(compensation=1.0, stash=True),
    "LWP": Mitigation.parse("lwpv"),
    "LWPv+SC": Mitigation.parse("lwpv+sc"),
    "LWPw+SC": Mitigation.parse("lwpw+sc"),
    "SpecTrain": Mitigation.parse("spectrain"),
}
SWEPT = (PB, "SC", "LWP", "LWPv+SC", "SpecTrain")
LOW, HIGH = 0.032, 0.064  # where SGDM does its best
RATES = (0.016, 0.0226, LOW, 0.0453, HIGH, 0.0905, 0.128)
BATCH_ONE, UPDATE_OF_8 = (1, 3), (8, 12)  # batch, epochs
COLUMNS = {
    f"batch 1, D <= {bound}, eta_r {rate}": (*BATCH_ONE, rate, bound / 30) for rate in (LOW, HIGH) for bound in (30, 90)
} | {f"update size 8, D <= 30, eta_r {rate}": (*UPDATE_OF_8, rate, 1.0) for rate in (0.004, 0.008, 0.016)}
FACTORS = (2.0, 0.5, 4.0)  # of the sweep, beside 1 and 3; at the lower rate

Column = tuple[int, int, float, float]  # batch, epochs, eta_r, factor


def measure(log: Log, column: Column, methods: Sequence[str]) -> None:
    """What the log lacks of a column, some runs at a time."""
    batch, epochs, rate, factor = column
    setting = Setting(batch=batch, epochs=epochs, reference_lr=rate)
    wanted = [(m, seed) for m in methods for seed in SEEDS if (*key(column, m), seed, "loss") not in log.values]
    for start in range(0, len(wanted), AT_ONCE):
        cases = [Case(m, METHODS[m], 0.0 if m == SGDM else factor, seed) for m, seed in wanted[start : start + AT_ONCE]]
        for row in study(setting, cases).rows:
            for metric, value in (("accuracy", row.accuracy), ("loss", row.loss)):
                log.measure((*key(column, row.label), row.seed, metric), lambda value=value: value)


def key(column: Column, method: str) -> tuple:
    """Of a method's runs; SGDM has no delay."""
    batch, epochs, rate, factor = column
    return (batch, epochs, rate, 0.0 if method == SGDM else factor, method)


def values(log: Log, column: Column, method: str, metric: str) -> list[float]:
    """One a seed that was measured; NaN: diverged."""
    keys = [(*key(column, method), seed, metric) for seed in SEEDS]
    return [log.values[k] for k in keys if k in log.values]


def summary(found: Sequence[float]) -> dict[str, object]:
    """Mean and standard deviation of the runs that did not diverge, and all of them."""
    kept = [v for v in found if math.isfinite(v)]
    return {
        "mean": statistics.mean(kept) if kept else None,
        "std": statistics.stdev(kept) if len(kept) > 1 else None,
        "diverged": len(found) - len(kept),
        "runs": [v if math.isfinite(v) else None for v in found],
    }


def paired(one: Sequence[float], other: Sequence[float]) -> dict[str, float] | None:
    """Mean of one - other over seeds where both are finite, and the p of a two-sided paired t test."""
    both = [(a, b) for a, b in zip(one, other, strict=False) if math.isfinite(a) and math.isfinite(b)]
    if len(both) < 3:
        return None
    a, b = zip(*both, strict=True)
    test = stats.ttest_rel(a, b)
    return {"mean": statistics.mean(x - y for x, y in both), "p": float(test.pvalue), "pairs": len(both)}


def table(log: Log, column: Column) -> dict[str, object]:
    """Every method of a column, with its loss in logarithms and its accuracy against PB's and SGDM's."""
    found: dict[str, object] = {}
    for method in METHODS:
        accuracy, loss = (values(log, column, method, metric) for metric in ("accuracy", "loss"))
        if not accuracy:
            continue
        row: dict[str, object] = {"accuracy": summary(accuracy), "loss": summary(loss)}
        for other in (PB, SGDM):
            if method != other:
                theirs = values(log, column, other, "loss")
                row[f"log loss - {other}'s"] = paired([math.log(v) for v in loss], [math.log(v) for v in theirs])
                row[f"accuracy - {other}'s"] = paired(accuracy, values(log, column, other, "accuracy"))
        found[method] = row
    return found


def markdown(tables: dict[str, dict]) -> str:
    """Accuracy and loss, a column each table, and how many runs diverged."""
    lines = [f"| | {' | '.join(tables)} |", "|---" * (len(tables) + 1) + "|"]
    for method in METHODS:
        cells = []
        for rows in tables.values():
            row = rows.get(method)
            if row is None or row["loss"]["mean"] is None:
                cells.append("" if row is None else "diverged")
                continue
            lost = f" ({row['loss']['diverged']} diverged)" if row["loss"]["diverged"] else ""
            spread = row["accuracy"]["std"] or math.nan
            cells.append(f"{row['accuracy']['mean']:.1f} ± {spread:.1f} / {row['loss']['mean']:.3f}{lost}")
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def sweep(log: Log, metric: str) -> dict[str, dict[float, list[float]]]:
    """A metric by method and largest delay."""
    found: dict[str, dict[float, list[float]]] = {}
    for method in SWEPT:
        for factor in sorted((1.0, 3.0, *FACTORS)):
            runs = values(log, (*BATCH_ONE, LOW, factor), method, metric)
            if runs:
                found.setdefault(method, {})[30 * factor] = runs
    return found


def report(log: Log, *, complete: bool) -> None:
    """The table, the results file and the plot, of what there is."""
    tables = {name: table(log, column) for name, column in COLUMNS.items()}
    print(markdown(tables))
    rates = {str(r): summary(values(log, (*BATCH_ONE, r, 1.0), SGDM, "loss")) for r in RATES}
    losses, accuracies = sweep(log, "loss"), sweep(log, "accuracy")
    kept = {m: {str(d): summary(runs) for d, runs in row.items()} for m, row in accuracies.items()}
    kept_losses = {m: {str(d): summary(runs) for d, runs in row.items()} for m, row in losses.items()}
    setting = {"seeds": len(SEEDS), "eta_r of the sweep": LOW, "SGDM's loss by eta_r": rates, "complete": complete}
    sweeps = {"sweep, accuracy": kept, "sweep, loss": kept_losses}
    print(save("pipeline_digits", {"setting": setting, **tables, **sweeps}))
    if not losses:
        return
    reference = (SGDM, values(log, (*BATCH_ONE, LOW, 1.0), SGDM, "loss"))
    figure = delay_figure(losses, reference=reference, measure="Training loss of the last epoch", log=True)
    figure.savefig(RESULTS / "pipeline_digits_delay.svg")


def main() -> None:
    torch.set_num_threads(1)
    log = Log(RESULTS / "pipeline_digits.jsonl")
    for name, column in COLUMNS.items():
        print(name, flush=True)
        measure(log, column, list(METHODS))
        report(log, complete=False)
    for rate in RATES:
        measure(log, (*BATCH_ONE, rate, 1.0), [SGDM])
    for factor in FACTORS:
        measure(log, (*BATCH_ONE, LOW, factor), SWEPT)
        report(log, complete=factor == FACTORS[-1])


if __name__ == "__main__":
    main()
