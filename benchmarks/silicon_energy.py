"""Claim: sharing a multiplier saves a quarter of the energy on real operands with glitches, a third without them.

ResNet-20 on CIFAR-10, all 18 emulated convolutions, real operands of eight test images, weighted by their
multiply-accumulates. Beside NB-SMT stands the processing element with T exact multipliers: same speed, no loss. Each
layer is kept in benchmarks/results/silicon_energy.jsonl as it is measured; run again, it goes on where it stopped.

    python benchmarks/silicon_energy.py [--liberty FILE ...] [--registers product ...] [--lanes 64]
"""

import argparse
import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import recoup as rc
from benchmarks.log import Log
from benchmarks.measure import RESULTS, save
from recoup.data import root
from recoup.silicon import Energy, Measured, build, capture

IMAGES = 8
THREADS = (1, 2, 4)
KINDS = ("glitches", "gated", "bound")


class Operands:
    """What the layers of the network multiply, captured once it is asked for."""

    @functools.cached_property
    def model(self):
        """ResNet-20, calibrated."""
        model = rc.models.load("resnet20", root() / "cifar10_models" / "resnet20-12fca82f.th").eval()
        spec = f"cifar10:{root() / 'cifar10'}"
        rc.calibrate_(model, rc.data.load(spec, "train").subset(2048, 0).batches(128))
        self.images = next(iter(rc.data.load(spec, "test", limit=IMAGES).batches(IMAGES)))
        return model

    @functools.cache  # noqa: B019 -- there is one object a run
    def captured(self, threads: int) -> dict:
        """Every layer's operands, split over threads."""
        rc.emulate_(self.model, rc.NBSMT(threads=threads))
        try:
            return capture(self.model, self.images)
        finally:
            rc.restore_(self.model)

    @functools.cached_property
    def macs(self) -> dict[str, float]:
        """Multiply-accumulates of an image, by layer."""
        rc.emulate_(self.model, rc.NBSMT(threads=1))
        try:
            layers = rc.nbsmt.cycles(self.model, self.images).layers
        finally:
            rc.restore_(self.model)
        return {layer.name: layer.macs / IMAGES for layer in layers if layer.name in self.captured(1)}


def variants(threads: int, registers: str) -> dict[str, Measured]:
    """The processing elements of one number of threads, by title."""
    module = build(rc.NBSMT(threads=threads), registers=registers)
    exact = {title: other for title, other in module.counterparts().items() if "exact" in title}
    return {module.title: module, **exact}


def layer(log: Log, key: tuple, measured: functools.partial[Energy]) -> dict[str, float]:
    """Femtojoules a step by kind; what the log has is not simulated again."""
    glitches = functools.cache(measured)
    steps = {
        "glitches": lambda: glitches().step,
        "gated": lambda: glitches().gated,
        "bound": lambda: measured(glitches=False).step,
    }
    return {kind: log.measure((*key, kind), steps[kind]) for kind in KINDS}


def measure(log: Log, liberty: list[Path], registers: str, lanes: int) -> dict[str, dict[str, float]]:
    """uJ an image by title: with glitches, with gated drain too, and the lower bound; and what each saves."""
    operands, names = Operands(), [key[1] for key in log.values if key[0] == "macs"]
    names = names or list(operands.macs)
    macs = {name: log.measure(("macs", name), lambda name=name: operands.macs[name]) for name in names}
    table: dict[str, dict[str, float]] = {}
    for threads in THREADS:
        for title, module in variants(threads, registers).items():
            row: dict[str, float] = dict.fromkeys(KINDS, 0.0)
            for name in names:

                def one(name: str = name, threads: int = threads, module: Measured = module, **options) -> Energy:
                    return module.energy(operands.captured(threads)[name], liberty, lanes=lanes, **options)

                found = layer(log, (liberty[0].name, registers, lanes, title, name), functools.partial(one))
                for kind, step in found.items():
                    row[kind] += step * macs[name] / threads * 1e-9
            table[title] = row
    for row in table.values():
        row |= {f"saved {kind}": 1 - row[kind] / table["1T"][kind] for kind in KINDS}
    return table


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = root() / "liberty" / "sg13g2_stdcell_typ_1p20V_25C.lib"
    parser.add_argument("--liberty", type=Path, nargs="+", default=[default])
    parser.add_argument("--registers", nargs="+", default=["product", "decode"])
    parser.add_argument("--lanes", type=int, default=64)
    args = parser.parse_args()
    log = Log(RESULTS / "silicon_energy.jsonl")
    tables = {registers: measure(log, args.liberty, registers, args.lanes) for registers in args.registers}
    for registers, table in tables.items():
        for title, row in table.items():
            saved = " | ".join(f"{row[f'saved {kind}']:.1%}" for kind in KINDS)
            print(f"| {registers} | {title} | {row['glitches']:.1f} | {row['bound']:.1f} | {saved} |")
    area = build(rc.NBSMT(threads=1)).area(args.liberty)
    save("silicon_energy", {"tool": area.tool, "liberty": dict(area.liberty), "lanes": args.lanes, "tables": tables})


if __name__ == "__main__":
    main()
