"""Strip-wise execution equals the unpatched modules, and keeps its promise about memory."""

from contextlib import nullcontext
from fractions import Fraction
from functools import cache, partial

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from hypothesis import given, settings
from hypothesis import strategies as st
from products import in_pairs

import tiny
from largerespatch.core.families import install
from largerespatch.core.patching import PatchStack
from largerespatch.core.pieces import collect, rehearsal
from largerespatch.memory.weightless import WithoutData
from largerespatch.techniques.padding import padding_sites
from largerespatch.techniques.strips.halos import HaloForPadding
from largerespatch.techniques.strips.strips import Strips, strip_sites
from live import LiveBytes

# Layers by the dozen in float32, statistics summed in another order.
ROUNDING = {"rtol": 0, "atol": 1e-4}

PADDING_MODES = ("constant", "circular", "reflect", "replicate")


@given(st.integers(1, 30), st.integers(1, 9), st.integers(0, 3), st.booleans())
def test_reading_is_unharmed_by_writing_over_what_was_read(height, rows, halo, wrap):
    halo = min(halo, height)
    plane = torch.arange(float(height)).view(1, 1, height, 1).expand(1, 1, height, 2).clone()
    strips = Strips(rows, wrap)
    cuts = strips.cut(plane)
    for strip, (above, block) in zip(cuts, strips.read(plane, halo, cuts), strict=True):
        expected = torch.arange(strip.top - above, strip.top - above + block.shape[2])
        assert block[0, 0, :, 0].tolist() == (expected % height).tolist()
        assert strip.height <= rows
        assert above + strip.height <= block.shape[2]
        plane[:, :, strip.rows] = -1


def test_strips_that_begin_in_the_middle_are_read_with_what_lies_above():
    plane = torch.arange(12.0).view(1, 1, 12, 1)
    strips = Strips(3, wrap=False)
    blocks = list(strips.read(plane, 1, strips.cut(plane)[1:3]))
    assert [(above, block.flatten().tolist()) for above, block in blocks] == [
        (1, [2, 3, 4, 5, 6]),
        (1, [5, 6, 7, 8, 9]),
    ]


def test_a_rehearsal_of_strips_needs_what_reading_all_of_them_does():
    """From the second whole one on: what was kept of the one before is still there when the next is put together."""
    strips, peaks = Strips(4, wrap=False), []
    for around in (nullcontext, rehearsal):
        with around(), WithoutData("meta") as count:
            plane = torch.empty(1, 1, 64, 8, device="meta")
            collect(strips.cut(plane), lambda strip, given: None, read=partial(strips.read, plane, 3), carries=True)
        peaks.append(count.peak)
    assert peaks[0] == peaks[1]


@pytest.mark.parametrize("scale", [Fraction(1, 2), Fraction(1), Fraction(2)])
def test_strips_are_within_bounds_before_and_after_scaling(scale):
    for strip in Strips(8, False).cut(torch.zeros(1, 1, 50, 3), scale):
        assert max(strip.height, strip.height * scale) <= 8
        assert strip.top % scale.denominator == strip.bottom % scale.denominator == 0


def install_in_unet(stack, model, rows, wrap=False):
    """What counts as patched: the number of strips that each module was visited in is noted in the list returned."""
    strips, visits = Strips(rows, wrap), []
    cut = strips.cut
    strips.cut = lambda *args: visits.append(len(cut(*args))) or cut(*args)
    install(stack, strip_sites(model, "unet", strips))
    return visits


UNETS = {
    "sd": lambda: tiny.unet(layers_per_block=2),
    "xl": lambda: tiny.unet(**tiny.XL_UNET),
    "scale_shift": lambda: tiny.unet(resnet_time_scale_shift="scale_shift"),
    "resnets that resample": lambda: tiny.unet(
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        resnet_skip_time_act=True,
    ),
}


@cache
def unet_of(kind):
    return UNETS[kind]()


def unet_arguments(batch, height, width, xl=False):
    generator = torch.Generator().manual_seed(0)
    arguments = {
        "sample": slope(batch, 4, height, width, generator),
        "timestep": torch.linspace(100, 900, batch),
        "encoder_hidden_states": torch.randn(batch, 5, 64 if xl else 32, generator=generator),
    }
    if xl:
        added = {"text_embeds": torch.randn(batch, 32, generator=generator), "time_ids": torch.ones(batch, 6)}
        arguments["added_cond_kwargs"] = added
    return arguments


def slope(batch, channels, height, width, generator):
    """Noise over a slope, so that strips differ in their statistics."""
    noise = torch.randn(batch, channels, height, width, generator=generator)
    return noise + torch.linspace(-2, 2, height)[:, None]


