"""How gates know a float format: a `Layout`, made of what `recoup.formats` says of its code."""

from dataclasses import dataclass
from typing import Any, Protocol

__all__ = ["Fields", "Layout"]


class Fields(Protocol):
    """What `recoup.formats.FloatFields` says of a format's code."""

    @property
    def format(self) -> Any: ...
    @property
    def fraction(self) -> int: ...
    @property
    def exponent(self) -> int: ...
    @property
    def bias(self) -> int: ...
    @property
    def flag(self) -> int | None: ...
    @property
    def bits(self) -> int: ...
    @property
    def top_rank(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Layout:
    """A float format as gates need it.

    Attributes:
        fraction, exponent: widths of the code's fields.
        bits: width of the code.
        flag: whether the code has a non-zero flag, above the sign.
        bias: exponent field less exponent.
        low, high: exponents of the smallest and largest binade.
        top: fraction of the largest value.
        subnormals: gradual underflow, otherwise flush to zero below 2^low.
        nearest: rounding to nearest even, otherwise toward zero.
    """

    fraction: int
    exponent: int
    bits: int
    flag: bool
    bias: int
    low: int
    high: int
    top: int
    subnormals: bool
    nearest: bool

    @classmethod
    def of(cls, fields: Fields) -> "Layout":
        """The layout of a format's code."""
        form = fields.format
        return cls(
            fraction=fields.fraction,
            exponent=fields.exponent,
            bits=fields.bits,
            flag=fields.flag is not None,
            bias=fields.bias,
            low=form.min_exponent,
            high=form.max_exponent,
            top=fields.top_rank & ((1 << fields.fraction) - 1),
            subnormals=form.subnormals,
            nearest=form.rounding == "nearest",
        )
