"""Area by kind of part: registers, multipliers, adders, selection, logic, from a mapping that keeps them apart.

A netlist whose area is quoted is optimized across these borders and has none of them left. So the word-level cells of
each kind are put into a module of their own before mapping; what is gained across the borders is lost, and the sum of
the parts is more than the module's area by what that is.
"""

from collections.abc import Mapping
from typing import Any

from recoup.silicon.area import sized
from recoup.silicon.cells import Library

REGISTERS, REST = "registers", "other logic"
KINDS: Mapping[str, tuple[str, ...]] = {
    "multipliers": ("mul",),
    "adders": ("add", "sub", "neg", "alu", "macc", "macc_v2"),
    "selection and shifts": ("mux", "pmux", "bmux", "shl", "shr", "sshl", "sshr", "shift", "shiftx"),
}
"""Kind -> yosys's word-level cells of it."""
NAMES = (REGISTERS, *KINDS, REST)
"""All kinds, in the order in which they are shown."""


def apart() -> list[str]:
    """The commands that put each kind of a design's cells into modules of their own."""
    optimized = ["opt_expr", "opt_clean", "opt -nodffe -nosdff", "wreduce", "peepopt", "opt_clean", "opt"]
    marked = [
        f'setattr -set submod "{_mark(kind)}" {" ".join(f"t:${cell}" for cell in cells)}'
        for kind, cells in KINDS.items()
    ]
    return ["proc", *optimized, *marked, "submod"]


def parts_of(result: Any, top: str, library: Library | None) -> dict[str, float]:
    """Area by kind of a mapping after `apart`, the kinds that it has, in the order of `NAMES`."""
    known = {name.removeprefix("\\"): None for name in result["stat"]["modules"]}
    sizes = {name: sized(result, name, library) for name in known}
    found = dict.fromkeys(NAMES, 0.0)

    def walk(name: str, kind: str) -> None:
        area, registers, _ = sizes[name]
        found[kind] += area - registers
        found[REGISTERS] += registers
        for cell in result["netlist"]["modules"][name]["cells"].values():
            if cell["type"] in known:
                walk(cell["type"], next((k for k in KINDS if cell["type"].endswith(f"_{_mark(k)}")), kind))

    walk(top, REST)
    return {kind: area for kind, area in found.items() if area}


def _mark(kind: str) -> str:
    """A kind as part of a module's name."""
    return f"part{list(KINDS).index(kind)}"
