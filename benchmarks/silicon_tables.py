"""Claim: which registers NB-SMT's published area ratios hold for, and what T exact multipliers on one accumulator cost.

Area and delay of processing elements by registers and library, each beside its counterpart with T exact multipliers.
Writes benchmarks/results/silicon_tables.json and prints the table of docs/silicon.md.

    python benchmarks/silicon_tables.py                         # IHP SG13G2, sky130 and ASAP7 of the shared data
    python benchmarks/silicon_tables.py --library "IHP SG13G2"  # one of them
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import recoup as rc
from benchmarks.measure import save
from recoup.data import root
from recoup.silicon import build
from recoup.silicon.cells import Library

LIBRARIES = ("IHP SG13G2", "sky130hd", "ASAP7")
ROWS = (
    ("no drain, no registers", {"registers": "none", "drain": False}),
    ("drain register", {"registers": "none"}),
    ("drain, product register (default)", {}),
    ("drain, decode + product registers", {"registers": "decode"}),
    ("24-bit accumulator, no drain", {"registers": "none", "drain": False, "accumulator_bits": 24}),
)


def libraries() -> dict[str, list[Path]]:
    """The libraries of the shared data by name."""
    folder = root() / "liberty"
    files = (
        [folder / "sg13g2_stdcell_typ_1p20V_25C.lib"],
        [folder / "sky130hd_tt.lib.gz"],
        sorted(folder.glob("asap7_*.lib.gz")),
    )
    return dict(zip(LIBRARIES, files, strict=True))


def row(options: dict, liberty: list[Path], delay: bool) -> dict[str, dict[str, float]]:
    """Area and delay of one, two and four threads and of T exact multipliers."""
    found: dict[str, dict[str, float]] = {}
    for threads in (1, 2, 4):
        module = build(rc.NBSMT(threads=threads), **options)
        others = {name: other for name, other in module.counterparts().items() if "exact" in name}
        for title, one in {f"{threads}T": module, **others}.items():
            found[title] = {"area": one.area(liberty).area}
            if delay:
                found[title]["delay"] = one.delay(liberty).ns
    return found


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", action="append", choices=LIBRARIES, help="only this one; may be repeated")
    wanted = parser.parse_args().library
    table: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    digests = {}
    for name, files in libraries().items():
        if wanted and name not in wanted:
            continue
        chosen = ROWS if name == "IHP SG13G2" else ROWS[:2]
        digests[name] = dict(zip((f.name for f in files), Library(files).digests, strict=True))
        table[name] = {label: row(options, files, name == "IHP SG13G2") for label, options in chosen}
        for label, cells in table[name].items():
            one = cells["1T"]["area"]
            said = [f"{cells[t]['area'] / one:.2f}x" for t in ("2T", "2T exact", "4T", "4T exact")]
            waits = " / ".join(f"{c['delay']:.2f}" for c in cells.values()) if name == "IHP SG13G2" else ""
            print(f"| {name} | {label} | {one:,.1f} | {' | '.join(said)} | {waits} |", flush=True)
    tool = build(rc.NBSMT(threads=1)).area().tool
    save("silicon_tables", {"tool": tool, "liberty": digests, "table": table})


if __name__ == "__main__":
    main()
