"""Claim: LightNorm's units for rows, of layer norms and RMS norms, are proved, and a lane of them is several times
smaller than a conventional lane in FP32.

Areas of a lane's parts without the divider (neither side has division and root, once a row), of whole units with it,
and of conventional lanes from the same generator; rows of at most 4,096 features. Then the proofs of the units. A row
at a time is kept in benchmarks/results/silicon_rows.jsonl with a digest of its design and mapping, another is measured
anew. The table goes to silicon_rows.json.

    python benchmarks/silicon_rows.py
"""

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.log import Log
from benchmarks.measure import RESULTS, mapped, save
from benchmarks.proofs import prove
from benchmarks.silicon_lightnorm import packing
from recoup.data import root
from recoup.formats import ports
from recoup.gates import arithmetic
from recoup.gates.blocks import rebased
from recoup.gates.module import Module, Port
from recoup.lightnorm import LightNorm
from recoup.lightnorm.row_unit.unit import KINDS, Rows
from recoup.lightnorm.rtl import build
from recoup.lightnorm.rtl_conventional import FORMATS, conventional, conventional_rms
from recoup.silicon import Measured
from recoup.silicon.cells import Library

FEATURES, EPS = 4096, 1e-5
CONFIGS = {"FP10": LightNorm.fp10(), "FP10 in blocks of four": LightNorm()}
PROVED = {f"{kind}, {name}": (config, kind) for kind in KINDS for name, config in CONFIGS.items()}


def proved_of(name: str) -> Measured:
    """A unit that is proved."""
    config, kind = PROVED[name]
    return Measured.of(build(config, elements=FEATURES, eps=EPS, unit=kind))


def statistics(kind: str, config: LightNorm) -> Module:
    """A row's statistics over all lanes, as in the unit."""
    unit = Rows.of_kind(kind, config, FEATURES, EPS)
    F, G = unit.form, unit.lanes
    bits = ports.layout(F).bits
    pins = [Port("x", "in", bits * G, "", parts=G), *(Port(name, "in", 1, "") for name in unit.flags)]
    pins += [Port(name, "out", width, "") for name, width in unit.totals.items()]
    pins += [Port(f"new_{name}", "out", G, "", parts=G) for name in unit.extrema]

    def elaborate(m: Any, port: Any) -> None:
        layout = ports.layout(F)
        taken = [
            rebased(m, arithmetic.unpack(m, port.x[i * bits : (i + 1) * bits], layout, f"x_{i}"), layout, f"value_{i}")
            for i in range(G)
        ]
        (found,) = unit._gathered(m, port, {name: getattr(port, name) for name in unit.flags}, taken)
        m.d.comb += [getattr(port, name).eq(value) for name, value in zip(unit.totals, found, strict=True)]

    return Module(
        name="statistics", title=f"statistics, {kind}", ports=tuple(pins), elaborate=elaborate, expected=lambda _: {}
    )


def modules() -> dict[str, Module]:
    """Every row."""
    found = {"packing four": packing("outlier")}
    for kind in KINDS:
        found[f"{kind}: normalization"] = Rows.of_kind(kind, LightNorm.fp10(), FEATURES, EPS).lane.module()
        for name, config in CONFIGS.items():
            found[f"{kind}: statistics, {name}"] = statistics(kind, config)
            found[f"{kind}: whole unit, {name}"] = build(config, elements=FEATURES, eps=EPS, unit=kind)
        made = conventional if kind == "layer" else conventional_rms
        found |= {f"{kind}: {title}": made(form, title) for title, form in FORMATS.items()}
    return found


def ratios(area: dict[str, float]) -> dict[str, float]:
    """Conventional lanes over LightNorm's, without dividers; of four lanes with a quarter of the row's statistics."""
    found = {}
    for kind in KINDS:
        lane = area[f"{kind}: normalization"]
        lanes = {
            "FP10": area[f"{kind}: statistics, FP10"] + lane,
            "FP10 in blocks of four": area[f"{kind}: statistics, FP10 in blocks of four"] / 4 + lane,
            "FP10 in blocks of four, with both packers": (
                area[f"{kind}: statistics, FP10 in blocks of four"] / 4 + lane + area["packing four"] / 2
            ),
        }
        for name, value in lanes.items():
            found |= {f"{kind}: {title} over a lane, {name}": area[f"{kind}: {title}"] / value for title in FORMATS}
    return found


def main() -> None:
    """Measure, print and save."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    log, liberty = Log(RESULTS / "silicon_rows.jsonl"), root() / "liberty" / "sg13g2_stdcell_typ_1p20V_25C.lib"
    area = {
        name: log.measure(
            (liberty.name, name), lambda module=module: Measured.of(module).area(liberty).area, mapped(module)
        )
        for name, module in modules().items()
    }
    for name in PROVED:
        prove(log, name, proved_of(name))
    for name, ratio in ratios(area).items():
        print(f"{name}: {ratio:.2f}x")
    tool = Measured.of(packing("outlier")).area(liberty).tool
    proved = {name: {key[1]: value for key, value in log.values.items() if key[0] == name} for name in PROVED}
    save("silicon_rows", {
        "tool": tool, "liberty": {liberty.name: Library([liberty]).digests[0]}, "area": area,
        "ratios": ratios(area), "proof": proved,
    })  # fmt: skip


if __name__ == "__main__":
    main()
