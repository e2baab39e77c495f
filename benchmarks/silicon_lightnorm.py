"""Claim: LightNorm's units are several times smaller than batch norm in FP32, the forward one smaller than in FP16, and
all of them are proved.

Areas of a lane's parts without the divider (as published: neither has the division and the root, once a channel), of
whole units with it, and of conventional lanes from the same generator; then the proofs of units. A row at a time is
kept in benchmarks/results/silicon_lightnorm.jsonl with a digest of its design and mapping, another is measured anew;
FP32 takes minutes. The table goes to silicon_lightnorm.json.

    python benchmarks/silicon_lightnorm.py
"""

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.log import Log
from benchmarks.measure import RESULTS, mapped, save
from benchmarks.proofs import prove
from recoup.data import root
from recoup.formats import ports
from recoup.gates import arithmetic
from recoup.gates.blocks import pack_block, rebased
from recoup.gates.module import Module, Port, amaranth
from recoup.lightnorm import LightNorm
from recoup.lightnorm.backward_unit.unit import Backward
from recoup.lightnorm.rtl import Forward, build
from recoup.lightnorm.rtl_conventional import FORMATS, conventional, conventional_backward
from recoup.silicon import Measured
from recoup.silicon.cells import Library

ROUNDED = LightNorm().statistics
PROVED = {
    "lightnorm-fp10": (LightNorm.fp10(), "forward"),
    "lightnorm-fp10, x - mu in 1-5-12": (LightNorm.fp10(difference=ROUNDED), "forward"),
    "lightnorm": (LightNorm(), "forward"),
    "lightnorm, x - mu in 1-5-12": (LightNorm(difference=ROUNDED), "forward"),
    "lightnorm-fp10, backward": (LightNorm.fp10(), "backward"),
    "lightnorm, backward": (LightNorm(), "backward"),
}
CONFIGS = {"x - mu exact": {}, "x - mu in 1-5-12": {"difference": ROUNDED}}


def forward(config: LightNorm) -> Forward:
    """The unit with the generator's default options."""
    return Forward.of(config, 1 << 17, 1e-5)


def statistics() -> Module:
    """A lane's largest, smallest, exact sum and sum of ranges, as in the unit."""
    unit = forward(LightNorm.fp10())
    F = unit.form
    flags = ("collect", "first", "chunk", "fold", "low")
    pins = [ports.port("x", "in", F, ""), *(Port(name, "in", 1, "") for name in flags)]
    widths = {"sum": unit.sum_bits, "range": unit.range_bits, "new_largest": 1, "new_smallest": 1}
    pins += [Port(name, "out", bits, "") for name, bits in widths.items()]

    def elaborate(m: Any, port: Any) -> None:
        layout = ports.layout(F)
        value = rebased(m, arithmetic.unpack(m, port.x, layout, "x"), layout, "value")
        total, spread = unit._statistics(m, port, {name: getattr(port, name) for name in flags}, value, 0)
        m.d.comb += [port.sum.eq(total), port.range.eq(spread)]

    return Module(
        name="statistics", title="statistics, FP10", ports=tuple(pins), elaborate=elaborate, expected=lambda _: {}
    )


def packing(shared: str, backward: bool = False) -> Module:
    """Blocks of four, a whole block a cycle."""
    kind = Backward if backward else Forward
    unit = kind.of(LightNorm(shared=shared), 1 << 17, 1e-5)  # type: ignore[arg-type]
    block, layout = unit.block, ports.layout(unit.form)
    assert block is not None
    pins = (
        Port("x", "in", layout.bits * block.size, "", parts=block.size),
        Port("y", "out", block.bits, ""),
    )

    def elaborate(m: Any, port: Any) -> None:
        codes = [port.x[i * layout.bits : (i + 1) * layout.bits] for i in range(block.size)]
        given = [
            rebased(m, arithmetic.unpack(m, code, layout, f"x_{i}"), layout, f"x_{i}") for i, code in enumerate(codes)
        ]
        result = amaranth("hdl").Signal(block.bits)
        m.d.comb += [result.eq(pack_block(m, given, layout, block, "pack")), port.y.eq(result)]

    return Module(
        name="packing", title=f"blocks of 4, {shared}", ports=pins, elaborate=elaborate, expected=lambda _: {},
        clocked=False,
    )  # fmt: skip


def backward() -> Backward:
    """The unit with the generator's default options."""
    return Backward.of(LightNorm.fp10(), 1 << 17, 1e-5)


