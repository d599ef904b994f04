"""Maps of a U-Net that are on the host change nothing, whoever makes and reads them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from products import in_pairs

import streams
import tiny
from calls import CONTROLNETS, UNETS, assert_same, noise, text, xl_text
from largerespatch.core.families import Order, Site, install
from largerespatch.core.hosts import Host
from largerespatch.core.maps import StoredMap
from largerespatch.core.patching import PatchStack
from largerespatch.core.planes import Map
from largerespatch.techniques.padding import padding_sites
from largerespatch.techniques.serial import SerialBatch
from largerespatch.techniques.strips.host_strips import HostStrips, host_sites

PADDING_MODES = ("constant", "circular", "reflect", "replicate")


def elsewhere(least=0):
    """The host of a device that shares its memory: "cpu:0" is another name of it, which a tensor's device never has."""
    return Host("cpu:0", band_bytes=1500, least=least)


def in_strips(model, host, rows=4, wrap=False):
    strips = HostStrips(None, wrap, host)
    strips.rows = rows
    return host_sites(model, "unet", strips)


@pytest.fixture
def made(monkeypatch):
    """The shapes of the maps that were made on the host."""
    shapes, empty = [], StoredMap.empty.__func__
    monkeypatch.setattr(
        StoredMap,
        "empty",
        classmethod(lambda cls, shape, *others: shapes.append(tuple(shape)) or empty(cls, shape, *others)),
    )
    return shapes


@in_pairs({"case": UNETS, "batch, height, width": [(2, 8, 8), (3, 9, 7), (1, 14, 14)], "least": [0, 4000]})
def test_a_unet_whose_maps_are_on_the_host_is_the_unet(case, batch, height, width, least, made):
    build, arguments = UNETS[case]
    model, sample = build(), noise(batch, 4, height, width)
    expected = model(sample, **arguments(batch, height, width)).sample
    with PatchStack() as stack:
        install(stack, in_strips(model, elsewhere(least)))
        actual = model(sample, **arguments(batch, height, width)).sample
    assert type(actual) is torch.Tensor
    assert_same(actual, expected)
    assert {shape[1] for shape in made} >= ({16, 32} if height > 8 else {16})  # what is one strip is left alone
    assert all(4 * torch.Size(shape).numel() >= least for shape in made)


@settings(max_examples=16)
@given(
    st.sampled_from(["SD", "XL"]),
    st.integers(1, 3),
    st.integers(1, 21),
    st.integers(1, 9),
    st.integers(1, 6),
    st.sampled_from(PADDING_MODES),
    st.sampled_from([0, 3000]),
)
def test_it_is_for_any_size_and_padding(case, batch, height, width, rows, mode, least):
    if mode == "reflect":
        height, width = max(height, 3), max(width, 3)
    build, arguments = UNETS[case]
    model, sample = build(), noise(batch, 4, height, width) + torch.linspace(-2, 2, height)[:, None]
    arguments = arguments(batch, height, width)
    with PatchStack() as stack:
        install(stack, padding_sites(model, "unet", mode))
        expected = model(sample, **arguments).sample
        install(stack, in_strips(model, elsewhere(least), rows, mode == "circular"))
        assert_same(model(sample, **arguments).sample, expected)


@pytest.mark.parametrize("case", CONTROLNETS)
@pytest.mark.parametrize("serial", [False, True])
def test_a_controlnets_residuals_are_made_there_and_added_there(case, serial):
    build, arguments = CONTROLNETS[case]
    control, arguments = build(), arguments(2)
    model, sample, words = tiny.unet(**tiny.XL_UNET) if case == "XL" else tiny.unet(), noise(2, 4, 9, 7), text(2)
    if case == "XL":
        words = xl_text(2)

    def both():
        down, mid = control(sample, **arguments, return_dict=False)
        residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        return down, model(sample, **words, **residuals).sample

    expected_down, expected = both()
    with PatchStack() as stack:
        for each in (control, model):
            install(stack, in_strips(each, elsewhere()))
            if serial:
                Site(each, "model", Order.BATCH_IN_TURNS, SerialBatch(each)).install(stack)
        down, actual = both()
        assert all(isinstance(each, Map) and each.away for each in down)
        assert_same([each.copied() for each in down], list(expected_down))
    assert_same(actual, expected)


@pytest.mark.parametrize("xl", [False, True])
def test_adapters_add_to_maps_there(xl):
    """What an adapter adds to the end of a block is also added to that block's last skip connection."""
    model, sample = tiny.unet(**(tiny.XL_UNET if xl else {})), noise(2, 4, 9, 7)
    arguments = xl_text(2) if xl else text(2)
    states = [(16, 5, 4), (32, 5, 4)] if xl else [(16, 9, 7), (32, 5, 4)]

    def adapted():
        given = [noise(2, *size) for size in states]
        return model(sample, **arguments, down_intrablock_additional_residuals=given).sample

    expected = adapted()
    assert expected.sub(model(sample, **arguments).sample).abs().max() > 1e-3
    with PatchStack() as stack:
        install(stack, in_strips(model, elsewhere()))
        assert_same(adapted(), expected)


@pytest.mark.parametrize("xl", [False, True])
def test_free_u_keeps_its_effect(xl):
    model, sample = tiny.unet(**(tiny.XL_UNET if xl else {})), noise(2, 4, 9, 7)
    arguments = xl_text(2) if xl else text(2)
    plain = model(sample, **arguments).sample
    model.enable_freeu(s1=0.6, s2=0.4, b1=1.5, b2=1.6)
    expected = model(sample, **arguments).sample
    assert expected.sub(plain).abs().max() > 1e-3
    with PatchStack() as stack:
        install(stack, in_strips(model, elsewhere()))
        assert_same(model(sample, **arguments).sample, expected)


def test_where_no_map_is_large_or_models_are_on_the_host_nothing_changes(made):
    model, sample = tiny.unet(), noise(2, 4, 18, 8)
    expected = model(sample, **text(2)).sample
    for host in (elsewhere(least=2**20), Host()):
        with PatchStack() as stack:
            install(stack, in_strips(model, host))
            assert torch.equal(model(sample, **text(2)).sample, expected)
    assert made == []


def test_gradients_pass_where_nothing_leaves(made):
    model, sample = tiny.unet().requires_grad_(True), noise(2, 4, 8, 8).requires_grad_()
    with torch.enable_grad():
        (expected,) = torch.autograd.grad(model(sample, **text(2)).sample.square().sum(), sample)
        with PatchStack() as stack:
            install(stack, in_strips(model, elsewhere()))
            (actual,) = torch.autograd.grad(model(sample, **text(2)).sample.square().sum(), sample)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert made == []


@pytest.mark.parametrize("serial", [False, True])
def test_copies_on_streams_of_their_own_are_waited_for(serial):
    """As on CUDA, on streams that are played."""
    model, sample, host = tiny.unet(layers_per_block=2), noise(2, 4, 17, 6), elsewhere()
    expected = model(sample, **text(2)).sample
    with streams.play(host) as watch, PatchStack() as stack:
        install(stack, in_strips(model, host))
        if serial:
            Site(model, "unet", Order.BATCH_IN_TURNS, SerialBatch(model)).install(stack)
        for _ in range(2):
            assert_same(model(sample, **text(2)).sample, expected)
    assert [stream.total > 100 for stream in watch.sides] == [True, True]
    assert watch.sound()