@settings(max_examples=16)
@given(
    st.sampled_from(sorted(UNETS)),
    st.sampled_from([1, 3]),
    st.integers(1, 19),
    st.integers(1, 7),
    st.integers(1, 12),
    st.sampled_from(PADDING_MODES),
)
def test_a_unet_in_strips_equals_the_whole_one(kind, batch, height, width, rows, mode):
    if mode == "reflect":
        height, width = max(height, 3), max(width, 3)
    if kind == "resnets that resample":
        height, width = 2 * height, 2 * width  # odd maps do not fit together there, strips or not
    unet, arguments = unet_of(kind), unet_arguments(batch, height, width, xl=kind == "xl")
    given_sample = arguments["sample"].clone()
    with PatchStack() as stack:
        install(stack, padding_sites(unet, "unet", mode))
        expected = unet(**arguments).sample
        visits = install_in_unet(stack, unet, rows, wrap=mode == "circular")
        torch.testing.assert_close(unet(**arguments).sample, expected, **ROUNDING)
    assert (max(visits, default=1) > 1) == (height > rows)
    assert torch.equal(arguments["sample"], given_sample)


@in_pairs(
    {"mode": PADDING_MODES, "height, width": [(10, 6), (10, 7), (11, 6), (11, 7)], "rows": [1, 2, 3]},
)
def test_maps_of_odd_sides_are_doubled_in_strips(mode, height, width, rows):
    """Maps of one odd side, or both: what was halved is not just doubled then."""
    unet, arguments = unet_of("sd"), unet_arguments(2, height, width, xl=False)
    with PatchStack() as stack:
        install(stack, padding_sites(unet, "unet", mode))
        expected = unet(**arguments).sample
        visits = install_in_unet(stack, unet, rows, wrap=mode == "circular")
        torch.testing.assert_close(unet(**arguments).sample, expected, **ROUNDING)
    assert max(visits) > 1


@pytest.mark.parametrize("xl", [False, True])
def test_a_controlnet_in_strips_and_its_residuals(xl):
    """The residuals are handed to the U-Net as they are: nothing may have been written over them."""
    net, unet = tiny.controlnet(xl), tiny.unet(**(tiny.XL_UNET if xl else {}))
    arguments = unet_arguments(3, 13, 6, xl)
    control = arguments | {"controlnet_cond": torch.rand(3, 3, 104, 48)}

    def run():
        down, mid = net(**control, return_dict=False)
        residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        return *down, mid, unet(**arguments, **residuals).sample

    expected = run()
    with PatchStack() as stack:
        visits = [install_in_unet(stack, model, 4) for model in (net, unet)]
        for result, whole in zip(run(), expected, strict=True):
            torch.testing.assert_close(result, whole, **ROUNDING)
    assert all(max(each) > 1 for each in visits)


@settings(max_examples=16)
@given(st.integers(1, 2), st.integers(2, 16), st.integers(2, 6), st.integers(1, 70), st.sampled_from(PADDING_MODES))
def test_a_controlnets_picture_is_embedded_in_strips(batch, height, width, rows, mode):
    net, picture = tiny.controlnet(), torch.rand(batch, 3, 8 * height, 8 * width)
    with PatchStack() as stack:
        install(stack, padding_sites(net, "net", mode))
        expected = net.controlnet_cond_embedding(picture)
        visits = install_in_unet(stack, net, rows, wrap=mode == "circular")
        result = net.controlnet_cond_embedding(picture)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-6)
    assert (max(visits, default=1) > 1) == (8 * height > rows)


def test_a_controlnets_picture_takes_little_memory_in_strips():
    embedding, picture = tiny.controlnet().controlnet_cond_embedding, torch.rand(1, 3, 2048, 16)
    with LiveBytes() as whole:
        embedding(picture)
    with PatchStack() as stack:
        install(stack, strip_sites(embedding, "embedding", Strips(64, False)))
        with LiveBytes() as strips:
            embedding(picture)
    assert strips.peak["cpu"] < 0.3 * whole.peak["cpu"]


def test_adapters_and_freeu_see_the_strips():
    from peft import LoraConfig

    unet, arguments = tiny.unet(), unet_arguments(2, 16, 6)
    bare = unet(**arguments).sample
    config = LoraConfig(
        r=2, target_modules=["conv1", "conv2", "conv_shortcut", "time_emb_proj"], init_lora_weights=False
    )
    unet.add_adapter(config)
    unet.enable_freeu(0.9, 0.2, 1.2, 1.4)
    expected = unet(**arguments).sample
    assert (expected - bare).abs().max() > 0.01
    with PatchStack() as stack:
        visits = install_in_unet(stack, unet, 3)
        torch.testing.assert_close(unet(**arguments).sample, expected, **ROUNDING)
    assert max(visits) > 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_unet_in_half_precision_is_no_further_from_float32(dtype):
    unet, arguments = tiny.unet(), unet_arguments(1, 16, 6)
    reference = unet(**arguments).sample
    for parameter in unet.parameters():
        parameter.data = parameter.to(dtype)
    arguments = {key: value if key == "timestep" else value.to(dtype) for key, value in arguments.items()}
    whole = unet(**arguments).sample
    with PatchStack() as stack:
        visits = install_in_unet(stack, unet, 3)
        strips = unet(**arguments).sample
    assert max(visits) > 1
    assert strips.dtype == dtype
    assert (strips.float() - reference).norm() < 1.1 * (whole.float() - reference).norm()


