"""The closed form against an array simulated element by element and cycle by cycle, and networks by hand."""

import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import recoup as rc
from recoup.errors import RecoupError
from recoup.nbsmt.config import NBSMT
from recoup.nbsmt.cost import Array, cycles, layer_cycles
from tests.networks import images, small_net


class Simulation:
    """An output-stationary array: registers that pass operands on, accumulators, holding registers, drain chains.

    ``x`` [M][K'] and ``w`` [K'][N] hold one tuple of T operands each. A tile's row i gets its k-th activation k + i
    cycles after the tile's start, its column j the k-th weight k + j cycles after it.
    """

    def __init__(self, x, w, rows, cols):
        self.x, self.w, self.rows, self.cols = x, w, rows, cols
        self.steps = len(w)
        self.tiles = [(m, n) for m in range(0, len(x), rows) for n in range(0, len(w[0]), cols)]
        self.a: list[list[Any]] = [[None] * cols for _ in range(rows)]
        self.b: list[list[Any]] = [[None] * cols for _ in range(rows)]
        self.sums = {}
        self.held: list[dict[int, Any]] = [{} for _ in range(cols)]
        self.chain: list[list[Any]] = [[None] * rows for _ in range(cols)]
        self.result = {}

    def activation(self, starts, cycle, i):
        for tile, start in enumerate(starts):
            k = cycle - start - i
            if 0 <= k < self.steps:
                m = self.tiles[tile][0] + i
                return tile, k, self.x[m][k] if m < len(self.x) else None
        return None

    def weight(self, starts, cycle, j):
        for tile, start in enumerate(starts):
            k = cycle - start - j
            if 0 <= k < self.steps:
                n = self.tiles[tile][1] + j
                return tile, k, self.w[k][n] if n < len(self.w[0]) else None
        return None

    def cycle(self, starts, cycle):
        for j in range(self.cols):  # results leave through the last row
            leaving = self.chain[j].pop()
            self.chain[j].insert(0, None)
            if leaving is not None:
                (m, n), value = leaving
                self.result[m, n] = value
        for i in range(self.rows):
            self.a[i] = [self.activation(starts, cycle, i), *self.a[i][:-1]]
        self.b = [[self.weight(starts, cycle, j) for j in range(self.cols)], *self.b[:-1]]
        for i in range(self.rows):
            for j in range(self.cols):
                if self.a[i][j] is not None:
                    self.accumulate(i, j)
        for j in range(self.cols):
            if len(self.held[j]) == self.rows:
                assert not any(self.chain[j]), "the column before it has not left yet"
                self.chain[j] = [self.held[j].pop(i) for i in range(self.rows)]

    def accumulate(self, i, j):
        tile, k, x = self.a[i][j]
        assert self.b[i][j][:2] == (tile, k), "activation and weight do not meet"
        w = self.b[i][j][2]
        product = 0 if x is None or w is None else sum(u * v for u, v in zip(x, w, strict=True))
        self.sums[i, j] = (self.sums[i, j] if k else 0) + product
        if k == self.steps - 1:
            assert i not in self.held[j], "the result before it has not left its element yet"
            m, n = self.tiles[tile]
            self.held[j][i] = ((m + i, n + j), self.sums[i, j])

    def run(self, interval):
        """The cycles until the last result has left; ``interval`` None: a tile starts when the one before is done."""
        starts = [0] if interval is None else [tile * interval for tile in range(len(self.tiles))]
        cycle = 0
        while True:
            self.cycle(starts, cycle)
            cycle += 1
            if len(self.result) == len(starts) * self.rows * self.cols:
                if len(starts) == len(self.tiles):
                    return cycle
                starts.append(cycle)


