"""Write the trained parts as a pipeline folder that loads without network."""

from __future__ import annotations

import copy
import json
import platform
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL

from .text import write_tokenizer
from .text_to_image import TextToImage, build_pipeline, build_scheduler


def export(vae: AutoencoderKL, both: TextToImage, vocabulary: Path, folder: Path, training: dict[str, Any]) -> int:
    """Save the pipeline in half precision and a record of its training; return the folder's size in bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    # Python walks contiguous weights faster, and nobody should inherit the training's memory layout.
    vae, both = (copy.deepcopy(part).cpu().half().to(memory_format=torch.contiguous_format) for part in (vae, both))
    tokenizer = write_tokenizer(vocabulary, folder / "tokenizer")
    pipeline = build_pipeline(vae, both, tokenizer, build_scheduler())
    with tempfile.TemporaryDirectory() as scratch:
        pipeline.save_pretrained(scratch)
        shutil.rmtree(Path(scratch) / "tokenizer")
        shutil.copytree(scratch, folder, dirs_exist_ok=True)
    _load_in_single_precision(folder / "text_encoder" / "config.json")
    record = training | {"python": platform.python_version()}
    record |= {package: version(package) for package in ("torch", "diffusers", "transformers")}
    (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _load_in_single_precision(config: Path) -> None:
    """diffusers loads its own parts in single precision unless told otherwise, transformers in the precision saved."""
    settings = json.loads(config.read_text(encoding="utf-8"))
    settings.pop("torch_dtype", None)
    settings["dtype"] = "float32"
    config.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
