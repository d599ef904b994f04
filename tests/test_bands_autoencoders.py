"""Encoding and decoding over several processes, by autoencoders of all kinds: what each gets is what one gets alone."""

from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import test_asymmetric
import test_causal
import test_dc
import test_hunyuan_vae
import test_kl
import test_tiny
import test_vq
import torch
from diffusers.image_processor import VaeImageProcessor
from test_bands import BLOCKS, assert_as_alone, assert_close, in_shares, noise, rank_of, silent
from test_causal import Attended

from halves import picture
from largerespatch import LargeResPatch
from largerespatch.core import bands as bands_room
from largerespatch.core.bands import Bands, counting_sent
from largerespatch.memory.counting import LiveBytes
from largerespatch.techniques.attention import chunked_attention

pytestmark = pytest.mark.xdist_group("processes")


def causal(kind="Qwen-Image"):
    vae = test_causal.autoencoder(kind)
    test_causal.sharpen(vae)
    return vae


KINDS = {
    "Qwen-Image": causal,
    "Wan": lambda: causal("Wan"),
    "Wan 2.2": lambda: causal("Wan 2.2"),
    "Flux 2": test_kl.flux_2,
    "tiny": test_tiny.autoencoder,
    "HunyuanImage": test_hunyuan_vae.vae,
    "DC": test_dc.vae,
}


def given(vae, which, height, width, batch=1, seed=0):
    """What a half is given for ``height x width`` latent pixels, which for an encoder need not be whole."""
    frames = isinstance(vae.config.get("z_dim"), int)
    if which == "encode":
        factor = 8 * (vae.config.get("patch_size") or 1) if frames else 8
        x = picture(batch, int(factor * height), factor * width, seed)
    else:
        x = noise(batch, vae.config.z_dim if frames else vae.config.latent_channels, height, width, seed=seed)
    return x[:, :, None] if frames else x


def run(vae, which, x):
    if which == "decode":
        return vae.decode(x).sample
    encoded = vae.encode(x)
    return encoded.latent_dist.parameters if hasattr(encoded, "latent_dist") else encoded[0]


def pipe_of(vae):
    return SimpleNamespace(components={"vae": vae}, vae=vae, progress_bar=silent, image_processor=VaeImageProcessor())


def half(group, kind, which, size, batch=1, options=None, dtype=torch.float32):
    """Encoder or decoder, with another input in every process but the first."""
    vae, options = KINDS[kind](), dict(options or {})
    for parameter in vae.parameters():
        parameter.data = parameter.to(dtype)
    if options.pop("in turns", False):
        vae.enable_slicing()
    queries = options.pop("queries", chunked_attention.QUERIES)
    x = given(vae, which, *size, batch, seed=rank_of(group)).to(dtype)
    with (
        mock.patch.object(chunked_attention, "QUERIES", queries),
        LargeResPatch(pipe_of(vae), 960, 960, vae_mode="exact", process_group=group, **options),
        counting_sent() as sent,
    ):
        result = run(vae, which, x).float().numpy()
    assert group is None or sent["halo"]
    return result


# name: (how many processes, model, what, (height, width) in latent pixels, batch, options)
HALVES = {
    "Qwen-Image decodes": (2, "Qwen-Image", "decode", (9, 7), 2),
    "one row each": (4, "Qwen-Image", "decode", (4, 5), 1, {"vae_chunk_size_y": 3}),
    "attention in chunks": (3, "Qwen-Image", "decode", (9, 7), 2, {"queries": 20}),
    "attention blocked": (2, "Qwen-Image", "decode", (9, 7), 1, {"vae_attn": "blocked", "attn_context": 16} | BLOCKS),
    "samples in turns": (2, "Qwen-Image", "decode", (5, 4), 2, {"in turns": True}),
    "Qwen-Image encodes": (3, "Qwen-Image", "encode", (7, 5), 2, {"vae_chunk_size_y": 3}),
    "encodes an odd height": (2, "Qwen-Image", "encode", (43 / 8, 4)),
    "encodes one row each, circular": (4, "Qwen-Image", "encode", (4, 5), 1, {"padding_mode": "circular"}),
    "Wan decodes, circular": (2, "Wan", "decode", (5, 6), 1, {"padding_mode": "circular"}),
    "Wan encodes, reflected": (2, "Wan", "encode", (5, 4), 1, {"padding_mode": "reflect"}),
    "further than a band and its neighbours": (4, "Wan 2.2", "decode", (4, 5), 1, {"padding_mode": "circular"}),
    "Wan 2.2 encodes, replicated": (2, "Wan 2.2", "encode", (5, 4), 1, {"padding_mode": "replicate"}),
    "Flux 2 decodes": (2, "Flux 2", "decode", (7, 5)),
    "Flux 2 encodes": (2, "Flux 2", "encode", (5, 4)),
    "the tiny one decodes": (3, "tiny", "decode", (7, 5)),
    "the tiny one encodes": (2, "tiny", "encode", (5, 4)),
    "HunyuanImage decodes": (3, "HunyuanImage", "decode", (7, 5), 2),
    "HunyuanImage encodes": (2, "HunyuanImage", "encode", (5, 4)),
    "DC decodes": (3, "DC", "decode", (7, 5), 2),
    "DC encodes": (2, "DC", "encode", (5, 4)),
}


@pytest.mark.parametrize("name", HALVES)
def test_halves_are_those_of_one_process(pool, name):
    assert_as_alone(pool, half, *HALVES[name])


