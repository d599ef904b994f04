"""The upstream code that techniques must know the inside of is what it was when they were written.

A room names it in `LEANS_ON`; `upstream_hashes.json` holds what was read of it, and in which versions of diffusers (of
accelerate for what is accelerate's).
"""

import ast
import hashlib
import inspect
import json
import pkgutil
import re
import textwrap
from functools import reduce
from importlib import import_module
from pathlib import Path

import diffusers
import pytest

import largerespatch

TABLE = Path(__file__).parent / "upstream_hashes.json"
READ = json.loads(TABLE.read_text())

# What is no code: annotations, and what the parser of one Python says and that of another does not.
NO_CODE = {"annotation", "returns", "ctx", "kind", "type_comment"}


def rooms():
    """The rooms of the package by what they lean on."""
    found = {}
    for room in pkgutil.walk_packages(largerespatch.__path__, "largerespatch."):
        for name in getattr(import_module(room.name), "LEANS_ON", ()):
            found.setdefault(name, []).append(room.name)
    return found


ROOMS = rooms()


def code(node):
    """A syntax tree as text, the same for every version of Python."""
    if isinstance(node, list):
        return f"[{', '.join(map(code, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = {name: value for name, value in ast.iter_fields(node) if name not in NO_CODE and value not in (None, [])}
    if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) is not None:
        fields["body"] = node.body[1:]
    return f"{type(node).__name__}({', '.join(f'{name}={code(value)}' for name, value in fields.items())})"


def hash_of(source):
    return hashlib.sha256(code(ast.parse(textwrap.dedent(source)).body).encode()).hexdigest()


def source_of(name):
    module, kind, function = name.rsplit(".", 2)
    return inspect.getsource(reduce(getattr, (kind, function), import_module(module)))


def found_of(name):
    """The hash of the code `name`; None where this version does not have it."""
    try:
        return hash_of(source_of(name))
    except (ImportError, AttributeError):
        return None


def numbers(version):
    return tuple(map(int, version.split(".")))


def complaint(name, found):
    """What is wrong where the code `name` has this hash; empty if nothing is."""
    package = import_module(name.partition(".")[0])
    version, code = re.match(r"\d+\.\d+", package.__version__)[0], f"{name} of {package.__name__} {package.__version__}"
    asked = f"Read it, see that {' and '.join(ROOMS[name])} still hold, and note the hash in {TABLE.name}: {found}"
    known = {version for versions in READ.get(name, {}).values() for version in versions}
    if found is None:
        # What came with a later version; families match no model of it here.
        first = min((numbers(each) for each in known), default=())
        return f"There is no {code}, or no longer. {asked}" if numbers(version) >= first else ""
    if found not in READ.get(name, {}):
        return f"{code} is not as it was. {asked}"
    if version in known and version not in READ[name][found]:
        return f"{code} is that of {READ[name][found]}. {asked}"
    return ""


@pytest.mark.parametrize("name", sorted(ROOMS))
def test_what_techniques_lean_on_is_what_was_read(name):
    wrong = complaint(name, found_of(name))
    assert not wrong, wrong


def test_nothing_else_is_in_the_table():
    assert set(READ) == set(ROOMS)


def test_the_techniques_that_know_most_are_there():
    named = {name.removeprefix("diffusers.models.") for name in ROOMS}
    assert {"resnet.ResnetBlock2D.forward", "attention.BasicTransformerBlock.forward"} <= named
    assert {"upsampling.Upsample2D.forward", "downsampling.Downsample2D.forward"} <= named
    assert {"attention_processor.Attention.forward", "autoencoders.vae.Decoder.forward"} <= named


FORWARD = """
    def forward(self, x):
        return self.conv(x) + x
"""


def test_only_code_counts():
    told = '''
def forward(self, x: "Tensor") -> "Tensor":
    """What it does."""
    # Why it does so.
    return (self.conv(x)
            + x)
'''
    assert hash_of(told) == hash_of(FORWARD)
    assert hash_of(FORWARD.replace("+ x", "- x")) != hash_of(FORWARD)
    assert hash_of(FORWARD.replace("self, x", "self, x, y=None")) != hash_of(FORWARD)


def test_what_is_not_there_yet_is_no_change_and_what_is_gone_is(monkeypatch):
    name = "diffusers.models.resnet.ResnetBlock2D.forward"
    monkeypatch.setitem(READ, name, {"0": ["0.98", "0.99"]})
    assert not complaint(name, None)
    monkeypatch.setitem(READ, name, {"0": ["0.01"]})
    assert "no longer" in complaint(name, None)
    assert found_of(name) and found_of("diffusers.models.resnet.NoBlock.forward") is None
    assert found_of("diffusers.models.nothing.NoBlock.forward") is None


def test_a_change_is_told_with_the_rooms_that_it_concerns():
    name = "diffusers.models.resnet.ResnetBlock2D.forward"
    wrong = complaint(name, hash_of(FORWARD))
    assert name in wrong and diffusers.__version__ in wrong
    assert "largerespatch.techniques.strips.strips" in wrong and "largerespatch.techniques.vae.walked" in wrong
