"""The examples run, with settings as small as possible, and say what is true."""

import json
import math
import runpy
from pathlib import Path
from types import SimpleNamespace

import autoencoders
import nbformat
import numpy as np
import pytest
import torch
from nbclient import NotebookClient
from PIL import Image

import tiny as tiny_models
from conftest import EXAMPLES

BENCHMARKS = EXAMPLES / "benchmarks"
# 32x32 tokens at the finest level: small enough to be quick, larger than what is attended whole here.
SMALL = ("--attn-slice", "8", "--attn-full-tokens", "256", "--vae-chunk", "16")
TINY = (*SMALL, "--vae-mode", "exact")
TWO_PASS = ("--vae-mode", "two-pass")
FROM = ("--from", "given.png")
SCRIPTS = ("gallery.py", "generate.py", "upscale.py", "view_bricks.py")


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def refused(run, capsys, script, *arguments):
    """The message with which a script turns its arguments down, before any work."""
    with pytest.raises(SystemExit) as ended:
        run(EXAMPLES / script, *arguments)
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_generate_climbs_and_compares_patched_with_unpatched(run, capsys):
    size = ("--width", 320, "--height", 264)
    run(EXAMPLES / "generate.py", "--prompt", "a lake", *size, "--steps", 2, "--compare", *SMALL, *TWO_PASS)
    patched, unpatched = pixels("planet.png"), pixels("planet-unpatched.png")
    assert patched.shape == unpatched.shape == (264, 320, 3)
    assert patched.std() > 1, "a picture of one colour would hide every difference"
    largest = np.abs(patched - unpatched).max()
    assert largest > 0, "nothing was blocked"
    assert pixels("planet-difference.png").max() == 255
    printed = capsys.readouterr().out
    assert "written to planet.png" in printed
    assert int(printed.split("largest error ")[1].split()[0]) == largest


def test_generate_paints_small_first_and_says_how_near(run, capsys):
    run(EXAMPLES / "generate.py", "--prompt", "seas", "--width", 400, "--height", 656, "--steps", 2, *TINY)
    assert pixels("planet.png").shape == (656, 400, 3)
    rungs = [line for line in capsys.readouterr().out.splitlines() if "seas" in line]
    assert rungs == ["200 x 328: a whole planet, seas", "400 x 656: a whole planet, seas"]


def test_generate_at_once(run, capsys):
    run(EXAMPLES / "generate.py", "--width", 512, "--height", 512, "--steps", 2, "--at-once", *TINY)
    assert "256 x" not in capsys.readouterr().out


def test_generate_reports_equality_where_nothing_needs_the_patch(run, capsys):
    plain = ("--padding-mode", "constant")
    run(EXAMPLES / "generate.py", "--width", 64, "--height", 64, "--steps", 3, "--compare", *TWO_PASS, *plain)
    assert "PSNR infinite, largest error 0 of 255" in capsys.readouterr().out


def test_generate_uses_its_seed(run):
    for name, seed in (("a.png", 1), ("b.png", 1), ("c.png", 2)):
        run(EXAMPLES / "generate.py", "--width", 64, "--height", 64, "--steps", 3, "--seed", seed, "--out", name)
    assert (pixels("a.png") == pixels("b.png")).all()
    assert (pixels("a.png") != pixels("c.png")).any()


def test_a_planet_goes_on_at_its_left_edge(run):
    """Its edges differ no more than columns inside do; without circular padding they do."""
    steps = []
    for mode in ("circular", "constant"):
        size = ("--width", 256, "--height", 128, "--steps", 8)
        run(EXAMPLES / "generate.py", *size, "--padding-mode", mode, "--seed", 3)
        picture = pixels("planet.png")
        steps.append(np.abs(picture[:, 0] - picture[:, -1]).mean() / np.abs(np.diff(picture, axis=1)).mean())
    assert steps[0] < steps[1] and steps[0] < 3


