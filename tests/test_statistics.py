import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from largerespatch.core.hosts import Host
from largerespatch.core.maps import StoredMap
from largerespatch.core.patching import PatchStack
from largerespatch.core.statistics import GroupStatistics, apply, pool, record, record_by_rows, sharing_statistics
from largerespatch.core.tilings import Tile, Window, tiles, window
from largerespatch.techniques.vae.shared_norms import SharedGroupNorm, correct


@given(st.integers(2, 40), st.integers(2, 40), st.integers(2, 15), st.integers(2, 15), st.floats(0, 1000))
def test_pooled_statistics_are_those_of_the_plane(height, width, slice_y, slice_x, offset):
    x = torch.randn(2, 8, height, width) * torch.linspace(0, 3, width) + offset
    parts = [record(x[:, :, t.rows, t.columns], 4) for t in tiles(height, width, 0, slice_y, slice_x)]
    pooled, whole = pool(parts), record(x, 4)
    assert pooled.cells == whole.cells == height * width
    torch.testing.assert_close(pooled.mean, whole.mean, rtol=1e-5, atol=1e-5)
    # the square of an offset of 1000 leaves float32 about 0.1 of a variance
    torch.testing.assert_close(pooled.variance, whole.variance, rtol=1e-4, atol=1e-4 + 1e-7 * offset**2)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("at_once", [1, 100, 10**6])  # of 90 values in a group: one group, too, and all
def test_statistics_are_mean_and_variance_however_many_groups_are_taken_at_once(at_once, layout, monkeypatch):
    monkeypatch.setattr("largerespatch.core.statistics.NORMALIZED", at_once)
    torch.manual_seed(0)
    x = (torch.randn(2, 12, 5, 9) * torch.arange(12)[:, None, None] + 50).contiguous(memory_format=layout)
    variance, mean = torch.var_mean(x.double().reshape(2, 6, -1), dim=-1, correction=0)
    found = record(x, 6)
    torch.testing.assert_close(found.mean.double(), mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.variance.double(), variance, rtol=1e-5, atol=0)  # float32, at an offset of 50
    assert record(torch.full((1, 4, 3, 3), 7.0), 2).variance.eq(0).all()


def test_statistics_have_gradients():
    torch.manual_seed(0)
    x = torch.randn(2, 4, 3, 3, requires_grad=True)
    with torch.enable_grad():
        result = apply(record(x, 2), x, 2).square().sum() + record(x, 2).variance.sum()
        expected = F.group_norm(x, 2).square().sum() + x.reshape(2, 2, -1).var(dim=-1, correction=0).sum()
        found, right = (torch.autograd.grad(each, x)[0] for each in (result, expected))
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)


def test_the_term_between_tiles_counts():
    ramp = torch.arange(8.0).expand(1, 1, 4, 8)
    halves = [record(half, 1) for half in ramp.split(4, dim=3)]
    assert pool(halves).variance.item() == pytest.approx(5.25)
    assert sum(half.variance.item() for half in halves) / 2 == pytest.approx(1.25)  # what averaging would give


