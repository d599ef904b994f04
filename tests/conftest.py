import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before diffusers is imported: nothing here may touch a network
# Before torch is: toy models gain nothing from more threads, and those that wait for each other cost a lot. So it is in
# the processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"

import runpy
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

EXAMPLES = Path(__file__).parents[1] / "examples"
DEMO_MODEL = EXAMPLES / "demo_model"

settings.register_profile("tests", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("tests")


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def pytest_collection_finish():
    """What has been imported stays: searching it for garbage, again and again, takes longer than some tests."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def what_a_module_leaves_stays():
    """So do its caches."""
    yield
    gc.collect()
    gc.freeze()


def pytest_generate_tests(metafunc):
    """A class of tests that has `cases` runs those that ask for a `case` on each of them."""
    if "case" in metafunc.fixturenames and hasattr(metafunc.cls, "cases"):
        family, cases = getattr(metafunc.cls, "family", ""), metafunc.cls.cases
        names = [f"{family}: {name}" if family else name for name in cases]
        metafunc.parametrize("case", cases.values(), ids=names)


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def pool():
    """Forked when all tests are imported, which is what they run."""
    import processes

    made = processes.Pool()
    yield made
    assert made.close() == [0] * processes.MOST


@pytest.fixture
def pipe():
    """A tiny Stable Diffusion text-to-image pipeline."""
    import tiny  # not above: who only hands out tests loads this file, too

    return quiet(tiny.text_to_image())


@pytest.fixture(scope="session")
def demo():
    """The trained pipeline that comes with the examples; not to be changed."""
    from diffusers import StableDiffusionPipeline

    return quiet(StableDiffusionPipeline.from_pretrained(DEMO_MODEL))


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Run a script as from the command line, in an empty folder; returns its globals."""
    threads = torch.get_num_threads()
    monkeypatch.chdir(tmp_path)

    def run_script(script, *arguments):
        monkeypatch.syspath_prepend(script.parent)
        monkeypatch.setattr(sys, "argv", [script.name, *map(str, arguments)])
        return runpy.run_path(str(script), run_name="__main__")

    yield run_script
    torch.set_num_threads(threads)
