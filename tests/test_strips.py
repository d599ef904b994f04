"""Strip-wise execution equals the unpatched modules, and keeps its promise about memory."""

from fractions import Fraction
from functools import cache

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

import streams
import tiny
from _common import LiveBytes
from largerespatch.padding import PADDING_MODES, install_padding
from largerespatch.patching import PatchStack
from largerespatch.shuttle import Shuttle
from largerespatch.strips import Strips, replacements, unet_replacements
from largerespatch.vae import Exact, TwoPass, decoder_splits, encoder_splits
from test_vae import BOTH, HALVES, INPUTS, Bar, cutting

# Layers by the dozen in float32, statistics summed in another order.
ROUNDING = {"rtol": 0, "atol": 1e-4}


# Not where the model runs, though the same memory: whole maps live here and their strips are copied.
ELSEWHERE = torch.device("cpu", 0)


def install(stack, vae, size, wrap=False, **options):
    for half, latent_scale in (("encoder", 8), ("decoder", 1)):
        model = getattr(vae, half)
        exact = Exact(model, f"vae.{half}", cutting(size, latent_scale, wrap), **options)
        stack.wrap(model, "forward", exact, f"vae.{half}")


def sd_like():
    """All that Stable Diffusion's VAE has: widening and narrowing blocks, with and without a shortcut."""
    return tiny.vae(block_out_channels=(8, 16, 32, 32), layers_per_block=2, norm_num_groups=8)


@settings(max_examples=40)
@given(
    st.sampled_from(sorted(HALVES)),
    st.integers(1, 2),
    st.integers(1, 14),
    st.integers(1, 9),
    st.integers(1, 40),
    st.sampled_from(PADDING_MODES),
    st.booleans(),
    st.sampled_from([None, ELSEWHERE]),
)
def test_exact_equals_untiled(half, batch, height, width, rows, mode, recompute, host):
    if mode == "reflect":
        height, width = max(height, 2), max(width, 2)
    vae, x, run = sd_like(), INPUTS[half](batch, height, width), HALVES[half]
    given_x = x.clone()
    with PatchStack() as stack:
        install_padding(stack, vae, "vae", mode)
        expected = run(vae, x)
        install(stack, vae, (rows, 1), wrap=mode == "circular", recompute=recompute, host=host)
        torch.testing.assert_close(run(vae, x), expected, **ROUNDING)
    assert torch.equal(x, given_x)  # working in place stops short of the caller's own tensor


@BOTH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_half_precision_it_is_no_further_from_float32_than_untiled(half, dtype):
    vae, x, run = sd_like(), INPUTS[half](1, 24, 10), HALVES[half]
    reference = run(vae, x)
    for parameter in vae.parameters():
        parameter.data = parameter.to(dtype)
    untiled = run(vae, x.to(dtype))
    with PatchStack() as stack:
        install(stack, vae, (16, 16))
        exact = run(vae, x.to(dtype))
    assert exact.dtype == dtype
    assert (exact.float() - reference).norm() < 1.1 * (untiled.float() - reference).norm()


@BOTH
def test_an_input_of_one_tile_runs_unpatched(half):
    vae, x, run = sd_like(), INPUTS[half](1, 16, 12), HALVES[half]
    expected = run(vae, x)
    Bar.last = None
    with PatchStack() as stack:
        install(stack, vae, (16, 12))
        assert torch.equal(run(vae, x), expected)
    assert Bar.last is None


@BOTH
def test_every_module_is_restored_and_the_bar_completes(half):
    vae, x, run = sd_like(), INPUTS[half](1, 20, 20), HALVES[half]
    before = {name: dict(vars(module)) for name, module in vae.named_modules()}
    with PatchStack() as stack:
        install(stack, vae, (16, 16))
        run(vae, x)
    assert Bar.last.updates == Bar.last.total > 10
    assert {name: dict(vars(module)) for name, module in vae.named_modules()} == before


@pytest.mark.parametrize("options", [{"up": True}, {"down": True}, {"temb_channels": 8}])
def test_what_cannot_run_strip_by_strip_is_named(options):
    vae = sd_like()
    resnet = {"in_channels": 8, "groups": 8, "temb_channels": None} | options
    vae.decoder.up_blocks[1].resnets[2] = ResnetBlock2D(**resnet)
    with pytest.raises(
        ValueError, match=r"not know how to run vae\.decoder\.up_blocks\.1\.resnets\.2 \(ResnetBlock2D\)"
    ):
        Exact(vae.decoder, "vae.decoder", cutting((4, 4)))
    vae.decoder.conv_act = torch.nn.Hardtanh()
    with pytest.raises(ValueError, match=r"vae\.decoder\.\S+ \("):
        list(replacements(vae.decoder, Strips(4, False), "vae.decoder"))


