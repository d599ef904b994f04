"""Sites go in by their order, whatever order they come in; families are found by one registry."""

import random
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import tiny
from calls import noise, text
from largerespatch.core import families
from largerespatch.core.families import Family, Order, Site, families_in, family_of, install, models_of, told
from largerespatch.core.hosts import Host
from largerespatch.core.patching import PatchStack
from largerespatch.denoisers.unet import skip_sites
from largerespatch.techniques.attention.blocked import BlockedAttention
from largerespatch.techniques.attention.host_tokens import token_sites
from largerespatch.techniques.attention.sites import attention_sites
from largerespatch.techniques.chunks import chunk_sites
from largerespatch.techniques.notes import StepNote, StepNoting
from largerespatch.techniques.padding import padding_sites, reflection_sites
from largerespatch.techniques.serial import SerialBatch
from largerespatch.techniques.strips.cuts import Strips
from largerespatch.techniques.strips.host_strips import HostStrips, host_sites
from largerespatch.techniques.strips.strips import strip_sites


@given(st.permutations(list(Order)))
def test_what_comes_first_in_the_order_runs_outermost(orders):
    module, met = nn.Identity(), []

    def technique(order):
        def around(original, x):
            met.append(order)
            return original(x)

        return around

    with PatchStack() as stack:
        install(stack, [Site(module, "module", order, technique(order)) for order in orders])
        module(0)
    assert met == list(Order)
    assert module(0) == 0 and len(met) == len(Order)


OPTIONS = SimpleNamespace(attn_shape="brick", attn_slice_y=2, attn_slice_x=2, attn_full_tokens=4, attn_context=8)


def all_sites(unet, maps=False):
    note, host = StepNote(), Host("cpu:0", band_bytes=1500, least=1500)
    attention = list(attention_sites(unet, "unet", OPTIONS, note))
    blocked = {site.module: site.technique for site in attention if isinstance(site.technique, BlockedAttention)}
    strips = HostStrips(3, True, host)
    yield Site(unet, "unet", Order.STEP_NOTED, StepNoting(note, list))
    yield Site(unet, "unet", Order.BATCH_IN_TURNS, SerialBatch(unet))
    yield from attention
    yield from chunk_sites(unet, "unet", 7)
    yield from host_sites(unet, "unet", strips) if maps else strip_sites(unet, "unet", Strips(3, wrap=True))
    yield from token_sites(unet, "unet", strips, blocked) if maps else ()
    yield from padding_sites(unet, "unet", "circular")
    yield from reflection_sites(unet, "unet", "reflect", least=3, scale=8)
    yield from skip_sites(unet, "unet", host)


@pytest.mark.parametrize("maps", [False, True])
def test_shuffled_sites_do_the_same(maps):
    unet, sample, arguments, results = tiny.unet(), noise(2, 4, 9, 7), text(2), []
    plain = unet(sample, **arguments).sample
    for seed in range(4):
        sites = list(all_sites(unet, maps))
        # For autoencoders, for several processes, for maps on the host.
        others = {Order.IN_STAGES, Order.BATCH_SHARED, Order.IN_BANDS} | (set() if maps else {Order.IN_TILES})
        assert {site.order for site in sites} == set(Order) - others
        # No order of two sites is left to chance.
        assert len({(site.module, site.attribute, site.order) for site in sites}) == len(sites)
        if seed:
            random.Random(seed).shuffle(sites)
        with PatchStack() as stack:
            install(stack, sites)
            results.append(unet(sample, **arguments).sample)
    assert (results[0] - plain).abs().max() > 1e-3
    assert all(torch.equal(result, results[0]) for result in results)
    assert torch.equal(unet(sample, **arguments).sample, plain)


def test_what_cannot_be_called_is_the_value_itself():
    module = nn.Conv2d(1, 1, 3, padding=1)
    with PatchStack() as stack:
        install(stack, [Site(module, "conv", Order.PADDED, "circular", "padding_mode")])
        assert module.padding_mode == "circular"
    assert module.padding_mode == "zeros"


def test_a_failure_half_way_leaves_nothing():
    first, second = nn.Identity(), object()  # without a __dict__
    before = dict(vars(first))
    with pytest.raises((AttributeError, TypeError)), PatchStack() as stack:
        install(stack, [Site(first, "first", Order.PADDED, max), Site(second, "second", Order.STEP_NOTED, max)])
    assert vars(first) == before


def test_every_site_names_its_place():
    unet = tiny.unet()
    for site in all_sites(unet):
        assert site.path == "unet" or unet.get_submodule(site.path.removeprefix("unet.")) is site.module


def test_sites_that_say_the_same_are_told_once_with_their_number():
    module = nn.Identity()

    def site(says=""):
        return Site(module, "", Order.PADDED, max, says=says)

    sites = [site("{count} a"), site(), site("b"), site("{count} a"), site("b")]
    assert told(sites) == "2 a, b"
    assert told([site()]) == ""
    blocked = told(all_sites(tiny.unet()))
    assert "4 self-attentions in bricks of 4x2 and 2x4 tokens with 8 of context on maps of over 4" in blocked
    assert "4 feed-forwards in chunks of 7 tokens" in blocked
    assert "convolutions in strips of 3 rows" in blocked and "convolutions pad by 'circular'" in blocked


class Thing(nn.Module):
    pass


class Special(Thing):
    pass


class Things(Family):
    def matches(self, model):
        return isinstance(model, Thing)

    def sites(self, model, name, options, pipe):
        yield from ()


class Specials(Things):
    rank = Things.rank + 1

    def matches(self, model):
        return isinstance(model, Special)


@pytest.fixture
def registered():
    for family in (Specials, Things):
        assert families.register(family) is family  # to be written over a class
    yield
    for family in (Specials, Things):
        families.unregister(family)


def test_a_family_is_found_once_it_is_registered(registered):
    assert type(family_of(Thing())) is Things
    assert type(family_of(Special())) is Specials  # whatever was registered first
    families.unregister(Specials)
    assert type(family_of(Special())) is Things
    families.unregister(Things)
    assert family_of(Special()) is None


def test_the_models_of_a_pipeline(registered):
    compiled = SimpleNamespace(_orig_mod=Thing())
    parts = {"thing": Thing(), "compiled": compiled, "other": nn.Identity(), "scheduler": object(), "none": None}
    pipe = SimpleNamespace(components=parts)
    assert list(models_of(pipe)) == ["thing", "compiled", "other"]
    assert models_of(pipe)["compiled"] is compiled._orig_mod
    assert {name: type(family) for name, (_, family) in families_in(pipe).items()} == {
        "thing": Things,
        "compiled": Things,
    }
    for nothing in (None, object(), SimpleNamespace(components=[])):
        with pytest.raises(TypeError, match="pipe must be a diffusers pipeline, with `components`; got"):
            models_of(nothing)


def test_what_is_not_known_of_a_call_is_said():
    with pytest.raises(ValueError, match="it is not known how pipelines call Thing"):
        Things().call("step", Thing(), None, 8, 8)