def test_upscale_refines_an_enlarged_picture(run):
    Image.new("RGBA", (72, 48), "teal").save("given.png")
    run(EXAMPLES / "upscale.py", "--from", "given.png", "--to", "240x160", "--steps", 3, "--stages", *SMALL)
    assert pixels("upscaled-128x88.png").shape == (88, 128, 3)
    assert pixels("upscaled.png").shape == (160, 240, 3)
    assert (pixels("upscaled.png") != pixels("given.png")[0, 0]).any()


def test_upscale_takes_any_model(run, capsys):
    tiny_models.text_to_image().save_pretrained("model")
    Image.new("RGB", (64, 48), "teal").save("given.png")
    tiny = ("--model", "model", "--prompt", "a lake", "--steps", 3)
    run(EXAMPLES / "upscale.py", "--from", "given.png", "--to", "128x96", *tiny, "--attn-slice", 4, "--vae-chunk", 8)
    assert pixels("upscaled.png").shape == (96, 128, 3)
    assert "128 x 96: a lake" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("small", "large", "expected"),
    [
        ((512, 256), (4096, 2048), [(1024, 512), (2048, 1024), (4096, 2048)]),
        ((512, 512), (1024, 512), [(1024, 512)]),
        ((512, 256), (3000, 1504), [(920, 464), (1664, 832), (3000, 1504)]),
    ],
)
def test_rungs_of_the_ladder(monkeypatch, small, large, expected):
    monkeypatch.syspath_prepend(EXAMPLES)
    import ladder

    assert list(ladder.sizes_between(small, large, 8)) == expected


def test_an_enlarged_planet_still_goes_on_at_its_left_edge(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    import ladder

    planet = np.random.default_rng(0).integers(0, 256, (16, 32, 3), np.uint8)
    turned = [
        np.asarray(ladder.enlarge(Image.fromarray(np.roll(planet, by, axis=1)), (64, 32), True)) for by in (0, 16)
    ]
    assert (np.roll(turned[0], 32, axis=1) == turned[1]).all()
    assert (turned[0] != np.asarray(ladder.enlarge(Image.fromarray(planet), (64, 32), False))).any()


def test_gallery(run, capsys):
    """Four sheets; at this size one map is blocked, and every way to decode has seams."""
    run(EXAMPLES / "gallery.py", "--size", 64, "--times", 3, "--steps", 2, "--planet-width", 256, "--out", "sheets")
    sizes = {"planet.jpg": (1, 1), "sizes.jpg": (3, 1), "attention.jpg": (5, 2), "seams.jpg": (4, 1)}
    for name, (columns, rows) in sizes.items():
        sheet = pixels(f"sheets/{name}")
        assert sheet.std() > 1 and sheet.shape[1] // columns > 64 and sheet.shape[0] // rows > 64
        assert Path("sheets", name).stat().st_size <= 500_000
    assert capsys.readouterr().out.count("written to") == 4


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(run, capsys, script):
    with pytest.raises(SystemExit) as ended:
        run(EXAMPLES / script, "--help")
    assert ended.value.code == 0
    assert "(%" not in capsys.readouterr().out, "a default is not filled in"


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("generate.py", ("--width", "1001"), "width must be a multiple of 8 sample pixels; got 1001"),
        ("generate.py", ("--width", "0"), "must be a whole number, at least 1; got '0'"),
        ("generate.py", ("--attn-context", "-1"), "must be a whole number, at least 0; got '-1'"),
        ("generate.py", ("--out", "nowhere/large.png"), "must lie in an existing folder; got 'nowhere/large.png'"),
        ("generate.py", ("--out", "large"), "must end in the suffix of an image, as in .png; got 'large'"),
        ("generate.py", ("--model", "nowhere"), "--model: there is no folder 'nowhere', and a name on the hub has"),
        ("generate.py", ("--model", "../no/where"), "--model: there is no folder '../no/where'"),
        ("generate.py", ("--model", "."), "--model: there is no pipeline '.' to load"),
        ("generate.py", ("--steps", "2", "--strength", "0.4"), "must leave at least one step"),
        ("upscale.py", (*FROM, "--to", "64"), "must be like 4096x2048; got '64'"),
        ("upscale.py", (*FROM, "--to", "32x32"), "must be larger than the picture, which is 64x48; got 32x32"),
        ("upscale.py", (*FROM, "--to", "128x100"), "height must be a multiple of 8 sample pixels; got 100"),
        ("upscale.py", (*FROM, "--to", "128x96", "--strength", "nan"), "must be more than 0 and at most 1; got 'nan'"),
        ("upscale.py", ("--from", "missing.png", "--to", "64x64"), "there is no picture 'missing.png'"),
        ("several_devices.py", (), "is to be started by torchrun"),
        ("several_devices.py", ("--steps", "0"), "must be a whole number, at least 1; got '0'"),
    ],
)
def test_wrong_options_are_named(run, capsys, monkeypatch, script, arguments, message):
    from diffusers import StableDiffusionPipeline

    monkeypatch.setattr(StableDiffusionPipeline, "__call__", None)  # nothing is painted before
    Image.new("RGB", (64, 48)).save("given.png")
    told = refused(run, capsys, script, *arguments)
    assert message in told and len(lines_of_ours(told)) == 1


