"""CogView 4: text first, which may be masked; guidance in two calls; positions that are stretched over the image."""

from typing import ClassVar

import diffusers as d
import pytest
import torch
from joint import ALL, CLOSE, HEIGHT, WIDTH, Case, JointTests, embeds, error, patch

import tiny
from conftest import quiet
from family import noise, picture
from largerespatch import LargeResPatch

TEXT = embeds(32) | embeds(32, seed=7, negative=True, tokens=9)


def pipeline(kind=d.CogView4Pipeline, **changes):
    config = {"patch_size": 2, "in_channels": 4, "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2}
    config |= {"out_channels": 4, "text_embed_dim": 32, "time_embed_dim": 8, "condition_dim": 4, "sample_size": 8}
    return kind(
        tokenizer=None,
        text_encoder=None,
        vae=tiny.vae(),
        transformer=tiny.frozen(d.CogView4Transformer2DModel, 20, **config | changes),
        scheduler=d.FlowMatchEulerDiscreteScheduler(),
    )


def seed(*_):
    torch.manual_seed(0)


def control():
    pipe = pipeline(d.CogView4ControlPipeline, in_channels=8)
    pipe.vae.encoder.register_forward_pre_hook(seed)  # what becomes of the picture is drawn without a generator
    return pipe


class TestCogView4(JointTests):
    family = "CogView 4"
    waits: ClassVar = {"a tensor brought, denoisers/cogview4.py: <genexpr>"}  # positions, once
    prompt: ClassVar = embeds(32, tokens=1024) | embeds(32, tokens=1024, seed=7, negative=True)
    cases: ClassVar = {
        "text": Case(pipeline, TEXT),
        "without guidance": Case(pipeline, TEXT | {"guidance_scale": 1.0}),
        "two pictures": Case(pipeline, embeds(32, batch=2) | embeds(32, batch=2, seed=7, negative=True)),
        "Control": Case(
            control,
            TEXT | embeds(32, seed=7, negative=True) | {"control_image": picture(size=WIDTH)[:, :, :HEIGHT]},
        ),
    }


def test_text_that_is_masked_counts_as_upstream_has_it():
    """It adds one to scores, rather: the mask is made a number there."""
    pipe = quiet(pipeline())
    told = {"hidden_states": noise(2, 4, 22, 26), "encoder_hidden_states": noise(2, 5, 32), "return_dict": False}
    told |= {name: torch.full((2, 2), 64.0) for name in ("original_size", "target_size", "crop_coords")}
    told |= {"timestep": torch.tensor([500.0, 500.0])}
    masked = told | {"attention_mask": torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])}
    dense = pipe.transformer(**masked)[0]
    assert not torch.allclose(dense, pipe.transformer(**told)[0])
    with patch(pipe, attn_context=ALL):
        assert error(pipe.transformer(**masked)[0], dense) < CLOSE
    with patch(pipe, attn_context=0):
        assert error(pipe.transformer(**masked)[0], dense) > 10 * CLOSE


def test_where_neighbours_share_positions_it_is_said():
    pipe = pipeline(rope_axes_dim=(8, 8))
    LargeResPatch(pipe, 128, 128)
    said = "at most 128 sample pixels for CogView4Transformer2DModel.*got 128x144"
    with pytest.warns(RuntimeWarning, match=said) as warned:
        LargeResPatch(pipe, 128, 144)
    assert warned[0].filename == __file__
