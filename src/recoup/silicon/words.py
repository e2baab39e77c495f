"""Ports' patterns as words of 64 lanes, a row a bit, and back: what netlists are run on."""

from typing import Any

import numpy as np

from recoup.errors import RecoupError
from recoup.gates.module import Inputs, Module, Port, element_type


def packed(module: Module, inputs: Inputs) -> np.ndarray:
    """Ports' patterns as words: [steps, input bits, words]; lanes beyond the last repeat lane 0.

    Raises:
        RecoupError: a port is missing, or patterns of the wrong shape, type or range.
    """
    words = [bits(port, inputs) for port in module.inputs]
    runs = {port.name: inputs[port.name].shape[:2] for port in module.inputs}
    if len(set(runs.values())) > 1:
        said = ", ".join(f"{name} {list(shape)}" for name, shape in runs.items())
        raise RecoupError(f"{module.name}: ports differ in [steps, lanes]: {said}")
    return np.concatenate(words, axis=1)


def bits(port: Port, inputs: Inputs) -> np.ndarray:
    """A port's patterns, [steps, bits, words].

    Raises:
        RecoupError: as `packed`.
    """
    if port.name not in inputs:
        raise RecoupError(f"port {port.name!r}: no patterns are given")
    values = inputs[port.name]
    if not isinstance(values, np.ndarray):
        raise RecoupError(f"port {port.name!r}: patterns must be a numpy array, got {type(values).__name__}")
    if values.ndim == 2:
        values = values[:, :, None]
    if values.ndim != 3 or values.shape[2] != port.parts:
        raise RecoupError(
            f"port {port.name!r}: patterns of shape {list(values.shape)}; expected [steps, lanes, {port.parts}]"
        )
    if values.dtype != element_type(port):
        raise RecoupError(f"port {port.name!r}: patterns must be {np.dtype(element_type(port))}, got {values.dtype}")
    steps, lanes, _ = values.shape
    if values.size and int(values.max()) >> port.element:
        raise RecoupError(f"port {port.name!r}: {int(values.max())} has more than {port.element} bits")
    words = -(-lanes // 64)
    full = np.empty((steps, words * 64, port.parts), values.dtype)
    full[:, :lanes], full[:, lanes:] = values, values[:, :1]
    out = np.empty((steps, port.width, words), np.uint64)
    for part in range(port.parts):
        for bit in range(port.element):
            column = full[:, :, part]
            ones = (column >> (np.uint64(bit) if values.dtype != object else bit)) & (
                np.uint64(1) if values.dtype != object else 1
            )
            flat = np.packbits(ones.astype(np.uint8), axis=1, bitorder="little")
            out[:, part * port.element + bit] = flat.view("<u8")
    return out


def unpacked(module: Module, words: np.ndarray, lanes: int) -> dict[str, np.ndarray]:
    """The inverse for outputs and probes: [steps, output bits, words] to patterns by port."""
    found, start = {}, 0
    steps = words.shape[0]
    for port in module.shown:
        kind = element_type(port)
        values: Any = np.zeros((steps, lanes, port.parts), kind)
        for index in range(port.width):
            row = np.ascontiguousarray(words[:, start + index]).view(np.uint8).reshape(steps, -1)
            ones = np.unpackbits(row, axis=1, bitorder="little")[:, :lanes]
            part, bit = divmod(index, port.element)
            if kind is object:
                values[:, :, part] += ones.astype(object) * (1 << bit)
            else:
                values[:, :, part] |= ones.astype(np.uint64) << np.uint64(bit)
        found[port.name] = values if port.parts > 1 else values[:, :, 0]
        start += port.width
    return found
