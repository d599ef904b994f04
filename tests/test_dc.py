"""The autoencoder of Sana in pieces, against itself untiled: exact in either mode, since linear attention is pooled."""

import pytest
import torch
from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from products import in_pairs

import tiny
from conftest import quiet
from halves import (
    BOTH,
    HALVES,
    INPUTS,
    MODES,
    Bar,
    cut_up,
    error,
    latent,
    padded,
    patched,
    told,
)
from largerespatch import LargeResPatch
from largerespatch.autoencoders.dc import DC
from largerespatch.core.families import family_of
from largerespatch.core.hosts import Host
from largerespatch.core.patching import PatchStack
from largerespatch.techniques.vae.linear_attention import WalkedLinearAttention
from largerespatch.techniques.vae.walk import Walk

SHAPE = {"block_types": ("ResBlock", "ResBlock", "EfficientViTBlock", "EfficientViTBlock")}
SHAPE |= {
    "block_out_channels": (8, 16, 32, 32),
    "layers_per_block": (1, 1, 2, 1),
    "qkv_multiscales": ((), (), (5,), (5,)),
}


def vae(sizes=SHAPE, **changes):
    both = {f"{half}_{name}": value for half in ("encoder", "decoder") for name, value in sizes.items()}
    model = tiny.frozen(AutoencoderDC, 31, latent_channels=4, attention_head_dim=8, **both | changes)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter += torch.randn(parameter.shape, generator=generator) / 4
        if name.endswith((".norm_out.weight", ".norm_out.bias")):
            parameter *= 2  # so that what attention sees matters
    return model


KINDS = {
    "shuffles": vae,
    "other resamplers": lambda: vae(upsample_block_type="interpolate", downsample_block_type="Conv"),
    "no first level": lambda: vae(SHAPE | {"layers_per_block": (0, 1, 2, 1)}),
    "batch norms": lambda: vae(decoder_norm_types=("batch_norm", "batch_norm", "rms_norm", "rms_norm")),
    "no shortcuts": lambda: vae(encoder_out_shortcut=False, decoder_in_shortcut=False),
    "no attention": lambda: vae(SHAPE | {"block_types": "ResBlock"}),
    "attention everywhere": lambda: vae(SHAPE | {"block_types": "EfficientViTBlock"}),
}


def test_the_family_is_known():
    assert type(family_of(vae())) is DC
    assert family_of(vae()).factor(vae()) == 8


