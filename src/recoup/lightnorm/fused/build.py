"""LightNorm's emitted kernels: which formats they hold for, and the compiled functions."""

import math
from dataclasses import replace
from functools import cache

import torch

from recoup.formats import BlockFloat, Float
from recoup.formats.constants import float_constants
from recoup.kernels.llvm import Target, host
from recoup.kernels.signature import Kernel
from recoup.lightnorm.config import LightNorm
from recoup.lightnorm.fused.results_ir import GRADIENT, NORMALIZE, gradient, normalize
from recoup.lightnorm.fused.sums_ir import MOMENTS, PRODUCTS, moments, products
from recoup.lightnorm.fused.tile_format import whole
from recoup.lightnorm.fused.tile_ir import BIAS, FRACTION, Recipe

EXACT = 53  # bits of a float64 significand
EXPONENTS = (-100, 100)  # of formats whose results float32 holds, below their smallest too
LARGEST = 0x7F7FFFFF  # float32's

EMITTERS = {
    "moments": (moments, MOMENTS),
    "normalize": (normalize, NORMALIZE),
    "products": (products, PRODUCTS),
    "gradient": (gradient, GRADIENT),
}


def recipes(
    config: LightNorm, dtype: torch.dtype, channels: int, elements: int, stream: bool
) -> tuple[Recipe | None, Recipe | None, tuple[tuple[Recipe, int], ...]]:
    """What to build for activations and for gradients, None where the kernels do not hold; and the ways to add up
    gradients, the fastest first, with the largest magnitude, as bits, up to which each holds."""
    shape = dtype, channels, elements, stream
    fore = recipe(config.forward, config.forward_blocks, *shape)
    back = recipe(config.backward, config.backward_blocks, *shape)
    if back is None:
        return fore, None, ()
    small = None
    if fore is not None and config.forward is not None and config.backward is not None:
        small = small_products(back, config.backward, config.forward, elements)
    exact = back, back.top
    return fore, back, (exact,) if small is None else (small, exact)


@cache
def recipe(
    form: Float | None, blocks: BlockFloat | None, dtype: torch.dtype, channels: int, elements: int, stream: bool
) -> Recipe | None:
    """What to build for a format, or None where the kernels do not hold: see tile_ir.py."""
    if dtype != torch.float32:
        return None
    if form is None:
        return Recipe(None, 0, LARGEST, 0, False, stream=stream) if blocks is None else None
    low, high = EXPONENTS
    if form.largest is not None:
        return None  # an input's exponent would not say whether it saturates
    if form.rounding != "zero" or form.subnormals or form.min_exponent < low or form.max_exponent > high:
        return None
    if blocks is not None and not whole(form, blocks, dtype):
        return None
    c = float_constants(form, dtype)
    block = 0 if blocks is None else min(blocks.block, channels)
    outlier = blocks is not None and blocks.shared == "outlier"
    toward_zero = single(form) and "avx512f" in host().features
    return Recipe(
        form.mantissa, c.zero_below, c.largest, block, outlier, plain(form, elements), toward_zero, stream=stream
    )


def plain(form: Float, elements: int) -> bool:
    """Whether float64 adds up that many values of a format exactly, in any order.

    They are multiples of u = 2^(min_exponent - mantissa) below 2^(max_exponent + 1), and so is every partial sum, below
    ``elements`` times that: integers of at most 53 bits, in units of u.
    """
    bits = form.max_exponent + 1 - form.min_exponent + form.mantissa
    return elements <= 1 << max(0, EXACT - bits)


def single(form: Float) -> bool:
    """Whether gamma xhat + beta, once rounded toward zero to float32, is cut to the format as its float64 is.

    Of a format's values the sum is a multiple of u^2, see `plain`. Where it is below 2^(max_exponent + 1) it has at
    most 53 bits, so float64 holds it, and cutting it twice is cutting it once. Where it is not, both are beyond the
    format.
    """
    return form.max_exponent + 1 + 2 * (form.mantissa - form.min_exponent) <= EXACT


def small_products(recipe: Recipe, form: Float, xhat: Float, elements: int) -> tuple[Recipe, int] | None:
    """How to add up n gradients and products with xhat where gradients are small, and the largest exponent, as bits.

    g is a multiple of u, xhat of v, |xhat| < 2^(M + 1), n <= 2^l, and |g| < 2^(e + 1).
    - Sums of g are exact where n |g| <= 2^53 u: e <= 52 - l + log2 u.
    - A sum of g xhat starts at 1.5 * 2^b and stays in [2^b, 2^(b + 1)) where n |g xhat| < 2^(b - 2), the other
      2^(b - 2) being ample for its errors: e <= b - 4 - M - l. It is then a multiple of 2^(b - 52). An error is at most
      2^(b - 53) and a multiple of u v, so n of them add up exactly where 2^(b - 53 + l) <= 2^53 u v:
      b = 106 - l + log2 u v.
    """
    length = (elements - 1).bit_length()
    unit = form.min_exponent - form.mantissa
    power = 2 * EXACT - length + unit + xhat.min_exponent - xhat.mantissa
    top = min(EXACT - 1 - length + unit, power - 4 - xhat.max_exponent - length, form.max_exponent)
    if top < 0:  # gradients above it are too likely: then the pass would run twice
        return None
    return replace(recipe, plain=True, bias=math.ldexp(1.5, power)), (top + BIAS) << FRACTION


@cache
def kernel(name: str, recipe: Recipe, target: Target | None = None) -> Kernel:
    """A compiled pass."""
    (emit, signature), machine = EMITTERS[name], target or host()
    return Kernel(emit(recipe, machine), name, signature, machine)
