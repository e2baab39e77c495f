"""Weights in lanes: of four threads' products those that weigh something, against clipping slot by slot."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import recoup as rc
from recoup.kernels import llvm
from recoup.nbsmt import lanes
from recoup.nbsmt.config import NBSMT
from recoup.nbsmt.saturate import Saturating
from recoup.nbsmt.weights import weight_operand
from recoup.network.convolution import Geometry
from tests.nbsmt.strategies import operands
from tests.nbsmt.test_accumulator import convolved, dealt

CHOOSES = {"avx512vnni", "avx512vbmi"} <= llvm.host().features
VNNI_HERE = replace(llvm.host(), features=llvm.host().features - {"avx512vbmi"})
"""This processor, of which kernels are not told that it chooses bytes."""


@pytest.mark.skipif(not CHOOSES, reason="this processor has no AVX-512 VBMI")
@settings(max_examples=30, deadline=None)
@given(
    config=st.builds(
        NBSMT,
        threads=st.just(4),
        policy=st.sampled_from(["S", "S+A", "S+W", "S+Aw", "S+aW"]),
        rounding=st.sampled_from(["nearest", "zero"]),
        pairing=st.sampled_from(["halves", "adjacent"]),
        accumulator=st.builds(rc.Int, st.integers(8, 22)),
    ),
    seed=st.integers(0, 2**31),
    channels=st.integers(1, 70),
    outputs=st.sampled_from([1, 16, 17, 40]),
    size=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    sparse=st.sampled_from([0.0, 0.5, 0.99]),
    signed=st.booleans(),
)
def test_lanes_choose_the_values_that_weigh_something(config, seed, channels, outputs, size, sparse, signed):
    """Any pairing, slots that fill vectors and that do not, one pixel and many: against clipping slot by slot."""
    code, weight = operands(seed, channels * size[0] * size[1], 1, outputs * channels * 4, sparse, signed)
    code, weight = code.view(1, channels, *size), weight.view(outputs, channels, 2, 2)
    geometry = Geometry((2, 2), (1, 1), (1, 1), (1, 1), 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lanes, "MANY", 1)
        kernel, a_NHWJ = dealt(code, config, weight, 128 * signed)
        found = kernel(a_NHWJ, geometry, 128 * signed)
    (layout,) = kernel._layouts.values()
    assert layout.form.chosen <= 2
    plain, _ = dealt(code, config, weight, 128 * signed)
    assert torch.equal(found, plain(a_NHWJ, geometry, 128 * signed, target=VNNI_HERE))
    if channels * outputs < 100:
        expected = convolved(code, weight, config, geometry, signed)
        assert torch.equal(found[0].flatten(1).t(), expected.int())


@pytest.mark.skipif(not CHOOSES, reason="this processor has no AVX-512 VBMI")
def test_four_threads_multiply_eight_products_of_dozens():
    """A thread's value meets two weights at most, whatever they are: two quads of a slot's nine and more do it all."""
    random = torch.Generator().manual_seed(0)
    weight = torch.randint(-128, 128, (33, 64, 3, 3), generator=random).to(torch.int8)
    for signed in (False, True):
        operand = weight_operand(weight, NBSMT(4), 128 * signed)
        kernel = Saturating(operand.weight_OGJkk, NBSMT(4, accumulator=rc.Int(18)), len(operand.activations))
        layout = kernel.layout(1, 128 * signed, llvm.host())
        assert kernel.products >= 36
        assert layout.form.chosen == 2
        assert layout.form.corrected is signed
        assert kernel.layout(1, 128 * signed, VNNI_HERE).form.chosen == 0
