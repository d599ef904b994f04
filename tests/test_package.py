import subprocess
import sys
from importlib.metadata import metadata, requires, version
from importlib.resources import files

import largerespatch


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_the_public_names():
    assert set(largerespatch.__all__) == {"LargeResPatch", "viewBricks", "__version__"}
    assert largerespatch.__version__ == version("largerespatch")
    assert files("largerespatch").joinpath("py.typed").is_file()
    assert metadata("largerespatch")["License-Expression"] == "MIT"


def test_what_is_needed_at_run_time():
    names = {line.split(">")[0] for line in requires("largerespatch") if "extra" not in line}
    assert names == {"torch", "diffusers", "transformers", "pillow", "numpy"}


def test_importing_is_light():
    """No transformers, no network, no GPU: a context manager has no business with any of them."""
    code = """
import socket, sys, torch
def refuse(*_): raise AssertionError("network")
socket.socket.connect = refuse
torch.cuda._lazy_init = refuse
import largerespatch
print([name for name in sys.modules if name.split(".")[0] == "transformers"][:3])
"""
    assert run(code) == "[]"


def test_geometry_and_patching_need_no_torch():
    code = "import sys; sys.path.insert(0, {path!r}); import {name}; print('torch' in sys.modules)"
    folder = str(files("largerespatch"))
    for name in ("tilings", "patching", "validation"):
        assert run(code.format(path=folder, name=name)) == "False"