def lines_of_ours(told):
    """Without the bars and remarks that loading a pipeline writes."""
    return [line for line in told.splitlines() if "error" in line or "usage" in line]


def test_a_folder_that_cannot_be_written_is_told_before_any_work(run, capsys, monkeypatch):
    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    assert "must lie in a folder that can be written" in refused(run, capsys, "generate.py", "--out", "planet.png")


def test_interrupt_ends_in_one_line(run, monkeypatch, capsys):
    """Ctrl-C while generating writes nothing."""
    from diffusers import StableDiffusionPipeline

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(StableDiffusionPipeline, "__call__", interrupted)
    with pytest.raises(SystemExit) as ended:
        run(EXAMPLES / "generate.py", "--width", 64, "--height", 64)
    assert ended.value.code == 130
    assert "interrupted" in capsys.readouterr().err and not list(Path().glob("planet*"))


def test_half_a_picture_is_not_left_under_the_final_name(run, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    import pipelines

    def disk_full(image, path, **_):
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", disk_full)
    with pytest.raises(KeyboardInterrupt):
        pipelines.save(Image.new("RGB", (8, 8)), Path("planet.png"))
    assert not list(Path().iterdir())


def test_notebook():
    notebook = nbformat.read(EXAMPLES / "large_res.ipynb", as_version=4)
    nbformat.validate(notebook)
    committed = outputs(notebook)
    make_smaller(notebook)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(EXAMPLES)}}).execute()
    shown = outputs(notebook)
    for name in ("bricks", "small", "refined"):
        assert "image/png" in shown[name]
        (picture,) = (data for kind, data in committed[name].items() if kind.startswith("image/"))
        assert len(picture) * 3 / 4 < 500_000
    (estimate,) = (cell for cell in notebook.cells if cell.id == "estimate")
    assert any("peak" in output.get("text", "") for output in estimate.outputs)
    assert shown["limit"]["text/plain"] != shown["disable"]["text/plain"]
    assert shown["same"]["text/plain"] == "True"
    assert ", active" in shown["enable"]["text/plain"]
    assert "not active" in shown["disable"]["text/plain"]


SMALLER = {
    '"num_inference_steps": 12': '"num_inference_steps": 4',
    "width=512, height=256": "width=256, height=128",
    '"width": 768, "height": 384': '"width": 384, "height": 192',
    "(768, 384)": "(384, 192)",
}


def make_smaller(notebook):
    """Pictures of half the size, which blocks and tiles divide nevertheless."""
    for theirs, ours in SMALLER.items():
        assert any(theirs in cell.source for cell in notebook.cells)
        for cell in notebook.cells:
            cell.source = cell.source.replace(theirs, ours)


