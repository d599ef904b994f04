"""Maps give the rows that were put into them, wherever these live meanwhile, and nothing reads a wrong value."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import live
import streams
from largerespatch.core.hosts import Host
from largerespatch.core.maps import ComputedMap, JoinedMap, StoredMap, taken
from largerespatch.core.pieces import assemble
from largerespatch.core.planes import Map, fetch, part, whole
from largerespatch.core.tilings import Tile
from largerespatch.techniques.strips.strips import Strips

MAP = 16 * 64 * 64 * 4  # bytes


def elsewhere(band_bytes=300):
    """The host of a device that shares its memory: "cpu:0" is another name of it, which a tensor's device never has."""
    return Host("cpu:0", band_bytes=band_bytes)


def plane(*shape, seed=0):
    return torch.randn(shape or (2, 3, 11, 7), generator=torch.Generator().manual_seed(seed))


def away(values, host=None):
    made = StoredMap.of(values.clone(), host or elsewhere())
    made.leave()
    assert made.away
    return made


def joined(values, along=1, host=None):
    """Three maps side by side, of which one is on the device and one a plain tensor."""
    sizes = [1, 1, values.shape[along] - 2] if along else [1] * len(values)
    first, *others, last = values.split(sizes, dim=along)
    return JoinedMap.of([away(first, host), *map(StoredMap.of, others), last.clone()], along)


def computed(values):
    return ComputedMap(values.shape, values, lambda runs: (values[:, :, top:bottom] for top, bottom in runs))


KINDS = {"stored": StoredMap.of, "away": away, "joined": joined, "computed": computed}
KINDS["samples"] = lambda values: joined(values, along=0)
EVERY = pytest.mark.parametrize("kind", KINDS)


@EVERY
@given(st.lists(st.tuples(st.integers(0, 11), st.integers(0, 11)).map(sorted), min_size=1, max_size=4))
def test_rows_are_read_as_of_a_tensor(kind, runs):
    values = plane()
    made = KINDS[kind](values)
    assert isinstance(made, Map)
    for (top, bottom), rows in zip(runs, fetch(made, runs), strict=True):
        assert type(rows) is torch.Tensor
        assert torch.equal(rows, values[:, :, top:bottom])
        assert torch.equal(made[:, :, top:bottom], values[:, :, top:bottom])


@EVERY
@given(st.tuples(st.integers(0, 10), st.integers(1, 11)), st.tuples(st.integers(0, 6), st.integers(1, 7)))
def test_parts_are_read_as_of_a_tensor(kind, rows, columns):
    values = plane()
    tile = Tile(rows[0], columns[0], max(rows[1], rows[0] + 1), max(columns[1], columns[0] + 1))
    assert torch.equal(part(KINDS[kind](values), tile), values[:, :, tile.rows, tile.columns])


@pytest.mark.parametrize("host", [None, elsewhere()], ids=["here", "there"])
@pytest.mark.parametrize("columns", [slice(None), slice(2, 5)])
def test_what_is_written_is_read(host, columns):
    values, made = plane(), StoredMap.empty((2, 3, 11, 7), plane(), host)
    assert made.away == (host is not None)
    made[:, :, :, :] = torch.zeros(2, 3, 11, 7)
    made[:, :, 4:9, columns] = values[:, :, 4:9, columns]
    expected = torch.zeros_like(values)
    expected[:, :, 4:9, columns] = values[:, :, 4:9, columns]
    assert torch.equal(made + 0, expected)
    made[:, :, 2:] = values[:, :, 2:]
    assert torch.equal(made[:, :, :], torch.cat([expected[:, :, :2], values[:, :, 2:]], dim=2))


INDICES = {
    "rows": (slice(None), slice(None), slice(2, 5)),
    "channels": (slice(None), slice(1, 2)),
    "a sample": 1,
    "cells": (..., 3, slice(1, 4)),
}


