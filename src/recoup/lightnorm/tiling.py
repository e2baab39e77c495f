"""How LightNorm's passes on the CPU cut [N, C, P], and the two ways in which the fused ones walk the pieces.

A *segment* is the part of a sample's places that lies in one chunk, a *tile* a part of a segment, short enough that the
rows of a block, W channels that share exponents, stay in the first-level cache while they are read, rounded and used.
Sums, extrema and blocks never cross a tile's ends, so that a pass needs no memory but a tile's.

Passes with sums take *panels* of channels, for each the tiles of all samples, for each the panel's blocks, for each its
rows: a channel's sums stay in the first-level cache, and a pass still reads a few pages in a row before it goes on to
the next sample. Passes with results take samples, for each its blocks, for each the sample's tiles, for each its rows:
the order of memory. Panels, or samples' blocks, are what threads share; neither order changes a bit.

Numba's kernels and emitted ones walk alike, with limits of their own.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from recoup.lightnorm.scale import sizes

PANEL = 4096  # contiguous elements, four pages, that a pass with sums reads before it goes to the next sample


class Limits(NamedTuple):
    """What a kind of kernels sets for its tiles.

    Attributes:
        elements: of a tile; its channels times its places.
        shortest: places that a tile has at least, whatever its channels: shorter loops do not pay.
        longest: places that it has at most.
        lanes: places that the kernels' loops take at a time.
    """

    elements: int
    shortest: int
    longest: int
    lanes: int


class Tiling(NamedTuple):
    """The pieces of [N, C, P].

    Attributes:
        samples, channels, places: N, C and P.
        block: channels of a block, 1 without blocks; blocks: of a sample, the last one ragged.
        panel: channels of a panel, whole blocks; panels: of x.
        pitch: from row to row of a tile in scratch memory: a multiple of the lanes that holds the longest tile, and
            one vector more, so that rows are never a page apart and do not meet in one set of the cache.
        tiles: sample, first place, end, chunk, int64 [T, 4], in the order of the channel's elements.
        offsets: where every sample's tiles begin, int64 [N + 1].
    """

    samples: int
    channels: int
    places: int
    block: int
    blocks: int
    panel: int
    panels: int
    pitch: int
    tiles: np.ndarray
    offsets: np.ndarray

    @property
    def elements(self) -> int:
        """Of a channel."""
        return self.samples * self.places

    @property
    def of_panels(self) -> tuple[int, int]:
        """What threads share in a pass with sums: how many panels, and the elements of one."""
        return self.panels, self.samples * self.panel * self.places

    @property
    def of_blocks(self) -> tuple[int, int]:
        """What threads share in a pass with results: how many blocks of samples, and the elements of one."""
        return self.samples * self.blocks, self.block * self.places


def tiling(samples: int, channels: int, places: int, chunks: int, block: int | None, limits: Limits) -> Tiling:
    """The pieces for blocks of so many channels, None: no blocks; ``chunks`` 0 where there are no batch statistics."""
    block = min(block or 1, channels)
    longest = limits.elements // block // limits.lanes * limits.lanes
    tiles = _tiles(segments(samples, places, max(chunks, 1)), min(limits.longest, max(limits.shortest, longest)))
    vectors = -(-int((tiles[:, 2] - tiles[:, 1]).max()) // limits.lanes)
    panel = min(channels, -(-PANEL // (block * places)) * block)
    return Tiling(
        samples=samples,
        channels=channels,
        places=places,
        block=block,
        blocks=-(-channels // block),
        panel=panel,
        panels=-(-channels // panel),
        pitch=(vectors + 1) * limits.lanes,
        tiles=tiles,
        offsets=np.searchsorted(tiles[:, 0], np.arange(samples + 1)).astype(np.int64),
    )


@lru_cache(maxsize=256)
def segments(samples: int, places: int, chunks: int) -> np.ndarray:
    """The pieces of samples that lie in one chunk: sample, first place, end, chunk; int64 [S, 4]."""
    bounds = np.cumsum([0, *sizes(samples * places, chunks)])
    cuts = np.union1d(bounds, np.arange(0, samples * places + 1, places))
    chunk = np.searchsorted(bounds, cuts[:-1], side="right") - 1
    sample = cuts[:-1] // places
    return np.stack([sample, cuts[:-1] - sample * places, cuts[1:] - sample * places, chunk], 1).astype(np.int64)


def _tiles(segments: np.ndarray, longest: int) -> np.ndarray:
    """Segments cut to a length, in order of the samples' places."""
    out = [
        (sample, start, min(start + longest, end), chunk)
        for sample, begin, end, chunk in segments.tolist()
        for start in range(begin, end, longest)
    ]
    return np.array(out, np.int64)
