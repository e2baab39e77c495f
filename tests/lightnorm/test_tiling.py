"""The tiling's promises, on which kernels rest: every element once, no tile across a sample, a chunk or its limits."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from recoup.lightnorm.scale import sizes
from recoup.lightnorm.tiling import PANEL, Limits, segments, tiling

SHAPES = st.tuples(st.integers(1, 6), st.integers(1, 20), st.integers(1, 300))
LIMITS = [Limits(elements=256, shortest=16, longest=64, lanes=16), Limits(4096, 64, 4096, 64)]


def chunk_of_elements(n, chunks):
    return np.repeat(np.arange(chunks), sizes(n, chunks))


@given(SHAPES, st.integers(1, 9), st.sampled_from([None, 1, 3, 4, 64]), st.sampled_from(LIMITS))
def test_tiles_cover_every_place_once(shape, chunks, block, limits):
    N, C, P = shape
    cut = tiling(N, C, P, chunks, block, limits)
    seen = []
    for sample, start, end, chunk in cut.tiles.tolist():
        assert 0 <= start < end <= P
        assert end - start <= min(limits.longest, max(limits.shortest, limits.elements // cut.block))
        elements = np.arange(sample * P + start, sample * P + end)
        assert (chunk_of_elements(N * P, chunks)[elements] == chunk).all()
        seen.append(elements)
    assert np.array_equal(np.concatenate(seen), np.arange(N * P))  # in the order of the channel's elements
    assert cut.offsets.tolist() == [int((cut.tiles[:, 0] < sample).sum()) for sample in range(N + 1)]


@given(SHAPES, st.sampled_from([None, 1, 3, 4, 64]), st.sampled_from(LIMITS))
def test_panels_and_blocks_cover_every_channel(shape, block, limits):
    N, C, P = shape
    cut = tiling(N, C, P, 0, block, limits)
    assert cut.block == min(block or 1, C)
    assert (cut.blocks - 1) * cut.block < C <= cut.blocks * cut.block
    assert (cut.panels - 1) * cut.panel < C <= cut.panels * cut.panel
    assert cut.panel % cut.block == 0 or cut.panel == C  # a block lies in one panel
    assert cut.panel == C or cut.panel * P >= PANEL
    assert cut.elements == N * P
    assert cut.of_panels == (cut.panels, cut.panel * N * P)
    assert cut.of_blocks == (N * cut.blocks, cut.block * P)


@given(SHAPES, st.sampled_from(LIMITS))
def test_rows_hold_the_longest_tile_and_a_vector_more(shape, limits):
    cut = tiling(*shape, 2, None, limits)
    longest = int((cut.tiles[:, 2] - cut.tiles[:, 1]).max())
    assert cut.pitch % limits.lanes == 0
    assert longest + limits.lanes <= cut.pitch < longest + 2 * limits.lanes


@given(SHAPES, st.integers(1, 9))
def test_segments_end_with_samples_and_chunks(shape, chunks):
    N, _, P = shape
    pieces = segments(N, P, chunks)
    begins = pieces[:, 0] * P + pieces[:, 1]
    bounds = {0, *np.cumsum(sizes(N * P, chunks))[:-1].tolist(), *range(0, N * P, P)} - {N * P}
    assert set(begins.tolist()) == bounds
