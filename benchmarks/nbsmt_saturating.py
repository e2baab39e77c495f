"""Claim: registers that saturate, slot by slot, cost at most three times the unlimited sums of the same convolution.

Layers of ResNet-20 (batch 32) and ResNet-18 (batch 8), grouped and depthwise convolutions, and a whole ResNet-20:
``NBSMT(..., accumulator=Int(18))``, or of ``--bits``, against the same without an accumulator, activations quantised
and operands built in both. Random weights, activations behind a ReLU; interleaved, the median of the rounds' ratios.
One thread is measured in CPU time, which other jobs on the machine disturb less than the clock. ``--signed``: one
thread of the multiplier and activations of any sign, of which more or less saturate: registers of several sizes.

The claim does not hold of all layers. Unlimited sums are matrix products, which a processor with AMX computes eight
times as fast as slot by slot anything can be; and of signed ones under 14 to 17 bits most sums saturate.

    python benchmarks/nbsmt_saturating.py
    ONEDNN_MAX_CPU_ISA=AVX512_CORE_VNNI python benchmarks/nbsmt_saturating.py --signed
    OMP_WAIT_POLICY=PASSIVE python benchmarks/nbsmt_saturating.py --torch-threads 2

(torch's OpenMP threads else spin after every call on the core that ours want.)
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

import recoup as rc
from benchmarks.measure import clock_of_threads, interleaved, ratio_of, save
from recoup.models import resnet20
from recoup.nbsmt import cpu, ops
from recoup.nbsmt.config import NBSMT, POLICIES

# Batch, input channels, size, output channels, kernel, stride, groups.
LAYERS: dict[str, tuple[int, int, int, int, int, int, int]] = {
    "16 channels, 32 x 32": (32, 16, 32, 16, 3, 1, 1),
    "32 channels, 16 x 16": (32, 32, 16, 32, 3, 1, 1),
    "64 channels, 8 x 8": (32, 64, 8, 64, 3, 1, 1),
    "64 to 128 channels, 56 x 56, stride 2": (8, 64, 56, 128, 3, 2, 1),
    "256 channels, 14 x 14": (8, 256, 14, 256, 3, 1, 1),
    "64 to 256 channels, 28 x 28, 1 x 1": (8, 64, 28, 256, 1, 1, 1),
    "depthwise, 128 channels, 28 x 28": (8, 128, 28, 128, 3, 1, 128),
    "32 groups of 4": (8, 128, 28, 128, 3, 1, 32),
    "16 groups of 8": (8, 128, 28, 128, 3, 1, 16),
    "8 groups of 12": (8, 96, 28, 96, 3, 1, 8),
    "8 groups of 16": (8, 128, 28, 128, 3, 1, 8),
    "4 groups of 32": (8, 128, 28, 128, 3, 1, 4),
}
SIGNED = (12, 14, 15, 16, 17, 18, 20)
"""Bits of registers of signed products."""


def layer(
    shape: tuple[int, int, int, int, int, int, int], config: NBSMT, signed: bool = False
) -> Callable[[], torch.Tensor]:
    """One convolution under a config."""
    N, inputs, size, outputs, kernel, stride, groups = shape
    random = torch.Generator().manual_seed(0)
    x = torch.randn(N, inputs, size, size, generator=random)
    x = (x if signed else x.relu_()).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(outputs, inputs // groups, kernel, kernel, generator=random)
    places = [stride] * 2, [kernel // 2] * 2, [1, 1], groups
    scale, zero = (float(x.abs().amax()) / 127, 128) if signed else (float(x.amax()) / 255, 0)
    return lambda: ops.convolution(x, weight, None, scale, config.code, *places, "layer", zero)


def network(config: NBSMT) -> Callable[[], torch.Tensor]:
    """A ResNet-20 of random weights under a config, batch 32."""
    torch.manual_seed(0)
    model, x = resnet20().eval(), torch.randn(32, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    rc.emulate_(rc.calibrate_(model, [x]), config)
    return lambda: model(x)


def ratio(
    make: Callable[[NBSMT], Callable[[], torch.Tensor]], config: NBSMT, rounds: int, register: rc.Int
) -> dict[str, float]:
    """The saturating register's time over the unlimited one's: the median round, and the least times."""
    runs = {"unlimited": make(config), "saturating": make(config.replace(accumulator=register))}
    seconds = interleaved(runs, rounds, clock=clock_of_threads(torch.get_num_threads()))
    least = {f"{name}_ms": round(1e3 * min(kept), 3) for name, kept in seconds.items()}
    return {"ratio": round(ratio_of(seconds, "saturating", "unlimited"), 2), **least}


def rows(rounds: int, register: rc.Int) -> list[dict]:
    """Every layer under every config that it runs."""
    configs = [NBSMT(1), *(NBSMT(threads).replace(policy=policy) for threads in (2, 4) for policy in POLICIES)]
    found = []
    for name, shape in LAYERS.items():
        for config in configs[:1] if shape[-1] > 1 else configs:
            row = ratio(lambda config, shape=shape: layer(shape, config), config, rounds, register)
            found.append({"layer": name, "threads": config.threads, "policy": config.policy, **row})
            print(f"{name:40s} {config.threads}T {config.policy:5s} {row['ratio']:5.2f}", flush=True)
    for config in (NBSMT(1), NBSMT(2), NBSMT(4)):
        row = ratio(network, config, rounds, register)
        found.append({"layer": "ResNet-20, whole", "threads": config.threads, "policy": config.policy, **row})
    return found


def signed_rows(rounds: int) -> list[dict]:
    """Every layer on one thread of the multiplier, with activations of any sign, under registers of several sizes."""
    found = []
    for name, shape in LAYERS.items():
        for bits in SIGNED:
            row = ratio(lambda config, shape=shape: layer(shape, config, True), NBSMT(1), rounds, rc.Int(bits))
            found.append({"layer": name, "bits": bits, **row})
        print(f"{name:40s}", *(f"{row['bits']}: {row['ratio']:5.2f}" for row in found[-len(SIGNED) :]), flush=True)
    return found


def signed_table(found: list[dict]) -> str:
    """In Markdown."""
    lines = [f"| | {' | '.join(f'{bits} bits' for bits in SIGNED)} |", "|---" * (1 + len(SIGNED)) + "|"]
    for name in dict.fromkeys(row["layer"] for row in found):
        ratios = [f"{row['ratio']:.2f}" for row in found if row["layer"] == name]
        lines.append(f"| {name} | {' | '.join(ratios)} |")
    return "\n".join(lines)


def table(found: list[dict]) -> str:
    """In Markdown: `S+A`, and the slowest of all policies."""
    lines = [
        "| | 1 thread | 2 threads, S+A | slowest policy | 4 threads, S+A | slowest policy |",
        "|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(row["layer"] for row in found):
        of = {(row["threads"], row["policy"]): row["ratio"] for row in found if row["layer"] == name}
        cells = [of[1, "S+A"]]
        for threads in (2, 4):
            all_policies = [value for key, value in of.items() if key[0] == threads]
            cells += [of.get((threads, "S+A")), max(all_policies) if len(all_policies) > 1 else None]
        lines.append(f"| {name} | {' | '.join('' if cell is None else f'{cell:.2f}' for cell in cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--torch-threads", type=int, default=1)
    parser.add_argument("--bits", type=int, default=18, help="of the registers; not of --signed")
    parser.add_argument("--signed", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(given.torch_threads)
    with torch.inference_mode():
        found = signed_rows(given.rounds) if given.signed else rows(given.rounds, rc.Int(given.bits))
    print((signed_table if given.signed else table)(found))
    isa = cpu.probe().isa
    results = {"isa": isa, "threads": given.torch_threads, "rounds": given.rounds, "rows": found}
    results |= {} if given.signed else {"register": repr(rc.Int(given.bits))}
    kind = "signed" if given.signed else f"{given.bits}_bits" if given.bits != 18 else ""
    parts = "nbsmt_saturating", kind, "amx" if isa == "AMX" else "", f"{given.torch_threads}t"
    print(save("_".join(filter(None, parts)), results))


if __name__ == "__main__":
    main()
