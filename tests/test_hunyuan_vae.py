"""The autoencoder of HunyuanImage 2.1 in pieces, against itself untiled."""

from fractions import Fraction

import pytest
import torch
from diffusers import AutoencoderKLHunyuanImage, AutoencoderKLHunyuanImageRefiner
from diffusers.models.autoencoders.autoencoder_kl_hunyuanimage import HunyuanImageDownsample
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from conftest import quiet
from halves import (
    BOTH,
    HALVES,
    INPUTS,
    MODES,
    PADDING_MODES,
    cut_up,
    error,
    latent,
    live,
    padded,
    patched,
    told,
)
from largerespatch import LargeResPatch
from largerespatch.autoencoders.hunyuan_image import HunyuanImage
from largerespatch.core.families import family_of
from largerespatch.core.hosts import Host
from largerespatch.techniques.attention import chunked_attention
from largerespatch.techniques.vae import two_pass
from largerespatch.techniques.vae.walk import Walk
from largerespatch.techniques.vae.walked import WalkedDownsample, WalkedResample


def vae(**changes):
    config = {
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 4,
        "block_out_channels": (32, 32, 64, 64),
        "layers_per_block": 1,
        "spatial_compression_ratio": 8,
        "sample_size": 64,
        "scaling_factor": 0.75,
    } | changes
    model = tiny.frozen(AutoencoderKLHunyuanImage, 21, **config)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim == 1:  # far from zero and one, so that statistics matter
            parameter += torch.randn(parameter.shape, generator=generator) / 2
    return model


def test_the_family_is_known_and_films_are_not():
    assert type(family_of(vae())) is HunyuanImage
    assert family_of(vae()).factor(vae()) == 8
    with torch.device("meta"):
        assert not HunyuanImage().matches(AutoencoderKLHunyuanImageRefiner())


@settings(max_examples=16)
@given(
    st.sampled_from(sorted(HALVES)),
    st.integers(1, 2),
    st.integers(2, 14),
    st.integers(2, 9),
    st.integers(1, 16),
    st.sampled_from(PADDING_MODES),
    st.booleans(),
)
def test_exact_equals_untiled(half, batch, height, width, rows, mode, offload):
    model, x, run = vae(), INPUTS[half](batch, height, width), HALVES[half]
    before = x.clone()
    with padded(model, mode):
        expected = run(model, x)
    with patched(
        model,
        vae_mode="exact",
        padding_mode=mode,
        vae_chunk_size_y=rows,
        vae_chunk_size_x=1,
        vae_offload=offload,
    ):
        assert error(run(model, x), expected) < 1e-4
    assert torch.equal(x, before)


@pytest.mark.parametrize(("half", "host"), [("encode", True), ("decode", True), ("decode", False)])
def test_maps_live_on_a_host_as_well(monkeypatch, half, host):
    monkeypatch.setattr(Host, "serves", lambda self, device: host)  # as if the model ran elsewhere
    model, x, run = vae(), INPUTS[half](1, 24, 20), HALVES[half]
    expected = run(model, x)
    for mode, most in (("exact", 1e-4), ("two-pass", 0.2)):
        with patched(model, vae_offload=True, vae_mode=mode):
            assert error(cut_up(lambda: run(model, x)), expected) < most


@pytest.mark.parametrize(("half", "padding"), [("encode", "circular"), ("decode", "constant")])
def test_tiles_in_strips_give_what_they_give_at_once(half, padding, monkeypatch):
    """As they run where maps are on a host."""
    monkeypatch.setattr(two_pass, "TILE_STRIP_BYTES", 2**17)
    model, x, run, results = vae(), INPUTS[half](2, 11, 8), HALVES[half], []
    for offload in (False, True):
        with patched(model, vae_offload=offload, padding_mode=padding, vae_chunk_size_x=6, vae_chunk_size_y=5):
            results.append(cut_up(lambda: run(model, x)))
    assert error(*results) < 1e-4


@pytest.mark.parametrize(("half", "mode"), [("encode", "constant"), ("decode", "circular")])
def test_passes_come_close_and_as_many_as_there_are_norms_are_exact(half, mode):
    model, x, run = vae(), INPUTS[half](1, 9, 7), HALVES[half]
    with padded(model, mode):
        expected = run(model, x)
    errors = []
    for passes in (2, 16):
        with patched(model, vae_passes=passes, padding_mode=mode, vae_chunk_size_x=4, vae_chunk_size_y=5):
            errors.append(error(cut_up(lambda: run(model, x)), expected))
    assert 1e-4 < errors[0] < 0.2
    assert errors[1] < 1e-4


@pytest.mark.parametrize("widens", [1, 2, 4])
@pytest.mark.parametrize("rows_apart", [False, True])
def test_a_halved_map_lies_in_the_memory_of_the_whole_one_where_it_fits(widens, rows_apart):
    """Row by row; what is spare of it is another map of that size, and so on for what is halved next."""
    finest = 16 if rows_apart else None
    walk = Walk(4, wrap=False, finest=finest, by_rows=True)
    source = torch.randn(2, 8, 16, 12)
    plane = WalkedResample(walk, Fraction(1), halo=1).output(source, source, source.shape)
    plane[:, :, :] = source
    memory = plane.whole().untyped_storage()
    for channels in (8, 8 * widens):
        module = HunyuanImageDownsample(channels, channels * widens).requires_grad_(False)
        expected = module(source)
        plane = WalkedDownsample(walk, Fraction(1, 2), halo=2)(module, plane)
        assert error(plane.whole(), expected) < 1e-5
        fits = rows_apart and widens < 4
        assert (plane.whole().untyped_storage().data_ptr() == memory.data_ptr()) == fits
        assert (walk.spare is not None) == fits
        if fits:
            assert walk.spare.shape == plane.shape
            walk.spare[:, :, :] = torch.full(plane.shape, 9.0)  # as the next block does
            assert error(plane.whole(), expected) < 1e-5
        source = expected


