"""What a tensor core's adder does inside each layer: which products it cuts, and how far the output is off.

Legend: S sampled outputs; K terms of each.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from recoup.fields import integer
from recoup.network import ledger
from recoup.network.attention import PRODUCTS
from recoup.network.batches import call, prepared
from recoup.network.modes import evaluating
from recoup.network.operands import drawn_products, drawn_sums, observing_operands
from recoup.network.reached import watching
from recoup.tensorcore.attention_layers import TensorCoreAttention
from recoup.tensorcore.blocks import each_scale, in_blocks
from recoup.tensorcore.config import SCALES, SUMMED, TensorCore
from recoup.tensorcore.layers import TensorCoreConv1d, TensorCoreConv2d, TensorCoreLayer
from recoup.tensorcore.reference import ACCUMULATORS, ZERO_EXPONENT
from recoup.tensorcore.repair import tensorcore_modules

__all__ = ["LayerProfile", "Tally", "advanced", "profile", "summed"]

MAX_OUTPUTS = 2**31 - 1


@dataclass(frozen=True, slots=True)
class LayerProfile:
    """One layer on a random sample of its outputs. Shares are in 0 .. 1.

    Attributes:
        name, kind: of the layer.
        terms: K, products a sum has.
        group, fraction: of its config.
        outputs: how many were sampled, of those whose operands are finite.
        cut: products that were not zero and lost bits to the alignment, of all that were not; with 4-bit operands and
            block scales it is the sums of sixteen that are aligned and counted.
        lost: products (or such sums) that were not zero and of which nothing was left, of all that were not.
        overflowed: outputs that ended infinite, of all.
        slope: least-squares factor from the exact output to the unit's; truncation makes it less than 1. Of the outputs
            that are finite, as what follows; None where none is.
        residual: root mean square of what the slope leaves, relative to the exact output's.
        error: root mean square of the whole error, relative to the exact output's.
    """

    name: str
    kind: str
    terms: int
    group: int
    fraction: int
    outputs: int
    cut: float
    lost: float
    overflowed: float
    slope: float | None
    residual: float | None
    error: float | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def profile(
    model: nn.Module, batches: Iterable[Any], *, outputs: int = 2048, seed: int = 0, progress: bool = False
) -> list[LayerProfile]:
    """Look into every layer and attention product on a tensor core, in the order of their first run.

    The outputs are drawn at random from a layer's first call; their sums are computed again, step by step, with the
    layer's own operands, so upstream error and the operands' formats are part of those and not of the figures: they
    tell the accumulator alone. An attention has two rows, ``name (q k^T)`` and ``name (p v)``.

    Args:
        model: with layers on tensor cores.
        batches: only the first is used.
        outputs: how many a layer.
        seed: of the draw.
        progress: whether to show a progress bar.

    Raises:
        RecoupError: no layer on a tensor core or none that ran, no or bad batches, outputs no integer from 1 on.

    Warns:
        RecoupWarning: repairs that were fitted for other weights.
    """
    integer("tensorcore.profile", "outputs", outputs, (1, MAX_OUTPUTS))
    integer("tensorcore.profile", "seed", seed, (0, (1 << 63) - 1))
    ledger.warn_stale(model, "tensorcore.profile")
    modules = tensorcore_modules(model, "tensorcore.profile")
    rows: dict[str, LayerProfile] = {}

    def hook(name: str) -> Callable[..., None]:
        def observe(layer: TensorCoreLayer, args: tuple, kwargs: dict) -> None:
            if name not in rows:
                pair = _sampled(layer, args[0] if args else kwargs["input"], outputs, seed)
                rows[name] = _row(name, layer, *pair)

        return observe

    def watch(name: str, module: TensorCoreAttention) -> Callable[[str, Tensor, Tensor], None]:
        def see(product: str, x: Tensor, y: Tensor) -> None:
            row = f"{name} ({PRODUCTS[product]})"
            if row not in rows:
                rows[row] = _row(row, module, *drawn_products(x, y, outputs, seed))

        return see

    observed = observing_operands(modules, hook, watch)
    with watching(modules, "tensorcore.profile"), observed, evaluating(model), torch.no_grad():
        for inputs, _ in prepared(model, batches, "tensorcore.profile", progress):
            call(model, inputs)
            break
    return list(rows.values())


def _sampled(layer: TensorCoreLayer, x: Tensor, outputs: int, seed: int) -> tuple[Tensor, Tensor]:
    """Activations and weights [S, K] of sampled outputs, k in the order of the layer, before block scales."""
    x, w, _ = layer._operands(x.detach())
    x_SK, w_SK, _ = drawn_sums(layer, x, w, outputs, seed)
    if isinstance(layer, TensorCoreConv1d | TensorCoreConv2d) and layer.config.order == "kkc":
        x_SK, w_SK = (layer._kkc(t, w, 1) for t in (x_SK, w_SK))
    return x_SK, w_SK


@dataclass(frozen=True, slots=True)
class Tally:
    """Sums [S] as the unit has them, and how many products were not zero, lost bits, and were lost whole."""

    sums: np.ndarray
    nonzero: int
    cut: int
    lost: int


def summed(
    x_SK: np.ndarray, w_SK: np.ndarray, config: TensorCore, scales: tuple[np.ndarray, np.ndarray] | None = None
) -> Tally:
    """S sums of K products step by step, in float64, which holds every product, term and group's sum.

    Args:
        x_SK, w_SK: float64, finite values of the operand formats.
        config: the unit.
        scales: [S, K], the scale of every k, of a unit with block scales.
    """
    S, K = x_SK.shape
    whole, total = np.zeros(S, np.float32), np.zeros(S)
    nonzero = cut = lost = 0
    for k in range(0, K, config.group):
        if config.promotion is not None and k and k % config.promotion == 0:
            whole, total = _promoted(whole, total), np.zeros(S)
        own = slice(k, k + config.group)
        group = x_SK[:, own], w_SK[:, own]
        if scales is None:
            total, exact, terms = advanced(total, *group, config)
        else:
            total, exact, terms = _advanced_blocks(total, *group, scales[0][:, own], scales[1][:, own], config)
        nonzero += int((exact != 0).sum())
        cut += int((terms != exact).sum())
        lost += int(((terms == 0) & (exact != 0)).sum())
    if config.promotion is not None:
        return Tally(_promoted(whole, total).astype(np.float64), nonzero, cut, lost)
    return Tally(total, nonzero, cut, lost)


def _promoted(whole: np.ndarray, total: np.ndarray) -> np.ndarray:
    """A float32 addition; infinities of both signs give NaN, as in the unit."""
    with np.errstate(invalid="ignore", over="ignore"):
        return whole + total.astype(np.float32)


def advanced(
    c_S: np.ndarray, a_SG: np.ndarray, b_SG: np.ndarray, config: TensorCore
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One step of S sums: the accumulators after it; the products in units of the last bit kept, exact and cut."""
    first, second = config.formats
    exponents_SG = _exponents(a_SG, first.min_exponent) + _exponents(b_SG, second.min_exponent)
    return _step(c_S, a_SG * b_SG, exponents_SG, config)


