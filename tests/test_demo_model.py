"""What only trained weights can show, and the script that trains them."""

import gzip
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel, StableDiffusionPipeline
from PIL import Image

from _common import psnr
from conftest import DEMO_MODEL, EXAMPLES
from largerespatch import LargeResPatch

DEMO_TRANSFORMER = EXAMPLES / "demo_transformer"
SIDE = 384  # half again the training size
COAST = "a region, green coast by a deep sea, mountains"
DESERT, OCEAN = "a continent, desert land, mountains", "a continent, open sea, a deep sea"


@pytest.fixture(scope="module")
def latent(demo):
    """Of a picture of `SIDE`, unscaled."""
    with torch.no_grad():
        return paint(demo, COAST, side=SIDE, output_type="latent") / demo.vae.config.scaling_factor


def paint(pipe, prompt, side=256, steps=2, output_type="pt"):
    options = {"guidance_scale": 3.0, "generator": torch.Generator().manual_seed(0), "output_type": output_type}
    return pipe(prompt, width=side, height=side, num_inference_steps=steps, **options).images


def test_it_is_small_enough_to_ship():
    files = [path for path in DEMO_MODEL.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 25e6
    assert {path.suffix for path in files} <= {".json", ".txt", ".md", ".safetensors"}


def test_the_prompt_matters(demo):
    """A desert is redder than the sea, from the same noise."""

    def warmth(prompt):
        red, _, blue = paint(demo, prompt, steps=4)[0].mean(dim=(1, 2))
        return red - blue

    assert warmth(DESERT) > warmth(OCEAN) + 0.2


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
    noise = torch.randn(1, 8, 48, 48, generator=torch.Generator().manual_seed(0))
    prompt, _ = demo.encode_prompt(COAST, "cpu", 1, False)
    slices = {"attn_slice_x": 12, "attn_slice_y": 12, "attn_full_tokens": 400}

    def step(**settings):
        with LargeResPatch(demo, SIDE, SIDE, **slices, **settings):
            return demo.unet(noise, 999, prompt).sample

    whole = demo.unet(noise, 999, prompt).sample
    alone, context = (psnr(step(attn_context=tokens), whole, 2.0) for tokens in (0, 256))
    assert context > alone + 10


def test_the_transformer_is_small_enough_to_ship():
    files = [path for path in DEMO_TRANSFORMER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12e6
    assert {path.suffix for path in files} <= {".json", ".md", ".safetensors"}


def test_the_transformer_heeds_the_prompt(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    from pipelines import load_transformer

    flux = load_transformer()
    assert 3e6 < flux.pipe.transformer.num_parameters() < 6e6

    def warmth(prompt):
        image = flux(
            prompt,
            guidance_scale=3.0,
            width=128,
            height=128,
            num_inference_steps=4,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
        ).images[0]
        red, _, blue = image.mean(dim=(1, 2))
        return red - blue

    assert warmth(DESERT) > warmth(OCEAN) + 0.2


@pytest.fixture
def parts(monkeypatch):
    """The training package's modules."""
    monkeypatch.syspath_prepend(EXAMPLES)
    from demo_training import captions, data, latents, loop, text, text_to_image, vae

    return SimpleNamespace(
        captions=captions, data=data, latents=latents, loop=loop, text=text, text_to_image=text_to_image, vae=vae
    )


def test_nothing_of_the_held_out_region_is_trained_on(parts):
    earth = np.full((270, 540, 3), 100, np.uint8)
    parts.data.held_out_region(earth)[:] = 255
    assert (earth == 255).any()
    assert (parts.data.without_held_out(earth) == 100).all()


def test_a_planet_goes_on_at_its_left_edge(parts):
    earth = np.arange(8, dtype=np.uint8)[None].repeat(4, axis=0)
    assert parts.data.crop(earth, 1, 6, 2, 4).tolist() == [[6, 7, 0, 1]] * 2


def test_a_planet_turned_about_its_own_axis_only_moves_east(parts):
    earth = np.random.default_rng(0).integers(0, 256, (32, 64, 3), np.uint8)
    same = parts.latents.tilted(earth, 0.0, 0.0, nearest=True)
    assert (same == earth).all()
    spun = parts.latents.tilted(earth, 0.0, 0.5, nearest=True)
    assert (spun == np.roll(earth, -16, axis=1)).all()


def test_a_tilted_planet_keeps_its_pole_on_its_meridian(parts):
    earth = np.zeros((90, 180), np.uint8)
    earth[:2] = 255
    rows, columns = np.nonzero(parts.latents.tilted(earth, 40.0, 0.0, nearest=True))
    assert abs(rows.mean() - 20) < 2 and len(set(columns)) < 20


def test_captions_say_what_there_is(parts):
    captions = parts.captions
    cells = np.full((32, 32), captions.DEEP, np.uint8)

    def words(cells, width=2048):
        found = {captions.caption(cells, width, np.random.default_rng(seed)) for seed in range(60)}
        assert "" in found, "none is left out for guidance"
        return " ".join(found)

    assert "open sea" in words(cells) and "continent" in words(cells) and "planet" in words(cells, 512)
    cells[:, :10] = captions.DESERT + captions.MOUNTAIN
    assert all(word in words(cells) for word in ("desert", "deep sea", "mountains"))
    assert "green" not in words(cells) and "shallow" not in words(cells)
    cells[:] = captions.GREEN
    assert "green land" in words(cells) and "sea" not in words(cells)
    assert captions.scale_words(8192) == captions.SCALE_WORDS[5400][0]


def test_classes_tell_sea_desert_forest_and_ice_apart(parts):
    colours = {"DEEP": (2, 5, 20), "SHALLOW": (30, 70, 130), "GREEN": (40, 60, 25), "DESERT": (210, 170, 120)}
    colours["ICE"] = (240, 243, 245)
    earth = np.array(list(colours.values()), np.uint8)[None].repeat(40, axis=0).repeat(12, axis=1)
    etopo = np.full_like(earth, (220, 200, 150))
    etopo[:, :24] = (30, 90, 230)
    seen = parts.captions.classes(earth, etopo, np.full_like(earth, 128))
    assert seen[20, 6::12].tolist() == [getattr(parts.captions, name) for name in colours]
    relief = np.full_like(earth, 128)
    relief[::2] = 200
    assert (parts.captions.classes(earth, etopo, relief)[20, 35] - seen[20, 35]) == parts.captions.MOUNTAIN


def test_muon_steps_are_nearly_orthogonal(parts):
    for shape in ((8, 20), (20, 8)):
        matrix = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
        values = torch.linalg.svdvals(parts.loop.orthogonal(matrix))
        assert values.min() > 0.4 and values.max() < 1.4
        assert (torch.linalg.svdvals(matrix) / 8 - 1).abs().max() > 0.5


def test_branches_are_silent_for_a_while(parts):
    vae = parts.vae.build_vae()
    image = torch.randn(1, 3, 32, 32)
    before = parts.vae.reconstruct(vae, image)
    with parts.vae.branches_silent(vae):
        assert not torch.equal(parts.vae.reconstruct(vae, image), before)
    assert torch.equal(parts.vae.reconstruct(vae, image), before)


def test_normalised_latents_decode_as_before(parts):
    vae = parts.vae.build_vae()
    image = torch.randn(1, 3, 64, 64)
    before, latent = parts.vae.reconstruct(vae, image), vae.encode(image).latent_dist.mode()
    parts.latents.normalise_latents(vae, [latent[0]])
    after = vae.encode(image).latent_dist.mode() * vae.config.scaling_factor
    torch.testing.assert_close(parts.vae.reconstruct(vae, image), before, rtol=0, atol=1e-4)
    torch.testing.assert_close(after.std(dim=(0, 2, 3)), torch.ones(8), rtol=0, atol=1e-2)
    torch.testing.assert_close(after.mean(dim=(0, 2, 3)), torch.zeros(8), rtol=0, atol=1e-2)


@pytest.fixture
def training(parts, monkeypatch, tmp_path):
    """A folder for the training script, with maps of another planet; everything in it made tiny."""
    monkeypatch.setattr(parts.data, "NATIVE", (270, 540))
    monkeypatch.setattr(parts.vae, "START_CROPS", 2)
    monkeypatch.setattr(parts.vae, "PHASES", ((1.0, 32, 1),))
    monkeypatch.setattr(parts.vae, "TEST_SIZE", 64)
    monkeypatch.setattr(parts.text, "STEPS", 2)
    monkeypatch.setattr(parts.text_to_image, "PHASES", ((1.0, (((8, 8), 2, 1.0),)),))
    monkeypatch.setattr(parts.text_to_image, "SHEET_PROMPTS", (("a whole planet", 64, 64),))
    monkeypatch.setattr(parts.text_to_image, "SHEET_STEPS", 2)
    rng = np.random.default_rng(0)
    (tmp_path / "maps").mkdir()
    for name in parts.data.FILES:
        coarse = Image.fromarray(rng.integers(0, 256, (27, 54, 3), dtype=np.uint8))
        coarse.resize((540, 270), Image.Resampling.BICUBIC).save(tmp_path / "maps" / name)
    merges = (DEMO_MODEL / "tokenizer" / "merges.txt").read_bytes()
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "bpe_simple_vocab_16e6.txt.gz").write_bytes(gzip.compress(merges))
    yield tmp_path
    shutil.rmtree(tmp_path / "work")  # 200 MB of checkpoints


def test_training_resumes_in_every_stage_and_exports(run, training):
    def train(work, *arguments):
        shared = ("--maps", training / "maps", "--work", work, "--out", training, "--device", "cpu", "--windows", 0.001)
        with torch.enable_grad():
            run(EXAMPLES / "train_demo_model.py", *shared, *arguments)

    def average(work, stage):
        return torch.load(work / f"{stage}.pt", weights_only=True)["average"]

    def equal(first, second, stage):
        first, second = average(first, stage), average(second, stage)
        return all(torch.equal(first[name], second[name]) for name in first)

    work, whole = training / "work", training / "work" / "whole"
    train(work, "--vae-steps", 1, "--stages", "vae")
    train(work, "--vae-steps", 3, "--stages", "vae")
    train(whole, "--vae-steps", 3, "--stages", "vae")
    assert equal(work, whole, "vae")
    once = average(work, "vae")

    train(work, "--transformer-steps", 1, "--unet-steps", 1, "--stages", "transformer", "unet")
    shutil.copytree(work, whole, ignore=shutil.ignore_patterns("whole", "transformer*", "unet*"), dirs_exist_ok=True)
    train(work, "--transformer-steps", 2, "--unet-steps", 2, "--stages", "transformer", "unet", "export")
    train(whole, "--transformer-steps", 2, "--unet-steps", 2, "--stages", "transformer", "unet")
    assert equal(work, whole, "transformer") and equal(work, whole, "unet")
    assert equal(work, whole, "vae"), "other stages have trained the VAE"
    assert all(torch.equal(once[name], weight) for name, weight in average(work, "vae").items())

    pipe = StableDiffusionPipeline.from_pretrained(training / "demo_model")
    assert paint(pipe, "a planet", side=64, steps=2).shape == (1, 3, 64, 64)
    transformer = FluxTransformer2DModel.from_pretrained(training / "demo_transformer" / "transformer")
    kept = average(work, "transformer")
    assert all(torch.equal(kept[name].half().float(), weight) for name, weight in transformer.state_dict().items())
    record = json.loads((training / "demo_model" / "training.json").read_text())
    assert record["unet"]["last"]["step"] == 2 and record["vae"]["last"].keys() >= {"silent", "l1"}


def test_the_encoder_rests_while_the_decoder_learns(run, training, parts):
    def train(steps):
        with torch.enable_grad():
            run(
                EXAMPLES / "train_demo_model.py",
                *("--maps", training / "maps", "--work", training / "work", "--device", "cpu"),
                *("--vae-steps", steps, "--stages", "vae"),
            )
        return torch.load(training / "work" / "vae.pt", weights_only=True)["average"]

    half, whole = train(2), train(4)  # of two steps the encoder learns in one, of four in two
    moved = {name for name in half if not torch.equal(half[name], whole[name])}
    assert any(name.startswith("decoder.") for name in moved)
    longer = train(5)
    assert not any(
        name.startswith(("encoder.", "quant_conv.")) for name in whole if not torch.equal(whole[name], longer[name])
    )
