"""The pipelines that this library is for, on tiny models: one builder each, by family and name."""

from collections.abc import Callable
from typing import Any, NamedTuple

import diffusers as d
import test_dc
import torch
from peft import LoraConfig

import tiny
from conftest import quiet

SIZE = 96  # sample pixels

DENOISER, VAE = frozenset({"attention", "feed-forward"}), frozenset({"vae"})


class Case(NamedTuple):
    """How to build a pipeline, what to call it with, and what is cut up at a size where everything is."""

    build: Callable[[], Any]
    arguments: dict[str, Any]
    cuts: frozenset[str] = DENOISER | VAE


def noise(*shape, seed=5):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def picture(channels=3, size=SIZE):
    coarse = torch.rand(1, channels, 6, 6, generator=torch.Generator().manual_seed(5))
    return torch.nn.functional.interpolate(coarse, (size, size), mode="bilinear")


def mask():
    result = torch.zeros(1, 1, SIZE, SIZE)
    result[:, :, 20:70, 30:80] = 1
    return result


def sd(kind=d.StableDiffusionPipeline, *, then=None, **changes):
    """A builder of a Stable Diffusion pipeline; `changes` to its components may be builders; `then` finishes it."""
    return _builder(kind, tiny.components, changes, then)


def xl(kind=d.StableDiffusionXLPipeline, *, then=None, **changes):
    return _builder(kind, tiny.xl_components, changes, then)


def _builder(kind, components, changes, then):
    def build():
        pipe = quiet(kind(**components(**{key: f() if callable(f) else f for key, f in changes.items()})))
        if then:
            then(pipe)
        return pipe

    return build


def lora(pipe):
    """On self-, cross-attention and feed-forward, with weights that change the picture, loaded as users load one."""
    torch.manual_seed(6)
    targets = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    weights = {f"unet.{key}": value for key, value in pipe.unet.state_dict().items() if "lora_" in key}
    weights = {key.replace(".default.", "."): value for key, value in weights.items()}
    pipe.unet.delete_adapters("default")
    pipe.load_lora_weights(weights)


def fused_lora(pipe):
    lora(pipe)
    pipe.fuse_lora()


def ip_adapter(pipe):
    torch.manual_seed(7)
    width = pipe.unet.config.cross_attention_dim
    projection = {"proj.weight": torch.randn(4 * width, 16), "proj.bias": torch.randn(4 * width)}
    projection |= {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}
    crossing = [a for name, a in tiny.attentions(pipe.unet) if name.endswith("attn2")]
    layers = {
        f"{2 * i + 1}.{name}.weight": torch.randn(attention.inner_dim, width) / width**0.5
        for i, attention in enumerate(crossing)
        for name in ("to_k_ip", "to_v_ip")
    }
    pipe.load_ip_adapter(
        {"image_proj": projection, "ip_adapter": layers}, subfolder="", weight_name="", image_encoder_folder=None
    )


def textual_inversion(pipe):
    token = torch.randn(1, 32, generator=torch.Generator().manual_seed(8))
    pipe.load_textual_inversion({"<house>": token[0]}, token="<house>")


def xl_textual_inversion(pipe):
    for suffix in ("", "_2"):
        encoder, tokenizer = getattr(pipe, f"text_encoder{suffix}"), getattr(pipe, f"tokenizer{suffix}")
        token = torch.randn(1, 32, generator=torch.Generator().manual_seed(8))
        pipe.load_textual_inversion({"<house>": token[0]}, token="<house>", text_encoder=encoder, tokenizer=tokenizer)


def freeu(pipe):
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)


def lcm(pipe):
    pipe.scheduler = d.LCMScheduler()


