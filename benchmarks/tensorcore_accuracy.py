"""Claim: at the sizes of these networks Hopper's 13 bits do not show; FP8 itself does, and sums of one sign do.

Three tables: the error of one product of K = 4,096 on the units, relative to the exact one of the same operands, for
signed, half rectified and positive operands; top-1 of the pretrained CIFAR-10 networks found through RECOUP_DATA on
the first 2,000 test images (standard error 0.6); nats per character of the character GPT on the last tenth of
tinyshakespeare, attention included. "e4m3, exact" and its like have the operands in the format and sums in float32,
so they tell the format's own loss from the accumulator's. "repaired" and "averaged": `recoup.repair_`'s default plan,
which compares with exact sums of the same operands, and batch norm statistics measured anew (`recalibrate_`, average),
on 1,000 training images, augmented as in training. Kept in benchmarks/results/tensorcore_accuracy.jsonl.

    python benchmarks/tensorcore_accuracy.py [--tables]
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch import Tensor

import recoup as rc
from benchmarks.log import Log, arguments
from benchmarks.measure import RESULTS, save
from recoup.data import root
from recoup.data.text import contexts
from recoup.evaluation import nats_per_token
from recoup.network.emulated import running
from recoup.tensorcore import TensorCore, matmul, quantize_blocks, quantize_operand

UNITS = {
    "hopper-fp8": TensorCore.hopper_fp8(),
    "hopper-fp8, promoted every 128": TensorCore.hopper_fp8(promotion=128),
    "ada-fp8": TensorCore.ada_fp8(),
    "blackwell-fp8": TensorCore.blackwell_fp8(),
    "hopper-bf16": TensorCore.hopper_bf16(),
    "volta-f16": TensorCore.volta_f16(),
    "turing-f16": TensorCore.turing_f16(),
    "ampere-tf32": TensorCore.ampere_tf32(),
    "blackwell-mxfp8": TensorCore.blackwell_mxfp8(),
    "blackwell-mxfp4": TensorCore.blackwell_mxfp4(),
    "blackwell-nvfp4": TensorCore.blackwell_nvfp4(),
}
OVERFLOWING = {
    "hopper-fp8, float16 out, amax 16": TensorCore.hopper_fp8(output="float16", amax=16.0),
}
EXACT = {
    "e4m3, exact": UNITS["hopper-fp8"],
    "bfloat16, exact": UNITS["hopper-bf16"],
    "float16, exact": UNITS["volta-f16"],
    "mxfp8, exact": UNITS["blackwell-mxfp8"],
    "mxfp4, exact": UNITS["blackwell-mxfp4"],
    "nvfp4, exact": UNITS["blackwell-nvfp4"],
}
REPAIRED = {
    f"{name}, {how}": (UNITS[name], how)
    for name, how in (
        ("blackwell-mxfp4", "repaired"),
        ("blackwell-mxfp4", "averaged"),
        ("blackwell-nvfp4", "averaged"),
    )
}
KINDS = ("normal x normal", "rectified x normal", "uniform x uniform")
NETWORKS = {"resnet20": "resnet20-12fca82f.th", "resnet56": "resnet56-4bfd9763.th"}
K, IMAGES = 4096, 2000


def operands(kind: str) -> tuple[Tensor, Tensor]:
    """[64, K] and [K, 32] before their format."""
    generator = torch.Generator().manual_seed(0)
    if kind == "uniform x uniform":
        return torch.rand(64, K, generator=generator), torch.rand(K, 32, generator=generator)
    a, b = torch.randn(64, K, generator=generator), torch.randn(K, 32, generator=generator)
    return (a.relu() if kind.startswith("rectified") else a), b


def top1(name: str, unit: TensorCore | None, exact: bool = False, repair: str = "") -> float:
    """Top-1 in percent."""
    folder = root()
    model = rc.models.load(name, folder / "cifar10_models" / NETWORKS[name]).eval()
    if unit is not None:
        rc.emulate_(model, unit)
    if repair:
        images = rc.data.load(f"cifar10:{folder / 'cifar10'}", "train", limit=1000).batches(125, augment=True)
        if repair == "repaired":
            rc.repair_(model, images)
        else:
            rc.recalibrate_(model, images, "average")
    with running(model, "baseline" if exact else "emulate"):
        return rc.evaluate(model, rc.data.load(f"cifar10:{folder / 'cifar10'}", "test", limit=IMAGES).batches(250)).top1


def error(kind: str, unit: TensorCore) -> float:
    """Root mean square error, relative to the exact product of the operands in their formats."""
    a, b = operands(kind)
    if unit.block is None:
        a, b = (quantize_operand(x, n, unit.amax_of(n), None)[0] for x, n in zip((a, b), unit.pair, strict=True))
        exact, got = a.double() @ b.double(), matmul(a, b, unit)
    else:
        (a, s), (b, t) = quantize_blocks(a, unit, "a"), quantize_blocks(b, unit, "b")
        every = s.repeat_interleave(unit.block, 1).double(), t.repeat_interleave(unit.block, 0).double()
        exact, got = (a * every[0]) @ (b * every[1]), matmul(a, b, unit, scale_a=s, scale_b=t)
    return float((got.double() - exact).norm() / exact.norm())


def nats(unit: TensorCore | None, exact: bool = False) -> float:
    """Nats per character."""
    folder = root() / "text"
    model, alphabet = rc.models.load_chargpt(folder / "chargpt_tinyshakespeare.pt")
    if unit is not None:
        rc.emulate_(model, unit)
    with running(model, "baseline" if exact else "emulate"):
        return nats_per_token(model, contexts(folder / "tinyshakespeare.txt", alphabet, model.context, first=0.9))


def tables(log: Log) -> str:
    """The three tables in Markdown."""
    lines = ["| unit | " + " | ".join(KINDS) + " |", "|---|" + "---|" * len(KINDS)]
    for name in UNITS:
        values = [log.values.get(("error", kind, name)) for kind in KINDS]
        lines.append(f"| {name} | " + " | ".join("" if v is None else f"{v:.2e}" for v in values) + " |")
    lines += ["", "| unit | ResNet-20, top-1 % | ResNet-56, top-1 % | char-GPT, nats |", "|---|---|---|---|"]
    for name in ("float32", *EXACT, *UNITS, *OVERFLOWING, *REPAIRED):
        cells = [log.cell([(network, name)], 2) for network in NETWORKS]
        lines.append(f"| {name} | {cells[0]} | {cells[1]} | {log.cell([('chargpt', name)], 4)} |")
    return "\n".join(lines)


def main() -> None:
    given = arguments(__doc__).parse_args()
    torch.set_num_threads(1)
    log = Log(RESULTS / "tensorcore_accuracy.jsonl")
    if not given.tables:
        for kind in KINDS:
            for name, unit in UNITS.items():
                log.measure(("error", kind, name), lambda kind=kind, unit=unit: error(kind, unit))
        ways: dict[str, tuple[Any, ...]] = {"float32": (None, False)} | {
            name: (unit, True) for name, unit in EXACT.items()
        }
        ways |= {name: (unit, False) for name, unit in (UNITS | OVERFLOWING).items()}
        repaired: dict[str, tuple[Any, ...]] = {name: (unit, False, how) for name, (unit, how) in REPAIRED.items()}
        for name, way in ways.items():
            log.measure(("chargpt", name), lambda way=way: nats(*way))
        for network in NETWORKS:
            for name, way in (ways | repaired).items():
                if name not in OVERFLOWING and not (network == "resnet56" and name == "blackwell-mxfp4, repaired"):
                    log.measure((network, name), lambda network=network, way=way: top1(network, *way))
        save("tensorcore_accuracy", {"rows": log.rows()})
    print(tables(log))


if __name__ == "__main__":
    main()
