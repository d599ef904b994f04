"""Contract 3: exact cover, no permanent seam, no slivers, for every map and slice size."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from largerespatch.core.tilings import (
    PHASES,
    Each,
    Runs,
    Tile,
    bricks,
    even_cuts,
    halved,
    sampled_cells,
    scatter,
    staggered_cuts,
    tiles,
    window,
)

SIZES = st.integers(1, 90)
SLICES = st.integers(1, 24)
SHAPES = pytest.mark.parametrize("cover", [bricks, tiles])


def owners(cover, height, width, phase, slice_y, slice_x):
    """Which tile owns each cell; fails where a cell has no owner or two."""
    owner = np.full((height, width), -1)
    for i, tile in enumerate(cover(height, width, phase, slice_y, slice_x)):
        assert tile.area > 0
        assert (owner[tile.rows, tile.columns] == -1).all()
        owner[tile.rows, tile.columns] = i
    assert (owner >= 0).all()
    return owner


@SHAPES
@given(SIZES, SIZES, SLICES, SLICES)
def test_every_phase_covers_each_cell_once_and_no_seam_stays(cover, height, width, slice_y, slice_x):
    always_row_seam = np.ones((height - 1, width), bool)
    always_column_seam = np.ones((height, width - 1), bool)
    for phase in range(PHASES):
        owner = owners(cover, height, width, phase, slice_y, slice_x)
        always_row_seam &= owner[1:] != owner[:-1]
        always_column_seam &= owner[:, 1:] != owner[:, :-1]
    assert not always_row_seam.any()
    assert not always_column_seam.any()


@SHAPES
@given(SIZES, SIZES, SLICES, SLICES, st.integers(0, PHASES - 1))
def test_tiles_are_the_same_by_place_as_in_turn_and_few_tell_of_all(cover, height, width, slice_y, slice_x, phase):
    tiling = cover(height, width, phase, slice_y, slice_x)
    every = list(tiling)
    assert len(tiling) == len(every)
    assert [tiling[i] for i in range(len(tiling))] == every == tiling[:]
    assert tiling[-1] == every[-1]
    few = [every[i] for i in tiling.telling()]
    assert few[0] == every[0] and few[-1] == every[-1]
    there = Counter(tile.size() for tile in every)
    told = Counter(tile.size() for tile in few)
    assert all(told[size] >= min(count, 3) for size, count in there.items())


@pytest.mark.parametrize("side", [2**14, 2**21])
@SHAPES
def test_few_tiles_tell_of_however_many(cover, side):
    for phase in range(PHASES):
        tiling = cover(side, side, phase, 64, 64)
        assert len(tiling.telling()) < 400
        assert tiling[len(tiling) // 2].area > 0


@given(st.integers(1, 300), st.integers(1, 40))
def test_runs_follow_one_another(length, longest):
    runs = Runs(length, longest)
    cells = [cell for start, stop in runs for cell in range(start, stop)]
    assert cells == list(range(length))
    assert all(stop - start == longest for start, stop in runs[:-1])
    halved = Each(lambda run: slice(*run), runs)
    assert list(halved) == [slice(*run) for run in runs] == halved[:]
    assert halved.telling() == runs.telling() == sorted({*range(min(len(runs), 3)), len(runs) - 1})


@given(st.integers(1, 4000), st.integers(2, 300))
def test_cuts_are_within_the_limit_disjoint_and_without_slivers(length, longest):
    even, staggered = even_cuts(length, longest), staggered_cuts(length, longest)
    for cuts in (even, staggered):
        assert cuts[0] == 0 and cuts[-1] == length
        assert max(np.diff(cuts)) <= longest
    assert not set(even[1:-1]) & set(staggered[1:-1])
    run = length / (len(even) - 1)
    assert min(np.diff(even)) > run - 1
    # 2/3 of an even run, less the rounding of the two cuts that bound it
    assert min(np.diff(staggered)) >= min(2 / 3 * run - 1, length)
    if len(even) > 2:
        gaps = np.abs(np.subtract.outer(even[1:-1], staggered[1:-1])).min(initial=length)
        assert gaps >= max(1, run / 4 - 1.5)


@SHAPES
@given(SIZES, SIZES, SLICES, SLICES, st.integers(0, PHASES - 1))
def test_tiles_respect_their_slices(cover, height, width, slice_y, slice_x, phase):
    across, down = {bricks: [(2, 1), (1, 2)][phase % 2], tiles: (1, 1)}[cover]
    least = 2 if cover is tiles else 1
    for tile in cover(height, width, phase, slice_y, slice_x):
        assert tile.width <= max(across * slice_x, least)
        assert tile.height <= max(down * slice_y, least)


def test_the_four_phases_of_the_default_bricks():
    wide, tall, wide_flipped, tall_flipped = (list(bricks(256, 256, phase, 64, 64)) for phase in range(PHASES))
    assert wide[:2] == [Tile(0, 0, 64, 128), Tile(0, 128, 64, 256)]
    assert wide[2:5] == [Tile(64, 0, 128, 85), Tile(64, 85, 128, 171), Tile(64, 171, 128, 256)]
    assert wide_flipped[:3] == [Tile(0, 0, 64, 85), Tile(0, 85, 64, 171), Tile(0, 171, 64, 256)]
    for wide_phase, tall_phase in ((wide, tall), (wide_flipped, tall_flipped)):
        assert [Tile(t.left, t.top, t.right, t.bottom) for t in wide_phase] == tall_phase


@SHAPES
@pytest.mark.parametrize("phase", range(PHASES))
def test_a_plane_that_fits_one_tile_is_not_cut(cover, phase):
    assert list(cover(7, 5, phase, 8, 8)) == [Tile(0, 0, 7, 5)]


def test_a_tile_is_halved_across_its_longer_side():
    assert halved(Tile(0, 4, 4, 12), 1) == [Tile(0, 4, 4, 8), Tile(0, 8, 4, 12)]
    parts = halved(Tile(3, 0, 67, 128), 3)
    assert len(parts) == 8 and {part.size() for part in parts} == {(32, 32)}
    assert halved(Tile(0, 0, 1, 1), 1) == [Tile(0, 0, 1, 0), Tile(0, 0, 1, 1)]


def test_scaled_keeps_the_rectangle_in_place():
    assert Tile(1, 2, 3, 5).scaled(4) == Tile(4, 8, 12, 20)


def test_a_halo_ends_at_the_edge_or_wraps_around_it():
    corner = Tile(0, 4, 5, 8)
    assert window(corner, 3, 10, 8).outer == Tile(0, 1, 8, 8)
    assert window(corner, 3, 10, 8, wrap=True).outer == Tile(-3, 1, 8, 11)
    assert window(Tile(0, 0, 5, 8), 3, 10, 8, wrap=True).outer == Tile(-3, 0, 8, 8)  # its own edges are neighbours


@given(SIZES, SIZES, SLICES, SLICES, st.integers(0, 20), st.sampled_from([1, 2, 4]), st.booleans())
def test_the_owned_part_of_a_window_is_the_tile_at_any_scale(height, width, slice_y, slice_x, halo, scale, wrap):
    for tile in tiles(height, width, 0, slice_y, slice_x):
        around = window(tile, halo, height, width, wrap)
        owned = around.owned(scale * around.outer.height, scale * around.outer.width)
        assert (owned.height, owned.width) == (scale * tile.height, scale * tile.width)
        assert owned.top + scale * around.outer.top == scale * tile.top
        assert owned.left + scale * around.outer.left == scale * tile.left


@given(SIZES, SIZES, st.integers(1, 300), st.integers(0, 9))
def test_sampled_cells_are_spread_over_the_plane(height, width, count, seed):
    cells = sampled_cells(height, width, count, f"{seed}")
    assert cells == sampled_cells.__wrapped__(height, width, count, f"{seed}")
    assert len(set(cells)) == len(cells) <= min(count, height * width)
    assert all(0 <= cell < height * width for cell in cells)
    assert len(cells) >= min(count, height * width) / 2
    # Each quarter gets its share, give or take the cells of the grid that lie across its edges.
    if height >= 40 and width >= 40 and count >= 64:
        top_left = sum(cell // width < height / 2 and cell % width < width / 2 for cell in cells)
        assert len(cells) / 8 < top_left < len(cells) / 2


def test_another_seed_samples_other_cells():
    assert sampled_cells(64, 64, 64, "a") != sampled_cells(64, 64, 64, "b")


@given(SIZES, SIZES, SLICES, SLICES, st.integers(1, 12), st.sampled_from([1, 2, 4]))
def test_scattered_pieces_are_equal_on_the_grid_and_within_their_budget(height, width, most_y, most_x, side, step):
    height, width, side = height * step, width * step, side * step
    pieces = scatter(Tile(0, 0, most_y, most_x), side, height, width, step)
    assert {(piece.height, piece.width) for piece in pieces} == {(min(side, height), min(side, width))}
    assert all(edge % step == 0 for piece in pieces for edge in piece)
    assert all(piece.top >= 0 and piece.bottom <= height and piece.right <= width for piece in pieces)
    rows, columns = ({piece[axis] for piece in pieces} for axis in (0, 1))
    assert len(rows) * min(side, height) <= max(most_y, side) and len(columns) * min(side, width) <= max(most_x, side)


def test_scattered_pieces_lie_evenly():
    assert [piece.left for piece in scatter(Tile(0, 0, 4, 12), 4, 4, 100)] == [16, 48, 80]


def test_a_window_over_an_edge_is_larger_than_one_that_is_not():
    """It is put together of several parts, so a rehearsal must not take one for the other."""
    corner, side, inner = (
        window(Tile(top, left, top + 8, left + 8), 4, 24, 32, wrap=True) for top, left in ((16, 0), (8, 24), (8, 8))
    )
    assert (corner.beyond, side.beyond, inner.beyond) == ((4, 4), (0, 4), (0, 0))
    assert corner.size()[:4] == inner.size()[:4] and corner.size() > inner.size()
    assert window(corner.tile, 4, 24, 32).beyond == (0, 0)
