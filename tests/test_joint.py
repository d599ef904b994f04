"""Blocks of joint-attention transformers tile by tile: the mechanism, and a family that nobody knows."""

from typing import ClassVar
from unittest import mock

import diffusers as d
import pytest
import test_flux
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from joint import ALL, CLOSE, TILES, TOKENS, Case, JointTests, error, paint, patch
from torch import nn

from conftest import quiet
from family import noise
from largerespatch import LargeResPatch
from largerespatch.core import weights
from largerespatch.core.families import register, unregister
from largerespatch.core.tilings import Tile
from largerespatch.denoisers import joint as joint_room
from largerespatch.denoisers.joint import JointAttention, maps_of_ids
from largerespatch.options import Options
from largerespatch.techniques.attention.blocked import blocking_of
from largerespatch.techniques.joint.blocks import JointBlock, MapsNote
from largerespatch.techniques.joint.key_source import HALVINGS
from largerespatch.techniques.joint.passing import Passing
from largerespatch.techniques.joint.pooled import Keys, PooledMap
from largerespatch.techniques.joint.tokens import BOTH, IMAGE, TEXT, Maps, Tokens
from largerespatch.techniques.notes import StepNote

# --- pooled cells ---


@st.composite
def tiled_maps(draw):
    height, width = draw(st.integers(1, 20)), draw(st.integers(1, 20))
    top, left = draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))
    return (height, width), Tile(top, left, draw(st.integers(top + 1, height)), draw(st.integers(left + 1, width)))


def chosen_of(pooled, tile, judges, total):
    """All that is chosen, one after another."""
    found = zip(*pooled.chosen(tile, judges, total), strict=True)
    return Keys(*(torch.cat(each, dim=2) for each in found))


def chosen(size, tile, count, judges=None):
    tokens = size[0] * size[1]
    keys, values = noise(2, 3, tokens, 4), noise(2, 3, tokens, 5, seed=6)
    judges = torch.zeros(2, 3, 7, 4) if judges is None else judges
    return keys, values, chosen_of(PooledMap(keys, values, size, count), tile, judges, torch.zeros(2, 3, 7, 1))


@given(tiled_maps(), st.integers(0, 300))
def test_what_is_chosen_stands_for_each_token_outside_the_tile_once(case, count):
    (height, width), tile = case
    few = chosen((height, width), tile, count)[2]
    assert few.keys.shape[2] <= max(count, 1)
    torch.testing.assert_close(
        few.log_weights.exp().sum(dim=-1), torch.full((2, 3), float(height * width - tile.area)), rtol=1e-5, atol=1e-5
    )


@given(tiled_maps())
def test_with_room_for_all_each_token_stands_for_itself(case):
    (height, width), tile = case
    keys, values, all_of_them = chosen((height, width), tile, height * width)
    assert torch.equal(all_of_them.keys, keys)
    assert torch.equal(all_of_them.values, values)
    inside = torch.zeros(height, width, dtype=torch.bool)
    inside[tile.rows, tile.columns] = True
    assert torch.equal(all_of_them.log_weights == 0, ~inside.flatten().expand(2, 3, -1))


@given(tiled_maps(), st.integers(1, 60), st.sampled_from([2, 3, 9]))
def test_which_means_are_kept_makes_no_difference(case, count, kept):
    size, tile = case
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("largerespatch.techniques.joint.pooled.KEPT", 1)
        every_level = chosen(size, tile, count)[2]
        monkeypatch.setattr("largerespatch.techniques.joint.pooled.KEPT", kept)
        few_levels = chosen(size, tile, count)[2]
    for some, same in zip(few_levels, every_level, strict=True):
        torch.testing.assert_close(some, same)


def test_heads_choose_the_tokens_that_their_own_queries_want():
    keys = torch.zeros(1, 2, 256, 4)
    keys[0, 0, 37, 0] = keys[0, 1, 200, 0] = 9.0
    judges = torch.tensor([1.0, 0, 0, 0]).expand(1, 2, 5, 4)
    pooled = PooledMap(keys, keys, (16, 16), 13)  # four times the one best of four
    found = chosen_of(pooled, Tile(0, 0, 1, 1), judges, torch.zeros(1, 2, 5, 1))
    assert pooled.sizes[-1] == (1, 1)
    for head in (0, 1):
        favourite = found.keys[0, head, :, 0] == 9.0  # not the mean of a cell
        assert favourite.sum() == 1 and found.log_weights[0, head, favourite] == 0


