"""Flux 2: text first, two streams, then one of fused blocks; pictures to look at, also with a cache of their keys."""

from typing import ClassVar

import diffusers as d
from diffusers.image_processor import VaeImageProcessor
from joint import ALL, CLOSE, HEIGHT, WIDTH, Case, JointTests, embeds, error, paint, patch
from test_kl import flux_2

import tiny
from conftest import quiet
from family import mask, picture

TEXT = embeds(32)
NEGATIVE = {"negative_prompt_embeds": embeds(32, seed=7)["prompt_embeds"], "guidance_scale": 3.0}
IMAGE = {"image": VaeImageProcessor.numpy_to_pil(picture(size=112)[:, :, :80].permute(0, 2, 3, 1).numpy())}
TWO = {"image": IMAGE["image"] + [IMAGE["image"][0].resize((64, 96))]}
MODEL = {"in_channels": 16, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2}
MODEL |= {"joint_attention_dim": 32, "axes_dims_rope": (4, 4, 4, 4)}


def pipeline(kind=d.Flux2Pipeline, more=None, **changes):
    return kind(
        transformer=tiny.frozen(d.Flux2Transformer2DModel, 31, **MODEL | changes),
        vae=flux_2(),
        scheduler=d.FlowMatchEulerDiscreteScheduler(),
        text_encoder=None,
        tokenizer=None,
        **(more or {}),
    )


def klein(kind=d.Flux2KleinPipeline, distilled=True):
    return lambda: pipeline(kind, {"is_distilled": distilled}, guidance_embeds=False)


INPAINT = {"image": picture(size=WIDTH)[:, :, :HEIGHT], "mask_image": mask(), "strength": 0.9}
KEPT = {"num_inference_steps": 2}  # from the first to the second


class TestFlux2(JointTests):
    family = "Flux 2"
    prompt: ClassVar = embeds(32, tokens=512)
    cases: ClassVar = {
        "text": Case(pipeline, TEXT),
        "two pictures": Case(pipeline, embeds(32, batch=2)),
        "references": Case(pipeline, TEXT | TWO),
        "Klein": Case(klein(), TEXT),
        "Klein, guidance in two calls": Case(klein(distilled=False), TEXT | NEGATIVE),
        "Klein, references": Case(klein(), TEXT | IMAGE),
        "Klein, inpaint": Case(klein(d.Flux2KleinInpaintPipeline), TEXT | INPAINT),
        "Klein, keys of references kept": Case(klein(d.Flux2KleinKVPipeline), TEXT | TWO | KEPT),
    }


def test_the_first_step_runs_in_blocks_too_where_keys_of_references_are_kept():
    case = TestFlux2.cases["Klein, keys of references kept"]
    pipe = quiet(case.build())
    dense = paint(pipe, case.arguments, num_inference_steps=1)
    with patch(pipe, attn_context=0):
        assert error(paint(pipe, case.arguments, num_inference_steps=1), dense) > 10 * CLOSE
    with patch(pipe, attn_context=ALL):
        assert error(paint(pipe, case.arguments, num_inference_steps=1), dense) < CLOSE
