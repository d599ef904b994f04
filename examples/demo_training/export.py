"""Write the trained parts as folders that load without network."""

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
from diffusers import AutoencoderKL, FluxTransformer2DModel, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel

from .text import write_tokenizer
from .text_to_image import build_pipeline
from .transformer import build_flow_scheduler


def export_pipeline(
    vae: AutoencoderKL,
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    vocabulary: Path,
    folder: Path,
    training: dict[str, Any],
) -> int:
    """Save the pipeline in half precision and a record of its training; return the folder's size in bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = write_tokenizer(vocabulary, folder / "tokenizer")
    pipeline = build_pipeline(*(_shipped(part) for part in (vae, unet, text_encoder)), tokenizer)
    with tempfile.TemporaryDirectory() as scratch:
        saved = Path(scratch) / "model"  # which others may read, unlike the temporary folder
        pipeline.save_pretrained(saved)
        shutil.rmtree(saved / "tokenizer")
        shutil.copytree(saved, folder, dirs_exist_ok=True)
    _load_in_single_precision(folder / "text_encoder" / "config.json")
    return _finished(folder, training)


def export_transformer(transformer: FluxTransformer2DModel, folder: Path, training: dict[str, Any]) -> int:
    """Save the transformer in half precision, its scheduler and the record; return the folder's size in bytes.

    The VAE and the text encoder are those of the pipeline and are not written twice.
    """
    _shipped(transformer).save_pretrained(folder / "transformer")
    build_flow_scheduler().save_pretrained(folder / "scheduler")
    return _finished(folder, training)


def _shipped(model: nn.Module) -> Any:
    # Python walks contiguous weights faster, and nobody should inherit the training's memory layout.
    return copy.deepcopy(model).cpu().half().to(memory_format=torch.contiguous_format)


def _finished(folder: Path, training: dict[str, Any]) -> int:
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
