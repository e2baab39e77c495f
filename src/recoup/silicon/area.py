"""Area of a mapped module: of a library's cells, or in NAND2-equivalents of plain gates."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from recoup.silicon.cells import Library

WEIGHTS: Mapping[str, float] = {
    "$_NOT_": 0.75,
    "$_NAND_": 1.0,
    "$_NOR_": 1.0,
    "$_AND_": 1.25,
    "$_OR_": 1.25,
    "$_XOR_": 2.0,
    "$_XNOR_": 2.0,
    "$_MUX_": 2.5,
    "$_DFF_P_": 6.75,
}
"""NAND2-equivalents of plain gates: the ratios of the cells of IHP's SG13G2 (inv, nand2, ..., mux2, dfrbpq)."""


@dataclass(frozen=True, slots=True)
class Area:
    """How large a module is.

    Attributes:
        module: its title.
        area: in the library's unit (um2 in all that are common); without library NAND2-equivalents.
        unit: "um2", or "NAND2".
        nand2: the area in two-input NANDs of the library.
        registers: the area of flip-flops alone, in ``unit``.
        cells: how many of each kind.
        booth: whether the smaller of two syntheses was the one with Booth's recoding.
        parts: area by kind of part (`recoup.silicon.parts`), in ``unit``, where it was asked for.
        tool, liberty: what measured it: the yosys; file name and sha256 of each library file.
    """

    module: str
    area: float
    unit: str
    nand2: float
    registers: float
    cells: dict[str, int]
    booth: bool
    parts: dict[str, float]
    tool: str
    liberty: tuple[tuple[str, str], ...]

    @property
    def gates(self) -> int:
        """How many cells."""
        return sum(self.cells.values())

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return {**asdict(self), "gates": self.gates}


def sized(result: Any, top: str, library: Library | None) -> tuple[float, float, dict[str, int]]:
    """Area, that of the flip-flops, and cells by kind, of one module of yosys's statistics; sub-units left out."""
    stat = result["stat"]["modules"]["\\" + top]
    cells = {kind: int(count) for kind, count in stat["num_cells_by_type"].items()}
    total = registers = 0.0
    for kind, count in cells.items():
        if library is not None and kind in library:
            cell = library.cell(kind)
            total += count * cell.area
            registers += count * cell.area * (cell.flip_flop is not None)
        elif library is None and kind in WEIGHTS:
            total += count * WEIGHTS[kind]
            registers += count * WEIGHTS[kind] * (kind == "$_DFF_P_")
    return total, registers, cells