def test_half_precision_is_no_further_from_single_than_that_of_one_process(pool):
    what = ("Qwen-Image", "decode", (9, 7), 2, {})
    waiting = pool.start(2, half, *what, torch.bfloat16)
    single, alone = half(None, *what), half(None, *what, torch.bfloat16)
    most = np.square(alone - single).mean()
    assert all(0 < np.square(found - single).mean() < 1.1 * most for found in waiting())


def test_both_halves_of_guidance_decode_alike(pool):
    what = ("Qwen-Image", "decode", (5, 4))
    waiting = pool.start(4, in_shares, 2, half, *what)
    expected = half(None, *what)
    assert_close(waiting(), expected)


def places(group):
    """Where errors would say that it happened, of all that is sent."""
    found, talking = set(), Bands._talking

    def noted(self, *what):
        found.add(bands_room._PLACE.get())
        return talking(self, *what)

    with mock.patch.object(Bands, "_talking", noted):
        half(group, "HunyuanImage", "decode", (4, 4))
    return found


def test_errors_would_say_at_which_module_it_was(pool):
    for found in pool.run(2, places):
        assert {f"vae.decoder{path}" for path in ("", ".conv_in", ".mid_block.attentions.0", ".norm_out")} <= found
        assert all(place.startswith("vae.decoder") for place in found)


def untouched(group):
    """What is not of whole latent pixels, which a decoder could not make: as every process has it."""
    vae = test_tiny.autoencoder()
    x = picture(1, 45, 32)
    expected = run(vae, "encode", x)
    with LargeResPatch(pipe_of(vae), 64, 64, vae_mode="exact", process_group=group):
        return torch.equal(run(vae, "encode", x), expected)


def test_pictures_that_are_not_of_whole_latent_pixels_are_encoded_by_every_process(pool):
    assert all(pool.run(2, untouched))


# Memory


def layouts(group):
    """How far apart the channels of keys are, of all that is attended."""
    found = []
    for kind in ("Qwen-Image", "HunyuanImage"):
        vae = KINDS[kind]()
        with LargeResPatch(pipe_of(vae), 64, 64, vae_mode="exact", process_group=group), Attended() as attended:
            run(vae, "decode", given(vae, "decode", 4, 4))
        found += [key.stride(-1) for _, key in attended.met]
    return found


def test_keys_of_all_bands_lie_as_torchs_kernels_want_them(pool):
    """Of others there would be scores of all tokens for all."""
    assert pool.run(2, layouts) == [[1, 1]] * 2


def peaks(group, size):
    """Of both halves: the bytes counted in this process, and those told beforehand, by asking nobody."""
    vae = test_causal.autoencoder(base_dim=32)
    pipe, options = pipe_of(vae), {"vae_mode": "exact", "vae_chunk_size_y": 6}
    patch = LargeResPatch(pipe, 8 * size[1], 8 * size[0], process_group=group, **options)
    # One process alone: it would wait for the others.
    told = patch.estimate() if group is None or group.rank() == 1 else None
    found = []
    with patch:
        for which in ("encode", "decode"):
            x = given(vae, which, *size)
            with LiveBytes("cpu") as count:
                x = x + 0
                if which == "encode":
                    vae.encode(x).latent_dist.sample()
                else:
                    image = vae.decode(x, return_dict=False)[0][:, :, 0]
                    pipe.image_processor.postprocess(image, output_type="pt")
            found.append(count.peak)
    return found, told and [told.encode, told.decode], repr(patch)


def test_each_process_takes_a_share_and_an_estimate_is_of_the_tallest_band(pool):
    size = (25, 10)
    waiting = pool.start(3, peaks, size)
    alone, told, said = peaks(None, size)
    results = waiting()
    assert "several frames are left as they are" in said
    assert all("maps in bands of 3 processes" in said and "frames are refused" in said for _, _, said in results)
    for i in range(2):
        most = max(here[i] for here, _, _ in results)
        assert most < 0.6 * alone[i]
        assert 0.98 * most < results[1][1][i] < 1.02 * most and results[1][1][i] < 0.6 * told[i]


# What is refused


def refusal(group, what):
    """What a process says that is given this."""
    kind, which, size = what
    builders = KINDS | {"asymmetric": test_asymmetric.vae, "VQ": test_vq.vae}
    vae = builders[kind]()
    try:
        with LargeResPatch(pipe_of(vae), 96, 96, process_group=group):
            x = given(vae, which, *size)
            if kind == "Wan":
                x = x.repeat(1, 1, 2, 1, 1)
            run(vae, which, x)
    except ValueError as error:
        assert all("forward" not in vars(module) for module in vae.modules())
        return str(error)
    return ""


KNOWN = (
    "accepted are AutoencoderKL, AutoencoderKLFlux2, AutoencoderKLQwenImage, AutoencoderKLWan, AutoencoderDC, "
    "AutoencoderKLHunyuanImage, AutoencoderTiny"
)
REFUSED = {
    "one that may be shown a picture": (
        ("asymmetric", "decode", (4, 4)),
        f"share the maps of pipe.vae (AsymmetricAutoencoderKL); {KNOWN}",
    ),
    "one that looks at its latent": (("VQ", "decode", (4, 4)), f"share the maps of pipe.vae (VQModel); {KNOWN}"),
    "too low": (
        ("Qwen-Image", "encode", (1, 4)),
        "process_group: vae.encoder needs a map of at least 16 rows for 2 processes; got 8",
    ),
    "a film": (
        ("Wan", "decode", (4, 4)),
        "process_group: vae.decoder runs in bands of single frames; got several, accepted is one",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_bands_cannot_do_is_refused_by_all(pool, name):
    what, expected = REFUSED[name]
    for said in pool.run(2, refusal, what):
        assert expected in said