def attended(queries, keys, values, log_weights):
    return F.scaled_dot_product_attention(queries, keys, values, attn_mask=log_weights[:, :, None], scale=1)


@given(tiled_maps())
def test_a_cell_of_four_tokens_does_to_the_query_that_it_is_for_what_these_do(case):
    size, tile = case
    judge = noise(2, 3, 1, 4, seed=8)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("largerespatch.techniques.joint.pooled.COARSE", 1)
        keys, values, few = chosen(size, tile, max(-(-size[0] // 2) * -(-size[1] // 2), 1), judge)
    inside = torch.zeros(*size)
    inside[tile.rows, tile.columns] = -torch.inf
    weights = inside.flatten().expand(2, 3, -1)
    if tile.area < size[0] * size[1]:
        expected = attended(judge, keys, values, weights)
        torch.testing.assert_close(attended(judge, *few), expected, rtol=1e-4, atol=1e-5)
        scores = (keys @ judge.transpose(-1, -2))[..., 0] + weights
        pooled = (few.keys @ judge.transpose(-1, -2))[..., 0] + few.log_weights
        torch.testing.assert_close(pooled.logsumexp(dim=-1), scores.logsumexp(dim=-1), rtol=1e-4, atol=1e-4)


def test_the_part_of_a_map_that_keys_start_with_another_thing_is_its_own():
    keys, values, expected = chosen((16, 16), Tile(0, 0, 2, 8), 20)
    parts = [torch.cat([noise(2, 3, 5, each.shape[3], seed=9), each], dim=2) for each in (keys, values)]
    found = PooledMap(*parts, (16, 16), 20, start=5)
    found = chosen_of(found, Tile(0, 0, 2, 8), torch.zeros(2, 3, 7, 4), torch.zeros(2, 3, 7, 1))
    for some, same in zip(found, expected, strict=True):
        torch.testing.assert_close(some, same)


def test_several_sets_of_queries_choose_at_once_what_each_would_alone():
    judges, total = noise(3 * 2, 3, 5, 4, seed=9), noise(3 * 2, 3, 5, 1, seed=10)
    pooled = PooledMap(noise(2, 3, 320, 4), noise(2, 3, 320, 5, seed=6), (20, 16), 24)
    together = chosen_of(pooled, Tile(4, 4, 9, 12), judges, total)
    sets = zip(judges.chunk(3), total.chunk(3), together.chunk(3), strict=True)
    for some, its_total, found in sets:
        torch.testing.assert_close(tuple(found), tuple(chosen_of(pooled, Tile(4, 4, 9, 12), some, its_total)))


# --- where tokens are ---


@given(tiled_maps(), st.integers(0, 20), st.integers(0, 20), st.integers(0, 3))
def test_parts_of_a_piece_have_each_of_its_tokens_once(case, tall, wide, halvings):
    size, tile = case
    maps, cpu = Maps((size, (tall, wide))), torch.device("cpu")
    piece = maps.piece(tile)
    parts = piece.parts(halvings)
    places = [piece.places(part, cpu) for part in parts]
    assert sorted(torch.cat(places).tolist()) == list(range(piece.area))
    assert len(parts) <= 2**halvings and all(part.area for part in parts)
    for part, there in zip(parts, places, strict=True):
        assert torch.equal(maps.places(piece, cpu)[there], maps.places(part, cpu))


@given(tiled_maps(), st.integers(0, 20), st.integers(0, 20))
def test_pieces_have_the_same_part_of_every_map(case, tall, wide):
    size, _ = case
    maps = Maps((size, (tall, wide)))
    places = []
    for cut in range(size[1]):
        piece = maps.piece(Tile(0, cut, size[0], cut + 1))
        places += maps.places(piece, torch.device("cpu")).tolist()
    assert sorted(places) == list(range(maps.area))


def ids(*sizes):
    """As Flux's pipelines make them."""
    made = []
    for picture, (height, width) in enumerate(sizes):
        made.append(d.FluxPipeline._prepare_latent_image_ids(1, height, width, "cpu", torch.float32))
        made[-1][:, 0] = picture
    return torch.cat(made)


def test_maps_are_read_from_ids():
    assert list(maps_of_ids(ids((7, 5)))) == [(7, 5)]
    assert list(maps_of_ids(ids((7, 5), (3, 9)))) == [(7, 5), (3, 9)]
    assert list(maps_of_ids(ids((1, 5))[None])) == [(1, 5)]
    assert list(maps_of_ids(ids((7, 5))[1:])) == []
    assert list(maps_of_ids(ids((7, 5)).flip(0)[:30].roll(3, 0))) == []


def test_ids_are_read_once_and_again_when_they_change(monkeypatch):
    """What is read from a device has the host wait for it."""
    read = []
    monkeypatch.setattr(joint_room, "_read", lambda some: read.append(some.shape) or [(len(some), 1)])
    some = ids((7, 5), (3, 9))
    for _ in range(3):
        assert maps_of_ids(some) == [(62, 1)]
        assert maps_of_ids(some[35:]) == [(27, 1)]  # a part, which pipelines cut out anew every time
        assert maps_of_ids(some[:35]) == [(35, 1)]
    assert read == [(62, 3), (27, 3), (35, 3)]
    some[0] = 3
    maps_of_ids(some[35:])
    maps_of_ids(some.clone())
    assert read[3:] == [(27, 3), (62, 3)]
    with torch.inference_mode():  # where nobody counts writes
        given = some.clone()
        maps_of_ids(given)
        maps_of_ids(given)
    assert read[5:] == [(62, 3)] * 2
    kept = len(joint_room._READ)
    del some, given
    assert len(joint_room._READ) < kept  # and ids are not kept


def test_what_is_small_takes_no_time_to_find_out_about(monkeypatch):
    """On a GPU the host has many blocks to ask for, and each look at hooks, weights and arguments adds up."""
    pipe, arguments = quiet(test_flux.pipeline()), test_flux.TEXT
    dense = paint(pipe, arguments)
    for room, name in ((JointBlock, "__call__"), (Passing, "_kept"), (weights, "weights_held")):
        monkeypatch.setattr(room, name, mock.Mock(side_effect=AssertionError("asked")))
    with patch(pipe, attn_full_tokens=TOKENS):
        assert torch.equal(paint(pipe, arguments), dense)
    with patch(pipe, attn_full_tokens=TOKENS - 1), pytest.raises(AssertionError, match="asked"):
        paint(pipe, arguments)


def test_arguments_that_are_not_as_said_are_seen():
    tokens = Tokens({"x": IMAGE, "y": TEXT, "rotary": BOTH.along(0)}, (TEXT, IMAGE), text_first=True)
    x, y = torch.zeros(1, 12, 3), torch.zeros(1, 5, 3)
    assert tokens.texts({"x": x, "y": y, "rotary": (torch.zeros(17, 2),) * 2}, 12) == 5
    assert tokens.texts({"x": x, "y": y}, 12) == 5
    assert tokens.texts({"x": x, "y": y, "rotary": torch.zeros(16, 2)}, 12) is None
    assert tokens.texts({"x": x, "y": y}, 11) is None


class Led(nn.Module):
    """Tokens that are no cells of the image come before those, attend to themselves, and are seen by all."""

    ahead = 3

    def __init__(self, text_first):
        super().__init__()
        torch.manual_seed(0)
        self.text_first, self.keys = text_first, nn.Linear(16, 32)

    def forward(self, stream, texts):
        before = texts if self.text_first else 0
        query, key, value = torch.cat([stream, self.keys(stream)], dim=2).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        led, image = slice(before, before + self.ahead), slice(before + self.ahead, None if before else -texts)
        text = slice(before) if before else slice(-texts, None)
        order = (text, led, image) if before else (image, led, text)
        keys, values = (torch.cat([each[:, :, part] for part in order], dim=2) for each in (key, value))
        queries = torch.cat([query[:, :, part] for part in order if part is not led], dim=2)
        mixed = F.scaled_dot_product_attention(queries, keys, values)
        mixed_led = F.scaled_dot_product_attention(query[:, :, led], key[:, :, led], value[:, :, led])
        parts = [mixed[:, :, :before], mixed_led, mixed[:, :, before:]]
        return stream + torch.cat(parts, dim=2).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("text_first", [True, False])
def test_tokens_ahead_of_the_image_go_with_every_tile(text_first):
    block, note = Led(text_first).requires_grad_(False), MapsNote()
    note.maps = Maps([(9, 7)])
    tokens = Tokens({"stream": BOTH}, BOTH, text_first, ahead=block.ahead, keys_between=block.ahead)
    stream = noise(2, 5 + block.ahead + 9 * 7, 16)
    dense, errors = block(stream, texts=5), []
    for context in (0, ALL):
        options = Options(attn_slice_x=4, attn_slice_y=3, attn_full_tokens=9, attn_context=context)
        blocked = JointBlock(block, tokens, blocking_of(options), note, StepNote(), 0)(block.forward, stream, texts=5)
        others = slice(5 + block.ahead) if text_first else [*range(block.ahead), *range(-5, 0)]
        assert error(blocked[:, others], dense[:, others]) < 1e-5
        errors.append(error(blocked, dense))
    assert errors[0] > 1e-3
    assert errors[1] < 1e-5


# --- with what others put in ---


def flux():
    return quiet(test_flux.pipeline())


def test_tokens_in_no_grid_are_passed_on_as_they_are():
    model = flux().transformer
    told = {"hidden_states": noise(1, TOKENS, 16), "encoder_hidden_states": noise(1, 5, 32)}
    told |= {"pooled_projections": noise(1, 32), "timestep": torch.tensor([0.5]), "txt_ids": torch.zeros(5, 3)}
    told |= {"img_ids": ids((9, 11)).flip(0).roll(1, 0), "return_dict": False}
    pipe = flux()
    dense = pipe.transformer(**told)[0]
    with patch(pipe, attn_context=0):
        assert torch.equal(pipe.transformer(**told)[0], dense)
        assert not torch.equal(pipe.transformer(**told | {"img_ids": ids((9, 11))})[0], dense)
    assert type(model) is type(pipe.transformer)


def test_text_attends_to_all_even_without_context():
    pipe = flux()
    texts, images = [], []

    def look(block, given, result):
        texts.append(result[0])
        images.append(result[1])

    handle = pipe.transformer.transformer_blocks[0].register_forward_hook(look)
    paint(pipe, test_flux.TEXT, num_inference_steps=1)
    with patch(pipe, attn_context=0):
        paint(pipe, test_flux.TEXT, num_inference_steps=1)
    handle.remove()
    assert error(texts[1], texts[0]) < 1e-5
    assert error(images[1], images[0]) > 1e-3


def test_what_looks_at_tokens_one_by_one_sees_some_at_a_time(monkeypatch):
    """Before the blocks and after them, if these run in tiles."""
    monkeypatch.setattr("largerespatch.techniques.joint.ends.ENOUGH", 30)
    pipe, counts = flux(), []
    dense = paint(pipe, test_flux.TEXT)
    model = pipe.transformer
    for end in (model.x_embedder, model.norm_out, model.proj_out):

        def counted(tokens, *others, forward=end.forward):
            counts.append(tokens.shape[1])
            return forward(tokens, *others)

        monkeypatch.setattr(end, "forward", counted)
    for full_tokens, most in ((64, 30), (TOKENS, TOKENS)):
        counts.clear()
        with patch(pipe, attn_context=ALL, attn_full_tokens=full_tokens):
            assert error(paint(pipe, test_flux.TEXT), dense) < CLOSE
        assert max(counts) == most
        assert sum(counts) % TOKENS == 0


def test_a_map_of_tokens_is_there_once(monkeypatch):
    pipe = flux()

    def needed():
        return LargeResPatch(pipe, 1024, 1024, **TILES).estimate().step

    once = needed()
    monkeypatch.setattr("largerespatch.denoisers.flux.Flux.passes_on", False)
    assert needed() - once == 64 * 64 * pipe.transformer.inner_dim * 4


def all_other(models, phases):
    """A make for each module, in the place of one for all that are alike."""
    return {module: i for i, module in enumerate(module for model in models for module in model.modules())}


def test_blocks_that_write_over_what_they_are_given_are_counted_by_one_of_them(monkeypatch):
    pipe = test_flux.pipeline(num_layers=9, num_single_layers=9)
    runs = []
    monkeypatch.setattr(JointBlock, "_cover", lambda *given, cover=JointBlock._cover: runs.append(0) or cover(*given))

    def needed():
        runs.clear()
        return LargeResPatch(pipe, 1024, 1024, **TILES).estimate().step, len(runs)

    alike, few = needed()
    monkeypatch.setattr("largerespatch.memory.shadow.makes_of", all_other)
    assert needed() == (alike, 18)
    assert few <= 9  # of each kind one for each of the tilings, and the first whose text lies otherwise in memory


class ByHand:
    """A processor that computes its scores itself."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None):
        states = [hidden_states] if encoder_hidden_states is None else [encoder_hidden_states, hidden_states]
        keys = torch.cat([attn.to_k(each) for each in states], dim=1)
        mixed = (keys @ keys.transpose(1, 2)).softmax(dim=-1) @ keys
        if encoder_hidden_states is None:
            return mixed
        text = encoder_hidden_states.shape[1]
        return attn.to_out[0](mixed[:, text:]), attn.to_add_out(mixed[:, :text])


def test_a_block_whose_processor_attends_in_its_own_way_runs_whole_and_says_so_once():
    pipe = flux()
    pipe.transformer.transformer_blocks[0].attn.set_processor(ByHand())
    dense = paint(pipe, test_flux.TEXT)
    with patch(pipe, attn_context=ALL):
        with pytest.warns(RuntimeWarning, match="FluxTransformerBlock with ByHand") as warned:
            assert error(paint(pipe, test_flux.TEXT), dense) < CLOSE
        assert len(warned) == 1


@pytest.mark.parametrize("context", [8, ALL])
def test_parts_of_a_tile_look_for_themselves_unless_they_are_too_few(monkeypatch, context):
    pipe, looked, counts, choose = flux(), [], [], PooledMap.chosen

    def chosen(pooled, tile, judges, total):
        looked.append(len(judges))
        return choose(pooled, tile, judges, total)

    monkeypatch.setattr(PooledMap, "chosen", chosen)
    dense = paint(pipe, test_flux.TEXT)
    for few in (10**9, 4, 1):
        monkeypatch.setattr("largerespatch.techniques.joint.key_source.FEWEST", few)
        looked.clear()
        with patch(pipe, attn_context=context):
            assert (error(paint(pipe, test_flux.TEXT), dense) < CLOSE) == (context == ALL)
        counts.append(sum(looked))
    whole, some, all_of_them = counts
    assert whole < some < all_of_them <= 2**HALVINGS * whole


def test_parts_look_one_after_another_where_all_at_once_would_be_much(monkeypatch):
    pipe, counts, choose = flux(), [], PooledMap.chosen
    monkeypatch.setattr("largerespatch.techniques.joint.key_source.FEWEST", 1)
    for at_once in (2**27, 2**12, 1):
        looked = []
        monkeypatch.setattr(PooledMap, "chosen", lambda *given, looked=looked: looked.append(0) or choose(*given))
        monkeypatch.setattr("largerespatch.techniques.joint.key_source.LOOKED_THROUGH_ON_CPU", at_once)
        dense = paint(pipe, test_flux.TEXT)
        with patch(pipe, attn_context=ALL):
            assert error(paint(pipe, test_flux.TEXT), dense) < CLOSE
        counts.append(len(looked))
    assert counts[0] < counts[1] <= counts[2]


def test_kernels_that_take_no_weights_are_not_asked_meanwhile():
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    pipe = flux()
    dense = paint(pipe, test_flux.TEXT)
    asked = []

    def unable(query, key, value):
        asked.append(key.shape)
        return query

    known = dict(_AttentionBackendRegistry._backends), dict(_AttentionBackendRegistry._supported_arg_names)
    _AttentionBackendRegistry._backends[AttentionBackendName.SAGE] = unable
    _AttentionBackendRegistry._supported_arg_names[AttentionBackendName.SAGE] = {"query", "key", "value"}
    try:
        processors = [module.processor for module in pipe.transformer.modules() if hasattr(module, "processor")]
        for processor in processors:
            processor._attention_backend = AttentionBackendName.SAGE
        with patch(pipe, attn_context=ALL):
            assert error(paint(pipe, test_flux.TEXT), dense) < CLOSE
        assert not asked
        assert all(each._attention_backend == AttentionBackendName.SAGE for each in processors)
        paint(pipe, test_flux.TEXT)
        assert asked
    finally:
        for kept, now in zip(known, ("_backends", "_supported_arg_names"), strict=True):
            getattr(_AttentionBackendRegistry, now).clear()
            getattr(_AttentionBackendRegistry, now).update(kept)


def test_a_model_that_several_processes_share_is_left_alone():
    pipe = flux()
    pipe.transformer._parallel_config = object()
    with pytest.warns(RuntimeWarning, match="^FluxTransformer2DModel is run by several processes") as warned:
        shared = patch(pipe)
    assert len(warned) == 1
    assert repr(shared).endswith("transformer (FluxTransformer2DModel): left as it is")
    with shared:
        assert not any("forward" in vars(module) for module in pipe.transformer.modules())


# --- a family that nobody knows ---


class Block(nn.Module):
    """One stream, text first; two queries share each key; some of the text is masked."""

    def __init__(self):
        super().__init__()
        self.query, self.keys, self.out = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, stream, mask, positions):
        heads = (self.query(stream) + positions).unflatten(2, (4, 4)).transpose(1, 2)
        key, value = (self.keys(stream)).unflatten(2, (2, 2, 4)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(heads, key, value, mask[:, None, None], enable_gqa=True)
        return stream + self.out(mixed.transpose(1, 2).flatten(2)).relu()


class Stranger(nn.Module):
    config = type("Config", (), {"in_channels": 4, "time_cond_proj_dim": None})()

    def __init__(self):
        super().__init__()
        self.embedder, self.projection = nn.Linear(4, 16), nn.Linear(16, 4)
        self.layers = nn.ModuleList(Block() for _ in range(2))

    def forward(self, latent, text, mask, t):
        image = self.embedder(latent.flatten(2).transpose(1, 2))
        mask = F.pad(mask, (0, image.shape[1]), value=True)
        stream = torch.cat([text, image], dim=1)
        positions = torch.arange(stream.shape[1])[:, None].to(stream).expand(-1, 16).mul(0.1).sin()
        for layer in self.layers:
            stream = layer(stream, mask, positions)
        return self.projection(stream[:, text.shape[1] :]).transpose(1, 2).unflatten(2, latent.shape[2:])


class Strangers(JointAttention):
    """All that there is to say."""

    timestep = "t"
    passes_on = True

    def matches(self, model):
        return isinstance(model, Stranger)

    def kinds(self, model):
        rows = {"stream": BOTH, "mask": BOTH, "positions": BOTH.along(0)}
        return {"layers": Tokens(takes=rows, gives=BOTH, text_first=True, asking=("query",))}

    def maps(self, model, arguments):
        return [arguments["latent"].shape[2:]]

    def predict(self, call):
        mask = call.new(call.batch, 6, dtype=torch.bool)
        return call.model(self.sample(call), call.new(call.batch, 6, 16), mask, call.new(call.batch))


class Pipeline:
    vae_scale_factor = 16

    def __init__(self):
        torch.manual_seed(0)
        self.transformer = Stranger().requires_grad_(False)
        self.scheduler = d.FlowMatchEulerDiscreteScheduler()
        self.config = {}

    def set_progress_bar_config(self, **options):
        pass

    @property
    def components(self):
        return {"transformer": self.transformer, "scheduler": self.scheduler}

    def __call__(self, width, height, num_inference_steps, generator, output_type, guidance_scale=2.0):
        latent = torch.randn(2, 4, height // 16, width // 16, generator=generator)  # the halves of guidance
        text, mask = noise(2, 6, 16), torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
        self.scheduler.set_timesteps(num_inference_steps)
        for timestep in self.scheduler.timesteps:
            latent = latent + self.transformer(latent, text, mask, t=timestep.expand(2))
        return (latent,)


@pytest.fixture(autouse=True, scope="module")
def strangers():
    register(Strangers)
    yield
    unregister(Strangers)


class TestStrangers(JointTests):
    cases: ClassVar = {"plain": Case(Pipeline, {}, cuts=frozenset({"attention"}))}
