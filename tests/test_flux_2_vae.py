"""Flux 2's autoencoder: `AutoencoderKL`'s encoder and decoder. The batch norm over packed latents is outside of it."""

from diffusers import FlowMatchEulerDiscreteScheduler, Flux2Pipeline, Flux2Transformer2DModel
from test_kl import flux_2

import tiny
from conftest import quiet
from halves import MODES, cut_up, latent, live, patched


@MODES
def test_half_of_the_untiled_memory_is_enough(mode):
    model, z = flux_2(), latent(1, 64, 64)
    untiled = live(lambda: model.decode(z))
    with patched(model, vae_mode=mode, vae_chunk_size_x=16, vae_chunk_size_y=16):
        assert live(lambda: cut_up(lambda: model.decode(z))) <= 0.5 * untiled


def pipeline(transformer=None):
    parts = {"transformer": transformer, "text_encoder": None, "tokenizer": None}
    return quiet(Flux2Pipeline(vae=flux_2(), scheduler=FlowMatchEulerDiscreteScheduler(), **parts))


def whole_pipeline():
    """With a denoiser for its packed latents."""
    return pipeline(
        tiny.frozen(
            Flux2Transformer2DModel,
            23,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=(4, 4, 4, 4),
        )
    )
