"""What only trained weights can show, and the script that trains them."""

import copy
import gzip
import itertools
import json
import math
import shutil

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel, StableDiffusionPipeline
from PIL import Image

from _common import psnr
from conftest import DEMO_MODEL, EXAMPLES
from largerespatch import LargeResPatch
from largerespatch.techniques.vae import two_pass as two_pass_room

DEMO_TRANSFORMER = EXAMPLES / "demo_transformer"
SIDE = 384  # half again the training size
COAST = "a region, green coast by a deep sea, mountains"
DESERT, OCEAN = "a continent, desert land, mountains", "a continent, open sea, a deep sea"


@pytest.fixture(scope="module")
def latent(demo):
    """Of a picture of `SIDE`, unscaled; painted nearly to its end, for the VAE knows no others."""
    with torch.no_grad():
        return paint(demo, COAST, side=SIDE, steps=6, output_type="latent") / demo.vae.config.scaling_factor


@pytest.fixture(scope="module")
def untiled(demo, latent):
    """The picture; not to be changed."""
    with torch.no_grad():
        return demo.vae.decode(latent).sample


def paint(pipe, prompt, side=256, steps=2, output_type="pt"):
    options = {"guidance_scale": 3.0, "generator": torch.Generator().manual_seed(0), "output_type": output_type}
    return pipe(prompt, width=side, height=side, num_inference_steps=steps, **options).images


