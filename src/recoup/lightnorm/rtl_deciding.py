"""Elements that decide: codes of F for which (x - mu) r lies nearest to a step, for mu and r that are held.

A channel has one mu and one r but many elements; backward it has one m and one sigma, for (g - m) sigma. The low bits
of their product are seen only where what is above them is all ones or all zeros, so elements are not drawn: every code
is tried, and one nearer to a step is taken more often.

Elements that share a block lose bits to the largest. So one lane chooses, and the others have the best of its exponent.

Legend: T steps; R runs; G lanes; E exponents; C codes of an exponent.
"""

from typing import Any

import numpy as np
import torch

from recoup.formats import Float, ports, quantize
from recoup.lightnorm.portable import exp2, log2
from recoup.lightnorm.rtl_meeting import code

__all__ = ["deciding"]

RUNS, EXPONENTS, SIGNIFICANDS = 64, 40, 32
"""Runs that are tried at once; the most exponents, and significands of each, that are tried of a large format."""


def deciding(
    form: Float, difference: Float | None, mean: Any, reciprocal: Any, steps: int, generator: np.random.Generator
) -> np.ndarray:
    """Codes of x or g, [T, R, G].

    Args:
        form: F, or F' of gradients.
        difference: the format of x - mu; None: exact.
        mean, reciprocal: float64 [R, G]; backward m and sigma.
        steps: T.
        generator: of what is drawn.
    """
    codes = _codes(form, generator)
    values = ports.values(codes, form).numpy()
    parts = [
        _chosen(
            values, mean[start : start + RUNS], reciprocal[start : start + RUNS], form, difference, steps, generator
        )
        for start in range(0, len(mean), RUNS)
    ]
    return codes.reshape(-1)[np.concatenate(parts, axis=1)]


def _codes(form: Float, generator: np.random.Generator) -> np.ndarray:
    """Normal numbers of both signs by exponents, [E, C]."""
    exponents = np.arange(form.min_exponent, form.max_exponent + 1)
    significands = np.arange(1 << form.mantissa, 2 << form.mantissa)
    exponents, significands = (
        np.sort(generator.permutation(all_)[:most])
        for all_, most in ((exponents, EXPONENTS), (significands, SIGNIFICANDS))
    )
    both = [code(significands[None], exponents[:, None], np.full((len(exponents), 1), sign), form) for sign in (0, 1)]
    return np.concatenate(both, axis=1)


def _chosen(
    values: np.ndarray,
    mean: np.ndarray,
    reciprocal: np.ndarray,
    form: Float,
    difference: Float | None,
    steps: int,
    generator: np.random.Generator,
) -> np.ndarray:
    """Places in ``values``, [T, R, G]."""
    (R, G), (E, C) = mean.shape, values.shape
    beside = _beside(values, mean[..., None, None], reciprocal[..., None, None], form, difference)  # [R, G, E, C]
    all_ = np.argsort(beside.reshape(R, G, E * C), axis=-1, kind="stable")
    of_exponent = np.argsort(beside, axis=-1, kind="stable")
    run, lanes = np.arange(R), np.arange(G)
    leads = generator.integers(0, G, (steps, R))
    place = all_[run, leads, _early(E * C, (steps, R), generator)]
    exponent = place // C
    other = of_exponent[run[:, None], lanes, exponent[..., None], _early(C, (steps, R, G), generator)]
    return np.where(lanes == leads[..., None], place[..., None], exponent[..., None] * C + other)


def _beside(values: np.ndarray, mean: Any, reciprocal: Any, form: Float, difference: Float | None) -> np.ndarray:
    """How far (x - mu) r is from what its rounding turns on, in last places; what is flushed or saturates is last."""
    found = values - mean
    if difference is not None:
        found = quantize(torch.from_numpy(found), difference).numpy()
    fraction, exponent = np.frexp(np.abs(found * reciprocal))
    units = np.ldexp(fraction, form.mantissa + 1 + (form.rounding == "nearest"))
    seen = (exponent >= form.min_exponent) & (exponent <= form.max_exponent + 2)
    return np.where(seen, np.abs(units - np.rint(units)), 1.0)


def _early(count: int, shape: tuple[int, ...], generator: np.random.Generator) -> np.ndarray:
    """Places in an order of ``count``, as many below 10 as from 10 to 100."""
    return np.minimum(exp2(generator.random(shape) * log2(np.array(count + 1.0))) - 1, count - 1).astype(np.int64)
