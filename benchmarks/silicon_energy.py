"""Claim: sharing a multiplier saves a quarter of the energy on real operands with glitches, a third without them.

ResNet-20 on CIFAR-10, all 18 emulated convolutions, real operands of eight test images, weighted by their
multiply-accumulates. Beside NB-SMT stands the processing element with T exact multipliers: same speed, no loss. Each
layer is kept in benchmarks/results/silicon_energy.jsonl as it is measured, with a digest of the design and mapping; run
again, it goes on where it stopped, and measures what another generator measured anew. So is what a flip-flop's clock
takes by what it holds.

    python benchmarks/silicon_energy.py [--liberty FILE ...] [--registers product ...] [--lanes 64]
"""

import argparse
import functools
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

import recoup as rc
from benchmarks.log import Log
from benchmarks.measure import RESULTS, mapped, save
from recoup.data import root
from recoup.gates.module import Expected, Module, Port, amaranth
from recoup.silicon import Energy, Measured, build, capture

IMAGES = 8
THREADS = (1, 2, 4)
KINDS: tuple[str, ...] = ("glitches", "gated", "bound")
BITS, STEPS = 32, 1024  # of the drain; a run so long that its random first state does not count


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


def layer(log: Log, key: tuple, measured: functools.partial[Energy], of: str) -> dict[str, float]:
    """Femtojoules a step by kind; what the log has of the same design is not simulated again."""
    glitches = functools.cache(measured)
    steps = {
        "glitches": lambda: glitches().step,
        "gated": lambda: glitches().gated,
        "bound": lambda: measured(glitches=False).step,
    }
    return {kind: log.measure((*key, kind), steps[kind], of) for kind in KINDS}


def image(log: Log, key: tuple, measured: Any, steps: dict[str, float], of: str) -> dict[str, float]:
    """uJ an image by kind: every layer's energy a step, ``measured(name)``, as often as it has ``steps`` an image."""
    row = dict.fromkeys(KINDS, 0.0)
    for name, count in steps.items():
        found = layer(log, (*key, name), functools.partial(measured, name), of)
        for kind in KINDS:
            row[kind] += found[kind] * count * 1e-9
    return row


def measure(log: Log, liberty: list[Path], registers: str, lanes: int) -> tuple[dict[str, dict[str, float]], dict]:
    """uJ an image by title: with glitches, with gated drain too, and the lower bound, and what each saves of one
    thread's; and by title why an element has none, which leaves the others theirs."""
    operands = Operands()
    macs = {name: log.measure(("macs", name), lambda each=each: each) for name, each in operands.macs.items()}
    table: dict[str, dict[str, float]] = {}
    failed: dict[str, str] = {}
    for threads in THREADS:
        for title, module in variants(threads, registers).items():

            def one(name: str, threads: int = threads, module: Measured = module, **options: Any) -> Energy:
                return module.energy(operands.captured(threads)[name], liberty, lanes=lanes, **options)

            key, steps = (liberty[0].name, registers, lanes, title), {name: macs[name] / threads for name in macs}
            try:
                table[title] = image(log, key, one, steps, mapped(module))
            except rc.RecoupError as error:
                failed[title] = str(error)
                print(f"{title} with registers {registers} has no energy: {error}", flush=True)
    for row in table.values() if "1T" in table else ():
        row |= {f"saved {kind}": 1 - row[kind] / table["1T"][kind] for kind in KINDS}
    return table, failed


def held() -> Module:
    """A register of a drain's bits that holds what its port holds."""

    def elaborate(m: Any, port: Any) -> None:
        register = amaranth("hdl").Signal(BITS, name="drain", reset_less=True)
        m.d.sync += register.eq(port.x)
        m.d.comb += port.y.eq(register)

    return Module(
        name="held", title="a drain that holds", ports=(Port("x", "in", BITS, ""), Port("y", "out", BITS, "")),
        elaborate=elaborate, expected=lambda inputs: {"y": Expected(range(1, STEPS), inputs["x"][:-1])}, steps=STEPS,
    )  # fmt: skip


def clocks(log: Log, liberty: list[Path]) -> dict[str, float]:
    """fJ a clock that a flip-flop of the drain takes, by what it holds."""
    module, ones = Measured.of(held()), (1 << BITS) - 1
    drawn = np.random.default_rng(0).integers(0, ones, (1, 64), dtype=np.uint64, endpoint=True)
    rows = {"zeros": np.zeros_like(drawn), "random bits": drawn, "ones": np.full_like(drawn, ones)}

    def clock(row: np.ndarray) -> float:
        return module.energy({"x": np.repeat(row, STEPS, 0)}, liberty).clock / BITS

    return {
        name: log.measure((liberty[0].name, "a drain's clock", name), functools.partial(clock, row), mapped(module))
        for name, row in rows.items()
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = root() / "liberty" / "sg13g2_stdcell_typ_1p20V_25C.lib"
    parser.add_argument("--liberty", type=Path, nargs="+", default=[default])
    parser.add_argument("--registers", nargs="+", default=["product", "decode"])
    parser.add_argument("--lanes", type=int, default=64)
    args = parser.parse_args()
    log = Log(RESULTS / "silicon_energy.jsonl")
    found = {registers: measure(log, args.liberty, registers, args.lanes) for registers in args.registers}
    tables, failed = ({registers: pair[i] for registers, pair in found.items()} for i in (0, 1))
    for registers, table in tables.items():
        for title, row in table.items():
            saved = " | ".join(f"{row.get(f'saved {kind}', float('nan')):.1%}" for kind in KINDS)
            print(f"| {registers} | {title} | {row['glitches']:.1f} | {row['bound']:.1f} | {saved} |")
    area = build(rc.NBSMT(threads=1)).area(args.liberty)
    drain = clocks(log, args.liberty)
    save("silicon_energy", {
        "tool": area.tool, "liberty": dict(area.liberty), "lanes": args.lanes, "tables": tables, "failed": failed,
        "drain": drain,
    })  # fmt: skip


if __name__ == "__main__":
    main()
