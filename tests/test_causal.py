"""Qwen-Image's and Wan's autoencoder: of one frame exact in pieces, whatever the way; several frames are left alone."""

import warnings
from contextlib import nullcontext
from types import SimpleNamespace

import accelerate
import pytest
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    QwenImageImg2ImgPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from diffusers.hooks import apply_group_offloading
from diffusers.image_processor import VaeImageProcessor
from hypothesis import given, settings
from hypothesis import strategies as st
from products import in_pairs, in_turns
from test_company import CPU
from test_weights import cpu_as_accelerator, offload_on_a_stream  # noqa: F401  fixtures
from torch.overrides import TorchFunctionMode

import streams
import tiny
from conftest import quiet
from halves import BOTH, HALVES, MODES, PADDING_MODES, Bar, in_pieces, picture, sites
from largerespatch import LargeResPatch
from largerespatch.autoencoders.any import AnyAutoencoder
from largerespatch.autoencoders.causal import Causal
from largerespatch.core.families import factor_of, families_in, family_of, install
from largerespatch.core.hosts import Host
from largerespatch.core.patching import PatchStack
from largerespatch.memory.counting import LiveBytes
from largerespatch.options import Options
from largerespatch.techniques.attention import chunked_attention as attention_room
from largerespatch.techniques.attention.blocked import BlockedAttention, Blocking
from largerespatch.techniques.vae.frames import OneFrame
from largerespatch.techniques.vae.stages import measure
from live import LiveBytes as BytesByDevice
from live import fake
from test_patch import fingerprint

NARROW = {
    "dim_mult": [1, 2, 4, 4],
    "base_dim": 8,
    "z_dim": 4,
    "latents_mean": [0.1, 0.2, -0.1, 0.0],
    "latents_std": [1.5, 2.0, 0.7, 1.0],
}
RESIDUAL = {
    "is_residual": True,
    "temperal_downsample": [True, True, False],
    "patch_size": 2,
    "in_channels": 12,
    "out_channels": 12,
}
KINDS = {
    "Qwen-Image": (AutoencoderKLQwenImage, {}),
    "Wan": (AutoencoderKLWan, {}),
    "Wan 2.2": (AutoencoderKLWan, RESIDUAL),
}
EVERY = pytest.mark.parametrize("kind", KINDS)

CLOSE = 1e-4  # relative, of layers by the dozen in float32


def autoencoder(kind="Qwen-Image", **changes):
    """As published, but narrow, and with norms that weigh channels differently."""
    model, own = KINDS[kind]
    vae = tiny.frozen(model, 16, **NARROW | own | changes)
    for name, parameter in vae.named_parameters():
        if name.endswith("gamma"):
            parameter.data = 1 + torch.randn(parameter.shape) / 2
    return vae


def factor(kind):
    return 16 if kind == "Wan 2.2" else 8


def inputs(half, batch, height, width, kind="Qwen-Image"):
    """Of ``height x width`` latent pixels."""
    if half == "encode":
        return picture(batch, factor(kind) * height, factor(kind) * width)[:, :, None]
    return torch.randn(batch, 4, 1, height, width, generator=torch.Generator().manual_seed(0))


def whole(vae, run, x, padding_mode="constant"):
    with in_pieces(vae, 1000, padding_mode=padding_mode):
        return run(vae, x)


def error(result, expected):
    assert result.shape == expected.shape
    return float((result - expected).norm() / expected.norm())


@EVERY
def test_the_family_is_known_by_how_a_model_is_built(kind):
    vae = autoencoder(kind)
    assert type(family_of(vae)) is Causal
    assert family_of(vae).factor(vae) == factor_of(SimpleNamespace(components={"vae": vae})) == factor(kind)
    assert list(families_in(SimpleNamespace(components={"vae": vae, "other": None}))) == ["vae"]


def test_what_is_built_otherwise_is_left_to_others():
    """With attention between blocks."""
    assert type(family_of(autoencoder(attn_scales=[0.5]))) is AnyAutoencoder


@settings(max_examples=16)
@given(
    st.sampled_from(sorted(KINDS)),
    st.sampled_from(sorted(HALVES)),
    st.sampled_from(["exact", "two-pass"]),
    st.integers(1, 2),
    st.integers(2, 14),
    st.integers(2, 9),
    st.integers(1, 12),
    st.integers(1, 12),
    st.sampled_from(PADDING_MODES),
    st.booleans(),
)
def test_pieces_equal_the_untiled_result(kind, half, mode, batch, height, width, rows, columns, padding_mode, away):
    vae, x, run = autoencoder(kind), inputs(half, batch, height, width, kind), HALVES[half]
    before = x.clone()
    expected = whole(vae, run, x, padding_mode)
    with in_pieces(vae, rows, columns, vae_mode=mode, padding_mode=padding_mode, vae_offload=away):
        assert error(run(vae, x), expected) < CLOSE
    assert torch.equal(x, before)


