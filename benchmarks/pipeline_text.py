"""Question: what does a delay cost a language model trained by AdamW until the rate is zero, and what wins it back?

The character GPT (4 blocks, width 48, context 64) on the first nine tenths of tinyshakespeare, eight windows an update,
ten stages: fine-grained they are 18 to 0 updates late, under 1F1B 9 to 0. Five seeds; a seed decides initial weights
and windows and is the same for every method, so that differences are paired. The rate falls linearly to zero; every
method, no delay included, begins at a rate of its own: 0.004, halved or doubled while seed 0 ends lower for it. Nats
per character are of the last tenth of the text, for the choice of the rate as well.

    python benchmarks/pipeline_text.py [--tables]

Interrupted, the same command goes on. The log has one JSON line a run and epoch; a run is one epoch of 1,500 updates
(12,000 windows, drawn from 15,685), after which it is evaluated. ``--tables`` computes the table from the log.
"""

import math
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch import Tensor, nn

import recoup as rc
from benchmarks.log import append, arguments, ends, rows_of
from benchmarks.measure import RESULTS, save
from benchmarks.paired import gap, spread
from recoup.data import root
from recoup.data.text import contexts
from recoup.errors import RecoupError
from recoup.evaluation import nats_per_token

WIDTH, BLOCKS, HEADS, BATCH, STEPS, MEAN = 48, 4, 4, 8, 1500, 100
START, SEEDS = 4e-3, range(5)
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
FIELDS = ("method", "delays", "rate", "updates", "seed")  # of a run


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


def measure(method: str, late: str, seed: int, rate: float) -> None:
    """Train a run that the log lacks, and keep its row."""
    if (method, late, rate, STEPS, seed) in ends(LOG, *FIELDS):
        return
    run = {"method": method, "delay": 0 if method == EXACT else LATE[late][0], "seed": seed, "epoch": 0}
    setting = {"delays": late, "rate": rate, "updates": STEPS, "epochs": 1}
    row = {**run, **trained(method, late, seed, rate), **setting}
    append(LOG, row)
    print(row, flush=True)


def found(method: str, late: str, rate: float) -> dict[int, float]:
    """A method's nats by seed; NaN where a run diverged."""
    rows = {run[-1]: row for run, row in ends(LOG, *FIELDS).items() if run[:-1] == (method, late, rate, STEPS)}
    return {seed: math.nan if row["nats"] is None else row["nats"] for seed, row in rows.items()}


def tuned(method: str, late: str, measures: bool) -> float:
    """The rate at which seed 0 ends lowest, walking by factors of two; without measuring, by what the log has."""

    def nats(rate: float) -> float:
        if measures:
            measure(method, late, 0, rate)
        end = found(method, late, rate).get(0, math.nan)
        return end if math.isfinite(end) else math.inf

    rate = START
    while nats(nearby := min(rate / 2, rate * 2, key=nats)) < nats(rate):
        rate = nearby
    return rate


def cells(method: str, late: str) -> list[str]:
    """Rate, nats, and the difference to no delay on the seeds that both have."""
    rate = tuned(method, late, False)
    nats, exact = found(method, late, rate), found(EXACT, "none", tuned(EXACT, "none", False))
    if not nats:
        return ["", "not measured", ""]
    if lost := sum(map(math.isnan, nats.values())):
        return [f"{rate:g}", f"{lost} of {len(nats)} diverged", ""]
    both = sorted(seed for seed in nats if math.isfinite(exact.get(seed, math.nan)))
    own = [f"{rate:g}", spread(list(nats.values()), 3)]
    if method == EXACT or len(both) < 2:
        return [*own, ""]
    mean, half = gap([nats[seed] for seed in both], [exact[seed] for seed in both])
    return [*own, f"{mean:+.3f} ± {half:.3f}"]


def table() -> str:
    """In Markdown, with the paired differences to no delay."""
    head = "| rate | fine-grained, D = 18 to 0 | less no delay's | rate | 1F1B, D = 9 to 0 | less no delay's |"
    lines = ["| " + head, "|---" * 7 + "|", f"| {EXACT} | " + " | ".join(cells(EXACT, "none") * 2) + " |"]
    for method in METHODS:
        lines.append(f"| {method} | " + " | ".join(c for late in LATE for c in cells(method, late)) + " |")
    return "\n".join(lines)


def main() -> None:
    measures = not arguments(__doc__).parse_args().tables
    torch.set_num_threads(1)
    settings = [(EXACT, "none"), *((method, late) for late in LATE for method in METHODS)]
    rates = {f"{method}, {late}": tuned(method, late, measures) for method, late in settings}
    if measures:
        for seed in SEEDS:
            for method, late in settings:
                measure(method, late, seed, rates[f"{method}, {late}"])
        save("pipeline_text", {"rates": rates, "rows": rows_of(LOG)})
    print(table())


if __name__ == "__main__":
    main()
