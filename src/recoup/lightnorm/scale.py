"""C(m) and A(m): what a range, or the largest magnitude, of m samples is multiplied by to estimate their deviation."""

import math
from functools import lru_cache

import numpy as np

from recoup.lightnorm.config import Scale

HOFFER = 0.175 * (1 + math.sqrt(math.pi * math.log(4)))
STEP, REACH = 1 / 64, 40.0
PANELS, NODES = 160, 20  # of Gauss and Legendre's rule


@lru_cache(maxsize=4096)
def constant(samples: int, scale: Scale) -> float:
    """C(m) for m = ``samples`` >= 2, float64.

        paper     1 / sqrt(2 ln m)                                   Banner et al. 2018
        hoffer    0.175 (1 + sqrt(pi ln 4)) / sqrt(2 ln m)           the authors' training code
        gaussian  1 / E[range of m Gaussian samples]                 ours

    >>> round(constant(2, "gaussian"), 6)  # sqrt(pi) / 2
    0.886227
    """
    if scale == "gaussian":
        return 1 / gaussian_range(samples)
    plain = 1 / math.sqrt(2 * math.log(samples))
    return HOFFER * plain if scale == "hoffer" else plain


def gaussian_range(samples: int) -> float:
    """E[max - min] of m standard Gaussian samples: the integral of 1 - P^m - (1 - P)^m over the line.

    The trapezoidal rule converges exponentially on an integrand like this one: 1e-14 at this step.
    """
    x = np.arange(0.0, REACH, STEP)
    tail = np.array([0.5 * math.erfc(v / math.sqrt(2)) for v in x])
    inside = -np.expm1(samples * np.log1p(-tail)) - tail**samples
    return float(2 * STEP * (inside.sum() - inside[0] / 2))


@lru_cache(maxsize=4096)
def magnitude_constant(samples: int) -> float:
    """A(m) = 1 / E[max of m magnitudes of standard Gaussian samples], float64 [ours].

    With it the largest magnitude estimates the root of the mean square without bias.

    >>> round(magnitude_constant(1), 6)  # sqrt(pi / 2)
    1.253314
    """
    return 1 / gaussian_magnitude(samples)


def gaussian_magnitude(samples: int) -> float:
    """E[max |z|] of m standard Gaussian samples: the integral of 1 - (2 P - 1)^m over the positive half.

    The integrand is no even function where m is odd, so that the trapezoidal rule converges slowly; Gauss and
    Legendre's rule of 20 nodes on panels of width 1/4 has 1e-15.
    """
    nodes, weights = np.polynomial.legendre.leggauss(NODES)
    width = REACH / PANELS
    x = ((np.arange(PANELS)[:, None] + (nodes + 1) / 2) * width).ravel()
    outside = np.array([math.erfc(v / math.sqrt(2)) for v in x])
    return float((-np.expm1(samples * np.log1p(-outside)) * np.tile(weights, PANELS)).sum() * width / 2)


def sizes(elements: int, chunks: int) -> list[int]:
    """Sizes of K contiguous chunks of n elements: they differ by at most one, the longer ones first."""
    short, longer = divmod(elements, chunks)
    return [short + 1] * longer + [short] * (chunks - longer)


def factors(elements: int, chunks: int, scale: Scale) -> np.ndarray:
    """C(m_k) of every chunk, float64 [K]."""
    return np.array([constant(m, scale) for m in sizes(elements, chunks)])


def magnitude_factors(elements: int, chunks: int) -> np.ndarray:
    """A(m_k) of every chunk, float64 [K]."""
    return np.array([magnitude_constant(m) for m in sizes(elements, chunks)])
