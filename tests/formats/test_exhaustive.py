"""Every code of FP10, every pair of them in a block, and every float32 pattern that can matter to their rounding."""

import numpy as np
import pytest
import torch

from recoup.formats import BlockFloat, Float, quantize

NAMES = {"fp10_154": (5, 4, 15), "fp10_163": (6, 3, 31)}  # exponent bits, mantissa bits, bias


def codes(name):
    """All finite values, from their fields: float64."""
    exponent, mantissa, bias = NAMES[name]
    fields = np.arange(1, 2**exponent - 1)
    magnitudes = (2.0 ** (fields - bias))[:, None] * (1 + np.arange(2**mantissa) / 2**mantissa)
    return np.concatenate([-magnitudes.ravel()[::-1], [0.0], magnitudes.ravel()])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_code_comes_back(name, dtype):
    values = codes(name)
    x = torch.tensor(values, dtype=dtype)
    assert torch.equal(quantize(x, Float.parse(name)), x)
    assert len(np.unique(values)) == 2 * (2 ** NAMES[name][0] - 2) * 2 ** NAMES[name][1] + 1


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("low", [0, 1, 0x7FFF, 0x8000, 0xFFFF])
def test_every_upper_half_of_float32_is_cut_to_the_code_below(name, low):
    bits = (np.arange(1 << 16, dtype=np.uint32) << 16) | np.uint32(low)
    x = bits.view(np.float32)
    x = x[~np.isnan(x)]
    positive = codes(name)[len(codes(name)) // 2 :]  # from zero up
    below = positive[np.searchsorted(positive, np.abs(x).astype(np.float64), side="right") - 1]
    found = quantize(torch.from_numpy(x.copy()), Float.parse(name)).numpy()
    assert np.array_equal(found, np.copysign(below, x))


def modelled(x_BW, exponent, significand, outlier):
    """Blocks of a row each, from the exponents of their elements; shared ones within those of ieee(exponent, ...)."""
    exponents = np.frexp(x_BW)[1] - 1
    exponents = np.where(x_BW == 0, -(10**6), exponents)
    ordered = np.sort(exponents, 1)
    largest, second = ordered[:, -1], ordered[:, -2]
    alone = outlier & (largest > second)
    bias = 2 ** (exponent - 1) - 1
    shared = np.clip(np.where(alone, second, largest), 1 - bias, bias)
    quantum = 2.0 ** (shared.astype(np.float64) - significand + 1)[:, None]
    cut = np.trunc(x_BW / quantum) * quantum
    return np.where(alone[:, None] & (exponents == largest[:, None]), x_BW, cut)


@pytest.mark.parametrize("shared", ["outlier", "max"])
@pytest.mark.parametrize(("name", "exponent", "significand"), [("fp10_154", 5, 5), ("fp10_163", 6, 4)])
def test_every_pair_of_codes_in_a_block(name, exponent, significand, shared):
    values = codes(name)
    x_BW = np.stack(np.meshgrid(values, values, indexing="ij"), -1).reshape(-1, 2)
    blocks = BlockFloat(exponent, significand, 2, 1, shared, "zero")
    wanted = modelled(x_BW, exponent, significand, shared == "outlier")
    found = quantize(torch.from_numpy(x_BW).float(), blocks).double().numpy()
    assert np.array_equal(found, wanted)
    assert np.array_equal(quantize(torch.from_numpy(found).float(), blocks).double().numpy(), found)
