"""Kandinsky's `VQModel` in pieces, whose decoder's norms look at the latent, against itself untiled."""

import pytest
import torch
from diffusers import VQModel
from diffusers.models.attention_processor import Attention
from hypothesis import given, settings
from hypothesis import strategies as st
from products import in_pairs

import family
import tiny
from conftest import quiet
from halves import (
    BOTH,
    HALVES,
    MODES,
    cut_up,
    error,
    latent,
    padded,
    patched,
    picture,
    told,
)
from largerespatch import LargeResPatch
from largerespatch.autoencoders.vq import VQ
from largerespatch.core.families import family_of
from largerespatch.core.hosts import Host
from largerespatch.core.tilings import Tile
from largerespatch.techniques.attention import chunked_attention
from largerespatch.techniques.vae.alike import looking_there, piece

LEVELS = {"down_block_types": ("DownEncoderBlock2D",) * 2 + ("AttnDownEncoderBlock2D",)}
LEVELS |= {"up_block_types": ("AttnUpDecoderBlock2D", *("UpDecoderBlock2D",) * 2), "block_out_channels": (32, 32, 64)}
CODES = {"latent_channels": 4, "num_vq_embeddings": 12, "vq_embed_dim": 4, "norm_num_groups": 8}
ATTENDS = {"block_out_channels": (32, 32), "down_block_types": ("AttnDownEncoderBlock2D",) * 2}
ATTENDS |= {"up_block_types": ("AttnUpDecoderBlock2D",) * 2}
KINDS = {
    "as Kandinsky's": {"norm_type": "spatial"},
    "groups": {"norm_type": "group"},
    "attention everywhere": {"norm_type": "spatial", **ATTENDS},
    "a narrow end": {"norm_type": "spatial", "block_out_channels": (32, 64, 128)},
}


# As Kandinsky's pipelines decode; the codebook is no matter of pieces.
HALVES = HALVES | {"decode": lambda model, x: model.decode(x, force_not_quantize=True).sample}


def vae(kind="as Kandinsky's", **changes):
    model = tiny.frozen(VQModel, 41, **LEVELS | CODES | KINDS[kind] | changes)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter += torch.randn(parameter.shape, generator=generator) / 8
    return model


def inputs(half, batch, height, width):
    return picture(batch, 4 * height, 4 * width) if half == "encode" else latent(batch, height, width)


def test_the_family_is_known():
    assert all(type(family_of(vae(kind))) is VQ for kind in KINDS)
    assert family_of(vae()).factor(vae()) == 4


def test_a_norm_looks_where_its_piece_is():
    latent = torch.arange(12.0).view(1, 1, 3, 4)
    whole = torch.nn.functional.interpolate(latent, (12, 16), mode="nearest")
    seen = lambda plane, where: where  # noqa: E731
    for tile in (Tile(2, 0, 5, 16), Tile(0, 3, 12, 10), Tile(-1, 0, 2, 16), Tile(10, 14, 14, 18)):
        rows, columns = torch.arange(tile.top, tile.bottom) % 12, torch.arange(tile.left, tile.right) % 16
        with piece([tile], 16):
            assert torch.equal(
                looking_there(seen, torch.empty(1, 1, *tile.size()), latent), whole[:, :, rows][..., columns]
            )
    with piece([Tile(1, 1, 2, 3), Tile(5, 6, 6, 8)], 8):  # a plane of twice the latent's size, seen at twice that
        expected = torch.cat([whole[:, :, 2:4, 2:6], whole[:, :, 10:12, 12:16]])
        assert torch.equal(looking_there(seen, torch.empty(2, 1, 2, 4), latent), expected)
    assert looking_there(seen, whole, latent) is latent


@settings(max_examples=16)
@given(
    st.sampled_from(sorted(KINDS)),
    st.sampled_from(sorted(HALVES)),
    st.integers(1, 2),
    st.integers(2, 14),
    st.integers(2, 9),
    st.integers(1, 16),
    st.sampled_from(["constant", "circular", "reflect", "replicate"]),
    st.booleans(),
    st.booleans(),
)
def test_exact_equals_untiled(kind, half, batch, height, width, rows, padding, recompute, offload):
    model, x, run = vae(kind), inputs(half, batch, height, width), HALVES[half]
    before = x.clone()
    with padded(model, padding):
        expected = run(model, x)
    sizes = {"vae_chunk_size_y": rows, "vae_chunk_size_x": 1, "vae_recompute": recompute, "vae_offload": offload}
    with patched(model, vae_mode="exact", padding_mode=padding, **sizes):
        assert error(run(model, x), expected) < 1e-4
    assert torch.equal(x, before)


