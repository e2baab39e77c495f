"""What the NB-SMT tests draw: configurations, and operands rich in the values that decide something."""

import numpy as np
import torch
from hypothesis import strategies as st

from recoup.nbsmt.config import NBSMT, PAIRINGS, POLICIES, PORTS, ROUNDINGS, THREADS

configs = st.builds(
    NBSMT,
    threads=st.sampled_from(THREADS),
    policy=st.sampled_from(POLICIES),
    rounding=st.sampled_from(ROUNDINGS),
    pairing=st.sampled_from(PAIRINGS),
    port=st.sampled_from(PORTS),
)

ACTIVATIONS = [0, 1, 7, 8, 15, 16, 17, 23, 24, 25, 40, 120, 232, 239, 240, 247, 248, 255]
SIGNED = [0, 1, -1, 4, -4, 7, 8, -8, -9, 12, -12, 15, 16, -16, -17, 20, -20, -20, 28, 92, 100, 120, 123, 124, 127]
SIGNED += [-124, -125, -127, -128]
WEIGHTS = [0, 1, -1, 7, 8, 9, -8, -9, 24, -24, -23, 40, -40, 103, 104, 112, 119, 120, 127, -120, -127, -128]


def operands(seed: int, rows: int, size: int, columns: int, zeros: float = 0.3, signed: bool = False):
    """Random uint8 (signed: int8) [rows, size] and int8 [size, columns]: a third special values, a share of zeros."""
    rng = np.random.default_rng(seed)

    def draw(low: int, high: int, special: list[int], shape: tuple[int, int]) -> np.ndarray:
        values = rng.integers(low, high, shape)
        values = np.where(rng.random(shape) < 0.33, rng.choice(special, shape), values)
        return np.where(rng.random(shape) < zeros, 0, values)

    if signed:
        x = draw(-128, 128, SIGNED, (rows, size)).astype(np.int8)
    else:
        x = draw(0, 256, ACTIVATIONS, (rows, size)).astype(np.uint8)
    w = draw(-128, 128, WEIGHTS, (size, columns)).astype(np.int8)
    return torch.from_numpy(x), torch.from_numpy(w)


def port_of(config: NBSMT, signed: bool) -> str | int:
    """What the port model calls the port of activations."""
    return config.port if signed else "unsigned"


ONE_PRODUCT = {
    "kind": st.sampled_from(["any", "alternating", "runs", "sparse", "largest", "one sign"]),
    "images": st.integers(1, 3),
    "channels": st.integers(1, 40),
    "outputs": st.sampled_from([1, 3, 16, 33]),
    "groups": st.sampled_from([1, 1, 2, 3]),
    "kernel": st.tuples(st.integers(1, 3), st.integers(1, 3)),
    "stride": st.tuples(st.integers(1, 2), st.integers(1, 2)),
    "padding": st.tuples(st.integers(0, 2), st.integers(0, 2)),
    "dilation": st.tuples(st.integers(1, 2), st.integers(1, 2)),
}
"""Convolutions whose slots hold one product, and the kind of their weights."""