@settings(max_examples=16)
@given(
    st.sampled_from(sorted(KINDS)),
    st.sampled_from(sorted(HALVES)),
    st.integers(1, 2),
    st.integers(2, 14),
    st.integers(2, 9),
    st.integers(1, 16),
    st.sampled_from(["constant", "circular", "reflect", "replicate"]),
    st.sampled_from(["exact", "two-pass"]),
    st.booleans(),
)
def test_pieces_equal_the_untiled_result(kind, half, batch, height, width, size, padding, mode, offload):
    if padding == "reflect":
        height, width = max(height, 3), max(width, 3)
    model, x, run = KINDS[kind](), INPUTS[half](batch, height, width), HALVES[half]
    before = x.clone()
    with padded(model, padding):
        expected = run(model, x)
    sizes = {"vae_chunk_size_y": size, "vae_chunk_size_x": max(size // 2, 1)}
    with patched(model, vae_mode=mode, padding_mode=padding, vae_offload=offload, **sizes):
        assert error(run(model, x), expected) < 1e-4
    assert torch.equal(x, before)


@in_pairs({"kind": KINDS, "half": ["encode", "decode"], "mode": ["exact", "two-pass"]})
def test_every_kind_is_cut_up(kind, half, mode):
    model, x = KINDS[kind](), INPUTS[half](1, 24, 20)
    expected = HALVES[half](model, x)
    with patched(model, vae_mode=mode):
        assert error(cut_up(lambda: HALVES[half](model, x)), expected) < 1e-4
    tiles = 3 * 2
    assert (Bar.last.total == tiles) == (mode == "two-pass")  # each once


def test_sums_of_few_cells_are_those_of_the_whole_map():
    """Where strips have so few cells that upstream would attend to them in its other way."""
    model = vae().decoder.up_blocks[-1][-1].attn
    x = torch.randn(2, 32, 40, 1, generator=torch.Generator().manual_seed(3)) + torch.linspace(0, 3, 40)[:, None]
    expected = model(x)
    alone = torch.cat([model(rows) for rows in x.split(1, dim=2)], dim=2)
    with PatchStack() as stack:
        stack.wrap(model, "forward", WalkedLinearAttention(model, Walk(1, False), 2), "attn")
        assert error(model(x), expected) < 1e-5
    assert error(alone, expected) > 1e-2


@pytest.mark.parametrize(("half", "size"), [("encode", (16, 40)), ("decode", (2, 5))])
def test_what_is_too_small_to_reflect_is_refused(half, size):
    x = torch.zeros(1, 3 if half == "encode" else 4, *size)
    model = vae()
    with patched(model, padding_mode="reflect"), pytest.raises(ValueError, match=r"24 sample.*three cells.*got 40x16"):
        HALVES[half](model, x)


@BOTH
@MODES
def test_maps_live_on_a_host_as_well(monkeypatch, half, mode):
    monkeypatch.setattr(Host, "serves", lambda self, device: True)  # as if the model ran elsewhere
    model, x, run = vae(), INPUTS[half](2, 24, 20), HALVES[half]
    expected = run(model, x)
    with patched(model, vae_offload=True, vae_mode=mode):
        assert error(cut_up(lambda: run(model, x)), expected) < 1e-4


@BOTH
@MODES
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_half_precision_it_is_no_further_from_float32_than_untiled(half, mode, dtype):
    model, x, run = vae(), INPUTS[half](1, 16, 8), HALVES[half]
    reference = run(model, x)
    model.to(dtype)
    untiled = error(run(model, x.to(dtype)), reference)
    with patched(model, vae_mode=mode):
        result = cut_up(lambda: run(model, x.to(dtype)))
    assert result.dtype == dtype
    assert error(result, reference) < 1.1 * untiled


@MODES
def test_upstreams_tiling_and_slicing_are_off_meanwhile(mode):
    model, z = vae(), latent(2, 24, 20)
    expected = model.decode(z).sample
    model.enable_tiling(64, 64, 48, 48)
    model.enable_slicing()
    with patched(model, vae_mode=mode):
        assert not model.use_tiling and not model.use_slicing
        assert error(model.decode(z).sample, expected) < 1e-4
    assert model.use_tiling and model.use_slicing
    assert error(model.decode(z).sample, expected) > 1e-3


def test_a_hook_that_keeps_what_it_is_given_keeps_what_is_right():
    model, x, kept = vae(), latent(1, 24, 20), []
    model.decoder.norm_out.register_forward_hook(lambda _, __, output: kept.append(output))
    expected = model.decode(x).sample
    with patched(model, vae_mode="exact"):
        assert error(model.decode(x).sample, expected) < 1e-4
    assert error(kept[1] + 0, kept[0]) < 1e-4


def test_it_is_told():
    assert told(vae(), vae_mode="exact", vae_recompute=True) == {"encoder and decoder exactly, in strips of 10 rows"}
    deep = vae(
        SHAPE
        | {
            "block_types": "ResBlock",
            "block_out_channels": (4,) * 6,
            "layers_per_block": (1,) * 6,
            "qkv_multiscales": ((),) * 6,
        }
    )
    assert told(deep, vae_mode="exact") == {"encoder and decoder exactly, in strips of 32 rows"}
    assert told(vae(), vae_attn="blocked", vae_offload=True) == {
        "encoder and decoder exactly, in one pass over tiles of at most 10x10 latent pixels, whole maps on the host"
    }


def pipeline():
    transformer = tiny.frozen(
        SanaTransformer2DModel,
        32,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=8,
        sample_size=32,
    )
    return quiet(
        SanaPipeline(
            vae=vae(),
            transformer=transformer,
            scheduler=DPMSolverMultistepScheduler(),
            tokenizer=None,
            text_encoder=None,
        )
    )


def draw(pipe):
    embeds = torch.randn(2, 1, 5, 8, generator=torch.Generator().manual_seed(2))
    texts = {"prompt_embeds": embeds[0], "negative_prompt_embeds": embeds[1]}
    texts |= {"prompt_attention_mask": torch.ones(1, 5), "negative_prompt_attention_mask": torch.ones(1, 5)}
    options = {"width": 160, "height": 192, "use_resolution_binning": False, "num_inference_steps": 2}
    result = pipe(
        prompt=None,
        negative_prompt=None,
        **texts,
        **options,
        output_type="pt",
        generator=torch.Generator().manual_seed(0),
    )
    return torch.as_tensor(result[0])


@pytest.mark.filterwarnings("ignore:SanaTransformer2DModel is a denoiser of no known kind:RuntimeWarning")
@MODES
def test_a_pipeline_makes_the_untiled_picture(mode):
    pipe = pipeline()
    expected = draw(pipe)
    patch = LargeResPatch(pipe, 160, 192, vae_mode=mode, vae_chunk_size_x=10, vae_chunk_size_y=10)
    assert "vae (AutoencoderDC): encoder and decoder exactly, in" in repr(patch)
    with patch:
        assert error(draw(pipe), expected) < 1e-4
    assert torch.equal(draw(pipe), expected)