def outputs(notebook):
    """What each cell shows at its end, by the cell's name."""
    return {
        cell.id: output.data
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        if output.output_type == "execute_result"
    }


def check_environment(report):
    described = report["environment"]
    assert {"date", "device", "device_name", "python", "torch", "diffusers", "transformers"} <= described.keys()
    assert described["torch"] == torch.__version__ and report["question"]


def test_unet_step(run, tmp_path, capsys):
    out = tmp_path / "unet.json"
    sizes, few = ("--sizes", 64, 256), ("--rounds", 2, "--threads", 1, "--attn-slice", 8, "--attn-full-tokens", 256)
    few += ("--attn-context", 0)
    run(BENCHMARKS / "unet_step.py", "--architecture", "tiny", *sizes, *few, "--clock", "cpu", "--out", out)
    report = json.loads(out.read_text())
    check_environment(report)
    small, large = report["results"]
    assert small["arithmetic_ratio"] == 1, "64 sample pixels are 64 tokens, attended whole"
    assert large["arithmetic_ratio"] > 1
    for result in report["results"]:
        assert all(len(result["seconds"][name]) == 2 and min(result["seconds"][name]) > 0 for name in result["seconds"])
        assert math.isclose(result["deviation"], result["time_ratio"] / result["arithmetic_ratio"] - 1)
    # Feed-forwards and everything else are the same work patched; only attention shrinks.
    unpatched, patched = large["cost"]["unpatched"], large["cost"]["patched"]
    assert unpatched["other_flops"] == patched["other_flops"]
    assert unpatched["attention_flops"] > patched["attention_flops"] > 0
    assert "256x256" in capsys.readouterr().out


def test_transformer_step(run, tmp_path, capsys):
    out = tmp_path / "transformers.json"
    timed = ("--timed-side", 8, "--timed-slice", 4, "--timed-context", 16, "--timed-heads", 1, "--rounds", 2)
    few = ("--models", "sd3.5-large", "--sizes", 512, 1024, 8192, "--threads", 1, "--clock", "cpu")
    small = ("--attn-slice", 32, "--attn-full-tokens", 1024, "--attn-context", 64)
    run(BENCHMARKS / "transformer_step.py", *few, *small, *timed, "--out", out)
    report = json.loads(out.read_text())
    check_environment(report)
    small, large, refused = report["rows"]
    assert small["arithmetic_ratio"] == 1 and small["dense"] == small["in blocks"], "1024 tokens are attended whole"
    dense, blocks = (large[way] for way in ("dense", "in blocks"))
    assert dense["attention_flops"] > 1.5 * blocks["attention_flops"]
    assert large["arithmetic_ratio"] == dense["flops"] / blocks["flops"] != 1
    assert 0.2 < large["in blocks"]["activations"] / large["dense"]["activations"] < 1
    # Two samples of 1024 tokens and 333 of text that go through 12 square matrices in each of 38 blocks.
    others = small["dense"]["flops"] - small["dense"]["attention_flops"]
    assert 0.98 < others / (2 * 1357 * 38 * 24 * 2432**2) < 1.02
    assert "3072 sample pixels" in refused["refused"]
    assert [row["kind"] for row in report["times"]] == ["num_layers", "num_single_layers"]
    assert all(len(row["seconds"]["dense"]) == 2 and row["arithmetic_ratio"] > 1 for row in report["times"])
    assert all(row["defaults_ratio"] < row["time_ratio"] for row in report["times"])
    assert "num_single_layers, 64 tokens" in capsys.readouterr().out


