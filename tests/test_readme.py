"""The pages for readers: snippets run, tables are made from results and options, commands are the ones that CI runs."""

import re
from importlib import import_module
from pathlib import Path

import diffusers
import pytest
from PIL import Image
from table import listed

import readme_tables
import tiny
from conftest import quiet
from largerespatch import LargeResPatch
from largerespatch.core.families import family_of, register, unregister

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGES = (README, ROOT / "examples" / "README.md", ROOT / "examples" / "benchmarks" / "README.md")
LONGEST = 10_000  # bytes of the first page


def of_page(path):
    return str(path.parent.relative_to(ROOT))


def snippets(path, language="python"):
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(), flags=re.DOTALL)


def is_family(snippet):
    return "@register" in snippet


def at_toy_size(snippet):
    """The snippet as it stands, but for sizes and for what needs a GPU or a hub."""
    sizes = {"4096": "64", "2048": "64", "1024": "32", "512": "32"}
    snippet = re.sub(r"\b(4096|2048|1024|512)\b", lambda match: sizes[match[0]], snippet)
    return snippet.replace('.to("cuda")', "").replace("torch.float16", "torch.float32")


@pytest.fixture
def run_in_order(monkeypatch, tmp_path):
    """Runs a page's snippets one after another, in an empty folder; returns the pipeline and all names."""
    monkeypatch.chdir(tmp_path)
    pipe = quiet(tiny.text_to_image())
    monkeypatch.setattr(diffusers.StableDiffusionPipeline, "from_pretrained", lambda *_, **__: pipe)

    def run(path):
        names = {}
        for snippet in snippets(path):
            if not is_family(snippet):
                exec(at_toy_size(snippet), names)
        return pipe, names

    return run


def test_the_snippets_of_the_first_page_run(run_in_order, capsys):
    pipe, names = run_in_order(README)
    with Image.open("lake.png") as lake, Image.open("bricks.png") as bricks:
        assert lake.size == (64, 64)
        assert bricks.width <= 1400 and bricks.height <= 1000
    assert names["panorama"].size == (64, 32)
    assert names["image"].size == (64, 64)
    printed = capsys.readouterr().out
    assert "LargeResPatch on StableDiffusionPipeline, 64x32 sample pixels, active" in printed
    assert "memory_limit of 8.00 GiB" in printed
    assert "forward" not in vars(pipe.unet)


def test_the_snippets_of_the_examples_run(run_in_order, capsys):
    pipe, names = run_in_order(PAGES[1])
    assert names["small"].size == (32, 32)
    assert names["image"].size == (64, 64)
    assert "memory_limit of 8.00 GiB" in capsys.readouterr().out
    assert "forward" not in vars(pipe.unet)


def test_the_last_page_has_no_snippets_that_nobody_runs():
    assert not snippets(PAGES[2])


@pytest.fixture
def pixart():
    return quiet(tiny.pixart())


def test_the_family_that_is_shown_is_a_room_of_the_house_and_works_as_shown(pixart):
    (shown,) = filter(is_family, snippets(README))
    room = import_module("largerespatch.denoisers.pixart")
    assert Path(room.__file__).read_text().endswith(f'"""\n\n{shown}')

    patch = LargeResPatch(pixart, 64, 64)
    expected = patch.estimate()
    names = {"__name__": "largerespatch.denoisers.shown", "__package__": "largerespatch.denoisers"}
    unregister(room.PixArt)
    try:
        with pytest.raises(ValueError, match="not known how pipelines call PixArtTransformer2DModel"):
            patch.estimate()
        exec(shown, names)
        assert type(family_of(pixart.transformer)) is names["PixArt"]
        assert patch.estimate() == expected
    finally:
        unregister(names.get("PixArt"))
        register(room.PixArt)


@pytest.mark.parametrize(
    ("page", "table"), [(page, table) for page, tables in readme_tables.TABLES.items() for table in tables]
)
def test_tables_are_made_from_the_committed_results(page, table):
    assert f"\n\n{table()}\n\n" in page.read_text()


@pytest.mark.parametrize("page", PAGES, ids=of_page)
def test_no_table_is_written_by_hand(page):
    made = "\n\n".join(table() for table in readme_tables.TABLES.get(page, ()))
    lines = {line for line in page.read_text().splitlines() if line.startswith("|")}
    assert lines == {line for line in made.splitlines() if line.startswith("|")}


def test_a_table_is_put_in_place_of_the_one_that_begins_alike():
    old = "before\n\n| a | b |\n| --- | --- |\n| 1 | 2 |\n| 3 | 4 |\n\nmeasured then.\n\nafter\n"
    new = "| a | b |\n| --- | --- |\n| 5 | 6 |\n\nmeasured now."
    assert readme_tables.with_table(old, new) == f"before\n\n{new}\n\nafter\n"
    alone = new.removesuffix("\n\nmeasured now.")
    assert readme_tables.with_table(old, alone) == f"before\n\n{alone}\n\nmeasured then.\n\nafter\n"
    for text in ("no table\n", old + old):
        with pytest.raises(ValueError, match=r"one table that begins with '\| a \| b \|'"):
            readme_tables.with_table(text, new)


def test_the_table_of_pipelines_has_every_pipeline_that_is_tested_and_each_passed():
    results = readme_tables.load("pipelines")["results"]
    assert {f"{family}: {name}" for family, pipelines in results.items() for name in pipelines} == listed()
    answers = [answers for pipelines in results.values() for answers in pipelines.values()]
    assert all(each == dict.fromkeys(readme_tables.QUESTIONS, "passed") for each in answers)


def test_the_first_page_is_short():
    assert README.stat().st_size < LONGEST


def test_ci_tries_other_versions_of_diffusers():
    assert "tests/compat.sh" in (ROOT / ".ci" / "run").read_text()


def test_ci_runs_the_test_command_of_the_readme():
    commands = snippets(README, "sh")
    assert len(commands) == 2
    assert commands[1] in (ROOT / ".ci" / "run").read_text()


def anchors(path):
    """What a page's headings are called in links to them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    ("page", "target"),
    [(page, target) for page in PAGES for target in re.findall(r'(?:src="|\]\()([^"):]+)', page.read_text())],
    ids=lambda value: of_page(value) if isinstance(value, Path) else value,
)
def test_what_a_page_points_to_exists(page, target):
    path, _, heading = target.partition("#")
    there = (page.parent / path).resolve()
    assert there.exists() and there.is_relative_to(ROOT)
    assert not heading or heading in anchors(there)


def test_the_map_of_the_house_has_every_wing_and_room_at_the_top():
    (drawn,) = snippets(README, "text")
    package = ROOT / "largerespatch"
    rooms = {each.name for each in package.glob("*.py")} - {"__init__.py"}
    wings = {f"{each.parent.name}/" for each in package.glob("*/__init__.py")}
    assert {line.split()[0] for line in drawn.splitlines()} == rooms | wings


@pytest.mark.parametrize("page", PAGES[1:], ids=of_page)
def test_a_page_names_every_script_beside_it(page):
    named = set(re.findall(r"`([\w]+\.(?:py|ipynb))`", page.read_text()))
    there = {path.name for kind in ("*.py", "*.ipynb") for path in page.parent.glob(kind)}
    assert there - {"_common.py", "pipelines.py"} <= named
