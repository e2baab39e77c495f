"""Counts against the reference, which visits every slot: no difference allowed."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from recoup.errors import RecoupError
from recoup.nbsmt import reference, tally
from recoup.nbsmt.config import NBSMT, PAIRINGS, POLICIES, ROUNDINGS, THREADS
from recoup.nbsmt.slots import layer_statistics, statistics
from recoup.network.convolution import Geometry
from tests.nbsmt.strategies import configs, operands


@pytest.mark.parametrize(
    "config",
    [NBSMT(*fields) for fields in itertools.product(THREADS, POLICIES, ROUNDINGS, PAIRINGS)],
    ids=lambda c: f"{c.threads}-{c.policy}-{c.rounding}-{c.pairing}",
)
def test_every_configuration_equals_the_reference(config):
    for signed in (False, True):
        x, w = operands(0, 9, 13, 11, signed=signed)
        assert statistics(x, w, config) == reference.statistics(x, w, config)


@settings(max_examples=40, deadline=None)
@given(
    configs,
    st.integers(0, 2**32 - 1),
    st.integers(0, 6),
    st.integers(0, 21),
    st.integers(0, 6),
    st.sampled_from([0.0, 0.3, 0.9]),
    st.booleans(),
)
def test_every_shape_equals_the_reference(config, seed, rows, size, columns, zeros, signed):
    x, w = operands(seed, rows, size, columns, zeros, signed)
    assert statistics(x, w, config) == reference.statistics(x, w, config)


def columns_of(code, weight, config, geometry):
    """Explicit im2col: x [M, K] and w [K, N] in an order of K in which the threads split the channels."""
    missing, dtype = -code.shape[1] % config.threads, code.dtype
    code, weight = F.pad(code, (0, 0, 0, 0, 0, missing)), F.pad(weight, (0, 0, 0, 0, 0, missing))
    channels, kernel = code.shape[1], weight.shape[2:]
    x = F.unfold(code.double(), tuple(kernel), geometry.dilation, geometry.padding, geometry.stride)
    x = x.unflatten(1, (channels, -1)).permute(0, 3, 1, 2)
    w = weight.flatten(2).permute(1, 2, 0)
    if config.pairing == "adjacent":  # K index = tap * channels + channel, so that thread t has channels t mod T
        x, w = x.transpose(2, 3), w.transpose(0, 1)
    return x.flatten(2).flatten(0, 1).to(dtype), w.flatten(0, 1).contiguous()


sizes = st.tuples(st.integers(1, 7), st.integers(1, 7))
geometries = st.builds(
    Geometry,
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.tuples(st.integers(0, 2), st.integers(0, 2)),
    st.tuples(st.integers(1, 2), st.integers(1, 2)),
    st.just(1),
)


def layer(seed, images, channels, size, outputs, kernel, zeros=0.3, signed=False):
    inputs, weights = images * channels * size[0] * size[1], outputs * channels * kernel[0] * kernel[1]
    x, w = operands(seed, inputs, 1, weights, zeros, signed)
    return x.view(images, channels, *size), w.view(outputs, channels, *kernel)


@settings(max_examples=60, deadline=None)
@given(
    configs,
    st.integers(0, 2**32 - 1),
    st.integers(1, 3),
    st.integers(1, 9),
    sizes,
    st.integers(1, 4),
    geometries,
    st.booleans(),
)
def test_a_convolution_equals_its_im2col(config, seed, images, channels, size, outputs, geometry, signed):
    kernel = geometry.kernel
    assume(all(size[i] + 2 * geometry.padding[i] > geometry.dilation[i] * (kernel[i] - 1) for i in (0, 1)))
    code, weight = layer(seed, images, channels, size, outputs, kernel, signed=signed)
    expected = reference.statistics(*columns_of(code, weight, config, geometry), config)
    assert layer_statistics(code, weight, config, geometry) == expected


@pytest.mark.parametrize("threads", THREADS)
def test_small_blocks_change_nothing(threads, monkeypatch):
    code, weight = layer(0, 5, 18, (6, 5), 7, (3, 3))
    geometry, config = Geometry((3, 3), (2, 1), (1, 1), (1, 1), 1), NBSMT(threads, "S+Aw", pairing="adjacent")
    expected = layer_statistics(code, weight, config, geometry)
    monkeypatch.setattr(tally, "CELLS", 100)
    assert layer_statistics(code, weight, config, geometry) == expected


def test_a_grouped_convolution_is_the_sum_of_its_groups():
    code, weight = layer(0, 2, 12, (6, 6), 9, (3, 3))
    weight = weight[:, :4]
    config = NBSMT(4, "S+aW")
    found = layer_statistics(code, weight, config, Geometry((3, 3), (1, 1), (1, 1), (1, 1), 3))
    parts = [
        layer_statistics(
            code[:, 4 * g : 4 * g + 4], weight[3 * g : 3 * g + 3], config, Geometry((3, 3), (1, 1), (1, 1), (1, 1), 1)
        )
        for g in range(3)
    ]
    for key in ("slots", "collisions", "lossy", "active"):
        assert found[key] == sum(part[key] for part in parts)
    assert found["utilization"] == pytest.approx(sum(part["utilization"] for part in parts) / 3, rel=1e-15)


def test_one_thread_never_collides():
    code, weight = layer(1, 2, 7, (5, 5), 4, (3, 3))
    found = layer_statistics(code, weight, NBSMT(threads=1), Geometry((3, 3), (1, 1), (0, 0), (1, 1), 1))
    assert found["slots"] == 2 * 9 * 4 * 7 * 9
    assert (found["collisions"], found["lossy"]) == (0, 0)
    assert found["utilization"] == found["active"] / found["slots"]


def test_counts_beyond_32_bits():
    x, w = torch.full((30_000, 8), 200, dtype=torch.uint8), torch.full((8, 40_000), 100, dtype=torch.int8)
    slots = 30_000 * 40_000 * 4
    assert statistics(x, w, NBSMT(threads=2)) == {
        "slots": slots, "collisions": slots, "lossy": 2 * slots, "active": 2 * slots, "utilization": 1.0
    }  # fmt: skip


@pytest.mark.parametrize(
    ("codes", "weight", "groups", "message"),
    [
        (
            torch.zeros(1, 4, 5, 5),
            torch.zeros(2, 4, 3, 3, dtype=torch.int8),
            1,
            "uint8 and weight_codes int8; got torch.f",
        ),
        (
            torch.zeros(1, 4, 5, 5, dtype=torch.uint8),
            torch.zeros(2, 4, 3, 3),
            1,
            "int8; got torch.uint8 and torch.float32",
        ),
        (torch.zeros(4, 5, 5, dtype=torch.uint8), torch.zeros(2, 4, 3, 3, dtype=torch.int8), 1, r"got \[4, 5, 5\]"),
        (torch.zeros(1, 4, 5, 5, dtype=torch.uint8), torch.zeros(2, 3, 3, 3, dtype=torch.int8), 1, r"\[2, 3, 3, 3\]"),
        (torch.zeros(1, 4, 5, 5, dtype=torch.uint8), torch.zeros(3, 2, 3, 3, dtype=torch.int8), 2, "with groups 2"),
        (
            torch.zeros(1, 4, 2, 5, dtype=torch.uint8),
            torch.zeros(2, 4, 3, 3, dtype=torch.int8),
            1,
            "does not fit an input",
        ),
    ],
)
def test_bad_layers_are_refused(codes, weight, groups, message):
    with pytest.raises(RecoupError, match=message):
        layer_statistics(codes, weight, NBSMT(), Geometry((3, 3), (1, 1), (0, 0), (1, 1), groups))


def test_bad_matrices_are_refused():
    x, w = operands(0, 3, 4, 2)
    with pytest.raises(RecoupError, match="x must be uint8 and w int8"):
        statistics(x.long(), w, NBSMT())
    with pytest.raises(RecoupError, match=r"got \[3, 4\] and \[3, 2\]"):
        statistics(x, w[:3], NBSMT())