@BOTH
def test_attention_in_chunks_of_queries_is_exact(monkeypatch, half):
    model, x, run = vae(), INPUTS[half](2, 24, 20), HALVES[half]
    expected, chunks = run(model, x), []
    monkeypatch.setattr(chunked_attention, "QUERIES", 50)
    cut = chunked_attention.ChunkedAttention._cut
    monkeypatch.setattr(
        chunked_attention.ChunkedAttention, "_cut", lambda self, *size: chunks.append(cut(self, *size)) or chunks[-1]
    )
    with patched(model, vae_mode="exact"):
        assert error(run(model, x), expected) < 1e-4
    assert [len(each) for each in chunks] == [12, 12]  # of queries, and before of keys: two rows of 20 each


@BOTH
def test_attention_in_blocks_sees_more_by_its_context(half):
    model, x, run = vae(), INPUTS[half](2, 24, 20), HALVES[half]
    for name, parameter in model.named_parameters():
        if ".to_q." in name or ".to_k." in name:
            parameter *= 2  # some tokens matter more than others
    expected, errors = run(model, x), []
    blocks = {"vae_mode": "exact", "vae_attn": "blocked", "attn_slice_x": 8, "attn_slice_y": 8, "attn_full_tokens": 64}
    for context in (0, 4 * 480):
        with patched(model, **blocks, attn_context=context):
            errors.append(error(run(model, x), expected))
    assert errors[0] > 1e-3
    assert errors[1] < 1e-4  # all tokens


def test_attention_to_many_tokens_holds_no_scores_of_all_for_all():
    model, x = vae(), torch.randn(1, 64, 40, 32)
    attend = model.decoder.mid_block.attentions[0]
    scores = 4 * (40 * 32) ** 2
    assert live(lambda: attend(x)) > scores
    with patched(model):
        assert live(lambda: attend(x)) < scores / 2


@MODES
def test_upstreams_tiling_and_slicing_are_off_meanwhile(mode):
    model, z = vae(), latent(2, 24, 20)
    with patched(model, vae_mode=mode):
        expected = model.decode(z).sample
    model.enable_tiling()
    model.enable_slicing()
    with patched(model, vae_mode=mode):
        assert not model.use_tiling and not model.use_slicing
        assert error(model.decode(z).sample, expected) < 1e-6
    assert model.use_tiling and model.use_slicing


def test_a_hook_that_keeps_what_it_is_given_keeps_what_is_right():
    model, x, kept = vae(), latent(1, 24, 20), []
    model.decoder.up_blocks[-1].register_forward_hook(lambda _, __, output: kept.append(output))
    expected = model.decode(x).sample
    with patched(model, vae_mode="exact"), pytest.warns(RuntimeWarning, match="hooks"):
        model.decoder.up_blocks[0].conv1.register_forward_hook(lambda *_: None)
        assert error(model.decode(x).sample, expected) < 1e-4
    assert error(kept[1] + 0, kept[0]) < 1e-4


def test_it_is_told():
    assert told(vae(), vae_mode="exact", vae_recompute=True) == {"encoder and decoder exactly, in strips of 10 rows"}
    expected = {
        "encoder and decoder in two passes over tiles of at most 10x10 latent pixels, whole maps on the host",
        "its attention in blocks",
    }
    assert told(vae(), vae_attn="blocked", vae_offload=True) == expected


ARGUMENTS = {
    "prompt_embeds": torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(2)),
    "prompt_embeds_mask": torch.ones(1, 5, dtype=torch.int64),
    "prompt_embeds_2": torch.zeros(1, 3, 16),
    "prompt_embeds_mask_2": torch.zeros(1, 3, dtype=torch.int64),
    "num_inference_steps": 1,
    "output_type": "pt",
}


def pipeline():
    from diffusers import FlowMatchEulerDiscreteScheduler, HunyuanImagePipeline, HunyuanImageTransformer2DModel

    transformer = tiny.frozen(
        HunyuanImageTransformer2DModel,
        22,
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=16,
        text_embed_2_dim=16,
        rope_axes_dim=(4, 4),
    )
    texts = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    return quiet(
        HunyuanImagePipeline(vae=vae(), transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(), **texts)
    )


def test_a_pipeline_makes_the_untiled_picture():
    pipe = pipeline()
    draw = lambda: pipe(**ARGUMENTS, width=160, height=192, generator=torch.Generator().manual_seed(0))[0]  # noqa: E731
    expected = torch.as_tensor(draw())
    patch = LargeResPatch(pipe, 160, 192, vae_mode="exact", vae_chunk_size_x=10, vae_chunk_size_y=10)
    assert "vae (AutoencoderKLHunyuanImage): encoder and decoder exactly, in strips of 10 rows" in repr(patch)
    with patch:
        assert error(torch.as_tensor(draw()), expected) < 1e-4
    assert torch.equal(torch.as_tensor(draw()), expected)
