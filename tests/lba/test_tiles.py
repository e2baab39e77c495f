"""Tiles: shapes that the registers hold, fitted to the product, and the columns they read."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recoup.errors import RecoupError
from recoup.kernels.llvm import Target, host
from recoup.lba import cpu
from recoup.lba.driver import Columns
from recoup.lba.emit import IN_COLUMNS, SIDE_BY_SIDE
from recoup.lba.emit_code import Shape
from recoup.lba.emit_integer import Whole
from recoup.lba.emit_wide import Quantiser, Wide
from recoup.lba.tiles import current_target, fitted, padded, shape

REGISTERS = {"x86-64": (16, 16), "haswell": (16, 32), "skylake-avx512": (32, 64)}  # how many, and bytes of each
PLAIN = Quantiser("mask", True)


@pytest.mark.parametrize("level", REGISTERS)
@pytest.mark.parametrize("form", [Whole(), Wide(PLAIN, PLAIN, PLAIN, "zero")], ids=["float32", "float64"])
def test_sums_are_whole_registers_and_leave_room_for_constants(level, form):
    count, size = REGISTERS[level]
    tile = shape(form, Target.named(level))
    assert tile.lanes * (8 if form.wide else 4) == size
    assert tile.rows * tile.vectors <= count // 2
    assert tile.places == [(row, vector) for row in range(tile.rows) for vector in range(tile.vectors)]


@given(st.integers(1, 100), st.integers(1, 100), st.sampled_from([Shape(16, 8, 2), Shape(8, 3, 2), Shape(2, 2, 2)]))
def test_fitted_tiles_are_as_many_and_waste_the_fewest_rows(M, N, whole):
    tile = fitted(whole, M, N)
    tiles = -(-M // whole.rows)
    assert tile.lanes == whole.lanes
    assert tile.rows <= whole.rows
    assert -(-M // tile.rows) == tiles
    assert tile.rows * tiles - M < tiles
    assert tile.vectors == (1 if whole.lanes >= N else whole.vectors)


@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=70),
    st.integers(1, 2),
    st.sampled_from([Shape(16, 1, 2), Shape(4, 2, 1)]),
)
def test_padded_columns_repeat_the_last_and_say_how_they_lie(steps, down, tile):
    columns = np.cumsum(steps)
    terms = torch.arange(5) * down
    places, straight = padded(Columns(torch.zeros(1), terms, torch.from_numpy(columns.copy()), 0), tile)
    assert len(places) % tile.columns == 0
    assert len(places) - len(columns) < tile.columns
    assert places[: len(columns)].tolist() == columns.tolist()
    assert set(places[len(columns) :]) <= {columns[-1]}
    vectors = places.reshape(-1, tile.lanes)
    beside = [vector.tolist() == list(range(vector[0], vector[0] + tile.lanes)) for vector in vectors]
    expected = [SIDE_BY_SIDE if here else IN_COLUMNS if down == 1 else 0 for here in beside]
    assert straight.dtype == np.uint8
    assert straight.tolist() == expected


def test_a_target_holds_within_its_block_alone():
    assert current_target() == host()
    with cpu.target("x86-64"):
        assert current_target() == Target.named("x86-64")
        with cpu.target(None):
            assert current_target() == host()
        assert current_target() == Target.named("x86-64")
    assert current_target() == host()


def test_targets_this_processor_lacks_are_refused(monkeypatch):
    monkeypatch.setattr("recoup.lba.tiles.host", lambda: Target("old", "", frozenset({"avx2"})))
    with (
        pytest.raises(RecoupError, match=r"^lba\.cpu\.target\('haswell'\): this processor lacks fma$"),
        cpu.target("haswell"),
    ):
        pass
