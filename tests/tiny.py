"""Real architectures at toy size, from configs, with seeded random weights. Nothing is downloaded."""

import string

import torch
from diffusers import AutoencoderKL, ControlNetModel, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
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
