"""Claim: a transformer's layer norms run on ranges, FP10 and shared exponents once it was trained for that a little.

The character GPT found through RECOUP_DATA (4 layers, width 96, context 64, nine layer norms) on the last tenth of
tinyshakespeare, nats per character: converted, with a gain per feature fitted on 256 contexts of the training text, and
fine-tuned, each from the checkpoint: a quarter of an epoch over the first nine tenths, 62 of its 246 batches of 64
contexts, drawn by the seed, and the whole of it; AdamW without weight decay, cosine from 3e-4 to zero, no gain. The
float network is trained on as well: what that brings is not the norms' doing. Two cores carry whole epochs of a few.
Kept in benchmarks/results/lightnorm_text.jsonl.

    python benchmarks/lightnorm_text.py             # measure what is missing, then print the table
    python benchmarks/lightnorm_text.py --tables    # only print
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch.nn.functional import cross_entropy

import recoup as rc
from benchmarks.log import Log, arguments
from benchmarks.measure import RESULTS, save
from recoup.data import root
from recoup.data.text import contexts
from recoup.evaluation import nats_per_token
from recoup.lightnorm import LightNorm

RATE, SEEDS = 3e-4, (0,)
FITTED = 4  # batches of 64 contexts that the gain sees
FORWARD, BACKWARD = (rc.Float.parse(name).replace(rounding="nearest") for name in ("fp10_154", "fp10_163"))
NORMS: dict[str, LightNorm | None] = {
    "float": None,
    "range": LightNorm.range(),
    "range + FP10": LightNorm.fp10(),
    **{f"range + FP10 + BFP{g}": LightNorm(block=g) for g in (4, 8, 16, 32, 64)},
    "BFP4, largest exponent shared": LightNorm(shared="max"),
    "BFP4, rounded to nearest": LightNorm(FORWARD, BACKWARD),
}
STEPS = {"fine-tuned": 62, "fine-tuned, one epoch": 246}  # batches that the training takes
WAYS = ("converted", "gain", *STEPS)
WHOLE = ("range + FP10 + BFP4", "float", "range + FP10", "range")
TRAINED = ("range + FP10 + BFP4", "float", "range", "range + FP10", *(f"range + FP10 + BFP{g}" for g in (8, 16, 32)))


def measure(norm: str, way: str, seed: int) -> float:
    """Nats per character."""
    folder = root() / "text"
    model, alphabet = rc.models.load_chargpt(folder / "chargpt_tinyshakespeare.pt")
    text = folder / "tinyshakespeare.txt"
    train = contexts(text, alphabet, model.context, last=0.9)
    if (config := NORMS[norm]) is not None:
        rc.emulate_(model, config)
    if way == "gain":
        rc.repair_(model, train[:FITTED])
    if way in STEPS:
        fine_tune(model, train, STEPS[way], seed)
    return nats_per_token(model.eval(), contexts(text, alphabet, model.context, first=0.9))


def fine_tune(model: torch.nn.Module, batches: list[tuple[torch.Tensor, torch.Tensor]], steps: int, seed: int) -> None:
    """A part of an epoch."""
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    order = torch.randperm(len(batches), generator=torch.Generator().manual_seed(seed))
    model.train()
    for index in order[:steps].tolist():
        characters, following = batches[index]
        optimizer.zero_grad()
        cross_entropy(model(characters).flatten(0, 1), following.flatten()).backward()
        optimizer.step()
        schedule.step()


def tables(log: Log) -> str:
    """The table in Markdown."""
    lines = [f"| norm | {' | '.join(WAYS)} |", "|---" * (len(WAYS) + 1) + "|"]
    for norm in NORMS:
        cells = [log.cell([(norm, way, seed) for seed in SEEDS], 3) for way in WAYS]
        lines.append(f"| {norm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    given = arguments(__doc__).parse_args()
    torch.set_num_threads(1)
    log = Log(RESULTS / "lightnorm_text.jsonl")
    if not given.tables:
        plan = [(norm, way, 0) for norm in NORMS for way in WAYS[:2] if way == WAYS[0] or NORMS[norm] is not None]
        plan += [(norm, WAYS[2], seed) for seed in SEEDS for norm in TRAINED]
        plan += [(norm, WAYS[3], seed) for seed in SEEDS for norm in WHOLE]
        for run in plan:
            log.measure(run, lambda run=run: measure(*run))
        save("lightnorm_text", {"rate": RATE, "fitted": FITTED * 64, "steps": STEPS, "rows": log.rows()})
    print(tables(log))


if __name__ == "__main__":
    main()
