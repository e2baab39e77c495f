"""Attention on the shared multiplier: both products, q k^T and p v, run on the unit; the softmax is float32."""

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from recoup.errors import RecoupError
from recoup.models.attention import AttentionProducts
from recoup.nbsmt.config import NBSMT
from recoup.nbsmt.ports import SIGNED, UNSIGNED
from recoup.nbsmt.product_ops import EMULATION, batched
from recoup.network.attention import AttentionUnit, ProductsUnit, attend
from recoup.network.checks import instance
from recoup.network.scales import is_scale

__all__ = ["ATTENTION", "AttentionScales", "NBSMTAttention", "NBSMTAttentionProducts", "attention"]


class AttentionScales(NamedTuple):
    """The steps of an attention's 8-bit codes, float32 values above 0.

    Attributes:
        q, k, v: of the signed codes of q (times the attention's ``scale``), k and v.
        p: of the unsigned codes of the probabilities.
    """

    q: float
    k: float
    p: float
    v: float

    def of(self, names: str) -> tuple[float, float]:
        """Those of a product's operands: ``q k`` or ``p v``."""
        return (self.q, self.k) if names == "q k" else (self.p, self.v)


ZEROS = {"q k": SIGNED, "p v": UNSIGNED}
"""The byte of value 0 among the codes of a product's first operand; its second one plays the weight, and is signed."""


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: NBSMT,
    scales: AttentionScales,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    dropout: float = 0.0,
    layer: str = "nbsmt.attention",
    module: "NBSMTAttention | None" = None,
) -> Tensor:
    """softmax(scale q k^T + mask) v with both products on the shared multiplier.

    Of each product the first operand plays the activation and the second the weight [def]: q (times ``scale``) meets
    the signed activation port, the probabilities the unsigned one, k and v the weight port, with a scale a tensor. The
    threads split the head's width in q k^T and the keys of the call in p v. What a mask hides has probability 0, which
    leaves the multiplier to its partner where the policy has an ``S``.

    Args:
        q: float32 [..., H, T, d]; k, v: [..., G, S, d] with H a multiple of G (grouped queries). Half precision is
            cast under autocast.
        config: the unit.
        scales: the steps of the codes.
        mask: boolean (True: may look), or floating and added to the scores; broadcasts to [..., H, T, S].
        causal: token t sees the S - T + t + 1 first ones.
        scale: None is 1 / sqrt(d).
        dropout: probability with which a weight is dropped; the caller passes 0 outside training.
        layer: what errors call it.
        module: what is told of the products' operands; None: nothing is.

    Returns:
        float32 [..., H, T, d]. A token that sees nothing, or has no keys, gets zeros.

    Raises:
        RecoupError: a config, scales, shapes or dtypes that do not fit, operands that are not finite, sums that could
            leave 32 bits.

    Source: the unit as `NBSMT`; which operand plays which part is our definition.
    """
    instance(config, NBSMT, layer, "config", "NBSMT(threads=2)")
    scales = _checked(scales, layer)

    def product(x: Tensor, y: Tensor, names: str, title: str) -> Tensor:
        if module is not None and module.watch is not None:
            module.watch(names, x, y)
        return batched(x, y, scales.of(names), config, ZEROS[names], title, names)

    options: dict[str, Any] = {"mask": mask, "causal": causal, "scale": scale, "dropout": dropout}
    return attend(q, k, v, product, **options, layer=layer, emulation=EMULATION)


def _checked(scales: Any, layer: str) -> AttentionScales:
    if not isinstance(scales, tuple) or len(scales) != 4 or not all(map(is_scale, scales)):
        raise RecoupError(f"{layer}: scales must be an AttentionScales of four numbers above 0; got {scales!r}")
    return AttentionScales(*map(float, scales))


class NBSMTAttention(AttentionUnit):
    """What has both products of an attention run on the shared multiplier; ``config`` is an `NBSMT`.

    No bias correction, order or statistic of weights belongs to it: both operands are activations.

    Attributes:
        operand_scales: an `AttentionScales` that `recoup.calibrate_` measured; None: it has no scales yet.
    """

    tells_baseline = True
    hardware = "shared multipliers"

    config: NBSMT
    operand_scales: AttentionScales | None = None

    travelling: ClassVar[tuple[str, ...]] = ("operand_scales",)
    measured: ClassVar[tuple[str, ...]] = ("operand_scales",)

    def convert(self, config: NBSMT, layer: str) -> None:
        where, scales = f"layer '{layer}' ({self.float_class.__name__})", getattr(self, "operand_scales", None)
        instance(config, NBSMT, where, "config", "NBSMT(threads=2)")
        if scales is None:
            raise RecoupError(f"{where} has no operand scales: run calibrate_(model, batches) first")
        _checked(scales, where)
        super().convert(config, layer)

    @property
    def active_config(self) -> NBSMT:
        """The configuration the products really run: in ``baseline`` mode one thread and exact sums."""
        return self.config.eight_bit if self.mode == "baseline" else self.config

    @property
    def floats(self) -> bool:
        return self.mode == "float"

    def take_extras(self, values: Mapping[str, Any]) -> None:
        """As `AttentionUnit`; scales are plain numbers."""
        scales = values.get("operand_scales")
        super().take_extras({} if scales is None else {"operand_scales": _numbers(scales)})

    def fault(self, name: str, value: Any) -> str | None:  # noqa: ARG002 -- there is one
        found = _numbers(value)
        legal = found is not None and all(map(is_scale, found))
        return None if legal else f"is {value!r}; it is four numbers above 0, of q, k, p and v"

    def run_on_unit(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """As `attention`; in ``baseline`` mode in plain 8-bit arithmetic."""
        if self.operand_scales is None:
            raise RecoupError(f"{self.title} has no operand scales: run calibrate_(model, batches) first")
        scales = AttentionScales(*self.operand_scales)
        return attention(q, k, v, self.active_config, scales, **options, layer=self.title, module=self)


def _numbers(value: Any) -> AttentionScales | None:
    """Four numbers, also of a tensor; None where they are not four."""
    values = value.tolist() if isinstance(value, Tensor) else value
    return AttentionScales(*values) if isinstance(values, list | tuple) and len(values) == 4 else None


class NBSMTAttentionProducts(ProductsUnit, NBSMTAttention, AttentionProducts):
    """`recoup.models.attention.AttentionProducts` on the shared multiplier; ``config`` is an `NBSMT`."""

    float_class = AttentionProducts

    def __init__(self, config: NBSMT | None = None, scales: AttentionScales | None = None) -> None:
        super().__init__()
        name = type(self).__name__
        config = NBSMT() if config is None else config
        self.operand_scales = scales if scales is None else _checked(scales, name)
        AttentionUnit.convert(self, instance(config, NBSMT, name, "config", "NBSMT(threads=2)"), name)


ATTENTION: dict[type[nn.Module], type[nn.Module]] = {AttentionProducts: NBSMTAttentionProducts}
"""The attention modules NB-SMT stands in for."""
