"""NB-SMT's card: what the rest of recoup knows about the shared multiplier."""

from typing import Any

import torch
from torch import nn

from recoup.errors import RecoupError
from recoup.nbsmt import cpu, trust
from recoup.nbsmt.attention_layers import ATTENTION
from recoup.nbsmt.config import NBSMT
from recoup.nbsmt.hugging_face import adapted
from recoup.nbsmt.layers import LAYERS
from recoup.nbsmt.ops import matmul
from recoup.nbsmt.repair import AVERAGE, BIAS, EIGHT_BIT, PAIRED_BIAS, ROWS_BIAS
from recoup.network.scales import is_calibrated, was_seen
from recoup.network.sites import Site, Spent, array_cycles, unit_steps
from recoup.network.systolic import Array
from recoup.network.wing import Baseline, Card
from recoup.recalibrate import PAIRED

SUM_BITS = 32


def title(config: NBSMT) -> str:
    """What it is, and what differs from the defaults.

    >>> title(NBSMT(4, "S+Aw", "half_up"))
    '4 threads, S+Aw, rounding half_up'
    """
    plain = NBSMT()
    fields = [f for f in ("rounding", "pairing", "port") if getattr(config, f) != getattr(plain, f)]
    extra = [f"{field} {getattr(config, field)}" for field in fields]
    register = config.accumulator
    extra += [] if register is None else [f"accumulator of {register.bits} bits that {register.overflow}s"]
    threads = f"{config.threads} thread{'s' if config.threads > 1 else ''}"
    return ", ".join([threads, config.policy, *extra])


def eight_bit(config: Any) -> NBSMT:
    """The same arithmetic without sharing: one thread and exact sums; nothing else about a config decides a number."""
    return config if config == config.eight_bit else NBSMT(threads=1)


def cost(site: Site, config: NBSMT, array: Array) -> Spent:
    """Cycles on ``threads`` threads, one where the layer is grouped; 8-bit codes in and out; the sums' bits.

    An attention's groups are its heads, each a pair of products on all threads.
    """
    grouped = site.weights > 0 and any(product.groups > 1 for product in site.products)
    threads = 1 if grouped else config.threads
    bits = SUM_BITS if config.accumulator is None else config.accumulator.bits
    traffic = site.inputs + site.weights + site.outputs
    return Spent(array_cycles(site, array, threads), traffic, bits, unit_steps(site, threads))


def runs(unit: NBSMT, config: NBSMT) -> bool:
    """A unit leaves threads empty where a layer is slowed down; one thread is the same under every policy."""
    alike = config.threads == 1 and unit.accumulator == config.accumulator
    alike = alike or unit.replace(threads=config.threads) == config
    return alike and config.threads <= unit.threads


def path() -> tuple[str, str, str]:
    """How the CPU computes the products: backend, instruction set, reason."""
    probe = cpu.probe()
    return probe.name, probe.isa, probe.reason


def self_test() -> str:
    """A collision, a free slot and a narrow operand, by hand: 96 + 3, 100 and 3 + 7."""
    x = torch.tensor([[100, 3], [100, 0], [3, 7]], dtype=torch.uint8)
    w = torch.ones(2, 1, dtype=torch.int8)
    got = matmul(x, w, NBSMT(threads=2)).flatten().tolist()
    if got != [99, 100, 10]:
        raise RecoupError(f"nbsmt.matmul gives {got}, expected [99, 100, 10]")
    return f"two threads multiply as specified; {_trust()}"


def _trust() -> str:
    """What of the 8-bit path is trusted on this processor."""
    if cpu.probe().name != "int8":
        return "float32 does all convolutions"
    tried = trust.survey()
    wrong = [name for name, right in tried.items() if not right]
    left = f", float32 does {'; '.join(wrong)}" if wrong else ""
    count = f"{len(tried) - len(wrong)} of {len(tried)} common geometries"
    return f"oneDNN's 8-bit convolution is right on {count}{left}; {trust.distrusted()} distrusted in this process"


CARD = Card(
    config=NBSMT,
    layers=LAYERS | ATTENTION,
    title=title,
    presets={"nbsmt-2t": NBSMT(threads=2), "nbsmt-4t": NBSMT(threads=4)},
    example="NBSMT(threads=4, policy='S+A')",
    baseline=Baseline("8-bit", "8 bit", "at 8 bit", eight_bit, hardware="one thread"),
    repairs=(BIAS, ROWS_BIAS, EIGHT_BIT, AVERAGE, PAIRED, PAIRED_BIAS),
    default=(EIGHT_BIT.name, AVERAGE.name, PAIRED.name, BIAS.name),
    quoted=(PAIRED.name, AVERAGE.name, PAIRED_BIAS.name, ROWS_BIAS.name, BIAS.name),
    plan=(PAIRED.name,),
    plan_without_norms=(ROWS_BIAS.name,),
    seedless=False,
    ready=is_calibrated,
    declined=was_seen,
    unready="no layer has an activation scale: run calibrate_(model, batches) first",
    multiplies=True,
    adapt=adapted,
    float_only=(nn.modules.conv._ConvNd, nn.RNNBase, nn.RNNCellBase, nn.Bilinear, nn.MultiheadAttention),
    float_only_note="MultiheadAttention: its inner products",
    path=path,
    cost=cost,
    runs=runs,
    trains=True,
    channels_last=True,
    self_test=self_test,
    measure="recoup.study.measures.nbsmt",
    chapter="recoup.report.chapters.nbsmt",
    rtl="recoup.nbsmt.rtl",
)
