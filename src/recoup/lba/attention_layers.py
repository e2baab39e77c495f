"""Attention on narrow accumulators: both products, q k^T and p v, run on the unit; the softmax is float32."""

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

from torch import Tensor, nn

from recoup.errors import RecoupError
from recoup.lba.config import LBA
from recoup.lba.layers import RANGE_REMEDY
from recoup.lba.ops import EMULATION, batched, checked_config, draw_seed, shifted_code
from recoup.lba.quantizers import product_scale, quantize_operand
from recoup.models.attention import AttentionProducts
from recoup.network.attention import AttentionUnit, ProductsUnit, attend
from recoup.network.checks import float32_products


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: LBA,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    dropout: float = 0.0,
    layer: str = "lba.attention",
    module: "LBAAttention | None" = None,
) -> Tensor:
    """softmax(scale q k^T + mask) v with both products on the unit.

    The scale multiplies q before the product, as most kernels do; the choice matters to a narrow accumulator [ours].

    Args:
        q: float32 [..., H, T, d]; k, v: [..., G, S, d] with H a multiple of G (grouped queries). Half precision is
            cast under autocast.
        config: the unit; its ``operands`` quantise q and the probabilities as activations, k and v as weights are,
            each by its own largest magnitude.
        mask: boolean (True: may look), or floating and added to the scores; broadcasts to [..., H, T, S].
        causal: token t sees the S - T + t + 1 first ones.
        scale: None is 1 / sqrt(d).
        dropout: probability with which a weight is dropped; the caller passes 0 outside training.
        layer: what errors call it.
        module: what knows the products' shifts and is told of their operands and sums; None: nothing is.

    Returns:
        float32 [..., H, T, d]. A token that sees nothing, or has no keys, gets zeros.

    Raises:
        RecoupError: a config, shapes or dtypes that do not fit, activations without a sign, operands that are not
            finite.
    """
    config = _signed(checked_config(config, layer), layer)
    product = partial(_product, config=config, module=module)
    options: dict[str, Any] = {"mask": mask, "causal": causal, "scale": scale, "dropout": dropout}
    return attend(q, k, v, product, **options, layer=layer, emulation=EMULATION)


def _signed(config: LBA, owner: str) -> LBA:
    """A unit whose operands have signs, as queries do."""
    if config.unsigned:
        raise RecoupError(
            f"{owner}: queries have signs, and the unit's activations {config.pair[0]!r} have none: give attention "
            f"operands={config.pair[1]!r}, or leave it in float, with layers={{name: ...}} of emulate_"
        )
    return config


def _product(x: Tensor, y: Tensor, names: str, layer: str, config: LBA, module: "LBAAttention | None") -> Tensor:
    scale = None
    first, second = config.pair  # of q and p, which come as activations do, and of k and v
    if first is not None and second is not None:
        x, x_scale = quantize_operand(x, first)
        y, y_scale = quantize_operand(y, second)
        scale = product_scale(x_scale, y_scale)
    if module is not None and module.watch is not None:
        module.watch(names, x, y)
        if module.mode != "emulate":
            with float32_products(x):
                return x @ y if scale is None else x @ y * scale
    shift = None if module is None or module.mode != "emulate" else module.shifts.get(names)
    code = shifted_code(config.code, shift) if shift else config.code
    product = batched(x, y, code, draw_seed(config), layer, names)
    if module is not None and module.sums is not None and not module.sums.in_float:
        module.sums.add(product, *LBA.from_code(code).ends)
    return product if scale is None else product * scale


class LBAAttention(AttentionUnit):
    """What has both products of an attention run on a narrow accumulator; ``config`` is an `LBA`.

    Attributes:
        score_shift, value_shift: by how many binades k and v are larger to the unit, as `recoup.lba.LBALinear`'s
            ``shift``, or None.
    """

    tells_baseline = True

    config: LBA
    score_shift: int | None = None
    value_shift: int | None = None

    extras: ClassVar[tuple[str, ...]] = (*AttentionUnit.extras, "score_shift", "value_shift")
    travelling: ClassVar[tuple[str, ...]] = ("score_shift", "value_shift")
    range_remedy = RANGE_REMEDY
    hardware = "narrow accumulators"

    def convert(self, config: LBA, layer: str) -> None:
        super().convert(_signed(config, f"layer {layer!r}"), layer)

    @property
    def shifts(self) -> dict[str, int | None]:
        """Product -> its shift."""
        return {"q k": self.score_shift, "p v": self.value_shift}

    def take_extras(self, values: Mapping[str, Any]) -> None:
        """As `AttentionUnit`; shifts are plain numbers."""
        numbers = {name: values.get(name) for name in self.travelling}
        super().take_extras({name: None if value is None else int(value) for name, value in numbers.items()})

    def fault(self, name: str, value: Any) -> str | None:
        low, high = self.config.shift_range
        return None if low <= int(value) <= high else f"{name} is {int(value)}, not from {low} to {high}"

    def narrow_config(self) -> LBA | None:
        """What the products run on: in ``baseline`` mode float32 sums of quantised operands; None: float products."""
        if self.mode == "emulate":
            return self.config
        quantised = self.mode == "baseline" and (self.config.operands is not None or self.watch is not None)
        return LBA.fp32(operands=self.config.operands) if quantised else None  # scaled call by call

    @property
    def floats(self) -> bool:
        return self.narrow_config() is None

    def run_on_unit(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """As `attention`; in ``baseline`` mode with the operands quantised and float32 sums."""
        config = self.narrow_config()
        assert config is not None
        return attention(q, k, v, config, **options, layer=self.title, module=self)


class LBAAttentionProducts(ProductsUnit, LBAAttention, AttentionProducts):
    """`recoup.models.attention.AttentionProducts` on a narrow accumulator; ``config`` is an `LBA`."""

    float_class = AttentionProducts

    def __init__(self, config: LBA | None = None) -> None:
        super().__init__()
        self.convert(checked_config(config, type(self).__name__), type(self).__name__)


ATTENTION: dict[type[nn.Module], type[nn.Module]] = {AttentionProducts: LBAAttentionProducts}
"""The attention modules LBA stands in for."""