@in_pairs({"half": ["encode", "decode"], "mode": ["exact", "two-pass"], "dtype": [torch.float16, torch.bfloat16]})
def test_in_half_precision_it_is_no_further_from_float32_than_untiled(half, mode, dtype):
    vae, x, run = autoencoder(), inputs(half, 1, 18, 9), HALVES[half]
    reference = run(vae, x)
    for parameter in vae.parameters():
        parameter.data = parameter.to(dtype)
    untiled = run(vae, x.to(dtype))
    with in_pieces(vae, 8, 8, vae_mode=mode):
        result = run(vae, x.to(dtype))
    assert result.dtype == dtype
    assert (result.float() - reference).norm() < 1.1 * (untiled.float() - reference).norm()


@pytest.mark.parametrize("half", ["encode", "decode"])
def test_the_published_configuration_is_exact_too(half):
    vae = tiny.frozen(AutoencoderKLQwenImage, 17)
    x = inputs("encode", 1, 6, 2) if half == "encode" else torch.randn(1, 16, 1, 6, 2)
    expected = HALVES[half](vae, x)
    with in_pieces(vae, 4, vae_mode="exact"):
        assert 0 < error(HALVES[half](vae, x), expected) < CLOSE


@BOTH
@EVERY
@MODES
def test_an_image_of_one_tile_runs_unin_pieces(half, kind, mode):
    vae, x, run = autoencoder(kind), inputs(half, 1, 9, 7, kind), HALVES[half]
    expected = run(vae, x)
    Bar.last = None
    with in_pieces(vae, 9, 7, vae_mode=mode):
        assert torch.equal(run(vae, x), expected)
    assert Bar.last is None


@BOTH
@MODES
def test_every_module_is_restored_and_the_bar_completes(half, mode):
    vae, x, run = autoencoder(), inputs(half, 1, 9, 7), HALVES[half]
    pipe = SimpleNamespace(components={"vae": vae})
    with in_pieces(vae, 5, 4, vae_mode=mode, padding_mode="circular"):
        before = fingerprint(pipe)
        run(vae, x)
        run(vae, x)
        assert {key: value for key, value in fingerprint(pipe).items() if key[1]} == {
            key: value for key, value in before.items() if key[1]
        }
        tiles = 2 * 2  # one pass and no sample
        assert Bar.last.updates == Bar.last.total == (tiles if mode == "two-pass" else len(called(vae, half)))


def called(vae, half):
    """What an encoder or decoder calls in turn."""
    names = ("ResidualBlock", "Resample", "AttentionBlock")
    model = vae.encoder if half == "encode" else vae.decoder
    return [module for module in model.modules() if type(module).__name__.endswith(names)] + 4 * [None]


@EVERY
@pytest.mark.parametrize("mode", PADDING_MODES[1:])
def test_causal_convolutions_pad_by_the_mode(kind, mode):
    vae = autoencoder(kind)
    convolution = vae.encoder.conv_in
    x = torch.randn(1, convolution.in_channels, 2, 6, 8)
    frames = torch.cat([torch.zeros_like(x), x], dim=2)
    padded = torch.stack([F.pad(frame, (1, 1, 1, 1), mode=mode) for frame in frames.unbind(2)], dim=2)
    expected = F.conv3d(padded, convolution.weight, convolution.bias)
    with in_pieces(vae, 1000, padding_mode=mode):
        torch.testing.assert_close(convolution(x), expected)
        torch.testing.assert_close(convolution(x[:, :, 1:], x[:, :, :1]), expected[:, :, 1:])
    assert not torch.allclose(convolution(x), expected)


@BOTH
@EVERY
@MODES
def test_circular_padding_makes_an_autoencoder_commute_with_rolling(half, kind, mode):
    vae, x, run = autoencoder(kind), inputs(half, 1, 8, 6, kind), HALVES[half]
    latent_pixels, sample_pixels = (2, 1), (2 * factor(kind), factor(kind))
    there, ahead = (sample_pixels, latent_pixels) if half == "encode" else (latent_pixels, sample_pixels)
    back = [-each for each in ahead]
    with in_pieces(vae, 3, 4, padding_mode="circular", vae_mode=mode):
        plain, rolled = run(vae, x), run(vae, x.roll(there, (3, 4)))
        assert error(rolled.roll(back, (3, 4)), plain) < CLOSE
    assert error(run(vae, x.roll(there, (3, 4))).roll(back, (3, 4)), run(vae, x)) > 100 * CLOSE