@pytest.mark.parametrize("index", INDICES)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "computed"])
def test_a_map_is_written_to_like_a_tensor(kind, index):
    values, index = plane(), INDICES[index]
    made = held = KINDS[kind](values)
    expected = values.clone()
    for new in (values[index] + 1, 0.5):
        expected[index] = new
        made[index] = new
        assert torch.equal(whole(held), expected)


def test_what_is_computed_cannot_be_written_to():
    for index in INDICES.values():
        with pytest.raises(TypeError, match="computed whenever it is read cannot be written to"):
            computed(plane())[index] = 0.5


@EVERY
def test_any_other_operation_sees_the_whole_map(kind):
    values = plane()
    for operation in (
        lambda x: x.mean(dim=1),
        lambda x: torch.nn.functional.silu(x),
        lambda x: x[:, 1],
        lambda x: x.permute(2, 0, 1, 3).contiguous(),
        lambda x: torch.cat([x, x], dim=2),
        lambda x: torch.nn.functional.conv2d(x, torch.ones(1, 3, 3, 3)),
        lambda x: x.to(torch.float64),
        lambda x: x.clone(),
        lambda x: x - 1,
    ):
        result = operation(KINDS[kind](values))
        assert type(result) is torch.Tensor
        assert torch.equal(result, operation(values))
    made = KINDS[kind](values)
    assert made.shape == values.shape and made.dtype == values.dtype and made.device == values.device
    assert len(made) == 2 and made.to(values.device) is made and made.new_zeros(3).shape == (3,)
    assert torch.equal(whole(made), values) and torch.equal(made, values)


@EVERY
def test_samples_are_cut_off_where_they_are(kind):
    values = plane()
    made = KINDS[kind](values)
    for which in (slice(0, 1), slice(1, 2), slice(0, 2)):
        assert torch.equal(whole(made[which]), values[which])
    if kind == "away":
        assert made[:1].away


@pytest.mark.parametrize("kind", ["away", "joined"])
def test_sums_and_products_are_formed_where_their_terms_are(kind):
    values, other = plane(), plane(seed=1)
    made = KINDS[kind](values)
    for result, expected in (
        (made + other, values + other),
        (other + made, other + values),
        (made * 0.5, values * 0.5),
        (2.0 * made, 2.0 * values),
        (made + away(other), values + other),
        (torch.mul(made, other), values * other),
        (made * torch.tensor(3.0), values * 3),
    ):
        assert isinstance(result, StoredMap) and result.away and made.away
        assert torch.equal(whole(result), expected)


def test_others_are_formed_on_the_device():
    values, host = plane(), elsewhere()
    row = plane(2, 3, 1, 7)
    assert type(away(values, host) + row) is torch.Tensor
    assert torch.equal(away(values, host) + row, values + row)  # broadcast
    assert type(StoredMap.of(values, host) * 2) is torch.Tensor


def test_what_is_added_in_place_is_seen_by_all_who_hold_the_map():
    values = plane()
    made = held = away(values)
    made += 1
    assert torch.equal(made, values + 1) and torch.equal(held + 0, values + 1)
    held.leave()
    assert held.away and torch.equal(whole(held), values + 1)


def test_what_is_added_in_place_to_a_map_that_is_away_is_added_there():
    values, other = plane(), plane(seed=1)
    for change, expected in (
        (lambda made: made.add_(other), values + other),
        (lambda made: made.__iadd__(away(other)), values + other),
        (lambda made: made.mul_(0.5), values * 0.5),
        (lambda made: made.__imul__(other[:, :1]), values * other[:, :1]),
    ):
        made = away(values)
        assert change(made) is made and made.away
        assert torch.equal(made.copied(), expected)


def test_concatenated_maps_stay_where_they_are():
    values, other = plane(), plane(seed=1)
    waiting = away(values)
    result = torch.cat([other, waiting], dim=1)
    assert isinstance(result, JoinedMap) and result.away and waiting.away
    assert torch.equal(result[:, :, 3:5], torch.cat([other, values], dim=1)[:, :, 3:5])
    assert waiting.away
    assert torch.equal(whole(result), torch.cat([other, values], dim=1))
    assert not result.away


