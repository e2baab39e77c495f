"""NB-SMT's hardware from its config: product unit, processing element or array; and a layer's operands for it."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from recoup.errors import RecoupError
from recoup.fields import integer
from recoup.gates import typical as draw
from recoup.gates.module import Inputs, Module
from recoup.nbsmt import reference, systolic
from recoup.nbsmt.config import NBSMT
from recoup.nbsmt.element import REGISTERS, Options, element, element_feed, products
from recoup.nbsmt.observe import see
from recoup.nbsmt.ports import SIGNED, UNSIGNED


def build(
    config: NBSMT,
    *,
    registers: str = "product",
    drain: bool = True,
    accumulator_bits: int = 32,
    array: tuple[int, int] | None = None,
    unit: str = "pe",
    activations: str = "unsigned",
) -> Module:
    """The hardware of a config.

    Args:
        config: any NB-SMT config. ``pairing`` says which channels a slot's operands are and changes no gate.
        registers: "none", "product" or "decode"; see `Options`.
        drain: whether the processing element has a drain register.
        accumulator_bits: 17 to 64; narrower ones than a layer needs wrap.
        array: rows and columns, for the whole array; None: one processing element.
        unit: "pe", or "products" for the product unit alone, without any register.
        activations: "unsigned", or "signed": values -128..127, which meet ``config.port`` bits.

    Raises:
        RecoupError: an option outside these values, a config with an accumulator of its own.
    """
    if config.accumulator is not None:
        raise RecoupError(
            f"nbsmt.rtl.build: {config!r}: what is generated has registers of accumulator_bits that wrap; build the "
            "config with accumulator=None"
        )
    if registers not in REGISTERS:
        raise RecoupError(f"nbsmt.rtl.build(registers={registers!r}): must be one of {', '.join(REGISTERS)}")
    if unit not in ("pe", "products"):
        raise RecoupError(f"nbsmt.rtl.build(unit={unit!r}): must be 'pe' or 'products'")
    if activations not in ("unsigned", "signed"):
        raise RecoupError(f"nbsmt.rtl.build(activations={activations!r}): must be 'unsigned' or 'signed'")
    bits = integer("nbsmt.rtl.build", "accumulator_bits", accumulator_bits, (18, 64))
    if not isinstance(drain, bool):
        raise RecoupError(f"nbsmt.rtl.build(drain={drain!r}): must be True or False")
    options = Options(registers, drain, bits, zero=SIGNED if activations == "signed" else UNSIGNED)
    if unit == "products":
        return products(config, options)
    if array is not None:
        return systolic.build(config, options, array)
    return element(config, options)


def capture(layer: Any, inputs: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """A layer's codes as a product of slots: x uint8 (signed values: int8) [M, T, S], w int8 [T, S, N].

    Slots by channel, in the layer's own order of channels where it has one that decides, then by tap.

    Raises:
        RecoupError: a grouped convolution, which runs one thread on other arrays.
    """
    seen = see(layer, inputs)
    codes, weight = seen.codes(), seen.weight_codes()[0]
    if seen.geometry.groups != 1:
        raise RecoupError(
            f"silicon.capture: {layer.title}: {seen.geometry.groups} groups; only ungrouped layers are taken"
        )
    config = layer.active_config
    if layer.order is not None and layer.order_decides(config):
        codes, weight = codes.index_select(1, layer.order), weight.index_select(1, layer.order)
    x = reference.split_threads(codes.to(torch.int16), config, 1)  # [N, T, C, H, W]
    w = reference.split_threads(weight.to(torch.int16), config, 1)  # [O, T, C, kh, kw]
    images, T = x.shape[:2]
    g = seen.geometry
    patches = F.unfold(x.flatten(0, 1).float(), weight.shape[2:], g.dilation, g.padding, g.stride)  # [N T, C taps, P]
    x_MTS = patches.unflatten(0, (images, T)).permute(0, 3, 1, 2).flatten(0, 1)
    return x_MTS.to(codes.dtype).numpy(), w.flatten(2).permute(1, 2, 0).to(torch.int8).contiguous().numpy()


def typical(config: NBSMT, lanes: int, steps: int, generator: np.random.Generator) -> Inputs:
    """Inputs of the processing element for one sum of ``steps`` slots: `recoup.gates.typical` over 0 to 255 and -127 to
    127, unsigned activations. The drain register holds zeros."""
    T = config.threads
    x = np.rint(draw.activations((lanes, T, steps), 255, generator)).astype(np.uint8)
    w = np.rint(draw.weights((T, steps, lanes), 127, generator)).astype(np.int8)
    return element_feed((x, w), lanes, generator, T, Options())


def steps(operands: tuple[np.ndarray, ...]) -> int:
    """The slots of all outputs of a layer as `capture` gives it: clocks of one processing element."""
    x, w = operands
    return x.shape[0] * x.shape[2] * w.shape[2]