def bytes_by_device(half, mode, height):
    """Peaks on a device and on its host, played by fake tensors on ``meta`` and on ``cpu``: nothing is computed."""
    with fake():
        with torch.device("meta"):
            # So wide that strips are larger than all of the picture, which is on the device in the end.
            vae = AutoencoderKLQwenImage(**NARROW | {"base_dim": 64}).requires_grad_(False)
            x = torch.empty(inputs(half, 1, height, 4).shape)
        model = vae.encoder if half == "encode" else vae.decoder
        model.mid_block.attentions[0] = None  # attention takes its whole map to the device
        with PatchStack() as stack:
            install(stack, sites(vae, vae_mode=mode, vae_chunk_size_y=8, vae_offload=True))
            with BytesByDevice() as counted:
                model(x)
    return counted.peak["meta"], counted.peak["cpu"]


@BOTH
def test_on_a_device_with_a_host_only_the_host_holds_more_for_a_larger_image(half):
    device, host = bytes_by_device(half, "exact", 16)
    larger_device, larger_host = bytes_by_device(half, "exact", 32)
    assert larger_device <= 1.05 * device
    assert larger_host >= 1.8 * host


@pytest.mark.parametrize(("mode", "rows"), [("exact", 64), ("two-pass", 64), ("two-pass", 32)])
def test_the_published_one_takes_a_gibibyte_of_a_device_at_4096_pixels(mode, rows):
    with torch.device("meta"):
        vae = AutoencoderKLQwenImage()
    pipe = SimpleNamespace(components={"vae": vae}, vae=vae, progress_bar=Bar, image_processor=VaeImageProcessor())
    options = {"vae_mode": mode, "vae_offload": True, "vae_chunk_size_x": rows, "vae_chunk_size_y": rows}
    estimate = LargeResPatch(pipe, 4096, 4096, **options).estimate()
    assert max(estimate.encode, estimate.decode) < 1.6 * 2**30  # in float32; untiled 132 GiB


@in_pairs({"half": ["encode", "decode"], "mode": ["exact", "two-pass"], "wrap": [False, True]})
def test_copies_on_streams_of_their_own_are_waited_for(half, mode, wrap):
    """As on CUDA, on streams that are played."""
    vae, x, run = autoencoder(), inputs(half, 1, 7, 5), HALVES[half]
    options = {"vae_mode": mode, "padding_mode": "circular" if wrap else "constant", "vae_offload": True}
    expected = whole(vae, run, x, options["padding_mode"])
    host = Host("cpu:0", band_bytes=1500)
    with streams.play(host) as watch, in_pieces(vae, 3, 4, host, **options):
        assert error(run(vae, x), expected) < CLOSE
    assert all(stream.total > 10 for stream in watch.sides)
    assert watch.sound()


@MODES
@pytest.mark.parametrize("attention", ["full", "blocked"])
def test_the_mid_blocks_attention_runs_in_chunks_or_blocks(mode, attention, monkeypatch):
    monkeypatch.setattr(attention_room, "QUERIES", 20)
    vae, x, run, tiles = autoencoder(), inputs("decode", 2, 9, 7), HALVES["decode"], []
    sharpen(vae)
    expected = run(vae, x)
    owner = BlockedAttention if attention == "blocked" else attention_room.ChunkedAttention
    cut = owner._cut

    def noted(self, *size):
        tiles.extend(cut(self, *size))
        return cut(self, *size)

    monkeypatch.setattr(owner, "_cut", noted)
    options = {"vae_mode": mode, "vae_attn": attention, "attn_slice_x": 3, "attn_slice_y": 3, "attn_full_tokens": 9}
    errors = {}
    for context in (0, 16, 63):
        tiles.clear()
        with in_pieces(vae, 4, 5, **options, attn_context=context):
            errors[context] = error(run(vae, x), expected)
        assert len(tiles) > 3
        if attention == "full":
            assert errors[context] < CLOSE
    if attention == "blocked":
        assert errors[0] > errors[16] > 10 * CLOSE
        assert errors[0] > 100 * CLOSE


