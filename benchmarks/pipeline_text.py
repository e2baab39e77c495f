"""Question: what does a delay cost a language model trained by AdamW until the rate is zero, and what wins it back?

The character GPT (4 blocks, width 48, context 64) on the first nine tenths of tinyshakespeare, eight windows an update,
ten stages: fine-grained they are 18 to 0 updates late, under 1F1B 9 to 0. Five seeds; a seed decides initial weights
and windows and is the same for every method, so that differences are paired. The rate falls linearly to zero; its
beginning is that of a grid at which AdamW without a delay ends lowest on two seeds, and no other method was asked.
Nats per character are of the last tenth of the text.

    python benchmarks/pipeline_text.py [--table]

Interrupted, the same command goes on. The log has one JSON line a run; ``--table`` computes the table from the log.
"""

import json
import math
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch import Tensor, nn

import recoup as rc
from benchmarks.measure import RESULTS, save
from benchmarks.paired import gap, spread, table_only
from recoup.data import root
from recoup.data.text import contexts
from recoup.errors import RecoupError
from recoup.evaluation import nats_per_token

WIDTH, BLOCKS, HEADS, BATCH, STEPS, MEAN = 48, 4, 4, 8, 1500, 100
GRID, SEEDS = (1e-3, 2e-3, 4e-3, 8e-3, 16e-3), range(5)
EXACT = "no delay"
METHODS = {
    "nothing": "none",
    "stash": "stash",
    "SC": "sc",
    "prediction, T = D": "lwpv",
    "prediction, T = D, stash": "lwpv+stash",
    "coasting": "coasting",
    "coasting, stash": "coasting+stash",
}
LATE = {"fine-grained": rc.pipeline.delays(BLOCKS * 2 + 2), "1F1B": list(range(BLOCKS * 2 + 1, -1, -1))}
LOG = RESULTS / "pipeline_text.jsonl"


def stages() -> list[list[str]]:
    """Embeddings, the two halves of every block, and the classifier."""
    halves = (("ln1", "qkv", "attention", "proj"), ("ln2", "fc1", "fc2"))
    inner = [[f"blocks.{block}.{name}" for name in half] for block in range(BLOCKS) for half in halves]
    return [["tok", "pos"], *inner, ["lnf", "head"]]