def test_gradients_through_a_unet_are_those_of_the_whole_one():
    unet, arguments = tiny.unet().requires_grad_(), unet_arguments(1, 16, 6)

    def gradients():
        unet.zero_grad()
        unet(**arguments).sample.square().mean().backward()
        return {name: parameter.grad.clone() for name, parameter in unet.named_parameters()}

    with torch.enable_grad(), PatchStack() as stack:
        expected = gradients()
        visits = install_in_unet(stack, unet, 3)
        assert all(torch.equal(gradient, expected[name]) for name, gradient in gradients().items())
        assert not visits
        unet.requires_grad_(False)
        unet(**arguments)  # nothing to differentiate
        assert visits
        visits.clear()
        arguments["sample"].requires_grad_()
        unet(**arguments).sample.sum().backward()
        assert arguments["sample"].grad is not None


@pytest.mark.parametrize("narrowing", [False, True])
def test_a_residual_block_needs_one_map_beside_its_input(narrowing):
    module = ResnetBlock2D(in_channels=32 if narrowing else 16, out_channels=16, groups=8, temb_channels=4)
    x, temb = torch.randn(1, 32 if narrowing else 16, 256, 8), torch.randn(1, 4)
    with LiveBytes() as whole:
        module(x, temb)
    with PatchStack() as stack:
        install_in_unet(stack, module, 8)
        with LiveBytes() as strips:
            result = module(x, temb)
    assert strips.peak["cpu"] < 1.5 * result.nbytes
    assert whole.peak["cpu"] >= 3 * result.nbytes


def test_an_upsampler_needs_its_output_alone():
    module, x = Upsample2D(8, use_conv=True), torch.randn(1, 8, 128, 8)
    with PatchStack() as stack:
        install_in_unet(stack, module, 8)
        with LiveBytes() as strips:
            result = module(x)
    assert strips.peak["cpu"] < 1.3 * result.nbytes


def test_a_halo_takes_the_place_of_padding_however_that_is_told():
    """Adapters tell it by name, and their results are added to the convolution's."""
    x, weight = torch.randn(1, 2, 8, 5), torch.randn(3, 2, 3, 3)
    padded = F.conv2d(x, weight, padding=1)
    with HaloForPadding():
        for result in (
            F.conv2d(x, weight, None, (1, 1), (1, 1)),
            F.conv2d(x, weight, padding=(1, 1)),
            F.conv2d(input=x, weight=weight, padding=1),
        ):
            torch.testing.assert_close(result, padded[:, :, 1:-1])
        torch.testing.assert_close(F.conv2d(x, weight), padded[:, :, 1:-1, 1:-1])
    torch.testing.assert_close(F.conv2d(x, weight, padding=1), padded)


@pytest.mark.parametrize(("mode", "rows"), [("constant", [2 * (20 + 2), 10 * (4 + 2)]), ("circular", [2 * 30, 10 * 8])])
def test_no_row_of_a_halo_is_convolved_in_vain(mode, rows):
    """But at the edges of a map, where convolutions pad, and where they pad otherwise. Upsamplers see rows twice."""
    modules = (
        ResnetBlock2D(in_channels=16, out_channels=16, groups=8, temb_channels=None),
        Upsample2D(16, use_conv=True),
    )
    made = []
    for module in modules:
        for each in module.modules():
            if isinstance(each, torch.nn.Conv2d):
                each.register_forward_hook(lambda _, __, output: made.append(output.shape[2]))
    for module, expected_rows in zip(modules, rows, strict=True):
        x = torch.randn(1, 16, 20, 6)
        with PatchStack() as stack:
            install(stack, padding_sites(module, "module", mode))
            expected = module(x, None)
            made.clear()
            install_in_unet(stack, module, 4, wrap=mode == "circular")
            torch.testing.assert_close(module(x, None), expected, **ROUNDING)
        assert sum(made) == expected_rows


def test_strips_lower_the_peak_of_a_unet():
    unet = tiny.unet(down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, mid_block_type=None)
    arguments = unet_arguments(1, 256, 8)
    with LiveBytes() as whole:
        unet(**arguments)
    with PatchStack() as stack:
        install_in_unet(stack, unet, 8)
        with LiveBytes() as strips:
            unet(**arguments)
    assert strips.peak["cpu"] < 0.8 * whole.peak["cpu"]


def test_what_a_unet_holds_besides_is_left_alone():
    unet = tiny.unet()
    unet.mid_block.resnets[0].norm1 = torch.nn.Identity()
    paths = [site.path for site in strip_sites(unet, "unet", Strips(4, False))]
    assert "unet.mid_block.resnets.1" in paths
    assert "unet.up_blocks.0.upsamplers.0" in paths
    assert "unet.mid_block.resnets.0" not in paths