@given(st.integers(1, 30), st.integers(1, 9), st.integers(0, 3), st.booleans())
def test_reading_is_unharmed_by_writing_over_what_was_read(height, rows, halo, wrap):
    halo = min(halo, height)
    plane = torch.arange(float(height)).view(1, 1, height, 1).expand(1, 1, height, 2).clone()
    strips = Strips(rows, wrap)
    for strip, above, block in strips.read(plane, strips.cut(plane), halo):
        expected = torch.arange(strip.top - above, strip.top - above + block.shape[2])
        assert block[0, 0, :, 0].tolist() == (expected % height).tolist()
        assert strip.height <= rows
        assert above + strip.height <= block.shape[2]
        plane[:, :, strip.rows] = -1


@pytest.mark.parametrize("scale", [Fraction(1, 2), Fraction(1), Fraction(2)])
def test_strips_are_within_bounds_before_and_after_scaling(scale):
    for strip in Strips(8, False).cut(torch.zeros(1, 1, 50, 3), scale):
        assert max(strip.height, strip.height * scale) <= 8
        assert strip.top % scale.denominator == strip.bottom % scale.denominator == 0


def live_bytes(half, height, **options):
    """The peaks of the untiled half and of the exact one, for an input of ``height x 8`` latent pixels."""
    vae, x, run = sd_like(), INPUTS[half](1, height, 8), HALVES[half]
    with LiveBytes() as untiled:
        run(vae, x)
    with PatchStack() as stack:
        install(stack, vae, (16, 16), **options)
        with LiveBytes() as exact:
            run(vae, x)
    return untiled.peak, exact.peak


@BOTH
def test_half_of_the_untiled_memory_is_enough(half):
    untiled, exact = live_bytes(half, 64)
    assert exact <= 0.5 * untiled


@BOTH
def test_recomputing_needs_a_third_of_the_untiled_memory(half):
    untiled, exact = live_bytes(half, 64, recompute=True)
    assert exact <= 0.33 * untiled


