"""Models of diffusers that nobody else knows: only their convolutions, where these are to pad in another way."""

from collections.abc import Iterator
from typing import Any

from torch import nn

from ..core.calls import takes
from ..core.families import Family, Site, register, warn_of_unknown
from ..techniques.padding import padding_sites

# The parameters by which denoisers are told a timestep.
TIMESTEPS = {"timestep", "timesteps", "timestep_ratio", "t"}


@register
class Others(Family):
    """Adapters, priors, denoisers of no known kind. Of the last a warning tells, since they may be what takes most."""

    rank = -2
    known = False

    def matches(self, model: nn.Module) -> bool:
        from diffusers import ModelMixin  # here, not above: it brings transformers along

        return isinstance(model, ModelMixin)

    def sites(self, model: Any, name: str, options: Any, pipe: Any) -> Iterator[Site]:
        yield from padding_sites(model, name, options.padding_mode)

    def check(self, model: Any, pipe: Any, height: int, width: int) -> None:
        has_map = any(key.endswith(("in_channels", "patch_size")) for key in getattr(model, "config", ()))
        if has_map and TIMESTEPS & takes(type(model).forward):
            warn_of_unknown(model, "a denoiser")