def sharpen(vae):
    """Attention that prefers some cells to others and counts."""
    for half in (vae.encoder, vae.decoder):
        block = half.mid_block.attentions[0]
        block.to_qkv.weight.data *= 3
        block.proj.weight.data *= 5


@MODES
def test_with_all_tokens_as_context_blocks_are_dense_attention(mode):
    vae, x, run = autoencoder(), inputs("decode", 1, 9, 7), HALVES["decode"]
    sharpen(vae)
    expected = run(vae, x)
    options = {"vae_attn": "blocked", "attn_slice_x": 3, "attn_slice_y": 3, "attn_full_tokens": 9}
    with in_pieces(vae, 4, 5, vae_mode=mode, attn_context=126, **options):
        assert error(run(vae, x), expected) < CLOSE


class Attended(TorchFunctionMode):
    """Notes the queries and keys of all attention."""

    def __init__(self):
        super().__init__()
        self.met = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            self.met.append(args[:2])
        return func(*args, **(kwargs or {}))

    @property
    def queries(self):
        return [query.shape[2] for query, _ in self.met]


@EVERY
def test_heavy_tokens_are_searched_with_the_queries_and_keys_of_attention(kind):
    block, x = autoencoder(kind).decoder.mid_block.attentions[0], torch.randn(2, 32, 1, 3, 4)
    with Attended() as attended:
        block(x)
    technique = family_of(autoencoder(kind)).attending(block, Blocking("tile", 2, 2, 4, 4), 0, Options()).technique
    tokens = technique.of_tile.prepared(x.flatten(2).transpose(1, 2))
    for project, seen in zip((technique.attention.to_q, technique.attention.to_k), *attended.met, strict=True):
        torch.testing.assert_close(project(tokens)[:, None], seen)


@EVERY
@MODES
def test_attention_on_a_small_image_is_chunked_too_but_not_that_of_films(kind, mode, monkeypatch):
    monkeypatch.setattr(attention_room, "QUERIES", 20)
    vae, x = autoencoder(kind), inputs("decode", 1, 9, 7, kind)
    block = vae.decoder.mid_block.attentions[0]
    expected = vae.decode(x).sample
    with in_pieces(vae, 9, 7, vae_mode=mode), Attended() as attended:
        assert error(vae.decode(x).sample, expected) < CLOSE
        assert set(attended.queries) == {7, 14}  # one or two rows
        attended.met.clear()
        frames = torch.randn(1, 32, 3, 9, 7)
        block(frames)
        assert attended.queries == [63]


@pytest.mark.parametrize(("kind", "mode"), in_turns([(kind,) for kind in KINDS], ["exact", "two-pass"]))
def test_several_frames_are_left_alone_and_one_warning_says_so(kind, mode):
    vae = autoencoder(kind)
    size = 9 * factor(kind), 7 * factor(kind)
    film, latents = torch.rand(1, 3, 5, *size) * 2 - 1, torch.randn(1, 4, 2, 9, 7)
    x = inputs("decode", 1, 9, 7, kind)
    encoded, decoded, single = vae.encode(film).latent_dist.mode(), vae.decode(latents).sample, vae.decode(x).sample
    with in_pieces(vae, 5, 4, vae_mode=mode):
        with pytest.warns(RuntimeWarning, match="VAE decoder runs single frames in pieces, several ones as without"):
            assert torch.equal(vae.decode(latents).sample, decoded)
        with pytest.warns(RuntimeWarning, match="VAE encoder runs single frames"):
            assert torch.equal(vae.encode(film).latent_dist.mode(), encoded)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(vae.decode(latents).sample, decoded)
            Bar.last = None
            assert error(vae.decode(x).sample, single) < CLOSE
            assert Bar.last is not None


def test_frames_that_come_one_by_one_are_several(recwarn):
    """Of a decoder that is called with a cache only the cache knows what came before."""
    vae, latents = autoencoder(), torch.randn(1, 4, 3, 9, 7)

    def stream():
        vae.clear_cache()
        results = []
        for frame in latents.split(1, dim=2):
            vae._conv_idx = [0]
            results.append(vae.decoder(frame, feat_cache=vae._feat_map, feat_idx=vae._conv_idx))
        return torch.cat(results, dim=2)

    expected = stream()
    with in_pieces(vae, 5, 4):
        assert torch.equal(stream(), expected)
        Bar.last = None
        vae.decoder(latents[:, :, :1])
        assert Bar.last is not None