def test_transformer_fidelity(run, tmp_path, capsys):
    out = tmp_path / "fidelity.json"
    few = ("--times", 1, "--contexts", 0, 64, 256, "--pictures", 0, "--steps", 1, "--prompts", 1, "--threads", 1)
    run(BENCHMARKS / "transformer_fidelity.py", *few, "--out", out)
    report = json.loads(out.read_text())
    check_environment(report)
    rows = [row for row in report["rows"] if row["of"] == "one forward"]
    assert len(rows) == 3 * 3
    for alone, some, every in zip(rows[0::3], rows[1::3], rows[2::3], strict=True):
        assert alone["psnr"] + 5 < some["psnr"] < every["psnr"] and every["psnr"] > 100, (
            "all tokens are dense attention"
        )
    pictures = [row for row in report["rows"] if row["of"] == "picture"]
    assert len(pictures) == 1 and all(10 < row["psnr"] < 60 for row in pictures)
    assert "PSNR to dense" in capsys.readouterr().out


def test_autoencoders(run, tmp_path, capsys):
    out = tmp_path / "autoencoders.json"
    small = ("--autoencoders", "AutoencoderTiny", "--size", 128, "--tile", 64, "--large", 1024, "--threads", 1)
    run(BENCHMARKS / "autoencoders.py", *small, "--halves", "decode", "--out", out)
    (first,) = [row for row in json.loads(out.read_text())["rows"] if row["way"] == "exact"]
    assert "nothing is left" in capsys.readouterr().out
    run(BENCHMARKS / "autoencoders.py", *small, "--resume", "--out", out)
    report = json.loads(out.read_text())
    check_environment(report)
    assert first in report["rows"]  # seconds and all: it was not measured again
    for half in ("decode", "encode"):
        rows = {row["way"]: row for row in report["rows"] if row["half"] == half}
        assert sorted(rows) == ["default", "exact", "own tiling", "untiled"]
        assert rows["own tiling"].get("relative_error", 1) > 1e-2  # upstream's encodes to what is no number
        for way in ("default", "exact"):
            assert rows[way]["peak_live_bytes"] < rows["untiled"]["peak_live_bytes"]
            assert rows[way]["relative_error"] < 1e-5
    (simulated,) = report["simulated"]
    for half in ("decode", "encode"):
        assert simulated[f"{half}_bytes"]["exact"] < simulated[f"{half}_bytes"]["untiled"]
    assert "AutoencoderTiny, decode, 1024²" in capsys.readouterr().out


def test_a_result_that_float64_does_not_know_is_told(monkeypatch):
    """Of what is no further from the untiled result than rounding nothing is told."""
    options = SimpleNamespace(device="cpu", size=64, tile=32, rounds=1, clock="cpu")
    for most, told in ((0.0, True), (1e-4, False)):
        monkeypatch.setattr(autoencoders, "EXACT_TO", most)
        rows = {row["way"]: row for row in autoencoders.measure("AutoencoderTiny", "decode", options)}
        assert ("to_float64" in rows["exact"]) == told and "to_float64" not in rows["default"]
    assert 0 < rows["exact"]["relative_error"] < 1e-5


def test_vae(run, tmp_path, capsys):
    out = tmp_path / "vae.json"
    tiny = ("--channels", 8, 8, 16, 16, "--vae-chunk", 8, "--rounds", 1, "--threads", 1)
    run(BENCHMARKS / "vae.py", "--sizes", 64, 80, *tiny, "--out", out)
    report = json.loads(out.read_text())
    check_environment(report)
    cost = {(row["direction"], row["size"], row["method"]): row for row in report["cost"]}
    assert len(cost) == 2 * 2 * 4
    for direction in ("decode", "encode"):
        one_tile, untiled = (cost[direction, 64, method] for method in ("two-pass", "untiled"))
        assert one_tile["flops"] == untiled["flops"], "an image of one tile is not tiled"
        two_pass, untiled = (cost[direction, 80, method] for method in ("two-pass", "untiled"))
        assert two_pass["flops"] > untiled["flops"]
        assert two_pass["peak_live_bytes"] < untiled["peak_live_bytes"]
    assert "peak live" in capsys.readouterr().out


