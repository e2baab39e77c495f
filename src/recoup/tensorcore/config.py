"""The tensor core's configuration: operands, how many products are added at once, and in how many bits."""

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from recoup.errors import RecoupError
from recoup.fields import Config, choice, integer
from recoup.formats import Float

__all__ = ["OPERANDS", "OUTPUTS", "TensorCore"]

Output = Literal["e8m13", "float32", "float16"]
Order = Literal["ckk", "kkc"]
Scale = Literal["call", "calibrated"]
Nonfinite = Literal["error", "propagate"]
OUTPUTS: tuple[str, ...] = get_args(Output)

ScaleFormat = Literal["ue8m0", "ue4m3"]
SCALES: dict[str, Float] = {"ue8m0": Float(0, -127, 127, subnormals=False), "ue4m3": Float.parse("e4m3fn")}
"""Formats of block scales, which have no sign: powers of two, and e4m3's values without zero in the former."""
SUMMED = 16
"""Products of 4-bit operands that are summed exactly before they are scaled and aligned."""

OPERANDS = ("e4m3fn", "e5m2", "e2m1fn", "float16", "bfloat16", "tf32")
"""Operand formats of the units."""
FORMATS = {name: Float.parse(name) for name in OPERANDS}
"""The same as numbers; torch.compile would follow `Float.parse` through every format that there is."""

AMAX = {"e4m3fn": 448.0, "e5m2": 57344.0, "e2m1fn": 6.0}
"""Formats whose operands layers scale, and the magnitude that the largest element becomes."""

MAX_GROUP, MAX_FRACTION, LANE_BITS, SLACK = 64, 35, 51, 4
MAX_PROMOTION = 2**31 - 1


