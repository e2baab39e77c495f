"""Claim: Spike Compensation and Linear Weight Prediction win back what pipelined backpropagation loses.

A residual MLP of 16 stages (width 32, layer norm) on scikit-learn's digits; seeds 0 to 4 of every method in batched
networks. SGDM has no delay; the others D_s = 2 (15 - s) <= 30 updates, times the factor of a delay sweep. Learning rate
and momentum follow the scaling rule from (eta_r, 0.9) at batch 32, and the rate falls linearly to zero: 3 epochs at
batch one; 12 at update size 8, which is a batch of 8 with its mean loss, D counted in updates. SGDM alone decides on
eta_r at batch one: of a grid of factors of sqrt 2 it does its best from 0.032 to 0.064, and both ends are shown; update
size 8 is shown at three rates. Accuracy is the last point's, the loss the mean over the last epoch, both of the runs
that did not diverge; differences are paired by seed.

    python benchmarks/pipeline_digits.py [--tables]

Interrupted, the same command goes on; it writes pipeline_digits.json and pipeline_digits_delay.svg after every column.
The log has one JSON line a run and epoch; loss and accuracy are null from the epoch on in which a run diverged. Runs of
batch one at eta_r other than 0.032, or D other than 0, 30 and 90, have their last epoch only: no other was kept when
they were measured. ``--tables`` computes the tables, that of the documentation first, from the log.
"""

import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from scipy import stats

from benchmarks.log import append, arguments, ends, finite
from benchmarks.measure import RESULTS, save
from recoup.pipeline import Mitigation
from recoup.plots.pipeline import delay_figure
from recoup.study.measures.pipeline import PB, POINTS, SGDM, Case, PipelineRow, Setting, study

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

DOCUMENTED = {
    "batch 1, D <= 30": (*BATCH_ONE, LOW, 1.0),
    "batch 1, D <= 90": (*BATCH_ONE, LOW, 3.0),
    "update size 8, D <= 30": (*UPDATE_OF_8, 0.016, 1.0),
}
DELAY = 30  # of the first stage, at factor 1
FIELDS = ("update_size", "epochs", "rate", "delay", "method", "seed")  # of a run
LOG = RESULTS / "pipeline_digits.jsonl"

Column = tuple[int, int, float, float]  # batch, epochs, eta_r, factor
Ends = dict[tuple, dict]  # rows of last epochs, by FIELDS


def measure(column: Column, methods: Sequence[str]) -> None:
    """What the log lacks of a column, some runs at a time."""
    batch, epochs, rate, factor = column
    setting, ended = Setting(batch=batch, epochs=epochs, reference_lr=rate), ends(LOG, *FIELDS)
    wanted = [(m, seed) for m in methods for seed in SEEDS if (*key(column, m), seed) not in ended]
    for start in range(0, len(wanted), AT_ONCE):
        cases = [Case(m, METHODS[m], 0.0 if m == SGDM else factor, seed) for m, seed in wanted[start : start + AT_ONCE]]
        for run in study(setting, cases).rows:
            rows = by_epoch(run, column)
            append(LOG, *rows)
            print(rows[-1], flush=True)


def by_epoch(run: PipelineRow, column: Column) -> list[dict]:
    """A run's rows: the mean loss of every epoch, and the accuracy at its end."""
    own = dict(zip(FIELDS, key(column, run.label), strict=False))
    rows = []
    for epoch in range(own["epochs"]):
        points = slice(epoch * POINTS, (epoch + 1) * POINTS)
        loss = statistics.fmean(math.nan if point is None else point for point in run.losses[points])
        top1 = run.accuracies[points][-1] if math.isfinite(loss) else None
        measured = {"seed": run.seed, "epoch": epoch, "loss": finite(loss), "top1": top1}
        rows.append({"method": own["method"], "delay": own["delay"], **measured, **own})
    return rows


def key(column: Column, method: str) -> tuple:
    """Of a method's runs, FIELDS less the seed; SGDM has no delay."""
    batch, epochs, rate, factor = column
    return (batch, epochs, rate, 0 if method == SGDM else round(DELAY * factor), method)


