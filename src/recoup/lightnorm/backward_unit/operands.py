"""What lanes hold as codes, and operands that meet: m near g, gamma and r whose product has few bits.

Legend: g an element of dy in blocks, m the mean of g, sigma = gamma r.
"""

from dataclasses import dataclass

import numpy as np

from recoup.formats import Float, FloatFields, ports
from recoup.lightnorm.backward_unit.widths import Widths
from recoup.lightnorm.portable import log2
from recoup.lightnorm.rtl_meeting import code

__all__ = ["Operands", "pieces"]

TRIES, DRAWN = (60, 2000), 1 << 23
"""Between how many pairs the best is chosen, and about how many are drawn in all: few operands get more of them."""


@dataclass(frozen=True)
class Operands(Widths):
    """Codes of sigma and m |sigma|, and their values."""

    def sigma(self, gamma: np.ndarray, r: np.ndarray) -> np.ndarray:
        """The code of sigma of codes of gamma and of r, which has no sign."""
        bits, _, _, most = self.slope
        one, other = pieces(gamma, self.activations.form), pieces(self.activations.signed(r), self.activations.wide)
        significand = (one[0] * other[0]) & np.uint64((1 << bits) - 1)
        exponent = one[1] + other[1]
        return significand | exponent << np.uint64(bits) | one[2] << np.uint64(bits + max(most.bit_length(), 1))

    def kept(self, slope: np.ndarray, mean: np.ndarray) -> np.ndarray:
        """The code of m |sigma| of codes of sigma and m."""
        significand, exponent, sign = pieces(mean, self.wide)
        exponent = np.where(significand >> np.uint64(self.wide.mantissa) > 0, exponent - self._first, 0)
        sigma = slope & np.uint64((1 << self.slope_bits) - 1)
        at = self.shift_bits
        product, top = significand * sigma, at + (self.span + self.lifted).bit_length()
        up = at - np.frexp(product.astype(float))[1].astype(np.int64)
        up = np.where(product > 0, up, self.lifted).astype(np.uint64)
        product, exponent = product << up, exponent + (np.uint64(self.lifted) - up)
        found = product | exponent.astype(np.uint64) << np.uint64(at) | sign << np.uint64(top)
        if self.flagged:
            for place, (value, bits) in enumerate(((sigma, self.spare), (product, self.fine)), top + 1):
                found |= (value % np.uint64(1 << bits) > 0).astype(np.uint64) << np.uint64(place)
        return found

    @property
    def _first(self) -> np.uint64:
        """The exponent field of the smallest binade."""
        return np.uint64(FloatFields(self.wide).flag is None)

    def slope_parts(self, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of codes of sigma its significand with its sign, float64, and its exponent, int64."""
        bits, _, low, most = self.slope
        significand, exponent, sign = _fields(codes, bits, most)
        return np.where(sign > 0, -1.0, 1.0) * significand, exponent + low

    def shift_parts(self, codes: np.ndarray) -> np.ndarray:
        """Of codes of m |sigma| its value where sigma's lowest bit is worth 1, float64."""
        significand, exponent, sign = _fields(codes, self.shift_bits, self.span + self.lifted)
        unit = self.form.min_exponent - self.wide.mantissa - self.lifted
        return np.where(sign > 0, -1.0, 1.0) * np.ldexp(significand.astype(float), exponent + unit)

    def aimed(self, gradient: np.ndarray, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Codes of sigma and of m for codes of g: m near g or anything, gamma and r of many and of few bits, or such
        that (g - m) gamma r lies beside a step of F', where the lowest bits decide."""
        shape = gradient.shape
        near = generator.random(shape) < 0.8
        mean = np.where(near, self.near(gradient, generator), _few(self.wide, shape, generator))
        mean = _legal(mean, self.wide)
        gamma, r = self.few(shape, generator)
        met = generator.random(shape) < 0.75
        gamma, r = (np.where(met, *pair) for pair in zip(self._met(gradient, mean, generator), (gamma, r), strict=True))
        return self.sigma(gamma, self.activations.unsigned(r)), mean

    def few(self, shape: tuple[int, ...], generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Codes of gamma and r of many and of few bits."""
        F, S = self.activations.form, self.activations.wide
        return _legal(_few(F, shape, generator), F), _legal(_few(S, shape, generator), S)

    def _met(
        self, gradient: np.ndarray, mean: np.ndarray, generator: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Codes of gamma and r with (g - m) gamma r = q 2^t + d, q 2^t a step of F' and d small.

        r is solved for, and of many pairs the one is kept whose d is nearest to a size that is drawn.
        """
        F, S, shape = self.activations.form, self.activations.wide, gradient.shape
        difference = ports.values(gradient, self.form).numpy() - ports.values(mean, self.wide).numpy()
        size = np.ldexp(np.frexp(np.abs(difference))[0], 1) + (difference == 0)
        wanted = generator.uniform(-self.shift_bits, -self.form.mantissa, shape)
        wanted = np.where(generator.random(shape) < 0.6, -self.shift_bits, wanted)
        best: list[np.ndarray] = []
        for _ in range(int(np.clip(DRAWN // max(gradient.size, 1), *TRIES))):
            gamma = generator.integers(1 << F.mantissa, 2 << F.mantissa, shape)
            step = generator.integers(1 << self.form.mantissa, 2 << self.form.mantissa, shape)
            fraction = np.frexp(step / (size * gamma))[0]
            r = np.floor(np.ldexp(fraction, S.mantissa + 1)) + generator.integers(0, 2, shape)
            r = np.minimum(r, (2 << S.mantissa) - 1).astype(np.int64)
            scaled = np.ldexp(np.frexp(size * gamma * r)[0], self.form.mantissa + 1)
            beside = log2(np.abs(scaled - np.rint(scaled)) + 2.0**-60)
            found = [np.abs(np.maximum(beside, -self.shift_bits) - wanted), gamma, r]
            if best:
                found = [np.where(found[0] < best[0], new, old) for new, old in zip(found, best, strict=True)]
            best = found
        drawn = (generator.integers(form.min_exponent, form.max_exponent + 1, shape) for form in (F, S))
        sign = generator.integers(0, 2, shape)
        return tuple(
            code(value.astype(np.int64), exponent, negative, form)
            for value, exponent, negative, form in zip(best[1:], drawn, (sign, sign * 0), (F, S), strict=True)
        )  # type: ignore[return-value]

    def near(self, gradient: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """Codes in S' some steps beside those of g, or some binades."""
        wide, shape = self.wide, gradient.shape
        bits = FloatFields(wide).fraction - FloatFields(self.form).fraction
        code = ports.codes(ports.values(gradient, self.form), wide).astype(np.int64)
        low = np.where(
            generator.random(shape) < 0.5, generator.integers(0, 3, shape), generator.integers(0, bits + 3, shape)
        )
        code += generator.integers(-(1 << low), (1 << low) + 1)
        far = generator.choice([1, -1, 2, -2, 4, -4], shape) * (generator.random(shape) < 0.3)
        code += far << FloatFields(wide).fraction
        return np.maximum(code, 0).astype(np.uint64) & np.uint64((1 << FloatFields(wide).bits) - 1)


def pieces(codes: np.ndarray, form: Float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Significand with its hidden bit, exponent field and sign of codes, uint64."""
    fields = FloatFields(form)
    codes = np.asarray(codes, np.uint64)
    fraction = codes & np.uint64((1 << fields.fraction) - 1)
    field = codes >> np.uint64(fields.fraction) & np.uint64((1 << fields.exponent) - 1)
    hidden = field > 0 if fields.flag is None else codes >> np.uint64(fields.flag) & np.uint64(1)
    hidden = hidden.astype(np.uint64)
    if form.subnormals:
        field = np.maximum(field, np.uint64(1))
    return fraction | hidden << np.uint64(fields.fraction), field, codes >> np.uint64(fields.sign) & np.uint64(1)


def _fields(codes: np.ndarray, bits: int, most: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Significand, exponent (int64) and sign of a held code."""
    exponent = max(most.bit_length(), 1)
    field = codes >> np.uint64(bits) & np.uint64((1 << exponent) - 1)
    sign = codes >> np.uint64(bits + exponent) & np.uint64(1)
    return codes & np.uint64((1 << bits) - 1), field.astype(np.int64), sign


def _legal(codes: np.ndarray, form: Float) -> np.ndarray:
    return ports.legal(codes, FloatFields(form))


def _few(form: Float, shape: tuple[int, ...], generator: np.random.Generator) -> np.ndarray:
    """Patterns whose fractions often end in zeros or ones."""
    fields = FloatFields(form)
    drawn = generator.integers(0, 1 << fields.bits, shape, dtype=np.uint64)
    cut = generator.integers(0, fields.fraction + 1, shape) * (generator.random(shape) < 0.6)
    low = ((1 << cut) - 1).astype(np.uint64)
    return drawn & ~low | np.where(generator.random(shape) < 0.3, low, np.uint64(0))