class LiveBytesOn(LiveBytes):
    """Counts the bytes of one kind of device alone."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def _storages(self, tree):
        tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
        return super()._storages([tensor for tensor in tensors if tensor.device.type == self.kind])


def bytes_by_device(half, height, recompute):
    """Peaks on a device and on its host, played by fake tensors on ``meta`` and on ``cpu``: nothing is computed."""
    levels = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    with FakeTensorMode():
        with torch.device("meta"):
            vae = tiny.vae(block_out_channels=(8, 16), layers_per_block=1, **levels)
            x = torch.empty(1, 3, 2 * height, 8) if half == "encode" else torch.empty(1, 4, height, 4)
        model = vae.encoder if half == "encode" else vae.decoder
        model.mid_block.attentions[0] = None  # attention takes its whole map to the device
        pieces = cutting((16, 4), 2 if half == "encode" else 1)
        with PatchStack() as stack, LiveBytesOn("meta") as device, LiveBytesOn("cpu") as host:
            exact = Exact(model, half, pieces, recompute=recompute, host=torch.device("cpu"))
            stack.wrap(model, "forward", exact, half)
            result = model(x)
    assert result.device.type == "meta"
    return device.peak, host.peak


@pytest.mark.parametrize(("half", "recompute"), [("encode", False), ("decode", True)])
def test_on_a_device_with_a_host_only_the_host_holds_more_for_a_larger_image(half, recompute):
    device, host = bytes_by_device(half, 32, recompute)
    larger_device, larger_host = bytes_by_device(half, 64, recompute)
    assert larger_device <= 1.05 * device
    assert larger_host >= 1.8 * host


@BOTH
@pytest.mark.parametrize("mode", ["two-pass", "exact", "recompute"])
@pytest.mark.parametrize("wrap", [False, True])
def test_copies_on_streams_of_their_own_are_waited_for(half, mode, wrap, monkeypatch):
    """As on CUDA, on streams that are played."""
    vae, x, run = sd_like(), INPUTS[half](2, 14, 6), HALVES[half]
    latent_scale = 8 if half == "encode" else 1
    model = vae.encoder if half == "encode" else vae.decoder
    splits = encoder_splits(model) if half == "encode" else decoder_splits(model)
    results = []
    for host in (None, ELSEWHERE):
        pieces = cutting((3, 4), latent_scale, wrap)
        if mode == "two-pass":
            halved = TwoPass(splits, pieces, host=host)
        else:
            halved = Exact(model, half, pieces, recompute=mode == "recompute", host=host)
        if host is not None:
            unkept = streams.play(monkeypatch)
            monkeypatch.setattr(halved, "_shuttle", lambda device: PlayedShuttle(ELSEWHERE, ELSEWHERE))
            monkeypatch.setattr(Strips, "write", store)  # on the host all else looks as if it were on the device
        with PatchStack() as stack:
            install_padding(stack, vae, "vae", "circular" if wrap else "constant")
            stack.wrap(model, "forward", halved, half)
            results.append(run(vae, x))
    torch.testing.assert_close(*results, **ROUNDING)
    assert not unkept


def store(strips, plane, strip, values):
    if strips.shuttle is None:
        plane[:, :, strip.rows] = values
    else:
        strips.shuttle.store(plane[:, :, strip.rows], values)


class PlayedShuttle(Shuttle):
    def __init__(self, device, host):
        super().__init__(device, host)
        self.is_cuda = True
        self._incoming, self._outgoing = streams.Stream(), streams.Stream()


@BOTH
def test_pieces_have_no_gradients_and_say_so(half):
    vae, x, run = sd_like(), INPUTS[half](1, 20, 20).requires_grad_(), HALVES[half]
    with torch.enable_grad(), PatchStack() as stack:
        install(stack, vae, (16, 16))
        with pytest.raises(
            RuntimeError, match="VAE half of 20x20 latent pixels runs in pieces, which have no gradients"
        ):
            run(vae, x)
        assert not run(vae, x.detach()).requires_grad


def install_in_unet(stack, model, rows, wrap=False):
    """What counts as patched: the number of strips that each module was visited in is noted in the list returned."""
    strips, visits = Strips(rows, wrap), []
    cut = strips.cut
    strips.cut = lambda *args: visits.append(len(cut(*args))) or cut(*args)
    for path, module, replacement in unet_replacements(model, strips, "unet"):
        stack.wrap(module, "forward", replacement, f"{path}.forward")
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


@settings(max_examples=30)
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
        install_padding(stack, unet, "unet", mode)
        expected = unet(**arguments).sample
        visits = install_in_unet(stack, unet, rows, wrap=mode == "circular")
        torch.testing.assert_close(unet(**arguments).sample, expected, **ROUNDING)
    assert (max(visits, default=1) > 1) == (height > rows)
    assert torch.equal(arguments["sample"], given_sample)


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


@settings(max_examples=30)
@given(st.integers(1, 2), st.integers(2, 16), st.integers(2, 6), st.integers(1, 70), st.sampled_from(PADDING_MODES))
def test_a_controlnets_picture_is_embedded_in_strips(batch, height, width, rows, mode):
    net, picture = tiny.controlnet(), torch.rand(batch, 3, 8 * height, 8 * width)
    with PatchStack() as stack:
        install_padding(stack, net, "net", mode)
        expected = net.controlnet_cond_embedding(picture)
        visits = install_in_unet(stack, net, rows, wrap=mode == "circular")
        result = net.controlnet_cond_embedding(picture)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-6)
    assert (max(visits, default=1) > 1) == (8 * height > max(rows, 23))


def test_a_controlnets_picture_takes_little_memory_in_strips():
    embedding, picture = tiny.controlnet().controlnet_cond_embedding, torch.rand(1, 3, 2048, 16)
    with LiveBytes() as whole:
        embedding(picture)
    with PatchStack() as stack:
        for _, module, replacement in unet_replacements(embedding, Strips(64, False), "embedding"):
            stack.wrap(module, "forward", replacement, "embedding.forward")
        with LiveBytes() as strips:
            embedding(picture)
    assert strips.peak < 0.3 * whole.peak


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
    assert strips.peak < 1.5 * result.nbytes
    assert whole.peak >= 3 * result.nbytes


def test_an_upsampler_needs_its_output_alone():
    module, x = Upsample2D(8, use_conv=True), torch.randn(1, 8, 128, 8)
    with PatchStack() as stack:
        install_in_unet(stack, module, 8)
        with LiveBytes() as strips:
            result = module(x)
    assert strips.peak < 1.3 * result.nbytes


def test_strips_lower_the_peak_of_a_unet():
    unet = tiny.unet(down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, mid_block_type=None)
    arguments = unet_arguments(1, 256, 8)
    with LiveBytes() as whole:
        unet(**arguments)
    with PatchStack() as stack:
        install_in_unet(stack, unet, 8)
        with LiveBytes() as strips:
            unet(**arguments)
    assert strips.peak < 0.8 * whole.peak


def test_what_a_unet_holds_besides_is_left_alone():
    unet = tiny.unet()
    unet.mid_block.resnets[0].norm1 = torch.nn.Identity()
    paths = [path for path, _, _ in unet_replacements(unet, Strips(4, False), "unet")]
    assert "unet.mid_block.resnets.1" in paths
    assert "unet.up_blocks.0.upsamplers.0" in paths
    assert "unet.mid_block.resnets.0" not in paths
