"""Convolutions of integers on the CPU, exactly, and the probe that decides which way they go."""

import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from recoup.errors import RecoupError, RecoupWarning
from recoup.kernels import llvm
from recoup.nbsmt.cpu import Int8Convolution, exact_convolution, probe
from recoup.nbsmt.trust import packed

INT8 = probe().name == "int8"
needs_int8 = pytest.mark.skipif(not INT8, reason=f"the int8 path is not exact here: {probe().reason}")


Pair = tuple[int, int]
Geometry = tuple[Pair, Pair, Pair, int]
"""Stride, padding, dilation, groups."""


def plain(padding: int = 0, groups: int = 1) -> Geometry:
    return (1, 1), (padding, padding), (1, 1), groups


def correlate(x: Tensor, w: Tensor, geometry: Geometry) -> np.ndarray:
    """The convolution in int64, tap by tap."""
    stride, padding, dilation, G = geometry
    a, b = x.numpy().astype(np.int64), w.numpy().astype(np.int64)
    a = np.pad(a, ((0, 0), (0, 0), (padding[0], padding[0]), (padding[1], padding[1])))
    N, C, *sizes = a.shape
    kernel = b.shape[2:]
    h, v = ((s - d * (k - 1) - 1) // t + 1 for s, d, k, t in zip(sizes, dilation, kernel, stride, strict=True))
    a, b = a.reshape(N, G, C // G, *sizes), b.reshape(G, -1, *b.shape[1:])
    out = np.zeros((N, G, b.shape[1], h, v), np.int64)
    for i, j in np.ndindex(*kernel):
        top, left = i * dilation[0], j * dilation[1]
        rows = slice(top, top + (h - 1) * stride[0] + 1, stride[0])
        columns = slice(left, left + (v - 1) * stride[1] + 1, stride[1])
        out += np.einsum("ngchw,goc->ngohw", a[..., rows, columns], b[..., i, j])
    return out.reshape(N, -1, h, v)


def check(x: Tensor, w: Tensor, geometry: Geometry) -> None:
    """Every path gives the integer result, rounded to float32, in channels_last."""
    expected = torch.from_numpy(correlate(x, w, geometry).astype(np.float32))
    x = x.contiguous(memory_format=torch.channels_last)
    bound = int(255 * w.long().abs().flatten(1).sum(1).max())
    results = [exact_convolution(operand, w, *geometry, bound) for operand in (x, x.float())]
    results.append(exact_convolution(x, w, *geometry, 2**30))
    if INT8:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RecoupWarning)  # processors differ in where oneDNN is wrong
            convolution = packed(w, *geometry, tuple(x.shape), "a test's")
        results += [] if convolution is None else [convolution(x)]
    for result in results:
        assert result.dtype == torch.float32
        assert result.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(result, expected)


def codes(seed: int, *shape: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def weights(seed: int, *shape: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(-128, 128, shape, dtype=np.int8))


pairs = st.tuples(st.integers(1, 2), st.integers(1, 3))


@settings(max_examples=40, deadline=None)
@given(
    channels=st.tuples(st.integers(1, 40), st.integers(1, 20)),
    shape=st.tuples(st.integers(1, 3), st.integers(5, 9), st.integers(6, 9)),
    kernel=st.tuples(st.sampled_from([1, 3]), st.sampled_from([1, 2, 3])),
    geometry=st.tuples(pairs, st.tuples(st.integers(0, 1), st.integers(0, 2)), pairs, st.sampled_from([1, 1, 1, 2, 4])),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_convolution(channels: Pair, shape: tuple[int, int, int], kernel: Pair, geometry: Geometry, seed: int):
    (inputs, outputs), (N, H, W), groups = channels, shape, geometry[3]
    geometry = (*geometry[:2], (geometry[2][0], min(geometry[2][1], 2)), groups)
    check(codes(seed, N, inputs * groups, H, W), weights(seed, outputs * groups, inputs, *kernel), geometry)


@pytest.mark.parametrize("value", [127, -128])
@pytest.mark.parametrize(
    ("weight_shape", "size", "groups"),
    [
        ((16, 16, 3, 3), 6, 1),
        ((32, 64, 1, 1), 5, 1),
        ((5, 7, 3, 3), 6, 1),
        ((33, 256, 3, 3), 4, 1),
        ((10, 4096, 1, 1), 1, 1),
        ((16, 1, 3, 3), 5, 16),
    ],
    ids=str,
)
def test_largest_operands(weight_shape: tuple[int, ...], size: int, groups: int, value: int):
    """All activations 255, all weights 127 or -128: the sums that saturate 16 bits, some of them above 2^24."""
    x = torch.full((2, weight_shape[1] * groups, size, size), 255, dtype=torch.uint8)
    w = torch.full(weight_shape, value, dtype=torch.int8)
    check(x, w, plain(weight_shape[2] // 2, groups))


@pytest.mark.parametrize("shape", [(1000, 1, 1), (6, 1, 30)], ids=["linear", "1d"])
def test_linear_and_1d(shape: tuple[int, int, int]):
    """Linear layers and 1-d convolutions come as images of height 1."""
    check(codes(1, 3, *shape), weights(2, 10, shape[0], 1, min(3, shape[2])), plain())


def test_depthwise():
    check(codes(3, 2, 24, 7, 7), weights(4, 24, 1, 3, 3), ((2, 2), (1, 1), (1, 1), 24))


def test_sums_above_2_24_are_rounded_once():
    """Sums around 2^26, with weights of one sign: the nearest float32, ties to even."""
    check(codes(5, 1, 4096, 3, 3) | 128, weights(6, 16, 4096, 1, 1).abs().clamp_min(64), plain())


def test_exact_without_onednn():
    """torch may then take NNPACK, whose float32 convolutions are not exact."""
    x, w = codes(7, 32, 32, 14, 14), weights(8, 32, 32, 3, 3)
    expected = torch.from_numpy(correlate(x, w, plain(1)).astype(np.float32))
    torch.backends.mkldnn.enabled, before = False, torch.backends.mkldnn.enabled
    try:
        assert torch.equal(exact_convolution(x, w, *plain(1), bound=255 * 128 * 288), expected)
    finally:
        torch.backends.mkldnn.enabled = before


@needs_int8
def test_packed_convolution_refuses_another_shape():
    convolution = Int8Convolution(weights(0, 4, 3, 3, 3), *plain(1), (1, 3, 8, 8))
    with pytest.raises(RecoupError, match=r"packed for input \[1, 3, 8, 8\]; got \[1, 3, 9, 8\]"):
        convolution(codes(0, 1, 3, 9, 8))


def test_probe_agrees_with_processor():
    backend = probe()
    assert backend is probe()
    if "AMX" in backend.isa or "VNNI" in backend.isa:
        assert backend.name == "int8"
    assert backend.name in ("int8", "float32")
    assert backend.reason


# The processor each limit of oneDNN imitates, what it needs, and what the probe has to find.
LIMITS = {
    "AVX512_CORE_VNNI": ("avx512vnni", "int8", "AVX-512 VNNI"),
    "AVX2_VNNI": ("avxvnni", "int8", "AVX2 VNNI"),
    "AVX512_CORE": ("avx512bw", "float32", "none"),
    "AVX2": ("avx2", "float32", "none"),
}

SCRIPT = """
import torch
from recoup.nbsmt.cpu import Int8Convolution, exact_convolution, probe
torch.set_num_threads(1)
x = torch.full((1, 64, 6, 6), 255, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
w = torch.full((8, 64, 3, 3), -128, dtype=torch.int8)
geometry = (1, 1), (1, 1), (1, 1), 1
int8 = probe().name == "int8"
y = Int8Convolution(w, *geometry, x.shape)(x) if int8 else exact_convolution(x, w, *geometry, 255 * 128 * 576)
print(probe().name, probe().isa, int(y.min()), probe().reason, sep="|")
"""


@pytest.mark.slow
@pytest.mark.parametrize("limit", LIMITS)
def test_probe_under_limit(limit: str):
    feature, name, isa = LIMITS[limit]
    if feature not in llvm.host().features or not hasattr(torch.ops.onednn, "qconv2d_pointwise"):
        pytest.skip(f"this processor cannot imitate {limit}")
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": limit}
    text = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True)
    found = text.stdout.strip().split("|")
    assert found[:3] == [name, isa, str(-255 * 128 * 576)]
    if name == "float32":
        assert f"saturates on this CPU under ONEDNN_MAX_CPU_ISA={limit}" in found[3]
