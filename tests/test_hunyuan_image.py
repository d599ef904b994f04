"""HunyuanImage 2.1: image first, masks over the text of two encoders, guiders that call twice, a refiner of tokens."""

from typing import ClassVar

import diffusers as d
import pytest
import test_hunyuan_vae
import torch
from joint import ALL, CLOSE, HEIGHT, WIDTH, Case, JointTests, error, paint, patch

import tiny
from conftest import quiet
from family import noise, picture

# Tokens of the second encoder come first, those that are no text last: the masks say which.
MASK, MASK_2 = torch.tensor([[1, 1, 1, 1, 0]]), torch.tensor([[1, 1, 0]])
TEXT = {"prompt_embeds": noise(1, 5, 16), "prompt_embeds_mask": MASK}
TEXT |= {"prompt_embeds_2": noise(1, 3, 16, seed=6), "prompt_embeds_mask_2": MASK_2}
NEGATIVE = {f"negative_{name}": value.flip(1) for name, value in TEXT.items()}
TWO = {name: torch.cat([value, value.flip(1)]) for name, value in TEXT.items()}


def transformer(**changes):
    config = {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2}
    config |= {"num_single_layers": 2, "num_refiner_layers": 1, "text_embed_dim": 16, "text_embed_2_dim": 16}
    return tiny.frozen(d.HunyuanImageTransformer2DModel, 22, **config | {"rope_axes_dim": (4, 4)} | changes)


def pipeline(guider=None, **changes):
    pipe = d.HunyuanImagePipeline(
        transformer=transformer(**changes),
        vae=test_hunyuan_vae.vae(spatial_compression_ratio=16, block_out_channels=(32,) * 5),
        scheduler=d.FlowMatchEulerDiscreteScheduler(),
        guider=guider,
        **dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")),
    )
    pipe.tokenizer_max_length, pipe.tokenizer_2_max_length = MASK.shape[1], MASK_2.shape[1]
    return pipe


def guided():
    from diffusers.guiders import AdaptiveProjectedMixGuidance

    return pipeline(AdaptiveProjectedMixGuidance())


class TestHunyuanImage(JointTests):
    family = "HunyuanImage 2.1"
    blocks: ClassVar = JointTests.blocks | {"vae_chunk_size_x": 8, "vae_chunk_size_y": 8}  # latents are smaller
    cases: ClassVar = {
        "text": Case(pipeline, TEXT),
        "guidance": Case(guided, TEXT | NEGATIVE),
        "texts of different lengths": Case(pipeline, TWO),
        "distilled": Case(
            lambda: pipeline(guidance_embeds=True, use_meanflow=True), TEXT | {"distilled_guidance_scale": 3.25}
        ),
    }


def test_the_refiners_picture_is_a_film_of_one():
    """Its autoencoder is left as it is."""
    vae = tiny.frozen(
        d.AutoencoderKLHunyuanImageRefiner,
        23,
        latent_channels=4,
        block_out_channels=(32,) * 5,
        layers_per_block=1,
        spatial_compression_ratio=16,
    )
    three = {"patch_size": (1, 1, 1), "rope_axes_dim": (2, 2, 4), "text_embed_2_dim": None, "guidance_embeds": True}
    parts = {"transformer": transformer(in_channels=16, out_channels=8, **three), "vae": vae}
    parts |= {"scheduler": d.FlowMatchEulerDiscreteScheduler(), "text_encoder": None, "tokenizer": None, "guider": None}
    pipe = quiet(d.HunyuanImageRefinerPipeline(**parts))
    told = {"prompt_embeds": TEXT["prompt_embeds"], "prompt_embeds_mask": MASK}
    told["image"] = picture(size=WIDTH)[:, :, :HEIGHT]
    dense = paint(pipe, told)
    left_alone = {
        "expected_warning": RuntimeWarning,
        "match": "AutoencoderKLHunyuanImageRefiner is an autoencoder of no",
    }
    with pytest.warns(**left_alone), patch(pipe, attn_context=0):
        assert error(paint(pipe, told), dense) > 10 * CLOSE
    with pytest.warns(**left_alone), patch(pipe, attn_context=ALL):
        assert error(paint(pipe, told), dense) < CLOSE
