"""Real architectures at toy size, from configs, with seeded random weights. Nothing is downloaded."""

import string

import torch
from diffusers import (
    AnimateDiffPipeline,
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    DDPMScheduler,
    KandinskyV22Pipeline,
    MotionAdapter,
    MultiControlNetModel,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    StableDiffusionDepth2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionUpscalePipeline,
    StableDiffusionXLImg2ImgPipeline,
    T2IAdapter,
    UNet2DConditionModel,
    UNetMotionModel,
    VQModel,
)
from diffusers.models.attention_processor import Attention
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

UNET = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "cross_attention_dim": 32,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}
XL_UNET = UNET | {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 80,
    "cross_attention_dim": 64,
}
CONTROLNET_ONLY = {"conditioning_embedding_out_channels": (4, 4, 8, 8)}


def vae(**changes):
    torch.manual_seed(1)
    config = {
        "block_out_channels": (8, 8, 16, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "norm_num_groups": 4,
        "sample_size": 64,
        "force_upcast": False,
    } | changes
    return AutoencoderKL(**config).eval().requires_grad_(False)


def unet(**changes):
    torch.manual_seed(2)
    config = UNET | {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "out_channels": 4} | changes
    return UNet2DConditionModel(**config).eval().requires_grad_(False)


def controlnet(xl=False):
    torch.manual_seed(3)
    config = {
        key: value for key, value in (XL_UNET if xl else UNET).items() if key not in ("sample_size", "up_block_types")
    }
    model = ControlNetModel(**config, **CONTROLNET_ONLY).eval().requires_grad_(False)
    for zero in [*model.controlnet_down_blocks, model.controlnet_mid_block, model.controlnet_cond_embedding.conv_out]:
        torch.nn.init.normal_(zero.weight, std=0.1)  # trained ones are not zero, and zeros would hide errors
    return model


def tokenizer():
    letters = list(string.printable[:94])
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=77)


def text_encoder(kind=CLIPTextModel):
    torch.manual_seed(4)
    config = CLIPTextConfig(
        vocab_size=190,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=32,
        bos_token_id=188,
        eos_token_id=189,
        pad_token_id=189,
    )
    return kind(config).eval().requires_grad_(False)


def scheduler():
    return DDIMScheduler(clip_sample=False, steps_offset=1)


def components(**changes):
    """Of a Stable Diffusion pipeline."""
    return {
        "vae": vae(),
        "text_encoder": text_encoder(),
        "tokenizer": tokenizer(),
        "unet": unet(),
        "scheduler": scheduler(),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    } | changes


def text_to_image():
    return StableDiffusionPipeline(**components())


def xl_components(**changes):
    """Of a Stable Diffusion XL pipeline."""
    return {
        "vae": vae(force_upcast=True),
        "text_encoder": text_encoder(),
        "text_encoder_2": text_encoder(CLIPTextModelWithProjection),
        "tokenizer": tokenizer(),
        "tokenizer_2": tokenizer(),
        "unet": unet(**XL_UNET),
        "scheduler": scheduler(),
    } | changes


def frozen(kind, seed, **config):
    """A model of that kind with random weights, all of them in use: no zero-initialised layer stays so."""
    torch.manual_seed(seed)
    model = kind(**config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def attentions(model):
    return [(name, module) for name, module in model.named_modules() if isinstance(module, Attention)]


def unet_2(**changes):
    """As of Stable Diffusion 2: linear projections, a number of heads per level, another prediction."""
    return unet(use_linear_projection=True, attention_head_dim=(2, 4), **changes)


def v_scheduler():
    return DDIMScheduler(clip_sample=False, steps_offset=1, prediction_type="v_prediction")


def controlnets(xl=False):
    return MultiControlNetModel([controlnet(xl), controlnet(xl)])


def t2i_adapter(xl=False):
    kind = {"downscale_factor": 16, "adapter_type": "full_adapter_xl"} if xl else {"downscale_factor": 8}
    return frozen(T2IAdapter, 9, channels=[16, 32], num_res_blocks=1, **kind)


def depth_to_image():
    parts = components(unet=unet(in_channels=5))
    for name in ("safety_checker", "requires_safety_checker"):
        del parts[name]
    return StableDiffusionDepth2ImgPipeline(**parts, depth_estimator=None)


def upscaler():
    three = {"block_out_channels": (8, 8, 16), "down_block_types": ("DownEncoderBlock2D",) * 3}
    three |= {"up_block_types": ("UpDecoderBlock2D",) * 3}
    crossing = {"only_cross_attention": (True, False), "in_channels": 7, "num_class_embeds": 1000}
    crossing |= {"down_block_types": ("CrossAttnDownBlock2D",) * 2, "up_block_types": ("CrossAttnUpBlock2D",) * 2}
    parts = components(vae=vae(**three), unet=unet(**crossing), low_res_scheduler=DDPMScheduler())
    del parts["requires_safety_checker"]
    return StableDiffusionUpscalePipeline(**parts, max_noise_level=350)


def refiner():
    config = XL_UNET | {"cross_attention_dim": 32, "projection_class_embeddings_input_dim": 72}
    parts = xl_components(unet=unet(**config), text_encoder=None, tokenizer=None)
    return StableDiffusionXLImg2ImgPipeline(**parts, requires_aesthetics_score=True)


def animate_diff():
    motion = frozen(
        MotionAdapter,
        10,
        block_out_channels=UNET["block_out_channels"],
        motion_layers_per_block=1,
        motion_num_attention_heads=2,
        motion_norm_num_groups=8,
    )
    parts = components(unet=UNetMotionModel.from_unet2d(unet(), motion).eval().requires_grad_(False))
    for name in ("safety_checker", "requires_safety_checker"):
        del parts[name]
    return AnimateDiffPipeline(**parts, motion_adapter=motion)


def kandinsky():
    return KandinskyV22Pipeline(unet=kandinsky_unet(), movq=movq(), scheduler=DDIMScheduler(clip_sample=False))


def kandinsky_unet():
    return frozen(
        UNet2DConditionModel,
        11,
        in_channels=4,
        out_channels=8,
        addition_embed_type="image",
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        block_out_channels=(16, 32),
        encoder_hid_dim=16,
        encoder_hid_dim_type="image_proj",
        cross_attention_dim=16,
        attention_head_dim=4,
        resnet_time_scale_shift="scale_shift",
        class_embed_type=None,
        layers_per_block=1,
        norm_num_groups=8,
    )


def movq():
    return frozen(
        VQModel,
        12,
        block_out_channels=(32,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("AttnUpDecoderBlock2D", *("UpDecoderBlock2D",) * 3),
        latent_channels=4,
        num_vq_embeddings=12,
        norm_num_groups=4,
        vq_embed_dim=4,
        norm_type="spatial",
        layers_per_block=1,
    )


def pixart():
    transformer = frozen(
        PixArtTransformer2DModel,
        13,
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=16,
        cross_attention_dim=16,
        in_channels=4,
        out_channels=8,
        use_additional_conditions=False,
    )
    nothing = {"tokenizer": None, "text_encoder": None}
    return PixArtAlphaPipeline(vae=vae(), transformer=transformer, scheduler=scheduler(), **nothing)


def flow_vae(channels):
    """As Stable Diffusion 3's and Flux's: more latent channels, no convolutions around the latent."""
    return vae(latent_channels=channels, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1)