def _advanced_blocks(
    c_S: np.ndarray, a_SG: np.ndarray, b_SG: np.ndarray, s_SG: np.ndarray, t_SG: np.ndarray, config: TensorCore
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same with a scale for every k of either operand; 4-bit products by sixteens."""
    smallest = SCALES[config.scale_format or "ue8m0"].min_exponent
    products_SG, powers_SG = a_SG * b_SG * (s_SG * t_SG), _exponents(s_SG, smallest) + _exponents(t_SG, smallest)
    if config.sums_sixteen:
        starts = np.arange(0, a_SG.shape[1], SUMMED)
        return _step(c_S, np.add.reduceat(products_SG, starts, 1), powers_SG[:, starts], config)
    first, second = config.formats
    own_SG = _exponents(a_SG, first.min_exponent) + _exponents(b_SG, second.min_exponent)
    return _step(c_S, products_SG, own_SG + powers_SG, config)


def _step(
    c_S: np.ndarray, terms_ST: np.ndarray, exponents_ST: np.ndarray, config: TensorCore
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The accumulators and some terms with their exponents, aligned, cut and added."""
    _, smallest, _ = ACCUMULATORS["float32" if config.output == "e8m13" else config.output]
    infinite = np.isinf(c_S)
    held = np.where(infinite, 0.0, c_S)
    unit = np.maximum(exponents_ST.max(1), _exponents(held, smallest)) - config.fraction
    exact = np.ldexp(terms_ST, -unit[:, None])
    terms = np.trunc(exact)
    sums = np.trunc(np.ldexp(held, -unit)) + terms.sum(1)
    return np.where(infinite, c_S, _output(sums, unit, config.output)), exact, terms


def _exponents(x: np.ndarray, smallest: int) -> np.ndarray:
    """The exponents as the unit sees them."""
    return np.where(x == 0, ZERO_EXPONENT, np.maximum(np.frexp(x)[1] - 1, smallest))


def _output(total: np.ndarray, exponent: np.ndarray, name: str) -> np.ndarray:
    """Integers total 2^exponent in the accumulator's format: `recoup.tensorcore.reference.output` of arrays."""
    fraction, smallest, infinite = ACCUMULATORS[name]
    last = np.maximum(np.frexp(total)[1] - 1 + exponent, smallest) - fraction  # the exponent of the last place
    kept = (np.rint if name == "float16" else np.trunc)(np.ldexp(total, exponent - last))
    value = np.ldexp(kept, last) + 0.0
    return np.where(np.abs(value) >= 2.0**infinite, np.copysign(np.inf, value), value)


def _in_numpy(
    x_SK: Tensor, w_SK: Tensor, config: TensorCore, name: str
) -> tuple[np.ndarray, np.ndarray, tuple[np.ndarray, np.ndarray] | None]:
    """Sums' operands whose numbers are finite, in float64, and where the unit has block scales those of every k."""
    finite = x_SK.isfinite().all(1) & w_SK.isfinite().all(1)
    x_SK, w_SK, scales = x_SK[finite], w_SK[finite], None
    if config.block is not None:
        x_SK, x_scale = in_blocks(x_SK, config, "a", name)
        w_SK, w_scale = (t.mT for t in in_blocks(w_SK.mT, config, "b", name))
        every = [each_scale(s, config.block, x_SK.shape[1], 1).double().cpu().numpy() for s in (x_scale, w_scale)]
        scales = every[0], every[1]
    return x_SK.double().cpu().numpy(), w_SK.double().cpu().numpy(), scales


def _row(name: str, module: Any, x_SK: Tensor, w_SK: Tensor) -> LayerProfile:
    config: TensorCore = module.config
    x, w, scales = _in_numpy(x_SK, w_SK, config, name)
    tally, truth = summed(x, w, config, scales), (x * w if scales is None else x * w * (scales[0] * scales[1])).sum(1)
    good = np.isfinite(tally.sums)
    y, z = tally.sums[good], truth[good]
    slope, residual, error = _fitted(y, z) if good.any() else (None, None, None)
    count = max(tally.nonzero, 1)
    return LayerProfile(
        name=name,
        kind=module.float_class.__name__,
        terms=x.shape[1],
        group=config.group,
        fraction=config.fraction,
        outputs=len(x),
        cut=tally.cut / count,
        lost=tally.lost / count,
        overflowed=1 - float(good.mean()) if len(x) else 0.0,
        slope=slope,
        residual=residual,
        error=error,
    )


def _fitted(y: np.ndarray, z: np.ndarray) -> tuple[float, float, float]:
    """The slope from z to y, what it leaves, and the whole error, relative to z; nothing is off where all is zero."""
    power = float((z * z).sum())
    if power == 0:
        return (1.0, 0.0, 0.0) if not y.any() else (1.0, math.inf, math.inf)
    slope = float((z * y).sum()) / power
    return slope, float(((y - slope * z) ** 2).sum() / power) ** 0.5, float(((y - z) ** 2).sum() / power) ** 0.5
