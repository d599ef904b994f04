"""Flux: text first, two streams, then one; every pipeline that calls its transformer."""

from typing import ClassVar

import diffusers as d
import torch
from joint import HEIGHT, WIDTH, Case, JointTests, embeds
from peft import LoraConfig

import tiny
from family import mask, noise, picture

TEXT = embeds(32, 32)
NEGATIVE = embeds(32, 32, seed=7, negative=True) | {"true_cfg_scale": 3.0}
IMAGE = {"image": picture(size=WIDTH)[:, :, :HEIGHT]}
IP = {"ip_adapter_image_embeds": [noise(1, 1, 10)], "negative_ip_adapter_image_embeds": [noise(1, 1, 10, seed=6)]}
MODEL = {"patch_size": 1, "in_channels": 16, "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2}
MODEL |= {"joint_attention_dim": 32, "pooled_projection_dim": 32, "axes_dims_rope": (4, 4, 8), "num_single_layers": 2}


def pipeline(kind=d.FluxPipeline, more=None, then=None, **changes):
    texts = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipe = kind(
        transformer=tiny.frozen(d.FluxTransformer2DModel, 15, **MODEL | changes),
        vae=tiny.flow_vae(4),
        scheduler=d.FlowMatchEulerDiscreteScheduler(),
        **texts,
        **(more or {}),
    )
    if then is not None:
        then(pipe)
    return pipe


def of(kind, **changes):
    return lambda: pipeline(kind, **changes)


def controlnet():
    return {"controlnet": tiny.frozen(d.FluxControlNetModel, 16, **MODEL)}


def lora(pipe):
    torch.manual_seed(6)
    targets = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.2", "proj_mlp", "proj_out"]
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))


def ip_adapter(pipe):
    from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection
    from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

    torch.manual_seed(7)
    model = pipe.transformer
    processors = {
        name: processor if "single" in name else FluxIPAdapterAttnProcessor(32, 32, (4,)).requires_grad_(False)
        for name, processor in model.attn_processors.items()
    }
    model.set_attn_processor(processors)
    model.encoder_hid_proj = MultiIPAdapterImageProjection([ImageProjection(10, 32, 4)]).requires_grad_(False)


class TestFlux(JointTests):
    family = "Flux"
    prompt: ClassVar = embeds(32, 32, tokens=512)
    cases: ClassVar = {
        "text": Case(pipeline, TEXT),
        "guidance in two calls": Case(pipeline, TEXT | NEGATIVE),
        "guidance told": Case(of(d.FluxPipeline, guidance_embeds=True), TEXT),
        "two pictures": Case(pipeline, embeds(32, 32, batch=2)),
        "from a picture": Case(of(d.FluxImg2ImgPipeline), TEXT | IMAGE),
        "Control": Case(
            of(d.FluxControlPipeline, in_channels=32, out_channels=16), TEXT | {"control_image": IMAGE["image"]}
        ),
        "Fill": Case(
            of(d.FluxFillPipeline, in_channels=16 + 16 + 256, out_channels=16),
            TEXT | IMAGE | {"mask_image": mask()},
        ),
        "ControlNet": Case(
            lambda: pipeline(d.FluxControlNetPipeline, controlnet()), TEXT | {"control_image": IMAGE["image"]}
        ),
        "Kontext": Case(
            of(d.FluxKontextPipeline), TEXT | {"image": picture(), "max_area": WIDTH * HEIGHT, "_auto_resize": False}
        ),
        "IP-Adapter": Case(of(d.FluxPipeline, then=ip_adapter), TEXT | IP),
        "LoRA": Case(of(d.FluxPipeline, then=lora), TEXT),
    }
