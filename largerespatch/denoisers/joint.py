"""What transformers share in which text and image tokens attend to one another. They are left as they are."""

from collections.abc import Iterator
from typing import Any

from ..core.families import Site
from ..techniques.padding import padding_sites
from .any import AnyDenoiser


class JointAttention(AnyDenoiser):
    """A family of these says how pipelines call it, so that its memory can be told."""

    rank = 0
    known = False

    def sites(self, model: Any, name: str, options: Any, pipe: Any) -> Iterator[Site]:
        yield from padding_sites(model, name, options.padding_mode)
