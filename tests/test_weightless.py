"""Tensors without data, next to torch's fake ones."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from largerespatch.memory.weightless import Look, Weightless, WithoutData


def written(plane):
    plane[:, :, 2:4] = plane[:, :, :2] + 1
    return plane.mul_(2)


# Of a map [2, 8, 6, 5] and tokens [2, 30, 8].
WORK = {
    "convolution": lambda plane, tokens: F.conv2d(plane, torch.ones(4, 8, 3, 3), stride=2, padding=1),
    "group norm": lambda plane, tokens: torch.ops.aten.native_group_norm(plane, None, None, 2, 8, 30, 4, 1e-5),
    "batch norm": lambda plane, tokens: torch.ops.aten.native_batch_norm(
        plane, None, None, torch.ones(8), torch.ones(8), False, 0.1, 1e-5
    ),
    "batch norm of its own statistics": lambda plane, tokens: torch.ops.aten.native_batch_norm(
        plane, None, None, None, None, True, 0.1, 1e-5
    ),
    "layer norm": lambda plane, tokens: torch.ops.aten.native_layer_norm(tokens, [30, 8], None, None, 1e-5),
    "another layout": lambda plane, tokens: plane.permute(0, 2, 3, 1).contiguous() + 1,
    "views": lambda plane, tokens: (plane[:, 2:4, ..., 1:], plane.flatten(2).transpose(1, 2), *plane.chunk(3, dim=1)),
    "reshaped by a copy": lambda plane, tokens: plane.permute(0, 2, 3, 1).reshape(2, 30, 8).unflatten(1, (6, 5)),
    "written to": lambda plane, tokens: written(plane),
    "another dtype": lambda plane, tokens: (plane.double(), plane.half().float(), plane == 1),
    "a product, which torch views unsafely": lambda plane, tokens: torch.matmul(tokens, torch.ones(8, 3)),
    "several results": lambda plane, tokens: torch.var_mean(plane.reshape(2, 4, -1), dim=-1, correction=0),
    "indices": lambda plane, tokens: tokens.gather(1, tokens.topk(3, dim=1).indices),
    "of numbers": lambda plane, tokens: torch.tensor([1, 2, 3]).expand(4, -1) * 2.5,
    "doubled": lambda plane, tokens: F.interpolate(plane, scale_factor=2.0, mode="nearest"),
    "value by value": lambda plane, tokens: (F.silu(plane), plane + plane, tokens * 2.5, tokens.clamp(min=0), -plane),
    "with others": lambda plane, tokens: (
        plane + plane[:1],
        plane.half() * plane,
        plane / plane.permute(1, 0, 3, 2)[0, 0, 0, 0],
    ),
    "of whole numbers": lambda plane, tokens: (torch.arange(6) / 2, torch.arange(6) + torch.arange(6)),
    "put together": lambda plane, tokens: torch.cat([plane, plane[:, :3]], dim=1),
}


def looks(results):
    tensors = results if isinstance(results, tuple) else (results,)
    return [(Look.of(each), each.storage_offset(), each.untyped_storage().nbytes()) for each in tensors]


# How a plane [2, 8, 6, 5] and tokens [2, 30, 8] lie.
LAYOUTS = {
    "as they come": lambda: (torch.ones(2, 8, 6, 5), torch.ones(2, 30, 8)),
    "parts of larger ones": lambda: (torch.ones(2, 8, 9, 5)[:, :, 2:8], torch.ones(2, 40, 8)[:, 5:35]),
    "turned": lambda: (torch.ones(6, 5, 2, 8).permute(2, 3, 0, 1), torch.ones(2, 8, 30).transpose(1, 2)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", WORK)
def test_results_look_like_those_of_fake_tensors(name, layout):
    def results():
        return looks(WORK[name](*LAYOUTS[layout]()))

    with FakeTensorMode():
        expected = results()
    for _ in range(2):  # the second time nothing is worked out anew
        with WithoutData("cpu"):
            assert results() == expected


def test_tensors_know_where_they_are_and_results_are_on_the_accelerator():
    with WithoutData("meta") as count:
        host, away = torch.ones(10), torch.ones(10, device="meta")
        assert (host.device.type, away.device.type) == ("cpu", "meta")
        assert (away + host[0]).device.type == (host[0] + away).device.type == "meta"
        assert (away.to("cpu").device.type, host.to("meta").device.type) == ("cpu", "meta")
        assert host.to("cpu") is host and torch.empty_like(host).device.type == "cpu"
        assert count.alive == away.nbytes


def test_views_share_memory_and_what_is_written_to_stays():
    with WithoutData("cpu") as count:
        plane = torch.ones(4, 6)
        part = plane[1:, 2:]
        assert isinstance(part, Weightless) and part.untyped_storage()._cdata == plane.untyped_storage()._cdata
        part.add_(1)
        plane[0] = part[0, 0]
        assert count.peak == plane.nbytes
        assert torch.matmul(torch.ones(2, 3, 4), plane).nbytes == 2 * 3 * 6 * 4
        assert count.peak == plane.nbytes + 24 * 4 + 36 * 4, "a product is no larger for being viewed"
        del plane
        assert count.alive == 24 * 4


def test_arguments_that_are_equal_but_differ_in_kind_are_not_mixed_up():
    with WithoutData("cpu"):
        whole = torch.ones(3, dtype=torch.int64)
        assert [(whole * factor).dtype for factor in (2, 2.0, True, 1)] == [
            torch.int64,
            torch.float32,
            torch.int64,
            torch.int64,
        ]


def test_what_is_real_stays_real_outside():
    with WithoutData("cpu"):
        torch.ones(2)
    assert torch.ones(2).sum().item() == 2


@pytest.mark.parametrize(
    ("device", "kernel", "workspace"),
    [("meta", 3, 2 * (8 * 20 * 30 + 16 * 8 * 9 + 16 * 20 * 30)), ("meta", 1, 0), ("cpu", 3, 0)],
)
def test_a_convolution_counts_what_an_accelerator_lays_out_anew(device, kernel, workspace):
    place = {"device": device, "dtype": torch.float16}
    with WithoutData(device) as count:
        plane, weight = torch.empty(1, 8, 20, 30, **place), torch.empty(16, 8, kernel, kernel, **place)
        result = torch.nn.functional.conv2d(plane, weight, padding=kernel // 2)
        alive = count.alive
    assert result.shape == (1, 16, 20, 30)
    assert count.peak == alive + workspace