def test_it_is_small_enough_to_ship():
    files = [path for path in DEMO_MODEL.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 25e6
    assert {path.suffix for path in files} <= {".json", ".txt", ".md", ".safetensors"}


def test_its_vae_restores_what_it_has_never_seen(demo):
    """As measured on the maps, which are not here, from weights with this scaling factor."""
    figures = json.loads((EXAMPLES / "benchmarks" / "results" / "demo_model.json").read_text())
    assert figures["scaling_factor"] == demo.vae.config.scaling_factor
    restored, silent = figures["psnr_db"], figures["psnr_db_without_residual_branches"]
    assert restored["mean, native"] >= 34
    assert all(silent[name] <= restored[name] - 3 for name in restored)


def test_its_record_and_its_card_tell_the_same():
    records = [json.loads((folder / "training.json").read_text()) for folder in (DEMO_MODEL, DEMO_TRANSFORMER)]
    assert records[0] == records[1]
    figures = json.loads((EXAMPLES / "benchmarks" / "results" / "demo_model.json").read_text())
    card = (DEMO_MODEL / "README.md").read_text(encoding="utf-8")
    for name, restored in figures["psnr_db"].items():
        silent = figures["psnr_db_without_residual_branches"][name]
        assert f"| {name} | {restored:.2f} | {silent:.2f} |" in card
        if name in records[0]["vae"]:  # on a GPU, whose convolutions round more
            assert abs(records[0]["vae"][name] - restored) < 0.05
    assert all(str(records[0][part]["step"]) in card for part in ("vae", "unet"))
    assert str(records[0]["transformer"]["step"]) in (DEMO_TRANSFORMER / "README.md").read_text(encoding="utf-8")


def test_the_prompt_matters(demo):
    """A desert is redder than the sea, from the same noise."""

    def warmth(prompt):
        red, _, blue = paint(demo, prompt, steps=4)[0].mean(dim=(1, 2))
        return red - blue

    assert warmth(DESERT) > warmth(OCEAN) + 0.2


def test_its_residual_branches_matter(demo, untiled, parts):
    """Without them a picture of its own comes back at least 3 dB worse."""
    picture = untiled[..., :192, :192]
    restored = psnr(parts.vae.reconstruct(demo.vae, picture), picture, 2.0)
    with parts.vae.branches_silent(demo.vae):
        assert psnr(parts.vae.reconstruct(demo.vae, picture), picture, 2.0) < restored - 3


def test_two_passes_are_far_closer_to_untiled_than_upstreams_tiling(demo, latent, untiled):
    with LargeResPatch(demo, SIDE, SIDE, vae_chunk_size_x=24, vae_chunk_size_y=24):
        two_pass = demo.vae.decode(latent).sample
    demo.vae.enable_tiling()
    try:
        tiled = demo.vae.decode(latent).sample
    finally:
        demo.vae.disable_tiling()
    assert not torch.equal(two_pass, untiled), "nothing was tiled"
    assert psnr(two_pass, untiled, 2.0) > psnr(tiled, untiled, 2.0) + 10


@pytest.mark.parametrize("limit", [two_pass_room.WHOLE_BYTES, 1])
def test_two_passes_are_as_good_as_untiled_to_the_eye(demo, untiled, monkeypatch, limit):
    """70 dB where as little as may be is in tiles, 65 where all is that can."""
    monkeypatch.setattr(two_pass_room, "WHOLE_BYTES", limit)
    latents = demo.vae.encode(untiled).latent_dist.mode()
    decoded = demo.vae.decode(latents).sample
    with LargeResPatch(demo, SIDE, SIDE, vae_chunk_size_x=24, vae_chunk_size_y=24):
        encoded_in_tiles = demo.vae.encode(untiled).latent_dist.mode()
        decoded_in_tiles = demo.vae.decode(latents).sample
    least = 70 if limit > 1 else 65
    assert psnr(decoded_in_tiles, decoded, 2.0) > least
    assert psnr(encoded_in_tiles, latents, float(latents.max() - latents.min())) > least


def test_exact_is_untiled_to_rounding(demo, latent, untiled):
    with LargeResPatch(demo, SIDE, SIDE, vae_mode="exact", vae_chunk_size_y=24) as patch:
        assert patch.options.vae_mode == "exact"
        exact = demo.vae.decode(latent).sample
    assert not torch.equal(exact, untiled), "nothing ran in strips"
    torch.testing.assert_close(exact, untiled, rtol=0, atol=2e-4)


def test_context_brings_blocked_attention_closer_to_whole(demo):
    """One step of the U-Net on pure noise, where attention looks furthest."""
    noise = torch.randn(1, 8, SIDE // 8, SIDE // 8, generator=torch.Generator().manual_seed(0))
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
    import demo_training
    from demo_training import captions, data, denoiser, loop, planets, pool, text, vae  # noqa: F401

    return demo_training


def test_nothing_of_the_held_out_region_is_trained_on(parts):
    earth = np.full((270, 540, 3), 100, np.uint8)
    parts.data.held_out_region(earth)[:] = 255
    assert (earth == 255).any()
    assert (parts.data.without_held_out(earth) == 100).all()


def test_a_planet_goes_on_at_its_left_edge(parts):
    earth = np.arange(8, dtype=np.uint8)[None].repeat(4, axis=0)
    assert parts.data.crop(earth, 1, 6, 2, 4).tolist() == [[6, 7, 0, 1]] * 2


def test_a_planet_turned_about_its_own_axis_only_moves_east(parts):
    earth = torch.rand(3, 32, 64)
    assert torch.equal(parts.planets.tilted(earth, 0.0, 0.0, (32, 64), "nearest"), earth)
    spun = parts.planets.tilted(earth, 0.0, 0.5, (32, 64), "nearest")
    assert torch.equal(spun, earth.roll(-16, dims=2))


def test_a_tilted_planet_keeps_its_pole_on_its_meridian(parts):
    earth = torch.zeros(1, 90, 180)
    earth[:, :2] = 255
    _, rows, columns = torch.nonzero(parts.planets.tilted(earth, 40.0, 0.0, (90, 180), "nearest"), as_tuple=True)
    assert abs(rows.double().mean() - 20) < 2 and len(set(columns.tolist())) < 20


def test_crops_go_around_the_planet_and_are_turned_as_said(parts):
    small, large = torch.arange(6).view(2, 3, 1), 10 + torch.arange(12).view(3, 4, 1)
    pool = parts.pool.FlatPool.of(torch.cat([small.flatten(0, 1), large.flatten(0, 1)]), [(2, 3), (3, 4)])
    index, top, left = torch.tensor([[0, 1], [0, 1], [2, 3]])
    crops = pool.crops(index, top, left, (2, 2))
    assert crops[0, 0].tolist() == [[2, 0], [5, 3]]
    assert crops[1, 0].tolist() == [[17, 14], [21, 18]]
    turned = torch.tensor([[True, False, False], [False, True, True]])
    assert torch.equal(pool.crops(index, top, left, (2, 2), turned), torch.stack([crops[0].mT, crops[1].flip(1, 2)]))


def test_windows_show_what_their_classes_say(parts):
    """On a map whose every pixel is its class, tilted, mirrored and turned alike."""
    earth = np.random.default_rng(0).integers(0, 5, (32, 64), np.uint8).repeat(8, axis=0).repeat(8, axis=1)
    pixels = torch.from_numpy(earth)[None].float().expand(3, -1, -1)
    levels = {512: (pixels, torch.from_numpy(earth)[None].float())}
    windows = list(parts.planets.draw_windows(levels, 512, 8, np.random.default_rng(0)))
    assert len({cells.tobytes() for _, cells in windows}) > 1
    for window, cells in windows:
        assert (window[4::8, 4::8, 0].numpy() == cells).all()


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
        matrices = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
        values = torch.linalg.svdvals(parts.loop.orthogonal(matrices))
        assert values.min() > 0.4 and values.max() < 1.4
        assert (torch.linalg.svdvals(matrices) / 8 - 1).abs().max() > 0.5


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
    parts.pool.normalise(vae, *parts.pool.statistics(latent[0].flatten(1).T))
    after = vae.encode(image).latent_dist.mode() * vae.config.scaling_factor
    torch.testing.assert_close(parts.vae.reconstruct(vae, image), before, rtol=0, atol=1e-4)
    torch.testing.assert_close(after.std(dim=(0, 2, 3)), torch.ones(8), rtol=0, atol=1e-2)
    torch.testing.assert_close(after.mean(dim=(0, 2, 3)), torch.zeros(8), rtol=0, atol=1e-2)


class Clock:
    """A `time` that goes on by a second whenever somebody looks."""

    def __init__(self):
        self.ticks = itertools.count()

    def monotonic(self):
        return next(self.ticks)


@pytest.fixture
def seconds(parts, monkeypatch):
    """Steps of training take a second each."""
    monkeypatch.setattr(parts.loop, "time", Clock())


class BrokenOffError(Exception):
    pass


def train_a_little(parts, folder, seconds, break_at=None):
    """Of a two-layer network, broken off before a step; the averaged weights."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    average = copy.deepcopy(model).requires_grad_(False)
    steps = itertools.count()

    def loss_at(progress):
        if next(steps) == break_at:
            raise BrokenOffError
        loss = (model(torch.rand(8, 4)) - progress).square().mean()
        return loss, {"loss": loss}

    options = {"seed": 0, "peak_rate": 0.1, "inner": lambda name: name.startswith("0"), "decay": 0.9}
    with torch.enable_grad():
        parts.loop.train(
            "toy", model, average, loss_at, folder=folder, seconds=seconds, report=lambda: {"figure": 7.0}, **options
        )
    return average.state_dict()


def test_an_interrupted_training_equals_a_whole_one(parts, seconds, tmp_path, monkeypatch):
    monkeypatch.setattr(parts.loop, "SAVE_SECONDS", 2)
    (tmp_path / "whole").mkdir()
    with pytest.raises(BrokenOffError):
        train_a_little(parts, tmp_path, 10, break_at=5)
    assert torch.load(tmp_path / "toy.pt", weights_only=True)["step"] == 3, "the last that was kept"
    resumed, whole = train_a_little(parts, tmp_path, 10), train_a_little(parts, tmp_path / "whole", 10)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    rows = [json.loads(line) for line in (tmp_path / "toy.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [3, 6, 9, 10] and rows[-1]["figure"] == 7
    again = train_a_little(parts, tmp_path, 10, break_at=0)
    assert all(torch.equal(again[name], whole[name]) for name in whole), "its time was over"


def test_a_training_that_went_wrong_keeps_its_last_good_weights(parts, seconds, tmp_path, monkeypatch):
    monkeypatch.setattr(parts.loop, "SAVE_SECONDS", 2)
    monkeypatch.setattr(parts.loop, "learning_rate", lambda step, progress, peak: math.nan if step > 3 else peak)
    with pytest.raises(FloatingPointError, match="toy"):
        train_a_little(parts, tmp_path, 10)
    state = torch.load(tmp_path / "toy.pt", weights_only=True)
    assert state["step"] == 3 and all(weight.isfinite().all() for weight in state["average"].values())


@pytest.fixture
def training(parts, seconds, monkeypatch, tmp_path):
    """A folder for the training script, with maps of another planet; everything in it made tiny."""
    monkeypatch.setattr(parts.data, "NATIVE", (270, 540))
    for part in (parts.data, parts.vae):
        monkeypatch.setattr(part, "SCALES", parts.data.SCALES[:2])
    for part in (parts.planets, parts.pool):
        monkeypatch.setattr(part, "WINDOWS", {512: ((128, 256), 1), 1024: ((64, 128), 1)})
    monkeypatch.setattr(parts.pool, "CROPS", {(8, 8): 4})
    monkeypatch.setattr(parts.pool, "FEWEST", 4)
    monkeypatch.setattr(parts.vae, "START_CROPS", 2)
    monkeypatch.setattr(parts.vae, "PHASES", ((1.0, 32, 1),))
    monkeypatch.setattr(parts.vae, "TEST_SIZE", 64)
    monkeypatch.setattr(parts.text, "STEPS", 2)
    monkeypatch.setattr(parts.denoiser, "PHASES", ((1.0, (((8, 8), 2, 1.0),)),))
    monkeypatch.setattr(parts.denoiser, "SHEET", (("a whole planet", 64, 64),))
    monkeypatch.setattr(parts.denoiser, "SHEET_STEPS", 2)
    rng = np.random.default_rng(0)
    (tmp_path / "maps").mkdir()
    for name in parts.data.FILES:
        coarse = Image.fromarray(rng.integers(0, 256, (27, 54, 3), dtype=np.uint8))
        coarse.resize((540, 270), Image.Resampling.BICUBIC).save(tmp_path / "maps" / name)
    merges = (DEMO_MODEL / "tokenizer" / "merges.txt").read_bytes()
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "bpe_simple_vocab_16e6.txt.gz").write_bytes(gzip.compress(merges, 1))
    yield tmp_path
    for work in ("work", "whole"):
        shutil.rmtree(tmp_path / work, ignore_errors=True)  # 200 MB of checkpoints


def test_training_resumes_in_every_stage_and_exports(run, training):
    def train(work, denoiser_steps, *stages):
        with torch.enable_grad():
            run(
                EXAMPLES / "train_demo_model.py",
                *("--maps", training / "maps", "--work", training / work, "--out", training, "--device", "cpu"),
                *("--vae-minutes", 2 / 60, "--batch-share", 1, "--stages", *stages),
                *("--transformer-minutes", denoiser_steps / 60, "--unet-minutes", denoiser_steps / 60),
            )

    def kept(work, stage):
        return torch.load(training / work / f"{stage}.pt", weights_only=True)

    train("work", 1, "vae", "transformer", "unet")
    assert {stage: kept("work", stage)["step"] for stage in ("vae", "transformer", "unet")} == {
        "vae": 2,
        "transformer": 1,
        "unet": 1,
    }
    latents = (training / "work" / "latents.pt").stat().st_mtime_ns
    train("work", 2, "transformer", "unet", "export")
    assert (training / "work" / "latents.pt").stat().st_mtime_ns == latents, "they were made anew"
    for stage in ("transformer", "unet"):
        assert kept("work", stage)["step"] == 2 and (training / "work" / f"{stage}.png").exists()
    only = shutil.ignore_patterns("transformer*", "unet*")
    shutil.copytree(training / "work", training / "whole", ignore=only, dirs_exist_ok=True)
    train("whole", 2, "unet")
    resumed, whole = (kept(work, "unet")["average"] for work in ("work", "whole"))
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)

    pipe = StableDiffusionPipeline.from_pretrained(training / "demo_model")
    assert paint(pipe, "a planet", side=64, steps=2).shape == (1, 3, 64, 64)
    transformer = FluxTransformer2DModel.from_pretrained(training / "demo_transformer" / "transformer")
    weights = kept("work", "transformer")["average"]
    assert all(torch.equal(weights[name].half().float(), weight) for name, weight in transformer.state_dict().items())
    record = json.loads((training / "demo_model" / "training.json").read_text())
    assert record["unet"]["step"] == 2 and record["vae"].keys() >= {"silent", "l1"}


def test_a_training_of_the_vae_begins_with_another(run, training):
    """At no minutes it is that one; its figures are far from those of the start."""
    with torch.enable_grad():
        script = run(
            EXAMPLES / "train_demo_model.py",
            *("--maps", training / "maps", "--work", training / "work", "--device", "cpu"),
            *("--vae-minutes", 1 / 60, "--stages", "vae", "--vae-from", DEMO_MODEL / "vae"),
        )
    assert script["USUAL"]["cpu"]["batch_share"] < 1
    trained = torch.load(training / "work" / "vae.pt", weights_only=True)["average"]
    shipped = AutoencoderKL.from_pretrained(DEMO_MODEL / "vae").state_dict()
    assert all(torch.allclose(trained[name], weight, atol=1e-4) for name, weight in shipped.items())


def test_a_vae_that_is_trained_further_can_keep_its_latents(run, training, parts, monkeypatch):
    """Denoisers that were trained on them need not be trained again."""
    encoded, picture = {}, torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    first = AutoencoderKL.from_pretrained(DEMO_MODEL / "vae")
    with torch.no_grad():
        expected = first.encode(picture).latent_dist.mode()
    monkeypatch.setattr(parts.vae, "PEAK_RATE", 0.1)
    for weight in (0, 1e4):
        monkeypatch.setattr(parts.vae, "KEPT_WEIGHT", weight)
        shutil.rmtree(training / "work")
        with torch.enable_grad():
            run(
                EXAMPLES / "train_demo_model.py",
                *("--maps", training / "maps", "--work", training / "work", "--device", "cpu", "--keep-latents"),
                *("--vae-minutes", 8 / 60, "--stages", "vae", "--vae-from", DEMO_MODEL / "vae"),
            )
        first.load_state_dict(torch.load(training / "work" / "vae.pt", weights_only=True)["model"])
        with torch.no_grad():
            encoded[weight] = (first.encode(picture).latent_dist.mode() - expected).square().mean().item()
        assert json.loads((training / "work" / "vae.jsonl").read_text().splitlines()[-1])["moved"] > 0
    assert 0 < encoded[1e4] < encoded[0] / 2
    with pytest.raises(SystemExit):
        run(EXAMPLES / "train_demo_model.py", "--keep-latents", "--work", training / "work")