def test_a_map_leaves_and_returns_and_leaves():
    values = plane()
    made = StoredMap.of(values.clone(), elsewhere())
    for _ in range(2):
        made.leave()
        assert made.away
        assert torch.equal(made.copied(), values) and made.away  # for one reader
        assert torch.equal(made.whole(), values) and not made.away  # to stay
    made[:, :, 1:2] = 0 * values[:, :, 1:2]
    made.leave()
    assert not made[:, :, 1:2].any()


def test_a_map_with_no_host_or_on_it_never_leaves():
    for host in (None, Host()):
        made = StoredMap.of(plane(), host)
        made.leave()
        assert not made.away
        assert not StoredMap.empty((1, 2, 3, 4), plane(), host).away


@pytest.mark.parametrize("kind", [StoredMap.of, away, computed])
def test_a_map_that_is_claimed_is_its_readers_alone(kind):
    values = plane()
    made = kind(values)
    reader = made.claim()
    assert torch.equal(reader[:, :, :], values)
    with pytest.raises(RuntimeError, match="this map was passed on"):
        made[:, :, :1]
    with pytest.raises(RuntimeError, match="this map was passed on"):
        made + 1
    assert made.shape == values.shape


@pytest.mark.parametrize("passing", [False, True])
def test_only_what_was_passed_on_or_came_for_one_reader_may_be_written_over(passing):
    values, host = plane(), elsewhere()
    got, overwritable = taken(values)
    assert got is values and not overwritable
    got, overwritable = taken(StoredMap.of(values, host, passing))
    assert got is values and overwritable is passing
    waiting = away(values)
    got, overwritable = taken(waiting)
    assert torch.equal(got, values) and overwritable
    got.zero_()
    assert torch.equal(whole(waiting), values)


def test_a_finished_map_is_a_plain_tensor():
    values, host = plane(), elsewhere()
    for made in (StoredMap.of(values, host), away(values, host)):
        for stays in (False, True):
            assert type(made.delivered(stays)) is torch.Tensor
            assert torch.equal(made.delivered(stays), values)
            assert made.delivered(stays).is_contiguous()


@pytest.mark.parametrize("large", [False, True])
def test_a_large_one_may_stay_on_the_host(large):
    host = Host(band_bytes=MAP // 4 if large else MAP)
    with live.fake():
        made = StoredMap.empty((1, 16, 64, 64), torch.empty(1, device="meta"), host)
        assert made.delivered().device.type == "meta"
        assert made.delivered(stays=True).device.type == ("cpu" if large else "meta")


def test_one_that_gradients_pass_through_does_not_leave():
    assert elsewhere().keeps(plane())
    assert not elsewhere().keeps(plane().requires_grad_())
    assert not elsewhere().keeps(plane(2, 3, 4)) and not elsewhere().keeps(None)
    assert not Host().keeps(plane())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.uint8])
@given(st.integers(1, 40), st.integers(1, 10000))
def test_runs_are_of_bounded_size_and_cover_the_map(dtype, height, band_bytes):
    values = torch.zeros(2, 3, height, 5, dtype=dtype)
    runs = Host("cpu:0", band_bytes).cuts(values)
    assert [row for top, bottom in runs for row in range(top, bottom)] == list(range(height))
    row = values[:, :, :1].nbytes
    assert all((bottom - top) * row <= max(band_bytes, row) for top, bottom in runs)


