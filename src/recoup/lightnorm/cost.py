"""What normalization moves and computes on a LightNorm unit, against float32: a model, counted here.

All of this is our own count [our definition], from shapes alone: every pass over a feature map of N elements moves N
elements between memory and the unit, in their stored width; statistics and parameters (a few words a channel) are not
counted, nor is what other layers move. Per training step:

    conventional   forward  read x for the mean, for the variance, to normalize; write y         3 R + 1 W
                   backward read dy and x for the sums, dy and x for dx; write dx                4 R + 1 W
    range          forward  read x for mean and range, to normalize; write y                     2 R + 1 W
                   backward read dy and x for the sums, dy for dx; write dx                      3 R + 1 W

With single-pass variance the conventional forward has 2 R + 1 W. x and y have the forward width, dy and dx the
backward width. Away from the extrema dx needs no x, hence the read saved.

A layer or RMS norm finishes a sample before it begins the next one, so that its D features stay in the unit, in float
as by ranges: forward 1 R + 1 W, backward 2 R (dy and xhat) + 1 W. Ranges save no pass there; formats and blocks do.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from recoup.errors import RecoupError
from recoup.fields import boolean
from recoup.formats import BlockFloat, Float
from recoup.lightnorm.config import LightNorm
from recoup.lightnorm.layers import LightNormLayer
from recoup.lightnorm.rows.layers import LightRows
from recoup.network.batches import call, prepared
from recoup.network.checks import is_module
from recoup.network.modes import evaluating
from recoup.network.norms import is_batch_norm
from recoup.network.row_norms import features_of, is_row_norm
from recoup.network.sites import float_class

WORD = 32  # bits of float32
FORWARD_WORDS, BACKWARD_WORDS = 3 + 1, 4 + 1
RANGE_FORWARD_WORDS, RANGE_BACKWARD_WORDS = 2 + 1, 3 + 1
ROW_FORWARD_WORDS, ROW_BACKWARD_WORDS = 1 + 1, 2 + 1
KEPT_X = 1  # of the range's backward accesses: the stored activation, in the forward width
FLOAT_SIGNIFICAND = 24  # float32's, hidden bit included

Over = Literal["batch", "layer", "rms"]
"""What has statistics of its own: a channel of the batch, or a sample, with a mean or without."""


@dataclass(frozen=True, slots=True)
class Widths:
    """Bits that one element of a feature map moves in a training step, as the three approximations come one by one.

    Attributes:
        conventional: float32 batch norm.
        ranges: range batch norm in float32.
        formats: range batch norm in the config's formats, without blocks.
        blocks: range batch norm in the config's formats and blocks: the config itself.
    """

    conventional: float
    ranges: float
    formats: float
    blocks: float

    @property
    def ratio(self) -> float:
        """How many times less the config moves."""
        return self.conventional / self.blocks

    @property
    def shares(self) -> dict[str, float]:
        """The share of range, format and blocks in the saving, each on top of those before it; all zero if none.

        Each is negative where its step moves more: blocks in float32's place always save, the outlier rule's second
        exponent and index can cost more than a narrow format saves.
        """
        steps = {
            "range": self.conventional - self.ranges,
            "format": self.ranges - self.formats,
            "blocks": self.formats - self.blocks,
        }
        saved = self.conventional - self.blocks
        return {name: step / saved if saved else 0.0 for name, step in steps.items()}


def widths(
    config: LightNorm | None,
    channels: int | None = None,
    *,
    places: int | None = None,
    single_pass: bool = False,
    over: Over = "batch",
) -> Widths:
    """Bits an element of a training step; see the module for the accesses.

    A format b bits wide costs b; no format 32; a block of g channels 1 + significand bits an element and, once a
    block, its exponent. The outlier rule adds a second exponent and the outlier's index, ceil(log2 g) bits: equal
    exponents say that there is none. Where there is no format, the outlier is float32 and adds 24 - significand bits.

    Args:
        config: None: the conventional norm throughout.
        channels: of the feature map; the last block of a place is ragged and pays for its exponent whole. None: as
            many as whole blocks take.
        places: of a sample, which count so where blocks lie along them (``axis="place"``).
        single_pass: whether conventional batch norm takes mean and variance in one pass.
        over: ``batch`` for a batch norm; ``layer`` or ``rms`` for norms of samples, whose features are the channels.

    Raises:
        RecoupError: channels or places below 1.

    >>> widths(LightNorm(shared="max"))
    Widths(conventional=288, ranges=224, formats=70, blocks=48.5)
    >>> widths(LightNorm()).blocks
    61.5
    """
    for name, size in (("channel", channels), ("place", places)):
        if size is not None and size < 1:
            raise RecoupError(f"lightnorm widths({name}s={size}): a feature map has 1 {name} or more")
    rows = over != "batch"
    conventional = (FORWARD_WORDS - single_pass + BACKWARD_WORDS) * WORD
    conventional = (ROW_FORWARD_WORDS + ROW_BACKWARD_WORDS) * WORD if rows else conventional
    if config is None:
        return Widths(conventional, conventional, conventional, conventional)
    forward, backward = _format_bits(config.forward), _format_bits(config.backward)
    length = places if config.axis == "place" and not rows else channels
    one = block_bits(config.forward_blocks, config.forward, length)
    other = block_bits(config.backward_blocks, config.backward, length)
    step = _row_step if rows else _step
    return Widths(conventional, step(WORD, WORD), step(forward, backward), step(one, other))


def _row_step(forward: float, backward: float) -> float:
    return (ROW_FORWARD_WORDS + KEPT_X) * forward + (ROW_BACKWARD_WORDS - KEPT_X) * backward


def _step(forward: float, backward: float) -> float:
    return (RANGE_FORWARD_WORDS + KEPT_X) * forward + (RANGE_BACKWARD_WORDS - KEPT_X) * backward


def _format_bits(format: Float | None) -> int:  # noqa: A002
    return WORD if format is None else format.bits


def block_bits(blocks: BlockFloat | None, format: Float | None, length: int | None = None) -> float:  # noqa: A002
    """Stored bits an element, ragged last blocks included; see `widths`. ``length``: elements along the blocks' axis.

    >>> block_bits(LightNorm(shared="max").forward_blocks, None), block_bits(LightNorm().forward_blocks, None, 4)
    (7.25, 13.75)
    """
    if blocks is None:
        return _format_bits(format)
    element = 1 + blocks.significand
    block = (blocks.bits - element) * blocks.block
    if format is None and blocks.shared == "outlier":
        block += FLOAT_SIGNIFICAND - blocks.significand
    length = length or blocks.block
    return element + block * math.ceil(length / blocks.block) / length


@dataclass(frozen=True, slots=True)
class Operations:
    """Operations of a layer's forward pass in training; divisions and roots are once a channel.

    Conventional, an element: 5 additions and 3 multiplications; a channel: 3 divisions and a root. Range, an element: 3
    additions, 2 multiplications and 2 comparisons; a channel: one reciprocal. What joins a channel's K chunk ranges,
    about 2K operations, is not counted. A layer norm counts the same, a sample for a channel; an RMS norm, which has no
    mean, conventional 1 addition, 3 multiplications, 2 divisions and a root, by ranges 2 multiplications, a comparison
    and a reciprocal.
    """

    additions: int
    multiplications: int
    comparisons: int
    divisions: int
    roots: int

    @classmethod
    def conventional(cls, elements: int, channels: int, over: Over = "batch") -> "Operations":
        """Of the float norm."""
        if over == "rms":
            return cls(elements, 3 * elements, 0, 2 * channels, channels)
        return cls(5 * elements, 3 * elements, 0, 3 * channels, channels)

    @classmethod
    def ranges(cls, elements: int, channels: int, over: Over = "batch") -> "Operations":
        """Of the norm by ranges."""
        if over == "rms":
            return cls(0, 2 * elements, elements, channels, 0)
        return cls(3 * elements, 2 * elements, 2 * elements, channels, 0)

    def __add__(self, other: "Operations") -> "Operations":
        mine, theirs = asdict(self), asdict(other)
        return Operations(**{name: mine[name] + theirs[name] for name in mine})


@dataclass(frozen=True, slots=True)
class LayerTraffic:
    """One call of a norm in a training step.

    Attributes:
        name, kind: of the layer; kind is its float class.
        emulated: whether a LightNorm unit runs it; what is left counts as conventional everywhere.
        channels, elements: of its feature map, all images of the example together; features of a layer or RMS norm.
        conventional, ranges, formats, blocks: bits moved, as in `Widths`.
        over: what has statistics of its own.
    """

    name: str
    kind: str
    emulated: bool
    channels: int
    elements: int
    conventional: int
    ranges: int
    formats: int
    blocks: int
    over: Over = "batch"

    @property
    def ratio(self) -> float:
        """How many times less the unit moves."""
        return self.conventional / self.blocks

    @property
    def operations(self) -> Operations:
        """Of the forward pass as configured."""
        return (Operations.ranges if self.emulated else Operations.conventional)(*self._sizes)

    @property
    def conventional_operations(self) -> Operations:
        """Of the forward pass in float."""
        return Operations.conventional(*self._sizes)

    @property
    def _sizes(self) -> tuple[int, int, Over]:
        own = self.channels if self.over == "batch" else self.elements // self.channels
        return self.elements, own, self.over

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values, for tables and JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Traffic:
    """What a network's norms move in a training step on one example: layers in order of execution, and totals."""

    layers: tuple[LayerTraffic, ...]

    @property
    def bits(self) -> Widths:
        """Total bits, as the approximations come one by one; `Widths.shares` splits the saving."""
        names = ("conventional", "ranges", "formats", "blocks")
        return Widths(*(sum(getattr(layer, name) for layer in self.layers) for name in names))

    @property
    def ratio(self) -> float:
        """How many times less the configured network moves than float32 batch norm."""
        return self.bits.ratio

    @property
    def operations(self) -> Operations:
        """Forward operations of all layers as configured."""
        return sum((layer.operations for layer in self.layers), Operations(0, 0, 0, 0, 0))

    @property
    def conventional_operations(self) -> Operations:
        """Forward operations of all layers in float."""
        return sum((layer.conventional_operations for layer in self.layers), Operations(0, 0, 0, 0, 0))

    def to_dict(self) -> dict[str, Any]:
        """Layers and totals as plain values."""
        return {"layers": [layer.to_dict() for layer in self.layers], "bits": asdict(self.bits), "ratio": self.ratio}


