"""Claim: at the sizes of these networks Hopper's 13 bits do not show; FP8 itself does, and sums of one sign do.

Three tables: the error of one product of K = 4,096 on the units, relative to the exact one of the same operands, for
signed, half rectified and positive operands; top-1 of the pretrained CIFAR-10 networks found through RECOUP_DATA on
the first 2,000 test images (standard error 0.6); nats per character of the character GPT on the last tenth of
tinyshakespeare, attention included. "e4m3, exact" has the operands in FP8 and sums in float32, so it tells FP8's own
loss from the accumulator's. Kept in benchmarks/results/tensorcore_accuracy.jsonl.

    python benchmarks/tensorcore_accuracy.py [--tables]
"""

import sys
from pathlib import Path

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
from recoup.tensorcore import TensorCore, matmul, quantize_operand

UNITS = {
    "hopper-fp8": TensorCore.hopper_fp8(),
    "hopper-fp8, promoted every 128": TensorCore.hopper_fp8(promotion=128),
    "ada-fp8": TensorCore.ada_fp8(),
    "blackwell-fp8": TensorCore.blackwell_fp8(),
    "hopper-bf16": TensorCore.hopper_bf16(),
}
OVERFLOWING = {
    "hopper-fp8, float16 out, amax 16": TensorCore.hopper_fp8(output="float16", amax=16.0),
}
EXACT = "e4m3, exact"
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


def error(kind: str, unit: TensorCore) -> float:
    """Root mean square error, relative to the exact product of the operands in their formats."""
    forms = zip(operands(kind), unit.pair, strict=True)
    a, b = (quantize_operand(x, name, unit.amax_of(name), None)[0] for x, name in forms)
    exact = a.double() @ b.double()
    return float((matmul(a, b, unit).double() - exact).norm() / exact.norm())


def top1(name: str, unit: TensorCore | None, exact: bool = False) -> float:
    """Top-1 in percent."""
    folder = root()
    model = rc.models.load(name, folder / "cifar10_models" / NETWORKS[name]).eval()
    if unit is not None:
        rc.emulate_(model, unit)
    with running(model, "baseline" if exact else "emulate"):
        return rc.evaluate(model, rc.data.load(f"cifar10:{folder / 'cifar10'}", "test", limit=IMAGES).batches(250)).top1


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
    for name in ("float32", EXACT, *UNITS, *OVERFLOWING):
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
        ways = {"float32": (None, False), EXACT: (UNITS["hopper-fp8"], True)}
        ways |= {name: (unit, False) for name, unit in UNITS.items()}
        for name, way in ways.items():
            log.measure(("chargpt", name), lambda way=way: nats(*way))
        small = "hopper-fp8, float16 out, amax 16"
        log.measure(("chargpt", small), lambda: nats(OVERFLOWING[small]))
        for network, names in {"resnet20": list(ways), "resnet56": list(ways)[:4]}.items():
            for name in names:
                log.measure((network, name), lambda network=network, name=name: top1(network, *ways[name]))
        save("tensorcore_accuracy", {"rows": log.rows()})
    print(tables(log))


if __name__ == "__main__":
    main()
