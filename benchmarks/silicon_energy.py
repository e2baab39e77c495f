"""Claim: sharing a multiplier saves a quarter of the energy on real operands with glitches, a third without them.

ResNet-20 on CIFAR-10, all 18 emulated convolutions, real operands of eight test images, weighted by their
multiply-accumulates. Beside NB-SMT stands the processing element with T exact multipliers: same speed, no loss.

    python benchmarks/silicon_energy.py [--liberty FILE ...] [--registers product] [--lanes 64]
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import recoup as rc
from benchmarks.measure import save
from recoup.data import root
from recoup.silicon import Measured, build, capture

IMAGES = 8


def operands(threads: int) -> tuple[dict, dict]:
    """Each layer's operands, split over threads, and its multiply-accumulates an image."""
    folder = root()
    spec = f"cifar10:{folder / 'cifar10'}"
    model = rc.models.load("resnet20", folder / "cifar10_models" / "resnet20-12fca82f.th").eval()
    rc.calibrate_(model, rc.data.load(spec, "train").subset(2048, 0).batches(128))
    rc.emulate_(model, rc.NBSMT(threads=threads))
    images = next(iter(rc.data.load(spec, "test", limit=IMAGES).batches(IMAGES)))
    found = capture(model, images)
    macs = {layer.name: layer.macs / IMAGES for layer in rc.nbsmt.cycles(model, images).layers if layer.name in found}
    return found, macs


def variants(threads: int, registers: str) -> dict[str, Measured]:
    """The processing elements of one number of threads."""
    module = build(rc.NBSMT(threads=threads), registers=registers)
    exact = {title: other for title, other in module.counterparts().items() if "exact" in title}
    return {module.title: module, **exact}


def measure(liberty: list[Path], registers: str, lanes: int) -> dict[str, dict[str, float]]:
    """uJ an image by title: with glitches, with gated drain too, and the lower bound."""
    table: dict[str, dict[str, float]] = {}
    for threads in (1, 2, 4):
        found, macs = operands(threads)
        for title, module in variants(threads, registers).items():
            row: dict[str, float] = dict.fromkeys(("glitches", "gated", "bound"), 0.0)
            for name, layer in found.items():
                slots = macs[name] / threads
                energy = module.energy(layer, liberty, lanes=lanes)
                row["glitches"] += energy.step * slots * 1e-9
                row["gated"] += energy.gated * slots * 1e-9
                row["bound"] += module.energy(layer, liberty, lanes=lanes, glitches=False).step * slots * 1e-9
            table[title] = row
            print(registers, title, {k: round(v, 1) for k, v in row.items()}, flush=True)
    for row in table.values():
        for kind in ("glitches", "gated", "bound"):
            row[f"saved {kind}"] = 1 - row[kind] / table["1T"][kind]
    return table


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    default = root() / "liberty" / "sg13g2_stdcell_typ_1p20V_25C.lib"
    parser.add_argument("--liberty", type=Path, nargs="+", default=[default])
    parser.add_argument("--registers", default="product")
    parser.add_argument("--lanes", type=int, default=64)
    args = parser.parse_args()
    table = measure(args.liberty, args.registers, args.lanes)
    for title, row in table.items():
        saved = " ".join(f"{row[f'saved {k}']:6.1%}" for k in ("glitches", "gated", "bound"))
        print(f"{title:20} {row['glitches']:7.1f} uJ  saved {saved}")
    tool = str(build(rc.NBSMT(threads=1)).area().tool)
    save(f"silicon_energy_{args.registers}", {"liberty": [p.name for p in args.liberty], "tool": tool, "table": table})


if __name__ == "__main__":
    main()
