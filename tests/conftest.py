import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before diffusers is imported: nothing here may touch a network

import pytest
import torch
from hypothesis import settings

import tiny

torch.set_num_threads(1)  # toy models gain nothing from more, and threads that wait for each other cost a lot

settings.register_profile("tests", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("tests")


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe():
    """A tiny Stable Diffusion text-to-image pipeline."""
    return quiet(tiny.text_to_image())