ONE_STEP = {"num_inference_steps": 1}  # where a case does not say that it takes more to show anything
TEXT = {"prompt": "a house", "width": SIZE, "height": SIZE}
IMAGE = {"prompt": "a house", "image": picture(), "strength": 0.7, "num_inference_steps": 2}  # of which it leaves one
CONTROL = TEXT | {"image": picture()}
CONTROLS = TEXT | {"image": [picture(), picture().flip(-1)], "controlnet_conditioning_scale": [0.7, 0.4]}
INPAINT = IMAGE | {"mask_image": mask(), "width": SIZE, "height": SIZE}
IP = TEXT | {"ip_adapter_image_embeds": [noise(2, 1, 16)]}
IP_MASKS = IP | {"cross_attention_kwargs": {"ip_adapter_masks": [mask()]}}

SD = {
    "text-to-image": Case(sd(), TEXT),
    "guidance off": Case(sd(), TEXT | {"guidance_scale": 1.0}),
    "two prompts": Case(sd(), TEXT | {"prompt": ["a house", "the sea"]}),
    "two images": Case(sd(), TEXT | {"num_images_per_prompt": 2}),
    "version 2": Case(sd(unet=tiny.unet_2, scheduler=tiny.v_scheduler), TEXT),
    "image-to-image": Case(sd(d.StableDiffusionImg2ImgPipeline), IMAGE),
    "inpaint": Case(sd(d.StableDiffusionInpaintPipeline), INPAINT),
    "inpaint, 9 channels": Case(sd(d.StableDiffusionInpaintPipeline, unet=lambda: tiny.unet(in_channels=9)), INPAINT),
    "depth-to-image": Case(tiny.depth_to_image, IMAGE | {"depth_map": picture(1)[0]}),
    "InstructPix2Pix": Case(
        sd(d.StableDiffusionInstructPix2PixPipeline, unet=lambda: tiny.unet(in_channels=8)),
        {"prompt": "a house", "image": picture()},
    ),
    "x4 upscaler": Case(tiny.upscaler, {"prompt": "a house", "image": picture(size=SIZE // 4)}),
    "latent consistency": Case(
        sd(d.LatentConsistencyModelPipeline, unet=lambda: tiny.unet(time_cond_proj_dim=8), scheduler=d.LCMScheduler),
        TEXT,
    ),
    "T2I-Adapter": Case(sd(d.StableDiffusionAdapterPipeline, adapter=tiny.t2i_adapter), CONTROL),
    "ControlNet": Case(sd(d.StableDiffusionControlNetPipeline, controlnet=tiny.controlnet), CONTROL),
    "ControlNet, two": Case(sd(d.StableDiffusionControlNetPipeline, controlnet=tiny.controlnets), CONTROLS),
    "ControlNet image-to-image": Case(
        sd(d.StableDiffusionControlNetImg2ImgPipeline, controlnet=tiny.controlnet), IMAGE | {"control_image": picture()}
    ),
    "ControlNet inpaint": Case(
        sd(d.StableDiffusionControlNetInpaintPipeline, controlnet=tiny.controlnet),
        INPAINT | {"control_image": picture()},
    ),
    "IP-Adapter": Case(sd(then=ip_adapter), IP),
    "IP-Adapter with a mask": Case(sd(then=ip_adapter), IP_MASKS),
    "LoRA": Case(sd(then=lora), TEXT),
    "LoRA, fused": Case(sd(then=fused_lora), TEXT),
    "textual inversion": Case(sd(then=textual_inversion), TEXT | {"prompt": "a <house>"}),
    "PAG": Case(sd(d.StableDiffusionPAGPipeline), TEXT),
    "FreeU": Case(sd(then=freeu), TEXT),
    "AnimateDiff": Case(tiny.animate_diff, TEXT | {"num_frames": 2}),
}
XL = {
    "text-to-image": Case(xl(), TEXT),
    "guidance off": Case(xl(), TEXT | {"guidance_scale": 1.0}),
    "two prompts": Case(xl(), TEXT | {"prompt": ["a house", "the sea"]}),
    "two images": Case(xl(), TEXT | {"num_images_per_prompt": 2}),
    "image-to-image": Case(xl(d.StableDiffusionXLImg2ImgPipeline), IMAGE),
    "refiner": Case(tiny.refiner, IMAGE),
    "inpaint": Case(xl(d.StableDiffusionXLInpaintPipeline), INPAINT),
    "inpaint, 9 channels": Case(
        xl(d.StableDiffusionXLInpaintPipeline, unet=lambda: tiny.unet(**tiny.XL_UNET, in_channels=9)), INPAINT
    ),
    "InstructPix2Pix": Case(
        xl(d.StableDiffusionXLInstructPix2PixPipeline, unet=lambda: tiny.unet(**tiny.XL_UNET, in_channels=8)), CONTROL
    ),
    "latent consistency": Case(
        xl(unet=lambda: tiny.unet(**tiny.XL_UNET, time_cond_proj_dim=8), scheduler=d.LCMScheduler), TEXT
    ),
    "T2I-Adapter": Case(xl(d.StableDiffusionXLAdapterPipeline, adapter=lambda: tiny.t2i_adapter(xl=True)), CONTROL),
    "ControlNet": Case(xl(d.StableDiffusionXLControlNetPipeline, controlnet=lambda: tiny.controlnet(xl=True)), CONTROL),
    "ControlNet, two": Case(
        xl(d.StableDiffusionXLControlNetPipeline, controlnet=lambda: tiny.controlnets(xl=True)), CONTROLS
    ),
    "ControlNet image-to-image": Case(
        xl(d.StableDiffusionXLControlNetImg2ImgPipeline, controlnet=lambda: tiny.controlnet(xl=True)),
        IMAGE | {"control_image": picture()},
    ),
    "ControlNet inpaint": Case(
        xl(d.StableDiffusionXLControlNetInpaintPipeline, controlnet=lambda: tiny.controlnet(xl=True)),
        INPAINT | {"control_image": picture()},
    ),
    "IP-Adapter": Case(xl(then=ip_adapter), IP),
    "IP-Adapter with a mask": Case(xl(then=ip_adapter), IP_MASKS),
    "LoRA": Case(xl(then=lora), TEXT),
    "LoRA, fused": Case(xl(then=fused_lora), TEXT),
    "textual inversion": Case(xl(then=xl_textual_inversion), TEXT | {"prompt": "a <house>"}),
    "PAG": Case(xl(d.StableDiffusionXLPAGPipeline), TEXT),
    "FreeU": Case(xl(then=freeu), TEXT),
}
PIXART = TEXT | {"prompt": None, "negative_prompt": None, "use_resolution_binning": False}
PIXART |= {"prompt_embeds": noise(1, 5, 16), "prompt_attention_mask": torch.ones(1, 5)}
PIXART |= {"negative_prompt_embeds": noise(1, 5, 16, seed=6), "negative_prompt_attention_mask": torch.ones(1, 5)}
OTHERS = {
    "Kandinsky 2.2": Case(
        tiny.kandinsky,
        {"image_embeds": noise(1, 16), "negative_image_embeds": noise(1, 16, seed=6), "width": SIZE, "height": SIZE},
        frozenset({"attention"}) | VAE,
    ),
    "PixArt": Case(tiny.pixart, PIXART),
}
PICTURE = {"width": SIZE, "height": SIZE}
SANA = {"prompt": None, "negative_prompt": None, "use_resolution_binning": False} | PICTURE
SANA |= {"prompt_embeds": noise(1, 5, 8), "negative_prompt_embeds": noise(1, 5, 8, seed=6)}
SANA |= {"prompt_attention_mask": torch.ones(1, 5), "negative_prompt_attention_mask": torch.ones(1, 5)}
OTHERS |= {"Sana (VAE alone)": Case(test_dc.pipeline, SANA, VAE)}
FAMILIES = {"Stable Diffusion": SD, "Stable Diffusion XL": XL, "others": OTHERS}
CASES = {f"{family}: {name}": case for family, cases in FAMILIES.items() for name, case in cases.items()}


def run(pipe, arguments, **changes):
    """What a pipeline makes of `arguments`: images ``[B, C, H, W]``, or frames of a video."""
    generator = torch.Generator().manual_seed(0)
    options = {"num_inference_steps": 2, "generator": generator, "output_type": "pt"} | arguments | changes
    return torch.as_tensor(pipe(**options)[0])
