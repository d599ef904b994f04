"""CLIP's tokenizer, from its published vocabulary, and a small text encoder that both denoisers share.

The text encoder learns first, by telling from a caption what the crop shows, and is then kept as it is: so the
denoisers can be trained one without the other, and read the same words alike.
"""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from .captions import caption, look
from .loop import save_atomically
from .planets import Windows

VOCABULARY_PACKAGE = "clip-anytorch==2.6.0"
VOCABULARY_FILE = "clip/bpe_simple_vocab_16e6.txt.gz"
VOCABULARY_SIZE = 49408
MAX_TOKENS = 32
STEPS, BATCH = 500, 64


def fetch_vocabulary(folder: Path) -> Path:
    """CLIP's byte-pair merges (MIT), taken out of a wheel without installing it."""
    target = folder / Path(VOCABULARY_FILE).name
    if not target.exists():
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder), VOCABULARY_PACKAGE]
        subprocess.run(command, check=True)
        (wheel,) = folder.glob("clip_anytorch-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            target.write_bytes(archive.read(VOCABULARY_FILE))
        wheel.unlink()
    return target


def printable_bytes() -> list[str]:
    """The 256 characters that stand for the bytes, in CLIP's order: printable ones first, as themselves."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = 256 - len(printable)
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(others)]


def write_tokenizer(vocabulary: Path, folder: Path) -> CLIPTokenizer:
    """Write `vocab.json` and `merges.txt`, which every version of transformers reads, and load them back.

    The one file that transformers 5 would write itself holds the same in 3.6 MB instead of 1.4.
    """
    lines = gzip.decompress(vocabulary.read_bytes()).decode("utf-8").split("\n")
    merges = lines[1 : VOCABULARY_SIZE - 512 - 2 + 1]
    letters = printable_bytes()
    tokens = [*letters, *(letter + "</w>" for letter in letters), *(merge.replace(" ", "") for merge in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": MAX_TOKENS,
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
    }
    folder.mkdir(parents=True, exist_ok=True)
    ids = {token: i for i, token in enumerate(tokens)}
    compact = json.dumps(ids, ensure_ascii=False, separators=(",", ":"))
    (folder / "vocab.json").write_text(compact, encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return CLIPTokenizer.from_pretrained(folder)


def build_text_encoder() -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=VOCABULARY_SIZE,
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=VOCABULARY_SIZE - 2,
            eos_token_id=VOCABULARY_SIZE - 1,
            pad_token_id=VOCABULARY_SIZE - 1,
        )
    )


def embed(
    text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer, captions: list[str]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The last hidden state `[B, L, D]` of each caption, as Stable Diffusion takes it, and its pooled one `[B, D]`."""
    tokens = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    output = text_encoder(tokens.to(text_encoder.device))
    return output.last_hidden_state, output.pooler_output


def train_text_encoder(
    groups: list[Windows], tokenizer: CLIPTokenizer, path: Path, *, seed: int, device: str
) -> CLIPTextModel:
    """The encoder that tells best from a caption what is to be seen, by its pooled output; kept in `path`."""
    torch.manual_seed(seed)
    text_encoder = build_text_encoder().to(device)
    if path.exists():
        text_encoder.load_state_dict(torch.load(path, map_location=device, weights_only=True))
        return text_encoder.requires_grad_(False).eval()
    windows = [(cells, group.width) for group in groups for cells in group.cells]
    attributes = torch.tensor(np.array([look(cells).attributes(width) for cells, width in windows])).float().to(device)
    tell = nn.Linear(text_encoder.config.hidden_size, attributes.shape[1]).to(device)
    optimizer = torch.optim.AdamW([*text_encoder.parameters(), *tell.parameters()], lr=2e-3, weight_decay=0)
    rng = np.random.default_rng([seed, 11])
    for step in (bar := tqdm(range(STEPS), desc="text encoder", mininterval=10)):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 50, (STEPS - step) / (0.5 * STEPS))
        chosen = rng.integers(len(windows), size=BATCH)
        _, pooled = embed(text_encoder, tokenizer, [caption(*windows[i], rng) for i in chosen])
        loss = (tell(pooled) - attributes[chosen]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        bar.set_postfix({"loss": f"{loss.item():.4f}"}, refresh=False)
    save_atomically(text_encoder.state_dict(), path)
    return text_encoder.requires_grad_(False).eval()
