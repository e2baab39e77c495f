"""Claim: with signed activation codes a transformer runs on NB-SMT, two threads within 0.02 nats of 8 bit.

The character GPT found through RECOUP_DATA (4 layers, width 96, context 64): nats per character on 12,288 characters of
the last tenth of tinyshakespeare, its 16 linear layers on NB-SMT, attention's products and the head in float; then with
the products of its 4 attentions on NB-SMT too. Scales from 256 contexts of the training text. Then what signed codes
cost where unsigned ones would do: the pretrained ResNet-20, relative error of its logits against 8 bit on 500 images.
Kept in benchmarks/results/nbsmt_text.jsonl.

    python benchmarks/nbsmt_text.py [--tables]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch import Tensor, nn

import recoup as rc
from benchmarks.log import Log, arguments
from benchmarks.measure import RESULTS, save
from recoup.data import root
from recoup.data.text import contexts
from recoup.evaluation import nats_per_token
from recoup.network.emulated import running

BLOCKS = r"re:blocks\..*"
POLICIES = ("S+A", "A", "S+aW", "aW")
CONFIGS = [rc.NBSMT(threads, policy, port=port) for threads in (2, 4) for policy in POLICIES for port in (5, 4)]
WHOLE = ("S+A", "A", "S+aW", "S+W")
CODES = ("unsigned", "signed")


def char_gpt() -> tuple[nn.Module, list, list]:
    """The calibrated network, test and training batches."""
    folder = root() / "text"
    model, alphabet = rc.models.load_chargpt(folder / "chargpt_tinyshakespeare.pt")
    text = folder / "tinyshakespeare.txt"
    train = contexts(text, alphabet, model.context, last=0.9)[:4]
    rc.calibrate_(model, train, {BLOCKS: True, "head": None})
    return model, contexts(text, alphabet, model.context, first=0.9)[:3], train


def emulated(model: nn.Module, config: rc.NBSMT) -> nn.Module:
    """The blocks' linear layers on hardware; attention's products are said to stay in float, which is meant."""
    return rc.emulate_(model, None, {r"re:blocks\..*\.(qkv|proj|fc1|fc2)": config})


def nats(config: rc.NBSMT | None, products: rc.NBSMT | None = None) -> float:
    """Nats per character; ``products``: what attention's products run on, None: in float."""
    model, test, _ = char_gpt()
    if products is not None:
        rc.emulate_(model, config, {r"re:blocks\..*\.attention": products, "head": None})
    elif config is not None:
        emulated(model, config)
    return nats_per_token(model, test)


def zeros() -> float:
    """The share of zeros among the codes of all layers."""
    model, test, _ = char_gpt()
    rows = rc.nbsmt.profile(emulated(model, rc.NBSMT(2)), test[:1])
    codes = [row.weight_shape[1] for row in rows]  # a token each, of every layer alike
    return sum(row.zero_activations * count for row, count in zip(rows, codes, strict=True)) / sum(codes)


def logit_error(codes: str, threads: int) -> float:
    """|logits - logits at 8 bit| / |logits at 8 bit| of the ResNet-20."""
    spec = f"cifar10:{root() / 'cifar10'}"
    model = rc.models.load("resnet20", root() / "cifar10_models" / "resnet20-12fca82f.th").eval()
    train, test = rc.data.load(spec, "train", limit=512, seed=0), rc.data.load(spec, "test", limit=500)
    rc.calibrate_(model, train.batches(128), activations=codes)  # type: ignore[arg-type]
    rc.emulate_(model, rc.NBSMT(threads))

    def logits() -> Tensor:
        with torch.no_grad():
            return torch.cat([model(x) for x, _ in test.batches(250)])

    with running(model, "baseline"):
        eight = logits()
    return float((logits() - eight).norm() / eight.norm())


def tables(log: Log) -> str:
    """The tables in Markdown."""
    lines = [f"float {log.cell([('float',)], 4)}, 8 bit {log.cell([('8 bit',)], 4)} nats per character"]
    lines += [f"{100 * log.values.get(('zeros',), 0):.1f} % of the codes are zero", ""]
    lines += ["| | " + " | ".join(f"`{policy}`" for policy in POLICIES) + " |", "|---|" + "---|" * len(POLICIES)]
    for threads in (2, 4):
        for port in (5, 4):
            cells = [log.cell([(repr(rc.NBSMT(threads, policy, port=port)),)], 3) for policy in POLICIES]
            lines.append(f"| {threads} threads, {port}-bit port | " + " | ".join(cells) + " |")
    lines += ["", "| attention's products too | " + " | ".join(f"`{policy}`" for policy in WHOLE) + " |"]
    lines.append("|---|" + "---|" * len(WHOLE))
    for threads in (1, 2, 4):
        cells = [log.cell([("attention too", repr(rc.NBSMT(threads, policy)))], 3) for policy in WHOLE]
        lines.append(f"| {threads} thread{'s' * (threads > 1)} | " + " | ".join(cells) + " |")
    lines += ["", "| ResNet-20's logits | 2 threads | 4 threads |", "|---|---|---|"]
    for codes in CODES:
        lines.append(f"| {codes} | " + " | ".join(log.cell([(codes, threads)], 3) for threads in (2, 4)) + " |")
    return "\n".join(lines)


def main() -> None:
    given = arguments(__doc__).parse_args()
    torch.set_num_threads(1)
    log = Log(RESULTS / "nbsmt_text.jsonl")
    if not given.tables:
        log.measure(("float",), lambda: nats(None))
        log.measure(("8 bit",), lambda: nats(rc.NBSMT(1)))
        log.measure(("zeros",), zeros)
        for config in CONFIGS:
            log.measure((repr(config),), lambda config=config: nats(config))
        for config in [rc.NBSMT(threads, policy) for threads in (1, 2, 4) for policy in WHOLE]:
            log.measure(("attention too", repr(config)), lambda config=config: nats(config, config))
        for codes in CODES:
            for threads in (2, 4):
                log.measure((codes, threads), lambda codes=codes, threads=threads: logit_error(codes, threads))
        save("nbsmt_text", {"rows": log.rows()})
    print(tables(log))


if __name__ == "__main__":
    main()
