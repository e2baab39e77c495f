"""How fast delayed momentum methods converge on convex quadratics: what each mitigation is worth, without training.

On an eigenvalue of a quadratic with consistent delay D, a method is a linear recurrence of the error; the largest root
of its characteristic polynomial, over all eigenvalues, is the factor the error shrinks by. Source of the analysis:
Kosson et al., MLSys 2021; grids and refinement are our definition.

Legend: m momentum, h = eta times the eigenvalue, z the factor of one update, T the horizon that a method predicts by.
"""

import math
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from recoup.errors import RecoupError
from recoup.fields import choice, integer

Method = Literal["gdm", "sc", "lwp", "lwpv+sc", "lwpw+sc"]
Floats = NDArray[np.float64]


def characteristic(method: Method, delay: int, momentum: float, step: Floats | float) -> Floats:
    """The coefficients of the monic characteristic polynomial, highest power first, [..., D + 4].

        gdm, sc   (z - 1)(z - m) z^(D+1) + h Q z = 0,   Q = a z + b (z - m),   a = m^D, b = (1 - m^D) / (1 - m)
        lwp       (z - 1)(z - m) z^(D+1) + h Q ((1 + T) z - T) = 0;  lwpw+sc the same
        lwpv+sc   (z - 1)(z - m) z^(D+1) + h (Q + T (z - 1)) z = 0

    with a = 1, b = 0 without SC, and T = D.

    Args:
        method: see above; ``lwp`` alone is the same by velocity and by weight.
        delay: D, from 0.
        momentum: m, from 0 to below 1.
        step: h, any shape.

    Raises:
        RecoupError: another method, a delay or a momentum out of range.
    """
    choice("pipeline.analysis", "method", method, get_args(Method))
    D = integer("pipeline.analysis", "delay", delay, (0, 1 << 12))
    if not 0 <= momentum < 1:
        raise RecoupError(f"pipeline.analysis(momentum={momentum!r}): momentum must be from 0 to below 1")
    h = np.asarray(step, dtype=np.float64)[..., None]
    m, T = momentum, float(D if method.startswith("lwp") else 0)
    a, b = (m**D, (1 - m**D) / (1 - m)) if method.endswith("sc") else (1.0, 0.0)
    # v = g / (z - m) and (z - 1) w = -eta (a z v + b g), so w = -eta g Q / ((z - 1)(z - m)); g is taken D updates ago.
    Q = np.array([a + b, -b * m])
    if method == "lwpv+sc":
        gradient = np.polymul(Q + T * np.array([1.0, -1.0]), [1.0, 0.0])
    else:
        gradient = np.polymul(Q, [1 + T, -T])
    polynomial = np.zeros((*h.shape[:-1], D + 4))
    polynomial[..., :3] += [1.0, -(1 + m), m]
    polynomial[..., D + 1 :] += h * gradient
    return polynomial / polynomial[..., :1]


def half_life(method: Method, delay: int, condition: float) -> tuple[float, float, float]:
    """The fewest updates that halve the error of every direction, with the best learning rate and momentum for it.

        ln 2 / -ln max |z|   over eigenvalues from 1 / ``condition`` to 1

    Args:
        method: see `characteristic`.
        delay: D, the same for all weights.
        condition: the largest eigenvalue over the smallest, from 1.

    Returns:
        (half-life in updates, learning rate times the largest eigenvalue, momentum); to about a thousandth.

    Raises:
        RecoupError: another method, a delay or a condition number out of range.

    >>> round(half_life("gdm", 0, 100.0)[0], 1)  # heavy ball: ln 2 / ln(11 / 9)
    3.5
    """
    from scipy.optimize import minimize  # takes a second to import

    if not 1 <= condition <= 1e9:
        raise RecoupError(f"pipeline.half_life(condition={condition!r}): the condition number must be from 1 to 1e9")
    characteristic(method, delay, 0.0, 1.0)  # its checks
    eigenvalues = np.geomspace(1 / condition, 1, 28 if condition > 1 else 1)

    def cost(at: Floats, every: int = 1) -> float:
        momentum, rate = abs(math.expm1(min(at[0], 0.0))), math.exp(min(at[1], 3.0))
        radius = float(_radius(characteristic(method, delay, momentum, rate * eigenvalues[::every])).max())
        return math.log(math.log(2) / -math.log(radius)) if 0 < radius < 1 else 50.0 + min(radius, 1e3)

    left = np.linspace(0, -math.log(4 * condition * (delay + 1)), 14)
    rates = np.linspace(math.log(4), -math.log(10 * condition * (delay + 1)), 28)
    start = min(((x, y) for x in left for y in rates), key=lambda at: cost(np.array(at), 9))
    best = np.array(start)
    for size in (0.3, 0.1, 0.03, 0.01):  # the cost has a kink at its minimum: restarts keep the simplex from collapsing
        simplex = best + np.array([[0.0, 0.0], [size, 0.0], [0.0, size]])
        options = {"initial_simplex": simplex, "xatol": 1e-7, "fatol": 1e-9, "maxfev": 150}
        best = minimize(cost, best, method="Nelder-Mead", options=options).x
    return math.exp(cost(best)), math.exp(min(best[1], 3.0)), abs(math.expm1(min(best[0], 0.0)))


def _radius(polynomial: Floats) -> Floats:
    """The largest modulus of the roots of monic polynomials [..., n + 1], from their companion matrices."""
    n = polynomial.shape[-1] - 1
    companion = np.zeros((*polynomial.shape[:-1], n, n))
    companion[..., 0, :] = -polynomial[..., 1:]
    companion[..., range(1, n), range(n - 1)] = 1
    return np.abs(np.linalg.eigvals(companion)).max(-1)
