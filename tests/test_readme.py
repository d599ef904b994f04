"""Every snippet of the README runs, and its commands are the ones that CI runs."""

import re
from pathlib import Path

import diffusers
import pytest
from PIL import Image

import readme_tables
import tiny
from conftest import quiet
from family import CASES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL)


def at_toy_size(snippet):
    """The snippet as it stands, but for sizes and for what needs a GPU or a hub."""
    sizes = {"4096": "64", "2048": "64", "1024": "32", "512": "32"}
    snippet = re.sub(r"\b(4096|2048|1024|512)\b", lambda match: sizes[match[0]], snippet)
    return snippet.replace('.to("cuda")', "").replace("torch.float16", "torch.float32")


def test_the_snippets_run_in_order(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    pipe = quiet(tiny.text_to_image())
    monkeypatch.setattr(diffusers.StableDiffusionPipeline, "from_pretrained", lambda *_, **__: pipe)
    names = {}
    for snippet in SNIPPETS:
        exec(at_toy_size(snippet), names)
    with Image.open("lake.png") as lake, Image.open("bricks.png") as bricks:
        assert lake.size == (64, 64)
        assert bricks.height > 4 * 374
    assert names["panorama"].size == (64, 32)
    assert names["image"].size == (64, 64)
    assert "LargeResPatch on StableDiffusionPipeline, 64x32 sample pixels, active" in capsys.readouterr().out
    assert "forward" not in vars(pipe.unet)


@pytest.mark.parametrize("table", readme_tables.TABLES)
def test_tables_are_made_from_the_committed_results(table):
    assert table() in README


def test_the_table_of_pipelines_has_every_pipeline_that_is_tested_and_each_passed():
    results = readme_tables.load("pipelines")["results"]
    assert {f"{family}: {name}" for family, pipelines in results.items() for name in pipelines} == set(CASES)
    answers = [answers for pipelines in results.values() for answers in pipelines.values()]
    assert all(each == dict.fromkeys(readme_tables.QUESTIONS, "passed") for each in answers)


def test_ci_tries_other_versions_of_diffusers():
    assert "tests/compat.sh" in (ROOT / ".ci" / "run").read_text()


def test_ci_runs_the_test_command_of_the_readme():
    assert len(COMMANDS) == 2
    assert COMMANDS[1] in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("target", re.findall(r'(?:src="|\]\()([^"):]+)', README))
def test_what_the_readme_points_to_exists(target):
    assert (ROOT / target).exists()
