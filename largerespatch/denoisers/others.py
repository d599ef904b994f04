"""Models of diffusers that nobody else knows: only their convolutions, where these are to pad in another way."""

from collections.abc import Iterator
from typing import Any

from torch import nn

from ..core.families import Family, Site, register
from ..techniques.padding import padding_sites


@register
class Others(Family):
    """Adapters, priors, transformers of no known kind."""

    rank = -2
    known = False

    def matches(self, model: nn.Module) -> bool:
        from diffusers import ModelMixin  # here, not above: it brings transformers along

        return isinstance(model, ModelMixin)

    def sites(self, model: Any, name: str, options: Any, pipe: Any) -> Iterator[Site]:
        yield from padding_sites(model, name, options.padding_mode)
