"""Attention on a tensor core: both products, q k^T and p v, run on the unit; the softmax is float32."""

from functools import partial
from typing import Any

from torch import Tensor, nn

from recoup.errors import RecoupError
from recoup.models.attention import AttentionProducts
from recoup.network.attention import AttentionUnit, ProductsUnit, attend
from recoup.network.checks import float32_products
from recoup.tensorcore import block_ops
from recoup.tensorcore.blocks import in_blocks
from recoup.tensorcore.config import TensorCore
from recoup.tensorcore.ops import EMULATION, batched, checked_config
from recoup.tensorcore.quantizers import quantize_operand, scaled_operand

__all__ = ["ATTENTION", "TensorCoreAttention", "TensorCoreAttentionProducts", "attention"]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: TensorCore,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    dropout: float = 0.0,
    layer: str = "tensorcore.attention",
    module: "TensorCoreAttention | None" = None,
) -> Tensor:
    """softmax(scale q k^T + mask) v with both products on the unit.

    The operands of both are brought to the unit's formats, 8-bit ones with a scale a tensor: q (times ``scale``), k, v
    and the probabilities; on a unit with block scales in blocks along d and along the tokens of v. The
    scores leave the unit in float32 for the softmax, as fused kernels have it.

    Args:
        q: float32 [..., H, T, d]; k, v: [..., G, S, d] with H a multiple of G (grouped queries). Half precision is
            cast under autocast.
        config: the unit.
        mask: boolean (True: may look), or floating and added to the scores; broadcasts to [..., H, T, S].
        causal: token t sees the S - T + t + 1 first ones.
        scale: None is 1 / sqrt(d).
        dropout: probability with which a weight is dropped; the caller passes 0 outside training.
        layer: what errors call it.
        module: what is told of the products' operands, and in which mode they run; None: nothing is.

    Returns:
        float32 [..., H, T, d]. A token that sees nothing, or has no keys, gets zeros.

    Raises:
        RecoupError: a config, shapes or dtypes that do not fit, operands that are not finite.
    """
    config = checked_config(config, layer)
    product = partial(_product, config=config, module=module)
    options: dict[str, Any] = {"mask": mask, "causal": causal, "scale": scale, "dropout": dropout}
    return attend(q, k, v, product, **options, layer=layer, emulation=EMULATION)


def _product(
    x: Tensor, y: Tensor, names: str, layer: str, config: TensorCore, module: "TensorCoreAttention | None"
) -> Tensor:
    if config.block is not None:
        return _blocked(x, y, names, layer, config, module)
    first, second = config.pair
    x, x_scale = quantize_operand(x, first, config.amax_of(first), None)
    y, y_scale = quantize_operand(y, second, config.amax_of(second), None)
    scale = x_scale.flatten() * y_scale.flatten()
    if module is not None and module.watch is not None:
        module.watch(names, x, y)
    if module is not None and module.mode != "emulate":
        with float32_products(x):
            return x @ y * scale
    product = batched(x, y, config.code, layer, names) * scale
    if names == "q k" and config.overflows and config.nonfinite == "error" and not bool(product.isfinite().all()):
        raise RecoupError(
            f"{layer}: {int((~product.isfinite()).sum())} sums left float16's range; operands scaled to less do not: "
            "TensorCore(amax=16)"
        )
    return product


def _blocked(
    x: Tensor, y: Tensor, names: str, layer: str, config: TensorCore, module: "TensorCoreAttention | None"
) -> Tensor:
    """The same of operands in blocks along the reduction."""
    (x, x_scale), (y, y_scale) = (
        scaled_operand(t, config.amax_of(name)) for t, name in zip((x, y), config.pair, strict=True)
    )
    if module is not None and module.watch is not None:
        module.watch(names, x, y)
    left, right = in_blocks(x, config, "a", layer), in_blocks(y, config, "b", layer)
    if module is not None and module.mode != "emulate":
        with float32_products(x):
            product = block_ops.exact(left, right, config)
    else:
        product = block_ops.multiplied(left, right, config, layer, names)
    return product * (x_scale.flatten() * y_scale.flatten())


class TensorCoreAttention(AttentionUnit):
    """What has both products of an attention run on a tensor core; ``config`` is a `TensorCore`."""

    tells_baseline = True
    hardware = "tensor cores"

    config: TensorCore

    def convert(self, config: TensorCore, layer: str) -> None:
        super().convert(checked_config(config, f"layer {layer!r}"), layer)

    def caveat(self) -> str | None:
        calibrated = self.config.scale == "calibrated"
        return "are attention products, whose operands are scaled call by call" if calibrated else None

    def note(self) -> str:
        return "operands scaled call by call" if self.caveat() else ""

    @property
    def floats(self) -> bool:
        return self.mode == "float"

    def run_on_unit(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """As `attention`; in ``baseline`` mode with the operands in their formats and float32 sums."""
        return attention(q, k, v, self.config, **options, layer=self.title, module=self)


class TensorCoreAttentionProducts(ProductsUnit, TensorCoreAttention, AttentionProducts):
    """`recoup.models.attention.AttentionProducts` on a tensor core; ``config`` is a `TensorCore`."""

    float_class = AttentionProducts

    def __init__(self, config: TensorCore | None = None) -> None:
        super().__init__()
        self.convert(checked_config(config, type(self).__name__), type(self).__name__)


ATTENTION: dict[type[nn.Module], type[nn.Module]] = {AttentionProducts: TensorCoreAttentionProducts}
"""The attention modules a tensor core stands in for."""