def text() -> tuple[str, Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
    """Alphabet, training windows and their successors, and test batches."""
    folder = root() / "text"
    trained, alphabet = rc.models.load_chargpt(folder / "chargpt_tinyshakespeare.pt")
    path = folder / "tinyshakespeare.txt"
    windows = contexts(path, alphabet, trained.context, last=0.9)
    test = contexts(path, alphabet, trained.context, first=0.9)
    return alphabet, torch.cat([x for x, _ in windows]), torch.cat([y for _, y in windows]), test


def loss(out: Tensor, y: Tensor) -> Tensor:
    """Cross entropy over all characters."""
    return nn.functional.cross_entropy(out.flatten(0, 1), y.flatten())


def trained(method: str, late: str, seed: int, rate: float) -> dict[str, float | None]:
    """Training loss, a mean over the last steps, and nats of the test text; None where it diverged."""
    alphabet, x, y, test = text()
    torch.manual_seed(seed)
    model = rc.models.chargpt(len(alphabet), BLOCKS, WIDTH, HEADS)
    order = torch.randint(len(x), (STEPS, BATCH), generator=torch.Generator().manual_seed(1000 + seed))
    cut = stages()
    delays = [0] * len(cut) if method == EXACT else LATE[late]
    simulator = rc.pipeline.Simulator(
        model,
        cut,
        delays,
        lambda k: rate * (1 - k / STEPS),
        mitigation=METHODS.get(method, "none"),
        loss=loss,
        optimizer=rc.pipeline.AdamW(),
    )
    losses = []
    try:
        for rows in order:
            losses.append(simulator.step(x[rows], y[rows]))
    except RecoupError as error:
        print(f"{method}, {late}, seed {seed}, rate {rate}: {error}", flush=True)
        return {"loss": None, "nats": None}
    return {"loss": statistics.mean(float(loss) for loss in losses[-MEAN:]), "nats": nats_per_token(model, test)}


def logged() -> list[dict]:
    """The log's rows."""
    return [json.loads(line) for line in LOG.read_text().splitlines()] if LOG.exists() else []


def measure(method: str, late: str, seed: int, rate: float) -> None:
    """Train a run that the log lacks, and keep its row."""
    key = {"method": method, "delays": late, "seed": seed, "rate": rate, "steps": STEPS}
    if any(key.items() <= row.items() for row in logged()):
        return
    delay = 0 if method == EXACT else LATE[late][0]
    row = key | {"delay": delay, **trained(method, late, seed, rate)}
    with LOG.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(row, flush=True)


def found(method: str, late: str, rate: float) -> dict[int, float]:
    """A method's nats by seed; NaN where a run diverged."""
    key = {"method": method, "delays": late, "rate": rate, "steps": STEPS}
    rows = [row for row in logged() if key.items() <= row.items()]
    return {row["seed"]: math.nan if row["nats"] is None else row["nats"] for row in rows}


def grid_of(rate: float) -> list[float]:
    """Nats without a delay on the grid's seeds."""
    exact = found(EXACT, "none", rate)
    return [exact[seed] for seed in SEEDS[:2] if seed in exact]


def best() -> float:
    """The rate at which AdamW without a delay ends lowest on the grid's seeds; 0 where the log lacks the grid."""
    means = {rate: statistics.mean(grid_of(rate) or [math.nan]) for rate in GRID}
    finite = {rate: mean for rate, mean in means.items() if math.isfinite(mean)}
    return min(finite, key=lambda rate: finite[rate]) if finite else 0.0


def cells(method: str, late: str, rate: float) -> list[str]:
    """Nats, and the difference to no delay on the seeds that both have."""
    nats, exact = found(method, late, rate), found(EXACT, "none", rate)
    if not nats:
        return ["not measured", ""]
    if lost := sum(map(math.isnan, nats.values())):
        return [f"{lost} of {len(nats)} diverged", ""]
    both = sorted(seed for seed in nats if math.isfinite(exact.get(seed, math.nan)))
    if method == EXACT or len(both) < 2:
        return [spread(list(nats.values()), 3), ""]
    mean, half = gap([nats[seed] for seed in both], [exact[seed] for seed in both])
    return [spread(list(nats.values()), 3), f"{mean:+.3f} ± {half:.3f}"]


def table(rate: float) -> str:
    """In Markdown, with the paired differences to no delay."""
    lines = [
        "| | fine-grained, D = 18 to 0 | less no delay's | 1F1B, D = 9 to 0 | less no delay's |",
        "|---|---|---|---|---|",
    ]
    own = cells(EXACT, "none", rate)[0]
    lines.append(f"| {EXACT} | {own} | | {own} | |")
    for method in METHODS:
        lines.append(f"| {method} | " + " | ".join(c for late in LATE for c in cells(method, late, rate)) + " |")
    return "\n".join(lines)


def main() -> None:
    measures = not table_only(str(__doc__))
    torch.set_num_threads(1)
    if measures:
        for rate in GRID:
            for seed in SEEDS[:2]:
                measure(EXACT, "none", seed, rate)
        for seed in SEEDS:
            measure(EXACT, "none", seed, best())
            for late in LATE:
                for method in METHODS:
                    measure(method, late, seed, best())
    rate = best()
    grid = {str(rate): grid_of(rate) for rate in GRID}
    print("nats without a delay by rate, two seeds:", grid, f"chosen {rate}", table(rate), sep="\n")
    if measures:
        save("pipeline_text", {"rate": rate, "grid": grid, "rows": logged()})


if __name__ == "__main__":
    main()
