"""What is installed: the names, the metadata, what an import brings along, and which rooms know which."""

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from importlib import reload
from importlib.metadata import PackageNotFoundError, metadata, requires
from importlib.resources import files
from pathlib import Path

import pytest
import yaml

import largerespatch

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "largerespatch"


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_the_public_names():
    assert set(largerespatch.__all__) == {"LargeResPatch", "viewBricks", "__version__"}
    assert files("largerespatch").joinpath("py.typed").is_file()
    assert metadata("largerespatch")["License-Expression"] == "MIT"


@pytest.fixture
def metadata_says(monkeypatch):
    """Imports the package anew where its metadata gives this version, or where there is none."""

    def importing(answer):
        def version(name):
            assert name == "largerespatch"
            if answer is None:
                raise PackageNotFoundError(name)
            return answer

        monkeypatch.setattr(importlib.metadata, "version", version)
        return reload(largerespatch)

    yield importing
    monkeypatch.undo()
    reload(largerespatch)


def test_the_version_is_that_of_the_metadata(metadata_says):
    assert metadata_says("7.8.9").__version__ == "7.8.9"


def test_a_checkout_on_the_path_has_no_metadata_and_imports_all_the_same(metadata_says):
    assert metadata_says(None).__version__ == "unknown"
    assert isinstance(largerespatch.LargeResPatch, type)


def test_what_is_installed_is_what_is_here():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert importlib.metadata.version("largerespatch") == declared


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
    folder = str(files("largerespatch.core"))
    for name in ("tilings", "patching", "checks"):
        assert run(code.format(path=folder, name=name)) == "False"


# Each wing or room at the top, and those that it may import.
BELOW = {
    "core": set(),
    "techniques": {"core"},
    "memory": {"core"},
    "denoisers": {"core", "techniques"},
    "autoencoders": {"core", "techniques"},
    "options": {"core", "memory"},
    "view": {"core"},
    "patch": {"core", "memory", "denoisers", "autoencoders", "options"},
    "__init__": {"patch", "view"},
}
# Rooms of the techniques; those that have none are in "".
BESIDE = {
    "strips": set(),
    "": {"strips"},
    "attention": {"", "strips"},
    "joint": {"", "strips", "attention"},
    "vae": {"", "strips", "attention"},
}


def _room(parts):
    return parts[0] if parts and parts[0] in BESIDE else ""


def imported(path):
    """Full names of all that a file imports, anywhere in it."""
    package = ["largerespatch", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            where = ".".join([*start, *filter(None, [node.module])])
            yield from (f"{where}.{name.name}" for name in node.names)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_wings_import_downwards_only(path):
    wing = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    names = [name.split(".") for name in imported(path)]
    known = {name[1] for name in names if name[0] == "largerespatch"}
    assert known <= BELOW[wing] | {wing}
    if wing == "techniques":
        room = _room(path.relative_to(PACKAGE).with_suffix("").parts[1:])
        assert {_room(name[2:]) for name in names if name[:2] == ["largerespatch", wing]} <= BESIDE[room] | {room}
    if wing == "core":
        assert not {"diffusers", "transformers"} & {name[0] for name in names}


def pinned(text):
    """Versions by package."""
    return dict(re.findall(r"^([\w-]+)==([\w.]+)$", text, flags=re.MULTILINE))


def test_hooks_before_a_commit_are_of_the_versions_that_ci_installs():
    constraints = pinned((ROOT / "tests" / "constraints.txt").read_text())
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    hooks = {hook["id"]: hook for hook in repository["hooks"]}
    for name in ("ruff-format", "ruff-check"):
        assert hooks[name]["additional_dependencies"] == [f"ruff=={constraints['ruff']}"]
    assert hooks["mypy"]["language"] == "system", "the one that CI has installed"
    commands = {hook["entry"].removesuffix(" --force-exclude") for hook in hooks.values()}
    assert commands == {"ruff format", "ruff check", "mypy"}


def test_ci_runs_its_script_at_each_push_and_tries_every_diffusers_once_a_week():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    triggers = workflow[True]  # YAML 1.1 reads the key `on` so
    assert {"push", "pull_request", "schedule"} <= set(triggers)
    jobs = {name: (job["if"], [step.get("run") for step in job["steps"]]) for name, job in workflow["jobs"].items()}
    assert jobs["run"][0] == "github.event_name != 'schedule'" and "bash .ci/run" in jobs["run"][1]
    assert "github.event_name == 'schedule'" in jobs["compat"][0] and "tests/compat.sh" in jobs["compat"][1]