@pytest.mark.parametrize("size", [64, 128], ids=["one tile", "four tiles"])
def test_fidelity(run, tmp_path, capsys, size):
    out = tmp_path / "fidelity.json"
    tiny_models.text_to_image().save_pretrained(tmp_path / "model")
    noise = np.random.default_rng(0).integers(0, 256, (20, 40, 3), np.uint8)
    for name in ("bmng.jpg", "etopo1.jpg", "shadedrelief.jpg"):
        Image.fromarray(noise).resize((800, 400), Image.Resampling.BICUBIC).save(tmp_path / name)
    few = ("--size", size, "--vae-chunk", 8, "--passes", 2, 4, "--threads", 1)
    few += ("--generated", size, "--attn-slice", 4, "--contexts", 0, 64, "--steps", 1, 2, "--prompts", 1)
    run(
        BENCHMARKS / "fidelity.py",
        "--model",
        tmp_path / "model",
        "--maps",
        tmp_path,
        "--pictures",
        1,
        *few,
        "--out",
        out,
    )
    report = json.loads(out.read_text())
    check_environment(report)
    rows = {(row["direction"], row["method"]): row for row in report["vae"]}
    assert len(rows) == len(report["vae"]) == 2 * 5
    for row in rows.values():
        assert (row["psnr"] is None) == (size == 64), "only equal results have an infinite PSNR"
        assert (row["maximum_error"] == 0) == (size == 64)
        assert (row["seam_error"] is None) == (size == 64), "one tile has no seam"
    if size == 128:
        for direction in ("decode", "encode"):
            errors = {
                method: rows[direction, method]["maximum_error"] for method in ("2022 recipe", "4 passes", "exact")
            }
            assert errors["2022 recipe"] > 10 * errors["4 passes"]
            assert errors["exact"] < 1e-4
    blocked = {(row["steps"], row["shape"], row["context"]): row["psnr"] for row in report["attention"]}
    assert len(blocked) == len(report["attention"]) == 2 * 2 * 2
    if size == 128:
        assert all(blocked[steps, shape, 64] > blocked[steps, shape, 0] for steps, shape, _ in blocked)
    assert "2022 recipe" in capsys.readouterr().out


def test_figures_of_the_demo_model_are_printed_from_what_is_committed(run, capsys):
    figures = json.loads((BENCHMARKS / "results" / "demo_model.json").read_text())
    run(BENCHMARKS / "demo_model.py")
    printed = capsys.readouterr().out
    assert all(f"{value:.2f}" in printed for value in figures["psnr_db"].values())
    assert ("blind test" in printed) == ("blind_test" in figures)


