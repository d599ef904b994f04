"""Bytes alive, counted; amounts, read and written."""

import math
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from largerespatch.memory.counting import KernelsInOne, LiveBytes, amount, gibibytes, parse_bytes

MIB = 2**20


def test_only_what_comes_to_life_inside_counts_and_only_while_it_lives():
    before = torch.ones(100)
    with LiveBytes("cpu") as count:
        view = before[:50].view(5, 10)
        assert count.alive == 0
        first = before + 1
        second = first * 2
        part = second[:10]
        assert count.alive == count.peak == 800
        del first, second
        assert count.alive == 400, "a view keeps all of its storage"
        del part
        third = view + 1
        assert (count.alive, count.peak) == (200, 800)
    assert third.shape == view.shape


def test_what_has_shrunk_since_it_was_counted_counts_as_it_is():
    with LiveBytes("cpu") as count:
        large = torch.ones(1000)
        large.untyped_storage().resize_(0)
        small = torch.ones(10)
        assert count.alive == small.nbytes
        assert count.peak == 4000


def test_nothing_is_called_when_memory_dies():
    """Python drops what is raised in there, Ctrl-C too."""
    called = []
    with LiveBytes("cpu") as count:
        some = torch.ones(10)
        sys.setprofile(lambda frame, event, given: called.append(frame.f_code) if event == "call" else None)
        del some
        sys.setprofile(None)
        assert called == [] and count.alive == 0


def test_the_peak_of_a_part_is_its_own():
    with LiveBytes("cpu") as count:
        kept = torch.ones(1000)
        torch.ones(5000)
        inner, during = count.peaks_of(lambda: torch.ones(100).sum())
        assert during["cpu"] == kept.nbytes + 400 + inner.nbytes
        assert count.peak == kept.nbytes + 20_000, "that of all is what it was"
        count.rise({"cpu": 50_000})
        assert count.peak == kept.nbytes + inner.nbytes + 50_000
    assert count.alive == kept.nbytes + inner.nbytes


def test_other_devices_count_nothing():
    with LiveBytes("meta") as count:
        torch.ones(10)
        away = torch.ones(10, device="meta")
    assert count.peak == away.nbytes


def test_several_devices_count_each_for_itself():
    with LiveBytes("meta", "cpu") as count:
        torch.ones(10)
        away = torch.ones(5, device="meta")
        here, during = count.peaks_of(lambda: torch.ones(1000) if torch.ones(500, device="meta").is_meta else None)
        del here
        assert count.all_alive() == {"meta": away.nbytes, "cpu": 0}
    assert during == count.peaks == {"meta": away.nbytes + 2000, "cpu": 4000}


def test_kernels_in_one_have_the_shape_and_layout_of_real_ones():
    query, key = torch.ones(2, 3, 10, 8), torch.ones(2, 3, 20, 8)
    plane, weight = torch.ones(2, 10, 8), torch.ones(5, 8)
    for work in (
        lambda: F.scaled_dot_product_attention(query, key, key),
        lambda: F.linear(plane, weight),
        lambda: F.linear(plane.transpose(1, 2), torch.ones(5, 10)),
    ):
        real = work()
        with KernelsInOne():
            empty = work()
        assert empty.shape == real.shape and empty.dtype == real.dtype
        if real.dim() == 3:
            assert empty.stride() == real.stride()
    with KernelsInOne():  # pipelines join the heads of what they get: that must not be a copy
        joined = F.scaled_dot_product_attention(query, key, key).transpose(1, 2)
    assert joined.is_contiguous()


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8GiB", 8 * 2**30),
        ("8 GB", 8 * 10**9),
        (" 512MiB ", 512 * MIB),
        ("1.5gib", 3 * 2**29),
        (".5 KiB", 512),
        ("7b", 7),
        ("8", None),
        ("-8GiB", None),
        ("8 parrots", None),
        ("1e3MB", None),
        ("nan", None),
        ("", None),
        ("9" * 400 + "GiB", None),
    ],
)
def test_amounts(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("value", [None, "auto", "8GiB", 2**33])
def test_amounts_stay_as_they_were_given(value):
    assert amount("memory_limit", value) is value


def test_whole_numbers_of_other_kinds_are_numbers_of_bytes():
    size = amount("memory_limit", np.int64(5))
    assert size == 5 and type(size) is int


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (0, ValueError),
        (-1, ValueError),
        (2**62, ValueError),
        ("0GiB", ValueError),
        ("8", ValueError),
        ("9" * 400 + "B", ValueError),
        (True, TypeError),
        (8.0, TypeError),
        (math.nan, TypeError),
        ([], TypeError),
    ],
)
def test_amounts_that_are_none_name_the_option(value, error):
    with pytest.raises(error, match=r"some_limit must be None, a positive amount such as '8GiB'.*got"):
        amount("some_limit", value)


@pytest.mark.parametrize(("size", "said"), [(3 * 2**30, "3.00 GiB"), (2**29, "0.50 GiB"), (MIB, "1.00 MiB")])
def test_bytes_are_said_in_units_that_fit(size, said):
    assert gibibytes(size) == said
