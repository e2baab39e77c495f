"""The LBA configuration: the datapath of a multiply-accumulate unit with a narrow accumulator."""

import math
import warnings
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from recoup.errors import RecoupError, RecoupWarning
from recoup.fields import Config, Value, boolean, choice, integer
from recoup.formats import Float, Int

Gradient = Literal["identity", "recursive_of", "immediate_of", "immediate_diff", "recursive_diff"]
Nonfinite = Literal["error", "propagate"]
WeightScale = Literal["tensor", "channel"]
ActivationScale = Literal["call", "calibrated"]
Operand = Float | Int
GRADIENTS: tuple[str, ...] = get_args(Gradient)

MAX_MANTISSA, MAX_EXPONENT, INT_BITS, SCALE_EXPONENT = 23, 256, (2, 32), 100
MAX_CHUNK = 2**31 - 1


@dataclass(frozen=True, slots=True)
class LBA(Config):
    """Matrix products on a fused multiply-add unit (FMAq) whose product and sum are kept in few bits.

        s_0 = 0,   s_i = Q_acc(Q_prod(x_i w_i) + s_{i-1})        within a chunk of consecutive i
        y_0 = 0,   y_c = Q_acc(s of chunk c + y_{c-1})           over the chunks, in increasing order

    Product and sum are infinitely precise before Q: *exact, then quantise*. Q truncates the magnitude (`Float.lba`)
    unless its format says otherwise. Plain float32 arithmetic followed by a mask differs from this in about 2^-17 of
    the products of float32 operands and never for operands of at most 12 significant bits.

    Attributes:
        product: format of Q_prod; None: the product enters the sum unrounded (a fused multiply-add).
        accumulator: format of Q_acc. An `Int` is fixed point: it counts in units of ``scale``, rounds to nearest even
            and saturates or wraps.
        chunk: how many consecutive terms sum up from zero, None for all of them. The paper's is 16; near sqrt(K) is
            better for K >= 1152.
        underflow: False drops the flush to zero below the smallest normal of both formats, and nothing else (the
            exponent is then unbounded below): the first stage of the paper's training.
        gradient: the derivative that training sees. ``identity``: of the exact product; ``recursive_of``,
            ``immediate_of``: terms that an overflow cut off get none; ``immediate_diff``, ``recursive_diff``: neither
            do terms that did not change the sum. See `recoup.lba.reference.gradients`.
        scale: value of the least significant bit of an `Int` accumulator, a power of two.
        promotion: format that chunk sums are added up in; None: the accumulator's own.
        operands: what layers quantise activations and weights to before the product (`recoup.lba.quantize_operand`),
            or a pair, activations' and weights': ``(Int(8, signed=False), Int(8))`` for what comes out of a ReLU. None:
            nothing. It is no part of the unit, and `recoup.lba.matmul` does not apply it.
        weight_scale: whether a layer's weight is quantised to ``operands`` with one scale (or flexible bias) per
            ``tensor``, or per output ``channel``: that costs the unit nothing, since the scale is of a sum's output. It
            is written in the repr and in `to_dict` where it is not the default.
        activation_scale: where the scale (or flexible bias) of a layer's activations comes from. ``call``: the largest
            magnitude of the whole tensor, at every call, as in the paper; ``calibrated``: the mean over the calibration
            images of the image's largest, which `recoup.calibrate_` measures, so that results do not depend on what
            else is in the batch; larger values saturate. The operands of an attention are scaled call by call in any
            case. Written as ``weight_scale`` is.
        backward: the unit that the two products of the backward pass run on; None: float32.
        nonfinite: a NaN or infinity in an operand is an ``error``, or makes every output it belongs to NaN
            (``propagate``).

    Raises:
        RecoupError: a field outside these values, or a format beyond the kernels: mantissa up to 23 bits, exponents
            -256 to 256, saturating; integers of 2 to 32 bits, signed, but for activations of a pair.

    Source: Blumenfeld, Hubara and Soudry, "Towards Cheaper Inference in Deep Networks with Lower Bit-Width
    Accumulators", ICLR 2024. Exact-then-truncate, the order of the chunk sums, promotion, integer and nearest
    accumulators, and `biased`'s rule for exponents other than 4 are our definitions.

    >>> LBA.m7e4() == LBA()
    True
    >>> LBA().accumulator.bits, LBA().accumulator.largest_value
    (12, 63.75)
    >>> LBA.biased(4, 3, chunk=None)
    LBA(product=Float.lba(3, 4, bias=6), accumulator=Float.lba(3, 4, bias=6), chunk=None)
    """

    product: Float | None = Float.lba(4, 7, bias=12)  # noqa: RUF009 -- frozen
    accumulator: Float | Int = Float.lba(4, 7, bias=10)  # noqa: RUF009
    chunk: int | None = 16
    underflow: bool = True
    gradient: Gradient = "identity"
    scale: float = 1.0
    promotion: Float | None = None
    operands: Operand | tuple[Operand, Operand] | None = None
    weight_scale: WeightScale = field(default="tensor", kw_only=True)
    activation_scale: ActivationScale = field(default="call", kw_only=True)
    backward: "LBA | None" = None
    nonfinite: Nonfinite = "error"
    # Whether any step, of the backward pass too, draws random bits: a plain value that compilers trace.
    stochastic: bool = field(init=False, repr=False, compare=False)

    @classmethod
    def inner(cls) -> tuple[type[Value], ...]:
        """Formats, and the backward unit."""
        return Float, Int, cls

    def _check(self) -> None:
        _check_float("product", self.product, optional=True)
        _check_float("promotion", self.promotion, optional=True)
        if isinstance(self.accumulator, Int):
            _check_int(self.accumulator)
        else:
            _check_float("accumulator", self.accumulator, optional=False)
        if self.chunk is not None:
            note = ", or None for no chunks"
            self._set("chunk", integer("LBA", "chunk", self.chunk, (1, MAX_CHUNK), note))
        boolean("LBA", "underflow", self.underflow)
        choice("LBA", "gradient", self.gradient, GRADIENTS)
        choice("LBA", "nonfinite", self.nonfinite, get_args(Nonfinite))
        self._set("scale", self._checked_scale())
        self._check_operands()
        if self.backward is not None and (not isinstance(self.backward, LBA) or self.backward.backward is not None):
            raise RecoupError(
                f"LBA(backward={self.backward!r}): backward must be an LBA without a backward of its own, or None"
            )
        if self.backward is not None and self.gradient != "identity":
            raise RecoupError(
                f"LBA(gradient={self.gradient!r}): with a backward unit the gradient must be 'identity'; the others "
                "sum over the terms that passed, in float32"
            )

        formats = (self.product, self.accumulator, self.promotion)
        random = any(isinstance(f, Float) and f.rounding == "stochastic" for f in formats)
        random = random or (self.backward is not None and self.backward.stochastic)
        self._set("stochastic", random)

    def _check_operands(self) -> None:
        choice("LBA", "weight_scale", self.weight_scale, get_args(WeightScale))
        choice("LBA", "activation_scale", self.activation_scale, get_args(ActivationScale))
        if self.operands is None:
            for name, value, what in (
                ("weight_scale", "tensor", "weights"),
                ("activation_scale", "call", "activations"),
            ):
                if getattr(self, name) != value:
                    raise RecoupError(
                        f"LBA({name}={getattr(self, name)!r}): there are scales where {what} are quantised: give "
                        "operands"
                    )
            return
        pair = self.operands if isinstance(self.operands, tuple | list) else (self.operands, self.operands)
        if len(pair) != 2 or not all(isinstance(form, Float | Int) for form in pair):
            raise RecoupError(
                f"LBA(operands={self.operands!r}): operands must be a Float, an Int, a pair of them (activations' and "
                "weights') or None"
            )
        activations, weights = pair
        for form in (weights,) if isinstance(activations, Int) and not activations.signed else pair:
            if isinstance(form, Int) and (not form.signed or form.bits < INT_BITS[0]):
                raise RecoupError(
                    f"LBA(operands={self.operands!r}): Int operands must be signed and have at least {INT_BITS[0]} "
                    "bits: their codes lie from -largest to largest; activations alone may be unsigned, as in "
                    f"operands=(Int({form.bits}, signed=False), Int({max(form.bits, INT_BITS[0])}))"
                )
        self._set("operands", activations if activations == weights else (activations, weights))

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values; what came later only where it is not the default: older digests lack it."""
        values = super(LBA, self).to_dict()
        for name, value in (("weight_scale", "tensor"), ("activation_scale", "call")):
            if values[name] == value:
                del values[name]
        return values

    @property
    def pair(self) -> tuple[Operand, Operand] | tuple[None, None]:
        """The formats of activations and of weights."""
        if isinstance(self.operands, tuple):
            return self.operands
        return (None, None) if self.operands is None else (self.operands, self.operands)

    @property
    def unsigned(self) -> bool:
        """Whether activations are integers without a sign."""
        form = self.pair[0]
        return isinstance(form, Int) and not form.signed

    @property
    def integers(self) -> bool:
        """Whether activations and weights both become whole numbers."""
        return all(isinstance(form, Int) for form in self.pair)

    def _checked_scale(self) -> float:
        scale, limit = self.scale, 2.0**SCALE_EXPONENT
        number = isinstance(scale, int | float) and not isinstance(scale, bool)
        if not number or not 1 / limit <= scale <= limit or math.frexp(scale)[0] != 0.5:
            raise RecoupError(
                f"LBA(scale={scale!r}): scale must be a power of two from 2^-{SCALE_EXPONENT} to 2^{SCALE_EXPONENT}"
            )
        if scale != 1 and not isinstance(self.accumulator, Int):
            raise RecoupError(f"LBA(scale={scale!r}): scale belongs to an Int accumulator; this one is a Float")
        return float(scale)

    @property
    def outer(self) -> Float | Int:
        """The format that chunk sums are added up in."""
        return self.accumulator if self.promotion is None else self.promotion

    @property
    def ends(self) -> tuple[float, float]:
        """The least and the largest sum. Integers that wrap have no end: infinities."""
        if not isinstance(self.outer, Int):
            return -self.outer.largest_value, self.outer.largest_value
        if self.outer.overflow == "wrap":
            return -math.inf, math.inf
        return self.outer.smallest_value * self.scale, self.outer.largest_value * self.scale

    def shifted(self, shift: int) -> "LBA":
        """The unit with every format's exponents ``shift`` lower: unit'(x, w) = unit(x, w 2^shift) 2^-shift.

        The backward unit stays as it is. Quantisation commutes with powers of two, so both sides are equal step by
        step; here no operand is scaled, so none leaves float32's range.

        Raises:
            RecoupError: a shift outside `shift_range`.

        >>> LBA().shifted(-5).accumulator.largest_value == 32 * LBA().accumulator.largest_value
        True
        """
        low, high = self.shift_range
        shift = integer(type(self).__name__, "shift", shift, (low, high))
        moved = {name: _moved(getattr(self, name), shift) for name in ("product", "accumulator", "promotion")}
        scale = self.scale * 2.0**-shift if isinstance(self.accumulator, Int) else self.scale
        return self.replace(**moved, scale=scale)

    @property
    def shift_range(self) -> tuple[int, int]:
        """The least and the largest shift that the kernels' formats allow."""
        floats = [f for f in (self.product, self.accumulator, self.promotion) if isinstance(f, Float)]
        low = max([f.max_exponent - MAX_EXPONENT for f in floats], default=-SCALE_EXPONENT)
        high = min([f.min_exponent + MAX_EXPONENT for f in floats], default=SCALE_EXPONENT)
        if isinstance(self.accumulator, Int):
            unit = math.frexp(self.scale)[1] - 1
            low, high = max(low, unit - SCALE_EXPONENT), min(high, unit + SCALE_EXPONENT)
        return low, high

    @classmethod
    def biased(
        cls, mantissa: int, exponent: int, bias: int | None = None, *, chunk: int | None = 16, **options: Any
    ) -> "LBA":
        """An accumulator of ``1 + exponent + mantissa`` bits with the product format that belongs to it.

        ``b_prod = bias + log2(chunk) / 2`` as in the paper, rounded to nearest even; ``bias`` None is
        ``2^(exponent-1) + 2``, the paper's 10 at four exponent bits, our definition elsewhere. Without chunks the
        product has the accumulator's bias.

        >>> LBA.biased(7, 4) == LBA.m7e4()
        True
        """
        exponent = integer("LBA.biased", "exponent", exponent, (1, 8))
        bias = (1 << (exponent - 1)) + 2 if bias is None else bias
        bias = integer("LBA.biased", "bias", bias, (-MAX_EXPONENT, MAX_EXPONENT))
        spread = 0 if chunk is None else round(math.log2(max(integer("LBA", "chunk", chunk, (1, MAX_CHUNK)), 1)) / 2)
        product = Float.lba(exponent, mantissa, bias + spread)
        return cls(product, Float.lba(exponent, mantissa, bias), chunk, **options)

    @classmethod
    def m7e4(cls, **options: Any) -> "LBA":
        """The paper's 12 bits: M7E4, biases 12 and 10, chunk 16."""
        return cls(**options)

    @classmethod
    def m10e5(cls, **options: Any) -> "LBA":
        """16 bits: ten of mantissa, five of exponent, biases 20 and 18 [ours], chunk 16."""
        return cls.biased(10, 5, **options)

    @classmethod
    def fp32(cls, **options: Any) -> "LBA":
        """Sequential float32: product and sum rounded to nearest even at every step, no chunks; it saturates."""
        single = Float.parse("float32")
        return cls(**{"product": single, "accumulator": single, "chunk": None, **options})

    @classmethod
    def sequential14(cls, **options: Any) -> "LBA":
        """Exact products, one by one onto a sum of 14 significant bits, truncated, to float32 every 128 terms.

        Width and interval are those commonly reported of Hopper's FP8 tensor cores, which add groups of products at
        once, with other errors: `recoup.tensorcore.TensorCore.hopper_fp8` is that unit.
        """
        total = Float(13, -126, 127, subnormals=False, rounding="zero")
        exact = {"product": None, "accumulator": total, "chunk": 128, "promotion": Float.parse("float32")}
        return cls(**{**exact, **options})

    @classmethod
    def hopper(cls, **options: Any) -> "LBA":
        """The former name of `sequential14`, for one version.

        Warns:
            RecoupWarning: what it is called now, and which unit is Hopper's.
        """
        warnings.warn(
            "LBA.hopper is called LBA.sequential14 now; Hopper's own adder is preset 'hopper-fp8'",
            RecoupWarning,
            stacklevel=2,
        )
        return cls.sequential14(**options)

    @classmethod
    def int16(cls, overflow: Literal["saturate", "wrap"] = "saturate", **options: Any) -> "LBA":
        """A 16-bit integer accumulator of exact products, no chunks."""
        return cls(**{"product": None, "accumulator": Int(16, overflow=overflow), "chunk": None, **options})

    @classmethod
    def int12(cls, overflow: Literal["saturate", "wrap"] = "saturate", **options: Any) -> "LBA":
        """A 12-bit integer accumulator of exact products, no chunks."""
        return cls(**{"product": None, "accumulator": Int(12, overflow=overflow), "chunk": None, **options})

    def __repr__(self) -> str:
        """What differs from the defaults, with formats by their short constructors; it can be pasted back."""
        return self._changed(_short)


