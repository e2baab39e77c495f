"""Claim: on convex quadratics compensation and prediction win back most of the speed that delayed gradients cost.

The least half-life of the error, over learning rate and momentum, of `recoup.pipeline.analysis`: by condition number at
delay 1, and by delay at condition number 1000. No training; beside it the figures of the specification.

    python benchmarks/pipeline_quadratic.py    # results/pipeline_quadratic.json and pipeline_quadratic.svg
"""

import sys
from pathlib import Path
from typing import get_args

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.measure import RESULTS, save
from recoup.pipeline.analysis import Method, half_life
from recoup.plots.pipeline import half_life_figure

NAMES = {"gdm": "GDM", "sc": "SC", "lwp": "LWP", "lwpv+sc": "LWPv+SC", "lwpw+sc": "LWPw+SC"}
METHODS: tuple[Method, ...] = get_args(Method)
CONDITIONS, DELAYS = (1e1, 1e2, 1e3, 1e4, 1e5), (1, 2, 4, 8, 16)
DELAY, CONDITION = 1, 1e3
EXPECTED = {  # specs/pipeline.md, section 5: condition number 1000
    1: {"gdm": 707, "sc": 120, "lwp": 108, "lwpw+sc": 43},
    16: {"gdm": 7473, "sc": 1334, "lwp": 1233, "lwpw+sc": 431},
}


def main() -> None:
    by_condition = {m: {c: half_life(m, DELAY, c)[0] for c in CONDITIONS} for m in METHODS}
    best = {m: {d: half_life(m, d, CONDITION) for d in DELAYS} for m in METHODS}
    by_delay = {m: {d: found[0] for d, found in row.items()} for m, row in best.items()}
    print(f"| half-life, updates | {' | '.join(f'D = {d}' for d in DELAYS)} |\n|{'---|' * (len(DELAYS) + 1)}")
    for method, row in by_delay.items():
        print(f"| {NAMES[method]} | {' | '.join(f'{v:.0f}' for v in row.values())} |")
    print(f"\n| at D = {DELAY} | {' | '.join(f'{c:g}' for c in CONDITIONS)} |\n|{'---|' * (len(CONDITIONS) + 1)}")
    for method, row in by_condition.items():
        print(f"| {NAMES[method]} | {' | '.join(f'{v:.4g}' for v in row.values())} |")
    apart = {d: {m: by_delay[m][d] / value - 1 for m, value in row.items()} for d, row in EXPECTED.items()}
    print("\nagainst the specification:", {d: {m: f"{v:+.1%}" for m, v in r.items()} for d, r in apart.items()})
    tables = {
        "half-life, rate and momentum by delay": {m: {str(d): v for d, v in r.items()} for m, r in best.items()},
        "half-life by condition number": {m: {f"{c:g}": v for c, v in r.items()} for m, r in by_condition.items()},
        "over the specification's": {str(d): row for d, row in apart.items()},
    }
    print(save("pipeline_quadratic", {"delay": DELAY, "condition": CONDITION, **tables}))
    figure = half_life_figure(
        {NAMES[m]: row for m, row in by_condition.items()},
        {NAMES[m]: row for m, row in by_delay.items()},
        delay=DELAY,
        condition=CONDITION,
    )
    figure.savefig(RESULTS / "pipeline_quadratic.svg")


if __name__ == "__main__":
    main()
