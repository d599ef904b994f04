"""Where in a model there is self-attention to the cells of a map."""

from collections.abc import Iterator
from typing import Any

from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from torch import nn

from ...core.bands import ALONE, Bands
from ...core.families import Order, Site
from ...core.modules import named_modules
from ..notes import MapNote, MapNoting, StepNote
from .blocked import BlockedAttention, blocking_of


def attends_cells(module: nn.Module) -> bool:
    """Whether a module is a transformer whose tokens are the cells of a map that it is given.

    Those have a patch size in their config (None for 1). Temporal ones, whose tokens are frames, and priors have none.
    """
    blocks = module._modules.get("transformer_blocks")  # what a module has not takes it long to say
    return (
        isinstance(blocks, nn.ModuleList)
        and any(isinstance(block, BasicTransformerBlock) for block in blocks)
        and "patch_size" in getattr(module, "config", ())
        and not getattr(module, "is_input_vectorized", False)
    )


def attends_map(module: nn.Module) -> bool:
    """Whether a module is a self-attention that is given a map rather than tokens: one that normalizes it by groups."""
    return isinstance(module, Attention) and module.group_norm is not None and not module.only_cross_attention


def attention_sites(
    model: nn.Module, name: str, options: Any, step_note: StepNote, bands: Bands = ALONE
) -> Iterator[Site]:
    """All self-attentions of `model` to the cells of maps, and the transformers that note the size of these."""
    blocking = blocking_of(options)
    says = f"{{count}} self-attentions in {blocking}"
    modules, layer = named_modules(model, name), 0
    for place, transformer in modules:
        if attends_cells(transformer):
            note = MapNote()
            noting = MapNoting(note, getattr(transformer.config, "patch_size", None) or 1)
            yield Site(transformer, place, Order.MAP_NOTED, noting)
            for path, module in named_modules(transformer, place):
                if isinstance(module, Attention) and not module.is_cross_attention:
                    blocked = BlockedAttention(module, blocking, step_note, layer, note, bands, path)
                    yield Site(module, path, Order.IN_BLOCKS, blocked, says=says)
                    layer += 1
    for path, module in modules:
        if attends_map(module):
            blocked = BlockedAttention(module, blocking, step_note, layer, None, bands, path)
            yield Site(module, path, Order.IN_BLOCKS, blocked, says=says)
            layer += 1