def threaded(seed, M, C, N, taps, threads):
    """Operands of a layer as tuples of T, slot by slot, and the product they give."""
    generator = torch.Generator().manual_seed(seed)
    slots = -(-C // threads)
    x = torch.randint(1, 9, (M, taps * slots, threads), generator=generator)
    w = torch.randint(1, 9, (taps * slots, N, threads), generator=generator)
    return x.tolist(), w.tolist(), torch.einsum("mkt,knt->mn", x, w)


small = st.integers(1, 5)


@settings(max_examples=40, deadline=None)
@given(
    small, small, st.integers(1, 6), small, st.integers(1, 2), st.sampled_from([1, 2, 4]), small, small, st.booleans()
)
def test_cycles_equal_the_simulated_array(M, N, C, taps, seed, threads, rows, cols, overlap):
    x, w, product = threaded(seed, M, C, N, taps, threads)
    array = Simulation(x, w, rows, cols)
    took = array.run(max(len(w), rows) if overlap else None)
    assert took == layer_cycles(M, C, N, threads, Array(rows, cols, overlap), taps=taps)
    assert [[array.result[m, n] for n in range(N)] for m in range(M)] == product.tolist()


def test_tiles_cannot_follow_each_other_faster():
    x, w, _ = threaded(0, 6, 4, 3, 1, 2)  # 2 cycles of reduction, 3 rows to drain
    assert Simulation(x, w, 3, 3).run(3) == layer_cycles(6, 4, 3, 2, Array(3, 3))
    with pytest.raises(AssertionError, match="has not left"):
        Simulation(x, w, 3, 3).run(2)


def test_threads_divide_the_reduction():
    array = Array(16, 16)
    one, two, four = (layer_cycles(4096, 64, 64, threads, array, taps=9) for threads in (1, 2, 4))
    fill = 16 + 16 - 2 + 16
    assert (one - fill, two - fill, four - fill) == (1024 * 576, 1024 * 288, 1024 * 144)
    assert layer_cycles(0, 3, 4) == layer_cycles(4, 0, 4) == 0
    assert layer_cycles(9, 1, 1, array=array, taps=9, groups=7) == 7 * layer_cycles(9, 1, 1, array=array, taps=9)


def test_a_network_by_hand():
    model = small_net()
    rc.calibrate_(model, [images(16)])
    rc.emulate_(model, NBSMT(threads=4), {"block2.conv2": NBSMT(threads=2)})
    cost = cycles(model, (3, 8, 8))
    by_name = {layer.name: layer for layer in cost.layers}
    assert next(iter(by_name)) == "stem"
    assert list(by_name)[-1] == "classifier"
    assert {name: layer.threads for name, layer in by_name.items() if layer.threads != 4} == {
        "stem": 1, "classifier": 1, "block2.conv2": 2
    }  # fmt: skip
    conv = by_name["block1.conv1"]  # 8 -> 12 channels, 3 x 3, stride 2: 16 positions
    assert (conv.M, conv.C, conv.N, conv.taps, conv.groups) == (16, 8, 12, 9, 1)
    assert (conv.cycles, conv.single) == (2 * 9 + 30 + 16, 8 * 9 + 30 + 16)
    assert conv.macs == 16 * 8 * 12 * 9
    assert (conv.activation_bytes, conv.weight_bytes, conv.output_bytes) == (8 * 64, 8 * 12 * 9, 12 * 16)
    assert not by_name["stem"].emulated
    assert cost.cycles == sum(layer.cycles for layer in cost.layers)
    assert 1 < cost.speedup < 4
    assert json.loads(json.dumps(cost.to_dict()))["cycles"] == cost.cycles
    assert cycles(model, images(2)).macs == 2 * cost.macs
    assert cycles(model, (images(2), torch.zeros(2))).macs == 2 * cost.macs


def test_grouped_one_dimensional_and_linear_layers():
    model = nn.Sequential(nn.Conv1d(4, 8, 3, groups=2), nn.ReLU(), nn.Flatten(2), nn.Linear(6, 5))
    first, last = cycles(model, (4, 8)).layers
    assert (first.M, first.C, first.N, first.taps, first.groups, first.macs) == (6, 2, 4, 3, 2, 6 * 2 * 4 * 3 * 2)
    assert (last.M, last.C, last.N, last.taps, last.macs) == (8, 6, 5, 1, 240)


@pytest.mark.parametrize("fields", [{"rows": 0}, {"cols": -1}, {"rows": 1.5}, {"cols": True}])
def test_bad_arrays_are_refused(fields):
    name, value = next(iter(fields.items()))
    with pytest.raises(RecoupError, match=rf"Array\({name}={value!r}\): {name} must be an integer"):
        Array(**fields)


def test_bad_requests_are_refused():
    with pytest.raises(RecoupError, match="threads=0"):
        layer_cycles(1, 1, 1, 0)
    with pytest.raises(RecoupError, match="M=-1"):
        layer_cycles(-1, 1, 1)
    with pytest.raises(RecoupError, match="positive whole sizes"):
        cycles(small_net(), (3, 0, 8))
    with pytest.raises(RecoupError, match="ran no Conv1d"):
        cycles(nn.ReLU(), (3, 8))


def test_conv1d_of_transformers_counts_as_the_linear_layer_it_is():
    """y = x W with W [in, out]: the sizes of a Linear of the same features, on hardware and off it."""
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    turned, plain = nn.Sequential(pytorch_utils.Conv1D(24, 8)), nn.Sequential(nn.Linear(8, 24))
    x = torch.rand(2, 5, 8)
    assert cycles(turned, x).to_dict()["layers"] == cycles(plain, x).to_dict()["layers"]
    for model in (turned, plain):
        rc.calibrate_(model, [x], {"0": True})
        rc.emulate_(model, NBSMT(threads=2))
    assert cycles(turned, x).layers == cycles(plain, x).layers
    assert cycles(turned, x).layers[0].threads == 2
