"""Claim: a transformer, attention included, keeps its perplexity on 12-bit accumulators; a gain helps below that.

The character GPT found through RECOUP_DATA (4 layers, width 96, context 64) on the last tenth of tinyshakespeare:
nats per character at accumulators from M10E5 to M4E3, with attention's two products on the unit or in float32, and with
a gain per channel fitted on 64 contexts of the training text. Kept in benchmarks/results/lba_text.jsonl.

    python benchmarks/lba_text.py [--tables]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

import recoup as rc
from benchmarks.log import Log, arguments
from benchmarks.measure import RESULTS, save
from recoup.data import root
from recoup.data.text import contexts
from recoup.evaluation import nats_per_token

FORMATS = ((10, 5), (9, 5), (8, 5), (7, 5), (6, 5), (7, 4), (6, 4), (5, 4), (4, 4), (4, 3))
WAYS = ("attention in float32", "attention too", "attention too, gain per channel")
ATTENTION = r"re:blocks\..*\.attention"


def measure(mantissa: int | None, exponent: int | None, way: str) -> float:
    """Nats per character."""
    folder = root() / "text"
    model, alphabet = rc.models.load_chargpt(folder / "chargpt_tinyshakespeare.pt")
    text = folder / "tinyshakespeare.txt"
    test = contexts(text, alphabet, model.context, first=0.9)
    if mantissa is not None and exponent is not None:
        rc.emulate_(model, rc.LBA.biased(mantissa, exponent), {ATTENTION: None} if way == WAYS[0] else None)
        if way == WAYS[2]:
            rc.lba.correct_gain_(model, contexts(text, alphabet, model.context, last=0.9)[:1])
    return nats_per_token(model, test)


def tables(log: Log) -> str:
    """The table in Markdown."""
    lines = [f"float: {log.cell([(None, None, 'float')], 3)} nats per character", ""]
    lines += ["| | " + " | ".join(f"M{m}E{e}" for m, e in FORMATS) + " |", "|---|" + "---|" * len(FORMATS)]
    for way in WAYS:
        lines.append(f"| {way} | " + " | ".join(log.cell([(m, e, way)], 3) for m, e in FORMATS) + " |")
    return "\n".join(lines)


def main() -> None:
    given = arguments(__doc__).parse_args()
    torch.set_num_threads(1)
    log = Log(RESULTS / "lba_text.jsonl")
    if not given.tables:
        log.measure((None, None, "float"), lambda: measure(None, None, "float"))
        for way in WAYS:
            for m, e in FORMATS:
                log.measure((m, e, way), lambda m=m, e=e, way=way: measure(m, e, way))
        save("lba_text", {"rows": log.rows()})
    print(tables(log))


if __name__ == "__main__":
    main()