@torch.no_grad()
def traffic(model: nn.Module, inputs: Any, config: LightNorm | None = None, *, single_pass: bool = False) -> Traffic:
    """The memory traffic of a model's norms in one training step on an example, from its shapes.

    Args:
        model: with batch, layer or RMS norms, converted or not; it runs once, in eval mode, to learn the sizes.
        inputs: one batch as in `recoup.network.batches`.
        config: what norms that are not converted are counted as; None: conventional ones. A converted layer counts with
            its own config.
        single_pass: whether conventional batch norm takes mean and variance in one pass.

    Returns:
        A row for each call of BatchNorm1d, 2d or 3d, LayerNorm or RMSNorm. Bits of the whole example.

    Raises:
        RecoupError: a bad batch, or a model that runs no such norm.
    """
    is_module(model, "lightnorm.traffic")
    if config is not None and not isinstance(config, LightNorm):
        raise RecoupError(f"lightnorm.traffic(config={config!r}): config must be a LightNorm or None")
    boolean("lightnorm.traffic", "single_pass", single_pass)
    found: list[LayerTraffic] = []

    def record(name: str) -> Any:
        def hook(module: nn.Module, _args: tuple, _kwargs: dict, output: Tensor) -> None:
            found.append(_row(name, module, output, config, single_pass))

        return hook

    norms = {name: module for name, module in model.named_modules() if is_batch_norm(module) or is_row_norm(module)}
    hooks = [
        module.register_forward_hook(record(name), with_kwargs=True, prepend=True) for name, module in norms.items()
    ]
    try:
        with evaluating(model):
            for batch, _ in prepared(model, [inputs], "lightnorm.traffic"):
                call(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    if not found:
        raise RecoupError("lightnorm.traffic: the model ran no BatchNorm1d, 2d or 3d, no LayerNorm and no RMSNorm")
    return Traffic(tuple(found))


def _row(name: str, module: Any, y: Tensor, config: LightNorm | None, single_pass: bool) -> LayerTraffic:
    converted = isinstance(module, LightNormLayer | LightRows)
    own = module.config if converted and module.mode == "emulate" else None if converted else config
    kind = float_class(module)
    over: Over = "batch" if is_batch_norm(module) else "layer" if issubclass(kind, torch.nn.LayerNorm) else "rms"
    channels = int(module.num_features) if over == "batch" else features_of(module)  # type: ignore[arg-type]
    places = math.prod(y.shape[2:]) or None  # an empty map moves nothing
    each = asdict(widths(own, channels, places=places, single_pass=single_pass, over=over))
    bits = {
        step: round(value * y.numel()) for step, value in each.items()
    }  # whole: no block is part of two places or samples
    return LayerTraffic(name, kind.__name__, own is not None, channels, y.numel(), **bits, over=over)
