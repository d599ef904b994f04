"""Skip connections that wait on the host change nothing, whoever reads them."""

import pytest
import torch

import streams
import tiny
from calls import CONTROLNETS, UNETS, assert_same, flat, noise, text, xl_text
from largerespatch.core.families import Order, Site, install
from largerespatch.core.hosts import Host
from largerespatch.core.maps import JoinedMap
from largerespatch.core.patching import PatchStack
from largerespatch.core.planes import Map
from largerespatch.denoisers.unet import skip_sites
from largerespatch.techniques.serial import SerialBatch
from largerespatch.techniques.strips.strips import Strips, strip_sites


def deeper():
    return tiny.unet(layers_per_block=2)


@pytest.fixture
def offloading():
    """Make a model's skip connections travel, in small bands, although they are on the host; returns what left."""
    host, left = elsewhere(), []
    store = host.store
    host.store = lambda rows, tile, values: left.append(values.shape) or store(rows, tile, values)
    with PatchStack() as stack:

        def begin(model, serial=False):
            install(stack, [*skip_sites(model, "unet", host), *turns(model, serial)])
            return left

        yield begin


def elsewhere():
    """The host of a device that shares its memory: "cpu:0" is another name of it, which a tensor's device never has."""
    return Host("cpu:0", band_bytes=1500)


def turns(model, serial):
    if serial:
        yield Site(model, "unet", Order.BATCH_IN_TURNS, SerialBatch(model))


@pytest.mark.parametrize("case", UNETS)
@pytest.mark.parametrize(("batch", "height", "width"), [(2, 8, 8), (3, 9, 7)])
def test_a_unet_whose_skip_connections_leave_is_the_unet(case, batch, height, width, offloading):
    build, arguments = UNETS[case]
    model, sample = build(), noise(batch, 4, height, width)
    arguments = arguments(batch, height, width)
    expected = model(sample, **arguments).sample
    left = offloading(model)
    actual = model(sample, **arguments).sample
    assert type(actual) is torch.Tensor
    assert_same(actual, expected)
    assert {size[1] for size in left} == {16, 32}


@pytest.mark.parametrize("build", [tiny.unet, lambda: tiny.unet(**tiny.XL_UNET)], ids=["SD", "XL"])
def test_free_u_keeps_its_effect(build, offloading):
    model, sample, arguments = build(), noise(2, 4, 9, 7), xl_text(2) if build is not tiny.unet else text(2)
    plain = model(sample, **arguments).sample
    model.enable_freeu(s1=0.6, s2=0.4, b1=1.5, b2=1.6)
    expected = model(sample, **arguments).sample
    assert expected.sub(plain).abs().max() > 1e-3
    left = offloading(model)
    assert_same(model(sample, **arguments).sample, expected)
    assert left


@pytest.mark.parametrize("build", [tiny.unet, lambda: tiny.unet(**tiny.XL_UNET)], ids=["SD", "XL"])
def test_adapters_may_add_to_maps_in_place(build, offloading):
    """What an adapter adds to the end of a block is also added to that block's last skip connection."""
    model, sample, arguments = build(), noise(2, 4, 9, 7), xl_text(2) if build is not tiny.unet else text(2)
    states = {"SD": [(16, 9, 7), (32, 5, 4)], "XL": [(16, 5, 4), (32, 5, 4)]}["SD" if build is tiny.unet else "XL"]

    def adapted():
        given = [noise(2, *size) for size in states]
        return model(sample, **arguments, down_intrablock_additional_residuals=given).sample

    expected = adapted()
    assert expected.sub(model(sample, **arguments).sample).abs().max() > 1e-3
    left = offloading(model)
    assert_same(adapted(), expected)
    assert left


@pytest.mark.parametrize("case", CONTROLNETS)
@pytest.mark.parametrize("serial", [False, True])
def test_a_controlnets_residuals_wait_on_the_host_for_the_unet(case, serial, offloading):
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
    offloading(control, serial), offloading(model, serial)
    down, actual = both()
    assert_same(actual, expected)
    assert all(isinstance(each, Map) and each.away for each in down)
    assert_same([each.whole() for each in down], list(expected_down))


def test_gradients_pass_where_nothing_leaves(offloading):
    model, sample = tiny.unet(), noise(2, 4, 8, 8).requires_grad_()
    with torch.enable_grad():
        (expected,) = torch.autograd.grad(model(sample, **text(2)).sample.square().sum(), sample)
        left = offloading(model)
        (actual,) = torch.autograd.grad(model(sample, **text(2)).sample.square().sum(), sample)
    assert torch.equal(actual, expected)
    assert left == []


def test_on_the_host_nothing_leaves():
    model, sample = tiny.unet(), noise(2, 4, 8, 8)
    expected = model(sample, **text(2)).sample
    seen = []
    model.down_blocks[0].register_forward_hook(lambda _, __, output: seen.extend([output[0], *output[1]]))
    with PatchStack() as stack:
        install(stack, skip_sites(model, "unet", Host()))
        assert torch.equal(model(sample, **text(2)).sample, expected)
    assert len(seen) == 3 and not any(isinstance(each, Map) for each in seen)


def test_a_hook_may_keep_and_read_what_waits(offloading):
    """As tools do that collect features: what they kept is the map, even after it has left."""
    model, sample, kept = tiny.unet(), noise(2, 4, 9, 7), []
    hooked = [model.conv_in, *model.down_blocks, *model.up_blocks]
    for module in hooked:
        module.register_forward_hook(lambda _, __, output: kept.append(output))
    model(sample, **text(2))
    expected, kept[:] = list(kept), []
    offloading(model)
    model(sample, **text(2))
    assert any(isinstance(each, Map) for each in kept)
    for actual, wanted in zip(kept, expected, strict=True):
        assert_same([_dense(each) for each in flat_tensors(actual)], flat_tensors(wanted))


def flat_tensors(output):
    return [each for each in flat(output) if isinstance(each, torch.Tensor)]


def _dense(plane):
    return plane.whole() if isinstance(plane, Map) else plane


def test_strips_read_what_waits_row_by_row(monkeypatch):
    model, sample, whole, read = deeper(), noise(2, 4, 17, 6), [], []
    expected = model(sample, **text(2)).sample
    for method, noted in (("whole", whole), ("fetch", read)):
        real = getattr(JoinedMap, method)
        noting = lambda self, *args, real=real, noted=noted: noted.append(self.shape) or real(self, *args)  # noqa: E731
        monkeypatch.setattr(JoinedMap, method, noting)
    with PatchStack() as stack:
        install(stack, [*skip_sites(model, "unet", elsewhere()), *strip_sites(model, "unet", Strips(4, wrap=False))])
        assert_same(model(sample, **text(2)).sample, expected)
    assert read and not whole


@pytest.mark.parametrize("serial", [False, True])
@pytest.mark.parametrize("strips", [False, True])
def test_copies_on_streams_of_their_own_are_waited_for(strips, serial):
    """As on CUDA, on streams that are played; in strips, which read ahead of what they need."""
    model, sample, host = deeper(), noise(2, 4, 17, 6), elsewhere()
    arguments = text(2)
    expected = model(sample, **arguments).sample
    in_strips = strip_sites(model, "unet", Strips(4, wrap=False)) if strips else []
    with streams.play(host) as watch, PatchStack() as stack:
        install(stack, [*turns(model, serial), *in_strips, *skip_sites(model, "unet", host)])
        for _ in range(2):
            assert_same(model(sample, **arguments).sample, expected)
    assert [stream.total > 20 for stream in watch.sides] == [True, True]
    assert watch.sound()
