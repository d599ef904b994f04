"""AuraFlow: text first, two streams, then one; positions from a table."""

from typing import ClassVar

import diffusers as d
import pytest
import torch
from joint import Case, JointTests, embeds, strayed

import tiny
from conftest import quiet
from family import noise
from largerespatch import LargeResPatch


def texts(batch=1, tokens=5):
    told = embeds(32, batch=batch, tokens=tokens) | embeds(32, batch=batch, tokens=tokens, seed=7, negative=True)
    return told | {f"{prefix}prompt_attention_mask": torch.ones(batch, tokens) for prefix in ("", "negative_")}


TEXT = texts()


def pipeline(**changes):
    config = {"sample_size": 8, "patch_size": 2, "in_channels": 4, "num_mmdit_layers": 2, "num_single_dit_layers": 2}
    config |= {"attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 32}
    config |= {"caption_projection_dim": 16, "out_channels": 4, "pos_embed_max_size": 64 * 64}
    transformer = tiny.frozen(d.AuraFlowTransformer2DModel, 19, **config | changes)
    for block in [*transformer.joint_transformer_blocks, *transformer.single_transformer_blocks]:
        block.norm1.linear.weight *= 8  # or the gates would be all but shut
    return d.AuraFlowPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=tiny.vae(),
        transformer=transformer,
        scheduler=d.FlowMatchEulerDiscreteScheduler(),
    )


def fused():
    pipe = pipeline(num_mmdit_layers=0)  # those with more projections cannot be fused
    pipe.transformer.fuse_qkv_projections()
    return pipe


class TestAuraFlow(JointTests):
    family = "AuraFlow"
    prompt: ClassVar = texts(tokens=256)
    cases: ClassVar = {
        "text": Case(pipeline, TEXT),
        "without guidance": Case(pipeline, TEXT | {"guidance_scale": 1.0}),
        "two pictures": Case(pipeline, texts(2)),
        "fused": Case(fused, TEXT),
    }


def test_text_and_registers_see_all_in_one_stream():
    pipe = quiet(pipeline(num_mmdit_layers=0))
    away = strayed(pipe, pipe.transformer.single_transformer_blocks[0], TEXT)
    assert away[:13].max() < 1e-5 < 1e-4 < away[13:].max()


def call(pipe, width, height):
    model = pipe.transformer
    told = {"encoder_hidden_states": noise(1, 5, 32), "timestep": torch.tensor([0.5])}
    return model(noise(1, 4, height // 8, width // 8), **told).sample


def test_beyond_its_table_of_positions_is_an_error_and_a_warning_where_upstream_takes_others():
    pipe = quiet(pipeline(pos_embed_max_size=8 * 8))
    LargeResPatch(pipe, 128, 128)
    for width, height in ((128, 144), (144, 128), (400, 96)):
        with pytest.raises(IndexError):
            call(pipe, width, height)
        with pytest.raises(ValueError, match=f"at most 128 sample pixels for AuraFlow.*got {width}x{height}"):
            LargeResPatch(pipe, width, height)
    call(pipe, 160, 96)
    with pytest.warns(RuntimeWarning, match="at most 128 sample pixels for AuraFlow.*got 160x96") as warned:
        LargeResPatch(pipe, 160, 96)
    assert warned[0].filename == __file__
