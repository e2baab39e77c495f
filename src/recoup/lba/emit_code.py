"""What the kernels and the forms of a step share: the tile's shape, a form's interface, a tile's arithmetic."""

from dataclasses import dataclass
from typing import Any, Protocol

from recoup.kernels.llvm import I16, I32, I64, Target, declared
from recoup.kernels.signature import Definition
from recoup.kernels.vector import Vector

CONSTANTS = 32  # floats and integers a form may take; more than any does, so that all kernels take tables of one size
PRODUCT, SUM, OUTER = 0, 1, 2  # the three places where a step quantises
SMALLER_MAGNITUDE = 2  # of VRANGEPS, with the sign of the first operand
EVERY_LANE, CURRENT_ROUNDING = -1, 4


@dataclass(frozen=True, slots=True)
class Shape:
    """How a kernel uses the registers: a tile of rows x vectors sums, of so many lanes each."""

    lanes: int
    rows: int
    vectors: int

    @property
    def columns(self) -> int:
        """Columns of a panel."""
        return self.lanes * self.vectors

    @property
    def places(self) -> list[tuple[int, int]]:
        """Row and vector of every register of the tile."""
        return [(row, vector) for row in range(self.rows) for vector in range(self.vectors)]


@dataclass(frozen=True, slots=True)
class Step:
    """What a step made: the new sum, and product and sum as they were before their limits (None: there is none)."""

    result: Any
    product: Any
    total: Any


class Form(Protocol):
    """One way to compute a step; frozen and hashable, so that kernels are built once."""

    @property
    def wide(self) -> bool:
        """Float64 lanes, operands at their own scale; else float32 lanes."""
        ...

    @property
    def control(self) -> int:
        """The floating point control word (MXCSR) it needs."""
        ...

    @property
    def random(self) -> bool:
        """Whether steps draw random bits."""
        ...

    def term(self, code: "Code", x: Any, w: Any, s: Any, draw: Any) -> Step:
        """One more term."""
        ...

    def add(self, code: "Code", s: Any, y: Any, draw: Any) -> Step:
        """A chunk's sum joins the outer sum."""
        ...

    def inside(self, code: "Code", value: Any, place: int) -> Any:
        """Lanes where a product, sum or outer sum (`PRODUCT`, `SUM`, `OUTER`) has not left its format's range."""
        ...


class Code(Vector):
    """The arithmetic of a kernel being written, over the tiles of a shape.

    Args:
        function: where.
        shape: of a tile.
        double: float64 lanes, else float32.
        target: the processor.

    Attributes:
        v: the function's arguments by name.
        float_constants, integer_constants: the form's, in every lane, once they are loaded.
    """

    def __init__(self, function: Definition, shape: Shape, double: bool, target: Target) -> None:
        super().__init__(function.b, shape.lanes, double)
        self.v, self.shape, self.target = function.arguments, shape, target
        self.float_constants: list[Any] = []
        self.integer_constants: list[Any] = []

    def load_constants(self) -> None:
        """Broadcast every constant, once a tile: they then stay in registers. LLVM drops those a form does not use."""
        for i in range(CONSTANTS):
            self.float_constants.append(self.everywhere(self.get(self.v["floats"], I64(i), self.scalar)))
            self.integer_constants.append(self.everywhere(self.get(self.v["integers"], I64(i), self.integer)))

    def limit(self, x: Any, top: Any) -> Any:
        """x with its magnitude limited to top.

        One operation, VRANGEPS, where AVX-512DQ has it: the smaller magnitude of both, with x's sign. Two elsewhere.
        """
        if not self.double and self.lanes == 16 and "avx512dq" in self.target.features:
            types = [self.vector, self.vector, I32, self.vector, I16, I32]
            ranged = declared(self.b, "llvm.x86.avx512.mask.range.ps.512", self.vector, types)
            return self.b.call(ranged, [x, top, I32(SMALLER_MAGNITUDE), x, I16(EVERY_LANE), I32(CURRENT_ROUNDING)])
        return self.larger(self.smaller(x, top), self.b.fneg(top))