@in_pairs({"half": HALVES, "kind": KINDS, "padding": ["constant", "circular"]})
def test_passes_come_close_and_as_many_as_there_are_norms_are_exact(half, kind, padding):
    model, x, run = vae(kind), inputs(half, 1, 9, 7), HALVES[half]
    with padded(model, padding):
        expected = run(model, x)
    errors = []
    for passes in (2, 14):
        with patched(model, vae_passes=passes, padding_mode=padding, vae_chunk_size_x=5, vae_chunk_size_y=5):
            errors.append(error(cut_up(lambda: run(model, x)), expected))
    assert errors[0] < 1  # random weights exaggerate
    assert errors[1] < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_attention_in_chunks_of_queries_is_exact(monkeypatch, kind):
    model, z, chunks = vae(kind), latent(2, 24, 20), []
    expected = HALVES["decode"](model, z)
    monkeypatch.setattr(chunked_attention, "QUERIES", 50)
    cut = chunked_attention.ChunkedAttention._cut
    monkeypatch.setattr(
        chunked_attention.ChunkedAttention, "_cut", lambda self, *size: chunks.append(cut(self, *size)) or chunks[-1]
    )
    with patched(model, vae_mode="exact"):
        assert error(HALVES["decode"](model, z), expected) < 1e-4
    attentions = sum(isinstance(module, Attention) for module in model.decoder.modules())
    assert len(chunks) == 2 * attentions > 4  # of keys, and then of queries
    assert all(len(each) == 12 for each in chunks[:6])  # two rows of 20 each


def test_attention_in_blocks_sees_more_by_its_context():
    model, z = vae(), latent(2, 24, 20)
    for name, parameter in model.named_parameters():
        if ".to_q.weight" in name or ".to_k.weight" in name:
            parameter *= 3  # some tokens matter more than others
    expected, errors = HALVES["decode"](model, z), []
    blocks = {"vae_mode": "exact", "vae_attn": "blocked", "attn_slice_x": 8, "attn_slice_y": 8, "attn_full_tokens": 64}
    assert "its attention in blocks" in told(model, **blocks)
    for context in (0, 4 * 480):
        with patched(model, **blocks, attn_context=context):
            errors.append(error(HALVES["decode"](model, z), expected))
    assert errors[0] > 1e-3
    assert errors[1] < 1e-4  # all tokens


@BOTH
@MODES
def test_maps_live_on_a_host_as_well(monkeypatch, half, mode):
    monkeypatch.setattr(Host, "serves", lambda self, device: True)  # as if the model ran elsewhere
    model, x, run = vae(), inputs(half, 2, 24, 20), HALVES[half]
    results = []
    for offload in (False, True):
        with patched(model, vae_offload=offload, vae_mode=mode):
            results.append(cut_up(lambda: run(model, x)))
    assert error(*results) < 1e-4


def test_it_is_told_and_leaves_nothing_behind():
    model = vae()
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    with patched(model):
        assert not hasattr(model, "use_tiling")  # upstream has none
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before
    assert "encoder and decoder exactly, in strips of 10 rows, largest maps recomputed" in told(
        model, vae_mode="exact", vae_recompute=True
    )
    assert "encoder and decoder in two passes over tiles of at most 10x10 latent pixels" in told(model)


KANDINSKY = family.CASES["others: Kandinsky 2.2"]


def test_a_pipeline_makes_the_untiled_picture():
    pipe = quiet(KANDINSKY.build())
    expected = family.run(pipe, KANDINSKY.arguments)
    options = {"vae_mode": "exact", "vae_chunk_size_x": 10, "vae_chunk_size_y": 10}
    patch = LargeResPatch(pipe, family.SIZE, family.SIZE, **options)
    assert "movq (VQModel): encoder and decoder exactly, in strips of 10 rows" in repr(patch)
    with patch:
        assert error(family.run(pipe, KANDINSKY.arguments), expected) < 1e-4
    assert torch.equal(family.run(pipe, KANDINSKY.arguments), expected)
