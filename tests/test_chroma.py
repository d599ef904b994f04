"""Chroma: as Flux, with masks over text that only fills up, and guidance in two calls."""

from typing import ClassVar

import diffusers as d
import torch
from joint import HEIGHT, WIDTH, Case, JointTests
from test_flux import IP, ip_adapter

import tiny
from family import noise, picture

MASK = torch.tensor([[1.0, 1, 1, 1, 0]])
TEXT = {"prompt_embeds": noise(1, 5, 32), "prompt_attention_mask": MASK}
NEGATIVE = {"negative_prompt_embeds": noise(1, 5, 32, seed=7), "negative_prompt_attention_mask": MASK.flip(1)}
GUIDED = TEXT | NEGATIVE
ALONE = TEXT | {"guidance_scale": 1.0}
TWO = {"prompt_embeds": noise(2, 5, 32), "prompt_attention_mask": torch.cat([MASK, torch.ones(1, 5)])}
LONG = {"prompt_embeds": noise(1, 512, 32), "prompt_attention_mask": torch.ones(1, 512)}
IMAGE = {"image": picture(size=WIDTH)[:, :, :HEIGHT], "strength": 0.9}
MODEL = {"in_channels": 16, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2}
MODEL |= {"joint_attention_dim": 32, "axes_dims_rope": (4, 4, 8), "approximator_num_channels": 8}
MODEL |= {"approximator_hidden_dim": 16, "approximator_layers": 1}


def pipeline(kind=d.ChromaPipeline, then=None):
    pipe = kind(
        transformer=tiny.frozen(d.ChromaTransformer2DModel, 32, **MODEL),
        vae=tiny.flow_vae(4),
        scheduler=d.FlowMatchEulerDiscreteScheduler(),
        text_encoder=None,
        tokenizer=None,
    )
    if then is not None:
        then(pipe)
    return pipe


class TestChroma(JointTests):
    family = "Chroma"
    prompt: ClassVar = LONG | {f"negative_{name}": value for name, value in LONG.items()}
    cases: ClassVar = {
        "text": Case(pipeline, GUIDED),
        "without guidance": Case(pipeline, ALONE),
        "a mask of truths": Case(pipeline, ALONE | {"prompt_attention_mask": MASK.bool()}),
        "texts of different lengths": Case(pipeline, TWO | {"guidance_scale": 1.0}),
        "from a picture": Case(lambda: pipeline(d.ChromaImg2ImgPipeline), GUIDED | IMAGE),
        "IP-Adapter": Case(lambda: pipeline(then=ip_adapter), GUIDED | IP),
    }