@EVERY
def test_upstreams_tiling_is_off_for_pictures_and_on_for_films(kind):
    vae, x, latents = autoencoder(kind), inputs("decode", 1, 36, 5, kind), torch.randn(1, 4, 2, 36, 5)
    expected = vae.decode(x).sample
    vae.enable_tiling()
    film, tiled = vae.decode(latents).sample, vae.decode(x).sample
    assert tiled.shape != expected.shape or error(tiled, expected) > CLOSE  # Wan 2.2's comes out smaller
    with in_pieces(vae, 5, 4):
        assert not vae.use_tiling
        assert error(vae.decode(x).sample, expected) < CLOSE
        with pytest.warns(RuntimeWarning, match="several ones"):
            assert torch.equal(vae.decode(latents).sample, film)
        assert not vae.use_tiling
    assert vae.use_tiling


@BOTH
@MODES
def test_slicing_runs_the_samples_of_a_batch_in_turns(half, mode):
    vae, x, run = autoencoder(), inputs(half, 3, 9, 7), HALVES[half]
    expected = run(vae, x)
    model, seen = vae.encoder if half == "encode" else vae.decoder, []
    vae.enable_slicing()
    with in_pieces(vae, 5, 4, vae_mode=mode):
        assert not vae.use_slicing
        model.conv_in.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
        with (
            pytest.warns(RuntimeWarning, match="pre-hooks on 1 of its modules see pieces")
            if (half == "encode" and mode == "two-pass")
            else nullcontext()
        ):
            assert error(run(vae, x), expected) < CLOSE
    assert set(seen) == {1}
    assert vae.use_slicing


@MODES
def test_an_estimate_knows_which_weights_are_there_at_once(mode):
    vae = autoencoder()
    for site in sites(vae, vae_mode=mode):
        if isinstance(site.technique, OneFrame):
            assert site.holds and site.holds == site.technique.in_pieces.holds


def offloaded_by_leaves(vae):
    apply_group_offloading(vae, onload_device=CPU, offload_device=CPU, offload_type="leaf_level")


def offloaded_by_blocks(vae):
    apply_group_offloading(
        vae, onload_device=CPU, offload_device=CPU, offload_type="block_level", num_blocks_per_group=1
    )


def offloaded_by_layers(vae):
    accelerate.cpu_offload(vae, execution_device=CPU)


def offloaded_as_a_model(vae):
    accelerate.cpu_offload_with_hook(vae, CPU)


def cast_by_layers(vae):
    vae.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)


BRINGING = [offloaded_by_leaves, offloaded_by_blocks, offloaded_by_layers, offloaded_as_a_model, cast_by_layers]


@in_pairs({"kind": KINDS, "mode": ["exact", "two-pass"], "hook": BRINGING})
def test_hooks_that_bring_weights_work(kind, mode, hook):
    vae = autoencoder(kind)
    hook(vae)
    for half in HALVES:
        x, run = inputs(half, 1, 7, 5, kind), HALVES[half]
        expected = run(vae, x)
        for padding_mode in ("constant", "circular"):
            with in_pieces(vae, 4, 3, vae_mode=mode, padding_mode=padding_mode):
                result = run(vae, x)
            assert (error(result, expected) < CLOSE) == (padding_mode == "constant")
        assert torch.equal(run(vae, x), expected)


@BOTH
def test_what_a_hook_on_a_block_is_given_is_right(half):
    vae, x, run, seen = autoencoder(), inputs(half, 1, 9, 7), HALVES[half], []
    model = vae.encoder if half == "encode" else vae.decoder
    for module in (model.mid_block, model.mid_block.resnets[0], model.norm_out):
        module.register_forward_hook(lambda _, __, output: seen.append(output))
    run(vae, x)
    expected, seen[:] = seen[:], []
    with in_pieces(vae, 5, 4, vae_mode="exact"):
        run(vae, x)
    for given_to, right in zip(seen, expected, strict=True):
        assert error(given_to + 0, right[:, :, 0]) < CLOSE  # maps have no frames there


def test_tiles_end_where_a_map_is_halved_and_reach_no_attention():
    vae = autoencoder()
    family = family_of(vae)
    encoder, decoder = family.splits(vae.encoder, True), family.splits(vae.decoder, False)
    assert [split.scale for split in encoder] == [1 / 2, 1 / 4, 1 / 8]
    assert [split.scale for split in decoder] == [2, 4, 8]
    assert encoder[0].halo == 8  # a convolution, two blocks of two, one that is not centred, on whole steps of two
    assert decoder[0].halo == 10  # three blocks of two, and on the doubled map a convolution, three blocks, another one
    # The resampler's convolution has half the channels on the doubled map; what mixes frames is not called.
    assert measure(vae.decoder.up_blocks[0]).values == 16 * 2**2
    for split in (*encoder, *decoder):
        assert not any(
            type(module).__name__.endswith("AttentionBlock")
            for i in split.tiled
            for module in split.stages[i].module.modules()
        )


