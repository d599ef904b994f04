"""What only trained weights can show, and the script that trains them."""

import gzip
import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from _common import psnr
from conftest import DEMO_MODEL, EXAMPLES
from largerespatch import LargeResPatch

SIDE = 384  # half again the training size


@pytest.fixture(scope="module")
def latent(demo):
    """Of a picture of `SIDE`, unscaled."""
    with torch.no_grad():
        return paint(demo, "a brick wall", side=SIDE, output_type="latent") / demo.vae.config.scaling_factor


def paint(pipe, prompt, side=256, steps=2, output_type="pt"):
    options = {"guidance_scale": 4.0, "generator": torch.Generator().manual_seed(0), "output_type": output_type}
    return pipe(prompt, width=side, height=side, num_inference_steps=steps, **options).images


def test_it_is_small_enough_to_ship():
    files = [path for path in DEMO_MODEL.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 25e6
    assert {path.suffix for path in files} <= {".json", ".txt", ".md", ".safetensors"}


def test_the_prompt_matters(demo):
    """Autumn is redder than night, from the same noise."""

    def warmth(prompt):
        red, _, blue = paint(demo, prompt, steps=4)[0].mean(dim=(1, 2))
        return red - blue

    autumn = warmth("fallen maple leaves on the ground, golden autumn light")
    night = warmth("a dark blue lake at night, mist and black trees")
    assert autumn > night + 0.2


def test_two_passes_are_far_closer_to_untiled_than_upstreams_tiling(demo, latent):
    untiled = demo.vae.decode(latent).sample
    with LargeResPatch(demo, SIDE, SIDE, vae_chunk_size_x=24, vae_chunk_size_y=24):
        two_pass = demo.vae.decode(latent).sample
    demo.vae.enable_tiling()
    try:
        tiled = demo.vae.decode(latent).sample
    finally:
        demo.vae.disable_tiling()
    assert not torch.equal(two_pass, untiled), "nothing was tiled"
    assert psnr(two_pass, untiled, 2.0) > psnr(tiled, untiled, 2.0) + 10


def test_exact_is_untiled_to_rounding(demo, latent):
    untiled = demo.vae.decode(latent).sample
    with LargeResPatch(demo, SIDE, SIDE, vae_mode="exact", vae_chunk_size_y=24) as patch:
        assert patch.options.vae_mode == "exact"
        exact = demo.vae.decode(latent).sample
    assert not torch.equal(exact, untiled), "nothing ran in strips"
    torch.testing.assert_close(exact, untiled, rtol=0, atol=2e-4)


def test_context_brings_blocked_attention_closer_to_whole(demo):
    """One step of the U-Net on pure noise, where attention looks furthest."""
    noise = torch.randn(1, 4, 48, 48, generator=torch.Generator().manual_seed(0))
    prompt, _ = demo.encode_prompt("a brick wall", "cpu", 1, False)
    slices = {"attn_slice_x": 12, "attn_slice_y": 12, "attn_full_tokens": 400}

    def step(**settings):
        with LargeResPatch(demo, SIDE, SIDE, **slices, **settings):
            return demo.unet(noise, 999, prompt).sample

    whole = demo.unet(noise, 999, prompt).sample
    alone, context = (psnr(step(attn_context=tokens), whole, 2.0) for tokens in (0, 256))
    assert context > alone + 10


@pytest.fixture
def training(monkeypatch, tmp_path):
    """A folder for the training script, with two photographs and one held out; everything in it made tiny."""
    monkeypatch.syspath_prepend(EXAMPLES)
    from demo_training import data, decoder, text_to_image, vae

    monkeypatch.setattr(data, "sample_image_folders", list)
    monkeypatch.setattr(vae, "START_CROPS", 2)
    monkeypatch.setattr(vae, "PHASES", ((1.0, 32, 1),))
    for module in (vae, decoder):
        monkeypatch.setattr(module, "TEST_SIZE", 64)
    monkeypatch.setattr(decoder, "RECEPTIVE_RADIUS", 16)
    for phase in ("HELD", "FALLING"):
        monkeypatch.setattr(decoder, phase, ((32, 1, 1.0),))
    monkeypatch.setattr(text_to_image, "ENCODED_SIZES", ((256, False),))
    monkeypatch.setattr(text_to_image, "SHEET_PROMPTS", 1)
    monkeypatch.setattr(text_to_image, "SHEET_STEPS", 1)

    captions = json.loads(data.CAPTIONS.read_text(encoding="utf-8"))
    some = [*list(captions["photos"])[:2], *list(captions["held_out"])[:1]]
    rng = np.random.default_rng(0)
    for name in some:
        path = tmp_path / "photographs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (32, 40, 3), dtype=np.uint8))
        coarse.resize((320, 256), Image.Resampling.BICUBIC).save(path)
    merges = (DEMO_MODEL / "tokenizer" / "merges.txt").read_bytes()
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "bpe_simple_vocab_16e6.txt.gz").write_bytes(gzip.compress(merges))
    yield tmp_path
    shutil.rmtree(tmp_path / "work")  # 200 MB of checkpoints


def test_training_resumes_in_every_stage_and_exports(run, training):
    def train(work, *steps):
        folders = ("--images", training / "photographs", "--work", work, "--out", training / "model")
        with torch.enable_grad():
            run(
                EXAMPLES / "train_demo_model.py",
                *folders,
                "--device",
                "cpu",
                "--unet-batch",
                1,
                "--vae-steps",
                1,
                *steps,
            )

    def checkpoint(work, stage):
        return torch.load(work / f"{stage}.pt", weights_only=True)

    work, whole = training / "work", training / "work" / "whole"
    train(work, "--decoder-steps", 1, "--unet-steps", 1)
    train(work, "--decoder-steps", 3, "--unet-steps", 2)
    assert [checkpoint(work, stage)["step"] for stage in ("vae", "decoder", "text_to_image")] == [1, 3, 2]
    shutil.copytree(work, whole, ignore=shutil.ignore_patterns("decoder*", "text_to_image*", "latents*"))
    train(whole, "--decoder-steps", 3, "--until", "decoder")
    interrupted, uninterrupted = (checkpoint(folder, "decoder")["average"] for folder in (work, whole))
    assert all(torch.equal(interrupted[name], uninterrupted[name]) for name in uninterrupted)

    pipe = StableDiffusionPipeline.from_pretrained(training / "model")
    assert paint(pipe, "a house", side=64, steps=1).shape == (1, 3, 64, 64)
    start = checkpoint(work, "vae")["average"]
    kept = {name: torch.equal(weight, start[name].half().float()) for name, weight in pipe.vae.state_dict().items()}
    assert all(kept[name] for name in kept if name.startswith("encoder."))
    assert not all(kept[name] for name in kept if name.startswith("decoder."))
    record = json.loads((training / "model" / "training.json").read_text())
    assert record["decoder"]["last"]["step"] == 3
    assert record["decoder"]["last"].keys() >= {"silent", "quarters"}