def _moved(format: Float | Int | None, shift: int) -> Float | Int | None:  # noqa: A002
    """A format with its exponents ``shift`` lower; an `Int` counts in the config's scale and stays."""
    if not isinstance(format, Float):
        return format
    largest = None if format.largest is None else math.ldexp(format.largest, -shift)
    exponents = {"min_exponent": format.min_exponent - shift, "max_exponent": format.max_exponent - shift}
    return format.replace(**exponents, largest=largest)


def _short(value: Any) -> str:
    """A field's repr; a format's by `Float.lba` or `Float.parse` where it is one of theirs."""
    if isinstance(value, tuple):
        return f"({', '.join(map(_short, value))})"
    if not isinstance(value, Float):
        return repr(value)
    if value == Float.parse("float32"):
        return "Float.parse('float32')"
    exponent = (value.max_exponent - value.min_exponent).bit_length()
    lba = 1 <= exponent <= 8 and value == Float.lba(
        exponent, value.mantissa, -value.min_exponent, rounding=value.rounding, overflow=value.overflow
    )
    rounding = "" if value.rounding == "zero" else f", rounding={value.rounding!r}"
    return f"Float.lba({exponent}, {value.mantissa}, bias={-value.min_exponent}{rounding})" if lba else repr(value)


def _check_float(name: str, value: Any, *, optional: bool) -> None:
    if optional and value is None:
        return
    if not isinstance(value, Float):
        kinds = "a Float or None" if optional else "a Float or an Int"
        raise RecoupError(f"LBA({name}={value!r}): {name} must be {kinds}")
    if (
        value.mantissa > MAX_MANTISSA
        or value.min_exponent < -MAX_EXPONENT
        or value.max_exponent > MAX_EXPONENT
        or value.overflow != "saturate"
    ):
        raise RecoupError(
            f"LBA({name}={value!r}): {name} must have a mantissa of at most {MAX_MANTISSA} bits and exponents from "
            f"-{MAX_EXPONENT} to {MAX_EXPONENT}, and saturate"
        )


def _check_int(value: Int) -> None:
    low, high = INT_BITS
    if not value.signed or not low <= value.bits <= high:
        raise RecoupError(
            f"LBA(accumulator={value!r}): an Int accumulator must be signed and have {low} to {high} bits"
        )