def test_figures_of_the_demo_model_are_measured(run, tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr("demo_training.vae.TEST_SIZE", 96)
    noise = np.random.default_rng(0).integers(0, 256, (20, 40, 3), np.uint8)
    for name in ("bmng.jpg", "etopo1.jpg", "shadedrelief.jpg"):
        Image.fromarray(noise).resize((400, 200), Image.Resampling.BICUBIC).save(tmp_path / name)
    run(BENCHMARKS / "demo_model.py", "--measure", "--maps", tmp_path, "--out", tmp_path / "figures.json")
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert len(figures["psnr_db"]) == 10 and min(figures["psnr_db"].values()) > 20
    assert all(figures["psnr_db_without_residual_branches"][name] != psnr for name, psnr in figures["psnr_db"].items())
    assert "mean, native" in capsys.readouterr().out


def test_blind_test_counts_right_answers(run, tmp_path, capsys):
    out = tmp_path / "figures.json"
    figures = json.loads((BENCHMARKS / "results" / "demo_model.json").read_text())
    out.write_text(json.dumps(figures | {"blind_test": {"right": 0, "pictures": 20, "by": "nobody"}}))
    few = ("--blind", tmp_path / "quiz", "--out", out)
    run(BENCHMARKS / "demo_model.py", *few, "--samples", 3, "--size", 32, "--steps", 2)
    right = json.loads((tmp_path / "quiz" / "answers.json").read_text())["answers"]
    wrong = "b" if right[0] == "a" else "a"
    run(BENCHMARKS / "demo_model.py", *few, "--answers", wrong + right[1] + right[2].upper(), "--by", "a test")
    assert "blind test: 2 of 3 right (chance: 1 in 5); a test" in capsys.readouterr().out


JUNIT = """<testsuites><testsuite>
<testcase name="test_all_is_blocked_and_restored[Stable Diffusion XL: ControlNet, two]"/>
<testcase name="test_what_is_exact_gives_the_unpatched_result[Flux: Kontext]"><failure/></testcase>
<testcase name="test_tiles_run_under_the_pipelines_progress_bar"/>
</testsuite></testsuites>"""


def test_the_table_of_pipelines_is_made_of_test_results(run, tmp_path):
    junit, out = tmp_path / "junit.xml", tmp_path / "pipelines.json"
    junit.write_text(JUNIT)
    run(BENCHMARKS / "pipeline_table.py", "--junit", junit, "--out", out)
    assert json.loads(out.read_text())["results"] == {
        "Stable Diffusion XL": {"ControlNet, two": {"blocked": "passed"}},
        "Flux": {"Kontext": {"exact": "failure"}},
    }


def test_memory(run, tmp_path, capsys):
    out = tmp_path / "memory.json"
    sizes = ["--sizes", 128, "--proof-size", 136, "--growth-sizes", 64, 128, "--picture-size", 1024]
    run(BENCHMARKS / "memory.py", "--models", "tiny", *sizes, "--threads", 1, "--out", out)
    report = json.loads(out.read_text())
    check_environment(report)
    peaks = {row["way"]: row["peak"] for row in report["rows"]}
    assert {row["kind"] for row in report["rows"]} == {"simulated"}
    assert list(peaks) == list(report["ways"])
    assert peaks["every saver"] <= peaks["unpatched"]
    assert {row["way"] for row in report["rows"] if row["host"]} == {"every saver, exact VAE"}  # small maps stay
    proof = {row["way"]: row for row in report["proof"]}
    assert proof["unet_serial"]["step"] < proof["patched"]["step"]
    assert proof["vae_mode exact"]["decode"] < proof["unpatched"]["decode"]
    for row in report["proof"]:
        for stage in ("step", "decode"):
            assert math.isclose(row[stage], row[f"{stage}_estimated"], rel_tol=0.1)
    counted, timed = report["growth"]
    assert 4 < counted["ratio"] < 16  # between linear and quadratic: so small a map is attended whole
    assert timed["ratio"] == timed["seconds"]["large"][0] / timed["seconds"]["small"][0]
    assert [case["way"] for case in report["travel"]] == ["skips", "maps"]
    assert all(case["arithmetic seconds"] > 0 for case in report["travel"])
    skips, maps = report["travel"]
    assert skips["to the device"] > 0 and skips["to the host"] > 0 and maps["to the device"] == 0  # all are small
    usual, written = (case["bytes"] for case in report["picture"])
    assert written < usual / 3
    assert "tiny, 64² to 128², arithmetic" in capsys.readouterr().out


def test_text_encoders_count_in_half_precision(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    memory = runpy.run_path(str(BENCHMARKS / "memory.py"))
    assert memory["text_encoder_bytes"]("sd15") == 2 * 123_060_480  # parameters of CLIP ViT-L/14's text encoder
    case = {"kind": "simulated", "model": "sdxl", "size": 4096, "way": "every saver", "peak": 7 * 2**30}
    headline = memory["headline"](case | {"text_encoders": 2**30})
    assert (headline["spare"], headline["spare_with_text_encoders"]) == (1 / 8, 0)
    assert (headline["met"], headline["met_with_text_encoders"]) == (True, False)


def test_import_time(run, tmp_path):
    out = tmp_path / "import.json"
    run(BENCHMARKS / "import_time.py", "--rounds", 1, "--out", out)
    report = json.loads(out.read_text())
    check_environment(report)
    ours, theirs = report["results"]["largerespatch"], report["results"]["diffusers"]
    assert len(ours["samples"]) == len(theirs["samples"]) == 1
    assert 0 < theirs["modules"] < ours["modules"], "the list of what we need of diffusers is out of date"


def test_planning(run, tmp_path, capsys):
    out = tmp_path / "planning.json"
    few = ("--models", "tiny", "--sizes", 512, "--limits", "8GiB", "1GiB", "513MiB", "--rounds", 1)
    run(BENCHMARKS / "planning.py", *few, "--out", out)
    report = json.loads(out.read_text())
    check_environment(report)
    assert [row["of"] for row in report["rows"]] == [
        "first estimate",
        "second estimate",
        "plan for 8GiB",
        "plan for 1GiB",
        "plan for 513MiB",
    ]
    assert all(row["median"] > 0 for row in report["rows"])
    assert "no saver needed" in report["rows"][2]["said"]
    told = capsys.readouterr().out
    assert "plan for 1GiB" in told and "refuses" in told


def test_measures(monkeypatch):
    """The instruments themselves, against values known beforehand."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    common = runpy.run_path(str(BENCHMARKS / "_common.py"))
    weight = torch.ones(100, 100)

    def work():
        first = weight.t() @ weight  # 40 kB; the view is free
        second = first + 1  # 40 kB more
        del first
        return second * 2  # in the place of the first

    assert common["peak_live_bytes"](common["Candidate"](work)) == 80_000

    with torch.device("meta"):
        query, key = torch.ones(2, 3, 10, 8), torch.ones(2, 3, 20, 8)
    attend = common["Candidate"](lambda: torch.nn.functional.scaled_dot_product_attention(query, key, value=key))
    assert common["cost_on_paper"](attend).flops == 4 * 2 * 3 * 10 * 20 * 8

    reference, result = torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8)
    result[..., 4] = 0.5
    assert common["seam_error"](result, reference, [], [4]) == {"seam": 0.25, "elsewhere": 0}
    assert math.isclose(common["psnr"](result, reference, 1.0), -10 * math.log10(0.25 / 8))
    assert common["maximum_error"](result, reference) == 0.5


def test_the_gpu_script_in_its_small_form(run, tmp_path, capsys):
    out = tmp_path / "gpu.json"
    common = ["--small", "--device", "cpu", "--minutes", 1, "--out", out]
    run(BENCHMARKS / "gpu.py", *common, "--parts", "kernels")
    run(BENCHMARKS / "gpu.py", *common, "--parts", "peaks", "tests")
    parts = json.loads(out.read_text())["parts"]
    assert set(parts) == {"kernels", "peaks", "tests"}, "rows of other parts are kept"
    (tests,) = parts.pop("tests")["rows"]
    assert tests["status"] == 0, tests["output"]
    for part in parts.values():
        assert part["rows"] and not any("error" in row for row in part["rows"])
        assert part["environment"]["device"] == "cpu"
    errors = {row["way"]: row["relative_error"] for row in parts["kernels"]["rows"] if "relative_error" in row}
    assert max(errors["mask"], errors["channels"]) < 1e-5 < errors["no weights (wrong)"]
    assert all(row["step"]["estimated"] > 0 for row in parts["peaks"]["rows"])
    del parts["peaks"]["rows"][0]
    left = len(parts["peaks"]["rows"])
    out.write_text(json.dumps({"parts": parts}))
    run(BENCHMARKS / "gpu.py", *common, "--parts", "peaks", "--go-on")
    rows = json.loads(out.read_text())["parts"]["peaks"]["rows"]
    assert len(rows) == left + 1, "what is there is not measured again"
    assert all("date" in row for row in rows[:left]), "kept rows say of which run they are"
    with pytest.raises(SystemExit):
        run(BENCHMARKS / "gpu.py", "--device", "cpu")
    assert "without a GPU only --small and --paper-only make sense" in capsys.readouterr().err