def test_a_concatenation_costs_its_parts_no_second_time():
    host = Host(band_bytes=MAP // 64)
    with live.fake(), live.LiveBytes() as counted:
        skip = StoredMap.of(torch.empty(1, 16, 64, 64, device="meta"), host)
        skip.leave()
        joined = torch.cat([torch.empty(1, 16, 64, 64, device="meta"), skip], dim=1)
        assert counted.now["meta"] == MAP
        torch.nn.functional.silu(joined[:, :, 3:5])
        assert counted.peak["meta"] < 1.3 * MAP  # some rows of it
        joined.whole()
        assert counted.peak["meta"] < 3.1 * MAP  # the part on the device is copied
        assert counted.now["meta"] == 2 * MAP  # and then gone


def test_leaving_and_reading_need_little_beside_the_map():
    host = Host(band_bytes=MAP // 64)
    with live.fake(), live.LiveBytes() as counted:
        made = StoredMap.of(torch.empty(1, 16, 64, 64, device="meta"), host)
        made.leave()
        assert counted.now == {"meta": 0, "cpu": MAP}
        for rows in made.fetch(host.cuts(made)):
            rows.mean()
        result = made * 2
    assert result.away
    assert counted.peak["meta"] < 1.1 * MAP
    assert counted.peak["cpu"] < 2.2 * MAP


class Played:
    """A host that copies on played streams, and the watch over them."""

    def __init__(self, host, watch):
        self.host, self.watch = host, watch

    def away(self, values):
        made = StoredMap.empty(values.shape, values, self.host)
        assert len(made.memory.bands) > 1
        made[:, :, :] = values  # under way
        return made


@pytest.fixture
def played():
    host = elsewhere()
    with streams.play(host) as watch:
        yield Played(host, watch)
        assert watch.sound()


RUNS = [(0, 3), (3, 4), (4, 9), (9, 11)]

READS = {
    "rows": lambda made: torch.cat(list(made.fetch([(0, 4), (4, 5), (5, 11)])), dim=2),
    "one run": lambda made: made[:, :, :],
    "a part, all columns": lambda made: torch.cat([part(made, Tile(0, 0, 6, 7)), part(made, Tile(6, 0, 11, 7))], dim=2),
    "parts": lambda made: torch.cat([part(made, Tile(0, 0, 11, 3)), part(made, Tile(0, 3, 11, 7))], dim=3),
    "whole": lambda made: made.whole(),
    "for one reader": lambda made: made.copied(),
    "a sum": lambda made: whole(made + 0),
    "a sample": lambda made: torch.cat([whole(made[:1]), whole(made[1:])]),
    "delivered": lambda made: made.delivered(),
    "joined": lambda made: whole(torch.cat([made[:, :1], made], dim=1))[:, 1:],
}


@pytest.mark.parametrize("read", READS)
def test_what_is_under_way_to_the_host_is_waited_for(played, read):
    values = plane()
    made = played.away(values.clone())
    assert torch.equal(READS[read](made), values)


def test_what_is_delivered_on_the_host_has_arrived(played, monkeypatch):
    monkeypatch.setattr(played.host, "is_large", lambda made: True)
    values = plane()
    assert torch.equal(played.away(values.clone()).delivered(stays=True), values)


def test_a_part_written_to_is_the_last_to_write(played):
    values = plane()
    made = played.away(values.clone())
    made[:, :, 3:6, 2:4] = torch.zeros(2, 3, 3, 2)
    values[:, :, 3:6, 2:4] = 0
    assert torch.equal(made[:, :, :], values)


@pytest.mark.parametrize("tile", [Tile(2, 0, 9, 7), Tile(2, 1, 9, 4), Tile(0, 3, 11, 7)])
@pytest.mark.parametrize("which", [slice(0, 2), slice(1, 2)])
def test_copies_between_host_and_device_are_of_single_runs_of_memory(played, tile, which):
    """Others would be gathered by the host first, who would wait for them."""
    values = plane()
    made = played.away(values.clone())[which]
    cells = torch.zeros(tile.height, len(made), tile.width, 3)
    made.host.settle(made.device)
    for target, own in made.memory.copies(tile, cells):
        assert target.is_contiguous() and own.is_contiguous()
        target[:] = own
    assert torch.equal(cells.permute(1, 3, 0, 2), values[which, :, tile.rows, tile.columns])


def test_rows_may_be_written_over_while_the_next_ones_come(played):
    values = plane()
    made = played.away(values.clone())
    for _ in range(2):
        assemble(
            RUNS,
            lambda run, rows: rows + 1,
            place=lambda run: (slice(None), slice(None), slice(*run)),
            into=made,
            read=made.fetch,
        )
    assert torch.equal(made[:, :, :], values + 1 + 1)


def test_what_is_computed_on_the_way_is_waited_for_in_both_directions(played):
    """A run goes to rows that others are read from, and on to a second map, by way of the device."""
    values = plane()
    made, other = played.away(values.clone()), played.away(plane(seed=1))
    for first, second in ((made, other), (other, made)):
        for (top, bottom), rows in zip(RUNS, first.fetch(RUNS), strict=True):
            second[:, :, top:bottom] = rows + 1
            first[:, :, top:bottom] = rows - 1
    assert torch.equal(made[:, :, :], values + 1 + 1)
    assert torch.equal(other[:, :, :], values + 1 - 1)


def test_the_device_holds_no_more_than_two_runs_that_come_and_two_that_go(played):
    """As far as the host can know: it waits for all others."""
    made, watch = played.away(plane()), played.watch
    _, outgoing = played.host._of(made.device)
    used, stored = [], []
    for top, rows in enumerate(made.fetch([(row, row + 1) for row in range(11)])):
        assert sum(count > watch.host[watch.main] for count in used) < 2  # another one has come by now
        values = rows + 1
        used.append(watch.main.known[watch.main])
        made[:, :, top : top + 1] = values
        stored.append(outgoing.known[outgoing])
        assert sum(count > watch.host[outgoing] for count in stored) <= 2
    assert len(used) == 11


def test_a_map_turned_to_have_its_channels_last_is_itself_when_turned_back():
    plane = torch.arange(120.0).view(2, 3, 4, 5)
    stored = StoredMap.of(plane, passing=True)
    turned = stored.movedim(1, -1)
    assert turned.shape == (2, 4, 5, 3)
    assert turned.movedim(-1, 1) is stored
    assert torch.equal(turned * 2, plane.movedim(1, -1) * 2)
    assert torch.equal(turned[:, :, 1:3], plane.movedim(1, -1)[:, :, 1:3])
    assert torch.equal(turned.movedim(-1, 2), plane.movedim(1, -1).movedim(-1, 2))
    assert torch.equal(torch.cat([turned, turned], dim=1), torch.cat([plane.movedim(1, -1)] * 2, dim=1))


def test_sums_and_products_are_formed_in_the_memory_of_a_map_that_was_passed_on():
    plane, mask = torch.arange(120.0).view(2, 3, 4, 5), torch.rand(2, 1, 4, 5)
    expected = plane * mask + 2
    passed = StoredMap.of(plane.clone(), passing=True)
    memory = passed.whole().data_ptr()
    result = passed * mask + torch.full_like(plane, 2)
    assert isinstance(result, StoredMap) and result.whole().data_ptr() == memory
    assert torch.equal(result + 0, expected)
    with pytest.raises(RuntimeError, match="passed on"):
        passed.whole()
    twice = StoredMap.of(plane.clone(), passing=True)
    assert torch.equal((twice + twice) + 0, 2 * plane)
    kept = StoredMap.of(plane.clone())
    assert torch.equal(kept * mask, plane * mask) and torch.equal(kept + 0, plane)
    wider = torch.rand(2, 3, 4, 1)  # not cut as the map is
    assert torch.equal(StoredMap.of(plane.clone(), passing=True) * wider, plane * wider)


@pytest.mark.parametrize("height", [6, 7])
@pytest.mark.parametrize("relu", [torch.relu, torch.Tensor.relu])
def test_what_relu_makes_of_a_map_is_computed_where_it_is_read(height, relu):
    x = torch.randn(2, 3, height, 5)
    plane = StoredMap.of(x, passing=True)
    seen = relu(plane)
    assert isinstance(seen, ComputedMap) and torch.equal(whole(plane), x)
    assert torch.equal(whole(seen), x.relu())
    assert Strips(2, False).cut(seen)[-1].bottom == height
    plane.claim()
    with pytest.raises(RuntimeError, match="was passed on"):
        whole(seen)