def transformer():
    return tiny.frozen(
        QwenImageTransformer2DModel,
        18,
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 4, 8),
    )


def qwen_image(kind=QwenImagePipeline):
    return quiet(
        kind(
            vae=autoencoder(),
            transformer=transformer(),
            scheduler=FlowMatchEulerDiscreteScheduler(),
            text_encoder=None,
            tokenizer=None,
        )
    )


PROMPT = {"prompt_embeds": torch.ones(1, 5, 16), "prompt_embeds_mask": torch.ones(1, 5, dtype=torch.long)}


def paint(pipe, width=96, height=64, **arguments):
    generator = torch.Generator().manual_seed(0)
    size = {"width": width, "height": height, "num_inference_steps": 2, "generator": generator, "output_type": "pt"}
    return pipe(**PROMPT, **size | arguments).images


@MODES
def test_a_pipeline_paints_the_untiled_picture(mode):
    pipe = qwen_image()
    expected = paint(pipe)
    before = fingerprint(pipe)
    patch = LargeResPatch(pipe, 96, 64, vae_mode=mode, vae_chunk_size_x=5, vae_chunk_size_y=5)
    with patch:
        assert error(paint(pipe), expected) < CLOSE
        pipe.vae.clear_cache()
    assert torch.equal(paint(pipe), expected)
    assert {path for path, value in fingerprint(pipe).items() if value[0] is not before[path][0]} == set()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"vae_mode": "exact", "vae_recompute": True}, "exactly, in strips of 5 rows"),  # there is nothing to recompute
        ({}, "exactly, in one pass over tiles of at most 7x5 latent pixels"),
        ({"vae_passes": 3}, "exactly, in one pass over tiles of at most 7x5 latent pixels"),
    ],
)
def test_repr_says_how_and_that_films_are_left_alone(options, says):
    text = repr(LargeResPatch(qwen_image(), 96, 64, **options, vae_chunk_size_x=7, vae_chunk_size_y=5))
    assert f"vae (AutoencoderKLQwenImage): encoder and decoder {says}; several frames are left as they are" in text


@pytest.mark.parametrize(("kind", "stage"), [(QwenImagePipeline, "decode"), (QwenImageImg2ImgPipeline, "encode")])
@pytest.mark.parametrize("mode", ["exact", "two-pass", "bare"])
def test_the_estimate_is_what_a_real_run_holds(kind, stage, mode):
    pipe = qwen_image(kind)
    options = {} if mode == "bare" else {"vae_mode": mode}
    patch = LargeResPatch(pipe, 256, 192, vae_chunk_size_x=12, vae_chunk_size_y=12, **options)
    estimate = patch.estimate(patched=mode != "bare")
    # As the pipelines do.
    x = torch.rand(1, 3, 1, 192, 256) * 2 - 1 if stage == "encode" else torch.randn(1, 4, 1, 24, 32)
    with nullcontext() if mode == "bare" else patch, LiveBytes("cpu") as count:
        x = x + 0
        if stage == "encode":
            kept = [torch.empty(1, 3, 192, 256), torch.empty(1, 3, 192, 256)]  # as it came, and prepared
            pipe.vae.encode(x).latent_dist.sample()
            assert kept
        else:
            image = pipe.vae.decode(x, return_dict=False)[0][:, :, 0]
            pipe.image_processor.postprocess(image, output_type="pt")
    assert getattr(estimate, stage) == pytest.approx(count.peak, rel=0.1)


def test_memory_limit_picks_what_is_needed(monkeypatch):
    monkeypatch.setattr("largerespatch.memory.planner.margin", lambda limit: 0)  # larger than this model
    pipe = qwen_image()
    options = {"vae_mode": "exact", "vae_chunk_size_x": 64}
    need = {rows: LargeResPatch(pipe, 512, 512, **options, vae_chunk_size_y=rows).estimate().peak for rows in (64, 32)}
    assert need[32] < need[64]
    patch = LargeResPatch(pipe, 512, 512, **options, memory_limit=(need[32] + need[64]) // 2)
    assert patch.options.vae_chunk_size_y == 32