def test_pooling_weighs_by_cells():
    small, large = record(torch.ones(1, 1, 1, 2), 1), record(torch.zeros(1, 1, 3, 2), 1)
    assert pool([small, large]).mean.item() == pytest.approx(1 / 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("affine", [True, False])
def test_applying_a_maps_own_statistics_is_group_norm(dtype, affine):
    torch.manual_seed(0)
    x = (torch.randn(3, 12, 5, 7) * 4 + 9).to(dtype)
    weight, bias = (torch.randn(12).to(dtype), torch.randn(12).to(dtype)) if affine else (None, None)
    result = apply(record(x, 4), x, 4, weight, bias, 1e-6)
    expected = F.group_norm(x.float(), 4, *(p.float() if affine else None for p in (weight, bias)), 1e-6)
    assert result.dtype == dtype
    # half a unit in the last place of values around 10
    tolerance = {torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2}[dtype]
    torch.testing.assert_close(result.float(), expected, rtol=0, atol=tolerance)


def affine(x, factor, offset):
    return x * factor + offset


@given(st.floats(0.1, 2), st.floats(-3, 3))
def test_the_plane_is_taken_to_change_as_the_sample_did(factor, offset):
    """Exactly so where the plane is the sample in another scale."""
    before, now = torch.randn(2, 8, 6, 6), 3 * torch.randn(2, 8, 6, 6) + 1
    plane = [record(affine(each, factor, offset), 4) for each in (before, now)]
    corrected = correct(plane[0], record(before, 4), record(now, 4))
    torch.testing.assert_close(corrected, plane[1], rtol=1e-4, atol=1e-4)


@given(st.floats(0, 1e6), st.floats(0, 1e6), st.floats(0, 1e6))
def test_no_variance_becomes_negative_and_a_flat_sample_changes_little(recorded, before, now):
    recorded, before, now = (
        GroupStatistics(1, torch.zeros(1, 1), torch.full((1, 1), v)) for v in (recorded, before, now)
    )
    corrected = correct(recorded, before, now).variance.item()
    assert 0 <= corrected <= recorded.variance.item() + 4 * now.variance.item() + 1


def whole(height, width):
    """A window that is all its own."""
    return Window(Tile(0, 0, height, width), Tile(0, 0, height, width))


def run_shared(norm, plane, windows, sample, then):
    """Sample, record, sample; then what `then` returns inside the block, which applies."""
    shared = SharedGroupNorm(norm)
    with PatchStack() as stack:
        stack.wrap(norm, "forward", shared, "norm.forward")
        pieces = torch.cat([plane[:, :, each.outer.rows, each.outer.columns] for each in sample])
        shared.sample(sample, 0.2)
        norm(pieces)
        for each in windows:
            shared.record(each, each.tile.area / plane[0, 0].numel())
            norm(plane[:, :, each.outer.rows, each.outer.columns])
        shared.sample(sample, 0.2)
        norm(pieces)
        shared.apply()
        return shared, then()


def test_shared_norm_records_owned_cells_alone_and_then_applies_them():
    torch.manual_seed(0)
    norm = nn.GroupNorm(2, 4)
    nn.init.normal_(norm.weight)
    plane = torch.randn(2, 4, 12, 12) * torch.linspace(1, 5, 12)
    windows = [window(tile, 3, 12, 12) for tile in tiles(12, 12, 0, 6, 6)]
    sample = [Window(Tile(1, 2, 4, 5), Tile(2, 3, 3, 4)), Window(Tile(8, 7, 11, 10), Tile(9, 8, 10, 9))]
    shared, applied = run_shared(norm, plane, windows, sample, lambda: norm(plane[:, :, 2:9, 3:]))
    torch.testing.assert_close(shared.statistics.variance, record(plane, 2).variance)
    torch.testing.assert_close(applied, norm(plane)[:, :, 2:9, 3:])


def test_a_sample_is_normalized_by_the_statistics_of_all_its_windows():
    torch.manual_seed(0)
    norm = nn.GroupNorm(2, 4)
    windows = torch.randn(3, 2, 4, 5, 6) * torch.arange(1.0, 4.0).view(3, 1, 1, 1, 1)  # three windows of a batch of two
    side_by_side = torch.cat(list(windows), dim=-1)
    shared = SharedGroupNorm(norm)
    shared.sample([whole(5, 6)] * 3, 0.0)
    result = shared(norm.forward, windows.flatten(0, 1)).unflatten(0, (3, 2))
    torch.testing.assert_close(torch.cat(list(result), dim=-1), norm(side_by_side))


@pytest.mark.parametrize("scale", [1, 2])
def test_edges_of_a_samples_windows_count_as_much_as_the_planes(scale):
    """In windows of three cells whose middle is dark and whose edge is bright, of a plane that has few edges."""
    norm, shared = nn.GroupNorm(1, 1), SharedGroupNorm(nn.GroupNorm(1, 1))
    windows = torch.ones(2, 1, 3, 3)
    windows[:, :, 1, 1] = 0
    place = Window(Tile(4, 4, 7, 7), Tile(5, 5, 6, 6))
    shared.sample([place, place], 0.09)  # of it 8 of 9 cells are edge
    shared(norm.forward, windows.repeat_interleave(scale, 2).repeat_interleave(scale, 3))
    _, mean, variance = shared.statistics
    torch.testing.assert_close(mean.item(), 0.08)
    torch.testing.assert_close(variance.item(), 0.08 * 0.92)


def test_what_a_sample_misses_does_not_overflow():
    """A light on black that the sample does not see: while recorded it must stay within half precision."""
    plane = torch.zeros(1, 2, 64, 64)
    plane[:, :, 40, 40] = 100
    norm = nn.GroupNorm(1, 2)
    shared = SharedGroupNorm(norm)
    shared.sample([whole(8, 8)] * 2, 0.0)
    shared(norm.forward, plane[:, :, :8, :8].repeat(2, 1, 1, 1))
    shared.record(window(Tile(32, 32, 64, 64), 4, 64, 64), 1 / 4)
    recorded = shared(norm.forward, plane[:, :, 28:, 28:])
    assert recorded.abs().max() < 100 < 100 / norm.eps**0.5


def test_the_original_forward_still_supplies_the_weights():
    """As under offload hooks, which bring the weights to the device inside ``forward``."""
    norm = nn.GroupNorm(1, 2)
    norm.forward = lambda x: F.group_norm(x, 1, torch.tensor([2.0, 3.0]), torch.tensor([1.0, -1.0]), 0.0)
    shared = SharedGroupNorm(norm)
    shared.statistics = GroupStatistics(1, torch.tensor([[5.0]]), torch.tensor([[4.0]]))
    with PatchStack() as stack:
        stack.wrap(norm, "forward", shared, "norm.forward")
        result = norm(torch.tensor([9.0, 5.0]).view(1, 2, 1, 1))
    torch.testing.assert_close(result.flatten(), torch.tensor([2 * 2.0 + 1, -1.0]))


def test_runs_of_rows_give_the_statistics_of_the_map(monkeypatch):
    monkeypatch.setattr("largerespatch.core.statistics.BAND", 2 * 8 * 5 * 3)
    plane = torch.randn(2, 8, 20, 5) + torch.linspace(0, 9, 20)[:, None]
    for found, expected in zip(record_by_rows(plane, 4)[1:], record(plane, 4)[1:], strict=True):
        torch.testing.assert_close(found, expected)


def test_a_map_that_is_elsewhere_has_the_same_statistics():
    plane = torch.randn(2, 8, 20, 5) + torch.linspace(0, 9, 20)[:, None]
    waiting = StoredMap.of(plane, Host("cpu:0", band_bytes=900))
    waiting.leave()
    for runs in ((), [(0, 3), (3, 20)]):
        for found, expected in zip(record_by_rows(waiting, 4, runs)[1:], record(plane, 4)[1:], strict=True):
            torch.testing.assert_close(found, expected)
    assert waiting.away


def test_a_part_is_normalized_as_the_whole_is():
    torch.manual_seed(0)
    norm, plane = nn.GroupNorm(2, 4), torch.randn(2, 4, 9, 8) * torch.linspace(1, 5, 8)
    expected = norm(plane)
    with sharing_statistics(norm, record_by_rows(plane, norm.num_groups)):
        torch.testing.assert_close(norm(plane[:, :, 2:5, 1:3]), expected[:, :, 2:5, 1:3])
        torch.testing.assert_close(norm(plane.flatten(2)[:, :, 7:20]), expected.flatten(2)[:, :, 7:20])
    assert not torch.allclose(norm(plane[:, :, 2:5, 1:3]), expected[:, :, 2:5, 1:3], atol=1e-2)
    assert "forward" not in vars(norm)