@dataclass(frozen=True, slots=True)
class TensorCore(Config):
    """Matrix products on the adder of a tensor core: a whole group of products, aligned, cut and added at once.

    One step takes an accumulator c and G products a_i b_i of consecutive k:

        E  = max(e(c), e(a_1) + e(b_1), ..., e(a_G) + e(b_G)),   q = 2^(E - n)
        T  = trunc(c / q) + sum_i trunc(a_i b_i / q)             each toward zero, the sum exact
        c' = output(T q)

    with e(x) the exponent of x, that of the smallest normal number for a subnormal one and -126 for zero: a product's
    exponent is the sum of its operands', not normalised. c starts at +0.

    With ``block`` the scales' exponents join the products' in the same way. 4-bit products (both operands e2m1fn) are
    first summed exactly by sixteens, and a sum has the exponents of its two scales alone:

        t_j = s_A s_B (sum of a_i b_i over 16 k),   e_j = e(scale_A) + e(scale_B),   E = max(e(c), e_1, ..., e_G/16)

    Attributes:
        operands: format of a and b, or of each: ``e4m3fn``, ``e5m2``, ``e2m1fn``, ``float16``, ``bfloat16``, ``tf32``.
            Unlike an `LBA`'s they are part of the unit: `recoup.tensorcore.matmul` refuses other values.
        group: G, products added at once, 1 to 64.
        fraction: n, bits kept below the largest term's exponent.
        output: the accumulator. ``float32``: toward zero, infinity from 2^128 on. ``e8m13``: the same without its low
            ten bits. ``float16``: to nearest even, infinity from 65,520 on.
        promotion: every so many k the sum is added to a float32 one, to nearest even, and starts anew; a multiple of
            ``group``. None: never.
        nonfinite: a NaN or infinity in an operand is an ``error``, or goes the way it goes in the unit
            (``propagate``).
        amax: what layers scale the largest magnitude of an operand, or gradient, to; None: the largest value of an 8 or
            4-bit format, and no scale for the others. With ``ue4m3`` scales the operand's own scale brings it to 2,688,
            the largest e2m1 value times the largest block scale; with ``ue8m0`` it has none.
        block: consecutive k that share a scale in each operand, 16 or 32; the last block is as short as K leaves it.
            Layers take the blocks along the reduction, in its ``order`` (`recoup.tensorcore.quantize_blocks`). None:
            none do.
        scale_format: of those scales: ``ue8m0``, powers of two, or ``ue4m3``, for 4-bit operands in blocks of 16.
        scale: where an activation's largest magnitude comes from. ``call``: the tensor's own, at every call;
            ``calibrated``: the mean over the calibration images of the image's largest, which `recoup.calibrate_`
            measures, so that results do not depend on what else is in the batch; larger values saturate. The operands
            of an attention are scaled call by call in any case, weights by their own largest.
        order: in which k of a convolution follow each other: ``ckk`` (channel, row, column) as everywhere in recoup,
            ``kkc`` (row, column, channel) as in kernels for channels_last images.
        backward: the two products of the backward pass run in ``float32`` or on the ``unit``.

    Raises:
        RecoupError: a field outside these values, or a fraction and group that sums in 51 bits do not hold:
            ``fraction + log2(4 group + 2) <= 51``; calibrated scales for activations that have none; block
            scales that a unit does not have, or beside outputs, scales and backward passes other than the usual ones.

    Source: the units' rule as published with MMA-Sim (Microsoft, arXiv 2511.10909), whose authors claim equality with
    the silicon; promotion as in CUTLASS. That c starts at +0 and that a bias is added afterwards are our definitions.

    >>> TensorCore.hopper_fp8() == TensorCore()
    True
    >>> TensorCore.hopper_bf16()
    TensorCore(operands='bfloat16', group=16, fraction=25, output='float32')
    """

    operands: str | tuple[str, str] = "e4m3fn"
    group: int = 32
    fraction: int = 13
    output: Output = "e8m13"
    promotion: int | None = None
    nonfinite: Nonfinite = "error"
    block: Literal[16, 32] | None = None
    scale_format: ScaleFormat | None = None
    amax: float | None = None
    scale: Scale = "call"
    order: Order = "ckk"
    backward: Literal["float32", "unit"] = "float32"

    def _check(self) -> None:
        self._set("operands", _checked_operands(self.operands))
        self._set("group", integer("TensorCore", "group", self.group, (1, MAX_GROUP)))
        self._set("fraction", integer("TensorCore", "fraction", self.fraction, (1, MAX_FRACTION)))
        choice("TensorCore", "output", self.output, OUTPUTS)
        if self.fraction + self.sum_bits > LANE_BITS:
            raise RecoupError(
                f"TensorCore(group={self.group}, fraction={self.fraction}): fraction must be at most "
                f"{LANE_BITS - self.sum_bits} with groups of {self.group}, so that sums have {LANE_BITS} bits"
            )
        if self.promotion is not None:
            last = MAX_PROMOTION // self.group * self.group
            self._set("promotion", integer("TensorCore", "promotion", self.promotion, (1, last), ", or None"))
            if self.promotion % self.group:
                raise RecoupError(
                    f"TensorCore(promotion={self.promotion}): promotion must be a multiple of group, {self.group}"
                )
        choice("TensorCore", "nonfinite", self.nonfinite, get_args(Nonfinite))
        if self.amax is not None:
            number = isinstance(self.amax, int | float) and not isinstance(self.amax, bool)
            top = min(form.largest_value for form in self.formats)
            if not number or not 0 < self.amax <= top:
                raise RecoupError(
                    f"TensorCore(amax={self.amax!r}): amax must lie above 0 and at most at {top}, or None"
                )
            self._set("amax", float(self.amax))
        choice("TensorCore", "scale", self.scale, get_args(Scale))
        self._check_blocks()
        if self.scale == "calibrated" and self.amax_of(self.pair[0]) is None:
            raise RecoupError(
                f"TensorCore(operands={self.operands!r}, scale='calibrated'): activations in {self.pair[0]} have no "
                "scale: set amax, or leave scale out"
            )
        choice("TensorCore", "order", self.order, get_args(Order))
        choice("TensorCore", "backward", self.backward, ("float32", "unit"))

    def _check_blocks(self) -> None:
        if self.block is None and self.scale_format is None:
            return
        said = f"TensorCore(block={self.block!r}, scale_format={self.scale_format!r})"
        fours = self.sums_sixteen
        legal = {("ue8m0", 32)} | ({("ue8m0", 16), ("ue4m3", 16)} if fours else set())
        if (self.scale_format, self.block) not in legal:
            shown = " or ".join(f"{name} per {block}" for name, block in sorted(legal))
            raise RecoupError(f"{said}: scales of operands {self.operands!r} are {shown}")
        if any(name not in AMAX for name in self.pair):
            raise RecoupError(f"{said}: operands of 16 bits have no block scales; got {self.operands!r}")
        if fours and self.group % SUMMED:
            raise RecoupError(f"{said}: group must be a multiple of {SUMMED} with 4-bit operands; got {self.group}")
        if (self.output, self.amax, self.backward) != ("float32", None, "float32"):
            raise RecoupError(f"{said}: block-scaled units have output='float32', amax=None and backward='float32'")
        if self.scale == "calibrated" and self.scale_format == "ue8m0":
            raise RecoupError(
                f"{said}: block scales of ue8m0 are the call's own, and there is no other to calibrate: leave scale out"
            )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TensorCore":
        """The inverse of `to_dict`: JSON and YAML have no tuples."""
        operands = values.get("operands")
        return super(TensorCore, cls).from_dict(
            values | ({"operands": tuple(operands)} if isinstance(operands, list) else {})
        )

    @property
    def sum_bits(self) -> int:
        """Bits by which a group's sum may exceed a term's, and its sign."""
        return math.ceil(math.log2(4 * self.group + 2))

    @property
    def sums_sixteen(self) -> bool:
        """Whether products are summed by sixteens before they are aligned: 4-bit operands with block scales."""
        return self.block is not None and self.pair == ("e2m1fn", "e2m1fn")

    @property
    def pair(self) -> tuple[str, str]:
        """The names of a's and b's formats."""
        return self.operands if isinstance(self.operands, tuple) else (self.operands, self.operands)

    @property
    def overflows(self) -> bool:
        """Whether sums of layers leave the accumulator's range easily: float16's."""
        return self.output == "float16"

    @property
    def formats(self) -> tuple[Float, Float]:
        """a's and b's formats."""
        first, second = self.pair
        return FORMATS[first], FORMATS[second]

    def amax_of(self, name: str) -> float | None:
        """What layers scale the largest magnitude of an operand in a format to; None: they do not scale it."""
        if self.block is not None:
            return AMAX[name] * AMAX["e4m3fn"] if self.scale_format == "ue4m3" else None
        return AMAX.get(name) if self.amax is None else self.amax

    @classmethod
    def _preset(cls, options: dict[str, Any], **values: Any) -> "TensorCore":
        return cls(**{**values, **options})

    @classmethod
    def volta_f16(cls, **options: Any) -> "TensorCore":
        """Volta, float16: four products at once."""
        return cls._preset(options, operands="float16", group=4, fraction=23, output="float32")

    @classmethod
    def turing_f16(cls, **options: Any) -> "TensorCore":
        """Turing, float16."""
        return cls._preset(options, operands="float16", group=8, fraction=24, output="float32")

    @classmethod
    def ampere_f16(cls, **options: Any) -> "TensorCore":
        """Ampere and Ada, float16."""
        return cls._preset(options, operands="float16", group=8, fraction=24, output="float32")

    @classmethod
    def ampere_bf16(cls, **options: Any) -> "TensorCore":
        """Ampere and Ada, bfloat16."""
        return cls._preset(options, operands="bfloat16", group=8, fraction=24, output="float32")

    @classmethod
    def ampere_tf32(cls, **options: Any) -> "TensorCore":
        """Ampere and Ada, TF32."""
        return cls._preset(options, operands="tf32", group=4, fraction=24, output="float32")

    @classmethod
    def ada_fp8(cls, **options: Any) -> "TensorCore":
        """Ada, FP8: sixteen products in 13 bits."""
        return cls._preset(options, group=16)

    @classmethod
    def hopper_f16(cls, **options: Any) -> "TensorCore":
        """Hopper, float16."""
        return cls._preset(options, operands="float16", group=16, fraction=25, output="float32")

    @classmethod
    def hopper_bf16(cls, **options: Any) -> "TensorCore":
        """Hopper, bfloat16."""
        return cls._preset(options, operands="bfloat16", group=16, fraction=25, output="float32")

    @classmethod
    def hopper_tf32(cls, **options: Any) -> "TensorCore":
        """Hopper, TF32."""
        return cls._preset(options, operands="tf32", group=8, fraction=25, output="float32")

    @classmethod
    def hopper_fp8(cls, **options: Any) -> "TensorCore":
        """Hopper, FP8: thirty-two products in 13 bits."""
        return cls._preset(options)

    @classmethod
    def blackwell_f16(cls, **options: Any) -> "TensorCore":
        """Blackwell, float16."""
        return cls._preset(options, operands="float16", group=16, fraction=25, output="float32")

    @classmethod
    def blackwell_bf16(cls, **options: Any) -> "TensorCore":
        """Blackwell, bfloat16."""
        return cls._preset(options, operands="bfloat16", group=16, fraction=25, output="float32")

    @classmethod
    def blackwell_tf32(cls, **options: Any) -> "TensorCore":
        """Blackwell, TF32."""
        return cls._preset(options, operands="tf32", group=8, fraction=25, output="float32")

    @classmethod
    def blackwell_fp8(cls, **options: Any) -> "TensorCore":
        """Blackwell, FP8: sums to float32's own width."""
        return cls._preset(options, group=32, fraction=25, output="float32")

    @classmethod
    def blackwell_mxfp8(cls, **options: Any) -> "TensorCore":
        """Blackwell, MXFP8: a power of two for every 32 of each operand."""
        return cls._preset(options, group=32, fraction=25, output="float32", block=32, scale_format="ue8m0")

    @classmethod
    def blackwell_mxfp4(cls, **options: Any) -> "TensorCore":
        """Blackwell, MXFP4: a power of two for every 32 of each operand."""
        values = {"operands": "e2m1fn", "group": 64, "fraction": 35, "output": "float32"}
        return cls._preset(options, **values, block=32, scale_format="ue8m0")

    @classmethod
    def blackwell_nvfp4(cls, **options: Any) -> "TensorCore":
        """Blackwell, NVFP4: an e4m3 scale for every 16 of each operand."""
        values = {"operands": "e2m1fn", "group": 64, "fraction": 35, "output": "float32"}
        return cls._preset(options, **values, block=16, scale_format="ue4m3")

    def __repr__(self) -> str:
        """What differs from the defaults; it can be pasted back."""
        return self._changed()


def _checked_operands(operands: Any) -> str | tuple[str, str]:
    given = tuple(operands) if isinstance(operands, tuple | list) else (operands,)
    names = tuple("e2m1fn" if name == "e2m1" else name for name in given)
    if len(names) > 2 or not names or any(name not in OPERANDS for name in names):
        raise RecoupError(
            f"TensorCore(operands={operands!r}): operands must be one of {', '.join(map(repr, OPERANDS))}, or two of "
            "them, a's and b's"
        )
    return names[0] if len(set(names)) == 1 else (names[0], names[-1])
