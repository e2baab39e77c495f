"""The LightNorm configuration: number formats, blocks and statistics of a range batch normalization unit."""

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from recoup.errors import RecoupError
from recoup.fields import Config, Value, choice, integer
from recoup.formats import BlockFloat, Float

Scale = Literal["gaussian", "paper", "hoffer"]
Shared = Literal["outlier", "max"]
Axis = Literal["channel", "place"]
Nonfinite = Literal["propagate", "error"]

MAX_MANTISSA, EXPONENTS = 23, (-126, 127)
STATISTICS_BITS = 8  # more of mantissa in the gradient's sums than in the gradient
DEFAULT_SIGNIFICAND = 5  # of blocks whose format is None
MAX_BLOCK, MAX_CHUNKS = 1 << 20, 1 << 20


@dataclass(frozen=True, slots=True)
class LightNorm(Config):
    """Range batch normalization in low precision: sigma estimated from ranges, values in FP10, in blocks that share
    an exponent.

    Per channel, over its n elements in the order (sample, place), split into K = ``chunks`` contiguous chunks of m_k:

        x_q = B(F(x))
        mu = S(sum x_q / n),   s = (1/K) sum_k C(m_k) (max_k x_q - min_k x_q) + eps,   r = S(1/s)
        xhat = F(D(x_q - mu) r),   y = B(F(F(gamma) xhat + F(beta)))

    with F the format ``forward``, S ``statistics``, D ``difference`` and B the blocks; the gradients are in
    `recoup.lightnorm.reference`. What a format rounds is exact before: *exact, then the format*. The kernels round it
    to float64 on the way, which gives the same bits unless the exact value needs more than 53 bits and lies within
    2^-53 of a step. C(m_k) / K and eps are float64 numbers, and s and 1/s exact before S, in the kernels too. Without a
    format every operation is float64 rounded to nearest. Sums are exact where from the highest bit of the sum of
    magnitudes to the lowest bit of an element there are at most 106 bits, as always for FP10 activations; of terms some
    thirty decimal orders apart the smallest may be lost.

    Attributes:
        forward: format of activations, parameters and results; None: their own dtype.
        backward: format of gradients; None: their own dtype.
        statistics: format of mu and 1/s; the sums of the gradient have `gradient_statistics`. None: float64.
        block: neighbours that share an exponent, the last block ragged; None: no blocks. Their significand, hidden bit
            included, has one bit more than the format's mantissa, their exponents are the format's; with no format 5
            bits forward, 4 backward, and float32's exponents.
        chunks: K; chunk sizes differ by at most one, the longer ones first. Range batch norm as Banner et al. wrote it
            has one.
        scale: C(m). ``paper``: 1 / sqrt(2 ln m); ``hoffer``: 0.5402 of that; ``gaussian`` (ours): 1 / E[range of m
            Gaussian samples], with which s estimates sigma without bias.
        shared: ``outlier``: a lone largest element of a block keeps its own exponent; ``max``: it shares.
        nonfinite: a NaN or infinity makes its whole channel NaN (``propagate``), or raises an ``error`` that names the
            layer. Formats without codes for them would turn infinities into ordinary numbers.
        axis: along what blocks lie. ``channel``: channels at one place of one sample; ``place`` (ours): places of one
            channel of one sample, in memory order. Such a block ends with its sample: in an input [N, C] it has one
            element.

    Raises:
        RecoupError: a field outside these values. Formats of values: mantissa up to 23 bits, exponents of float32's
            normal numbers, nearest or toward zero, saturating.

    Source: Noh et al., "LightNorm", ICCD 2022; Banner et al., 2018 (range batch norm). Saturation, flush to zero, what
    is rounded where, and the ``gaussian`` constant are our definitions.

    >>> LightNorm().gradient_statistics.bits
    18
    """

    forward: Float | None = Float.parse("fp10_154")  # noqa: RUF009 -- frozen
    backward: Float | None = Float.parse("fp10_163")  # noqa: RUF009
    statistics: Float | None = Float.ieee(5, 12, subnormals=False, rounding="zero")  # noqa: RUF009
    block: int | None = 4
    chunks: int = 8
    scale: Scale = "gaussian"
    shared: Shared = "outlier"
    nonfinite: Nonfinite = "propagate"
    axis: Axis = field(default="channel", kw_only=True)
    difference: Float | None = field(default=None, kw_only=True)

    def _check(self) -> None:
        for name in ("forward", "backward", "statistics", "difference"):
            _check_format(name, getattr(self, name))
        if self.block is not None:
            note = ", or None for no blocks"
            self._set("block", integer("LightNorm", "block", self.block, (1, MAX_BLOCK), note))
        self._set("chunks", integer("LightNorm", "chunks", self.chunks, (1, MAX_CHUNKS)))
        choice("LightNorm", "scale", self.scale, get_args(Scale))
        choice("LightNorm", "shared", self.shared, get_args(Shared))
        choice("LightNorm", "nonfinite", self.nonfinite, get_args(Nonfinite))
        choice("LightNorm", "axis", self.axis, get_args(Axis))

    @classmethod
    def inner(cls) -> tuple[type[Value], ...]:
        """Formats."""
        return (Float,)

    @property
    def gradient_statistics(self) -> Float | None:
        """The format of the gradient's sums: ``backward`` with eight more bits of mantissa; None where either is."""
        if self.backward is None or self.statistics is None:
            return None
        return self.backward.replace(mantissa=self.backward.mantissa + STATISTICS_BITS, largest=None)

    @property
    def blocks_of_places(self) -> bool:
        """Whether there are blocks along the places, which end with their sample."""
        return self.block is not None and self.axis == "place"

    @property
    def forward_blocks(self) -> BlockFloat | None:
        """The blocks of activations and results, of [N, C, P]."""
        return self._blocks(self.forward, DEFAULT_SIGNIFICAND)

    @property
    def backward_blocks(self) -> BlockFloat | None:
        """The blocks of gradients, of [N, C, P]."""
        return self._blocks(self.backward, DEFAULT_SIGNIFICAND - 1)

    def _blocks(self, format: Float | None, significand: int) -> BlockFloat | None:  # noqa: A002
        if self.block is None:
            return None
        dim = 2 if self.blocks_of_places else 1
        if format is None:
            return BlockFloat(8, significand, self.block, dim, self.shared, "zero")
        exponent = max(2, max(-format.min_exponent + 1, format.max_exponent).bit_length() + 1)
        return BlockFloat(exponent, format.mantissa + 1, self.block, dim, self.shared, "zero")

    @classmethod
    def range(cls, **options: Any) -> "LightNorm":
        """Range batch norm alone, in full precision."""
        return cls(**{"forward": None, "backward": None, "statistics": None, "block": None, **options})

    @classmethod
    def fp10(cls, **options: Any) -> "LightNorm":
        """Range batch norm in FP10, without blocks."""
        return cls(**{"block": None, **options})

    def __repr__(self) -> str:
        """What differs from the defaults; it can be pasted back."""
        return self._changed(_short)


def _short(value: Any) -> str:
    for name in ("fp10_154", "fp10_163", "bfloat16", "float16", "float32"):
        if isinstance(value, Float) and value == Float.parse(name):
            return f"Float.parse({name!r})"
    return repr(value)


def _check_format(name: str, value: Any) -> None:
    if value is None:
        return
    if not isinstance(value, Float):
        raise RecoupError(f"LightNorm({name}={value!r}): {name} must be a Float or None")
    low, high = EXPONENTS
    wide = value.mantissa > MAX_MANTISSA or value.min_exponent < low or value.max_exponent > high
    if wide or value.rounding == "stochastic" or value.overflow != "saturate":
        raise RecoupError(
            f"LightNorm({name}={value!r}): {name} must have a mantissa of at most {MAX_MANTISSA} bits and exponents "
            f"from {low} to {high}, round to nearest or toward zero, and saturate"
        )