def values(ended: Ends, column: Column, method: str, metric: str) -> list[float]:
    """One a seed that was measured; NaN: diverged."""
    rows = [ended.get((*key(column, method), seed)) for seed in SEEDS]
    return [math.nan if row[metric] is None else row[metric] for row in rows if row is not None]


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


def table(ended: Ends, column: Column) -> dict[str, object]:
    """Every method of a column, with its loss in logarithms and its accuracy against PB's and SGDM's."""
    found: dict[str, object] = {}
    for method in METHODS:
        accuracy, loss = (values(ended, column, method, metric) for metric in ("top1", "loss"))
        if not accuracy:
            continue
        row: dict[str, object] = {"accuracy": summary(accuracy), "loss": summary(loss)}
        for other in (PB, SGDM):
            if method != other:
                theirs = values(ended, column, other, "loss")
                row[f"log loss - {other}'s"] = paired([math.log(v) for v in loss], [math.log(v) for v in theirs])
                row[f"accuracy - {other}'s"] = paired(accuracy, values(ended, column, other, "top1"))
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
            lost, runs = row["loss"]["diverged"], len(row["loss"]["runs"])
            told = f" ({lost} of {runs} diverged)" if lost else ""
            spread = row["accuracy"]["std"] or math.nan
            cells.append(f"{row['accuracy']['mean']:.1f} ± {spread:.1f} / {row['loss']['mean']:.3f}{told}")
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def sweep(ended: Ends, metric: str) -> dict[str, dict[float, list[float]]]:
    """A metric by method and largest delay."""
    found: dict[str, dict[float, list[float]]] = {}
    for method in SWEPT:
        for factor in sorted((1.0, 3.0, *FACTORS)):
            runs = values(ended, (*BATCH_ONE, LOW, factor), method, metric)
            if runs:
                found.setdefault(method, {})[DELAY * factor] = runs
    return found


def print_tables(ended: Ends) -> None:
    """The documentation's, and that of all columns."""
    for columns in (DOCUMENTED, COLUMNS):
        print(markdown({name: table(ended, column) for name, column in columns.items()}), end="\n\n")


def report(ended: Ends, *, complete: bool) -> None:
    """The results file and the plot, of what there is."""
    tables = {name: table(ended, column) for name, column in COLUMNS.items()}
    rates = {str(r): summary(values(ended, (*BATCH_ONE, r, 1.0), SGDM, "loss")) for r in RATES}
    losses, accuracies = sweep(ended, "loss"), sweep(ended, "top1")
    kept = {m: {str(d): summary(runs) for d, runs in row.items()} for m, row in accuracies.items()}
    kept_losses = {m: {str(d): summary(runs) for d, runs in row.items()} for m, row in losses.items()}
    setting = {"seeds": len(SEEDS), "eta_r of the sweep": LOW, "SGDM's loss by eta_r": rates, "complete": complete}
    sweeps = {"sweep, accuracy": kept, "sweep, loss": kept_losses}
    print(save("pipeline_digits", {"setting": setting, **tables, **sweeps}))
    if not losses:
        return
    reference = (SGDM, values(ended, (*BATCH_ONE, LOW, 1.0), SGDM, "loss"))
    figure = delay_figure(losses, reference=reference, measure="Training loss of the last epoch", log=True)
    figure.savefig(RESULTS / "pipeline_digits_delay.svg")


def main() -> None:
    measures = not arguments(__doc__).parse_args().tables
    torch.set_num_threads(1)
    if measures:
        for name, column in COLUMNS.items():
            print(name, flush=True)
            measure(column, list(METHODS))
            report(ends(LOG, *FIELDS), complete=False)
        for rate in RATES:
            measure((*BATCH_ONE, rate, 1.0), [SGDM])
        for factor in FACTORS:
            measure((*BATCH_ONE, LOW, factor), SWEPT)
            report(ends(LOG, *FIELDS), complete=factor == FACTORS[-1])
    print_tables(ends(LOG, *FIELDS))


if __name__ == "__main__":
    main()
