"""The one loop over pieces: all of them, and few in a rehearsal."""

from threading import Thread

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from largerespatch.core.pieces import assemble, collect, rehearsal, rehearsing, repeated, visited
from largerespatch.core.tilings import Tile, bricks

SIZES = st.integers(1, 40)


def place(tile):
    return tile.rows, tile.columns


@given(SIZES, SIZES, st.integers(1, 9), st.integers(0, 3))
def test_pieces_are_put_together(height, width, size, phase):
    plane = torch.arange(height * width).view(height, width)
    cover = bricks(height, width, phase, size, size)
    result = assemble(cover, lambda tile: 2 * plane[place(tile)], place, make=lambda part: part.new_empty(plane.shape))
    assert torch.equal(result, 2 * plane)
    given_one = torch.zeros_like(plane)
    assert assemble(cover, lambda tile: 2 * plane[place(tile)], place, into=given_one) is given_one
    assert torch.equal(given_one, 2 * plane)
    assert sum(part.numel() for part in collect(cover, lambda tile: plane[place(tile)])) == plane.numel()


def test_several_results_go_into_as_many_outputs():
    plane = torch.arange(20)
    ones, twos = assemble(
        [slice(0, 7), slice(7, 20)],
        lambda run: (plane[run], 2.0 * plane[run]),
        place=lambda run: run,
        make=lambda parts: tuple(part.new_empty(20) for part in parts),
    )
    assert torch.equal(ones, plane) and torch.equal(twos, 2.0 * plane)


def test_what_is_read_is_read_in_turn():
    log, output = [], [None] * 3

    def read(pieces):
        for piece in pieces:
            log.append(f"read {piece}")
            yield 10 * piece

    def compute(piece, given):
        log.append(f"compute {piece}")
        return piece + given

    assert assemble([0, 1, 2], compute, lambda piece: piece, into=output, read=read) is output
    assert output == [0, 11, 22]
    assert log == ["read 0", "compute 0", "read 1", "compute 1", "read 2", "compute 2"]
    assert collect([0, 1, 2], compute, read=read) == output


def test_a_reader_that_ends_too_early_is_an_error():
    with pytest.raises(ValueError):
        collect([0, 1, 2], lambda piece, given: given, read=lambda pieces: iter(pieces[1:]))


def test_what_was_read_for_a_piece_is_gone_before_the_next_is_read():
    class Given:
        alive = 0

        def __init__(self):
            Given.alive += 1

        def __del__(self):
            Given.alive -= 1

    def read(pieces):
        for _ in pieces:
            assert Given.alive == 0
            yield Given()

    assert (
        assemble([0, 1, 2], lambda piece, given: Given.alive, lambda piece: piece, into=[0] * 3, read=read) == [1] * 3
    )


@given(SIZES, SIZES, st.integers(1, 9), st.integers(0, 3))
def test_a_rehearsal_visits_few_and_one_of_the_largest_of_them(height, width, size, phase):
    tiling = bricks(height, width, phase, size, size)
    cover = list(tiling)
    assert list(visited(tiling)) == cover
    with rehearsal():
        few = list(visited(tiling))
        assert {tile.size() for tile in few} == {tile.size() for tile in visited(cover)}  # a list is looked through
    assert few == [tile for tile in cover if tile in few]  # in turn
    with rehearsal():
        assert visited(cover, carries=True)[0] == visited(tiling, carries=True)[0] == cover[0]
    for tile in cover:
        assert any(tile.height <= other.height and tile.width <= other.width for other in few)
    largest = {tile.size() for tile in few}
    for each in largest:
        assert sum(tile.size() == each for tile in few) <= 2


def test_a_rehearsal_costs_the_same_whatever_the_size():
    counts = []
    for height in (40, 400, 4000):
        seen = []
        with rehearsal():
            cover = [Tile(top, 0, top + 4, 8) for top in range(0, height, 4)]
            collect(cover, seen.append)
        counts.append(len(seen))
    assert len(set(counts)) == 1 and counts[0] <= 4
    with rehearsal():
        assert len(visited(range(1000))) <= 4  # pieces without a size are all alike


def test_in_a_rehearsal_pieces_that_look_alike_are_computed_once():
    ran, looked = [], []

    def run(known, key, work, given, **named):
        looked.append((key, given, named))
        return known.setdefault((key, given), work(*given, **named)) if (key, given) not in known else known[key, given]

    def compute(run, given):
        ran.append(run)
        return given

    runs = [(0, 4), (4, 8), (8, 12), (12, 14)]
    with rehearsal(run):
        assert collect(runs, compute, read=lambda runs: iter("abba"), carries=True) == ["a", "b", "b"]
        assert ran == [(0, 4), (4, 8)] and looked[0] == ((4,), ("a",), {})
        assert collect(runs, compute, read=lambda runs: iter("abba")) == ["a", "b"]
        assert ran == [(0, 4), (4, 8)] * 2, "each loop for itself"
        output = assemble([0, 1, 2], lambda piece: ran.append(piece) or 7, lambda piece: piece, into=[0] * 3)
        assert output == [7, 7, 0] and ran[4:] == [0]
    assert collect(runs, compute, read=lambda runs: iter("abba")) == list("abba") and ran[5:] == runs


def test_what_every_piece_does_is_run_as_the_rehearsal_says():
    def add(first, second, third=0):
        return first + second + third

    assert repeated(add, 1, 2, third=3) == 6
    with rehearsal():
        assert repeated(add, 1, 2, third=3) == 6
    with rehearsal(lambda known, key, work, given, **named: (known, key, work, given, named)):
        assert repeated(add, 1, 2, third=3) == (None, add, add, (1, 2), {"third": 3})


def test_a_rehearsal_ends_and_is_its_threads_alone():
    seen = []
    with pytest.raises(KeyError), rehearsal():
        assert rehearsing()
        with rehearsal():
            pass
        assert rehearsing()
        thread = Thread(target=lambda: seen.append(rehearsing()))
        thread.start()
        thread.join()
        raise KeyError
    assert not rehearsing() and seen == [False]