def gradient_sums(*names: str) -> Module:
    """A lane's exact sums of dy (sum) and of dy xhat (cross), as in the unit."""
    unit = backward()
    widths = {"sum": unit.sum_bits, "cross": unit.cross_bits}
    pins = [ports.port("dy", "in", unit.form, ""), ports.port("xhat", "in", unit.activations.form, "")]
    pins += [Port(name, "in", 1, "") for name in ("collect", "first")]
    pins += [Port(name, "out", widths[name], "") for name in names]

    def elaborate(m: Any, port: Any) -> None:
        value = rebased(m, arithmetic.unpack(m, port.dy, unit.layout, "dy"), unit.layout, "value")
        found = dict(
            zip(widths, unit._sums(m, port, {n: getattr(port, n) for n in ("collect", "first")}, value, 0), strict=True)
        )
        m.d.comb += [getattr(port, name).eq(found[name]) for name in names]

    return Module(
        name="gradient_sums", title="sums of dy", ports=tuple(pins), elaborate=elaborate, expected=lambda _: {}
    )


def backward_modules() -> dict[str, Module]:
    """The same of the backward unit."""
    return {
        "backward: sum of dy": gradient_sums("sum"),
        "backward: sum of dy xhat": gradient_sums("cross"),
        "backward: both sums": gradient_sums("sum", "cross"),
        "backward: dx": backward().lane.module(),
        "backward: packing four, outlier": packing("outlier", backward=True),
        "backward: packing four, max": packing("max", backward=True),
        "backward: whole unit of one lane": build(LightNorm.fp10(), unit="backward"),
        "backward: whole unit of four lanes with blocks": build(LightNorm(), unit="backward"),
        **{f"backward: {title}": conventional_backward(form, title) for title, form in FORMATS.items()},
    }


def modules() -> dict[str, Module]:
    """Every row, the quick ones first."""
    found = {"statistics": statistics()}
    found |= {f"normalization, {name}": forward(LightNorm.fp10(**o)).lane.module() for name, o in CONFIGS.items()}
    found |= {f"packing four, {shared}": packing(shared) for shared in ("outlier", "max")}
    found |= {f"whole unit of one lane, {name}": build(LightNorm.fp10(**o)) for name, o in CONFIGS.items()}
    found["whole unit of four lanes with blocks, x - mu exact"] = build(LightNorm())
    return found | {title: conventional(form, title) for title, form in FORMATS.items()}


def proved_of(name: str) -> Measured:
    """A unit that is proved."""
    config, unit = PROVED[name]
    return Measured.of(build(config, unit=unit))


def ratios(area: dict[str, float]) -> dict[str, float]:
    """Conventional lanes over LightNorm's, without dividers."""
    found = {}
    for name in CONFIGS:
        lane = area["statistics"] + area[f"normalization, {name}"]
        packed = lane + area["packing four, outlier"] / 2  # of x and of y, a quarter of a packer each
        for title in FORMATS:
            found[f"{title} over a lane, {name}"] = area[title] / lane
            found[f"{title} over a lane with both packers, {name}"] = area[title] / packed
    lane = area["backward: both sums"] + area["backward: dx"]
    packed = lane + area["backward: packing four, outlier"] / 2  # of dy and of dx
    for title in FORMATS:
        found[f"{title} over a backward lane"] = area[f"backward: {title}"] / lane
        found[f"{title} over a backward lane with both packers"] = area[f"backward: {title}"] / packed
    found["the sum of dy xhat's part of a backward lane"] = area["backward: sum of dy xhat"] / lane
    whole = area["backward: whole unit of one lane"]
    found["the sum of dy xhat's part of the backward unit of one lane"] = area["backward: sum of dy xhat"] / whole
    return found


def main() -> None:
    """Measure, print and save."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    log, liberty = Log(RESULTS / "silicon_lightnorm.jsonl"), root() / "liberty" / "sg13g2_stdcell_typ_1p20V_25C.lib"
    area = {
        name: log.measure(
            (liberty.name, name), lambda module=module: Measured.of(module).area(liberty).area, mapped(module)
        )
        for name, module in (modules() | backward_modules()).items()
    }
    for name in PROVED:
        prove(log, name, proved_of(name))
    for name, ratio in ratios(area).items():
        print(f"{name}: {ratio:.2f}x")
    tool = Measured.of(statistics()).area(liberty).tool
    proved = {name: {key[1]: value for key, value in log.values.items() if key[0] == name} for name in PROVED}
    save("silicon_lightnorm", {
        "tool": tool, "liberty": {liberty.name: Library([liberty]).digests[0]}, "area": area,
        "ratios": ratios(area), "proof": proved,
    })  # fmt: skip


if __name__ == "__main__":
    main()
