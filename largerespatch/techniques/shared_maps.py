"""A model whose maps several processes share, each with a band of rows: its own forward runs on the band. Exact.

What it is given is cut where it comes in, and joined where it goes out. In between only leaves differ: convolutions
get the rows beside their band, group norms the statistics of the whole map, attention the keys (see
`largerespatch.techniques.attention.blocked`). Maps of fewer rows than there are processes are whole in all of them.
"""

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers.models.downsampling import Downsample2D
from diffusers.models.upsampling import Upsample2D
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

from ..core.agreement import groups_of
from ..core.bands import Band, Bands, at
from ..core.families import Order, Site
from ..core.modules import named_modules
from ..core.statistics import GivenStatistics, record_by_rows
from .strips.strips import is_differentiated

Forward = Callable[..., torch.Tensor]

# What bands must know the inside of: that a U-Net and a ControlNet do nothing to maps that looks at other rows but by
# their convolutions, group norms, self-attention and resamplers; and that these double a map or bring it to a size.
LEANS_ON = (
    "diffusers.models.unets.unet_2d_condition.UNet2DConditionModel.forward",
    "diffusers.models.controlnets.controlnet.ControlNetModel.forward",
    "diffusers.models.controlnets.controlnet.ControlNetConditioningEmbedding.forward",
    "diffusers.models.transformers.transformer_2d.Transformer2DModel.forward",
    "diffusers.models.resnet.ResnetBlock2D.forward",
    "diffusers.models.upsampling.Upsample2D.forward",
    "diffusers.models.downsampling.Downsample2D.forward",
)

# Arguments that are maps, or several of them.
MAPS = (
    "controlnet_cond",
    "down_block_additional_residuals",
    "mid_block_additional_residual",
    "down_intrablock_additional_residuals",
)

# What in `cross_attention_kwargs` is made for tokens of whole maps.
OF_WHOLE_MAPS = ("ip_adapter_masks", "gligen")


class InBands:
    """Takes the place of a model's ``forward`` and has it run on this process's band of what it is given.

    The first argument is the first process's, whatever the others were given: with other noise in each the bands would
    not fit together. Other maps are cut as they are. What comes out is `joined`, in all processes, or left in bands for
    another model that shares its maps.

    Args:
        model: whose forward it is, and `path` its name in messages.
        bands: of the processes.
        sizes: how the model's maps follow from its first argument; see `largerespatch.core.band_rows.banded`.
        joined: see above.
        all_cut: whether no map may be whole in all processes.
    """

    def __init__(
        self,
        model: nn.Module,
        path: str,
        bands: Bands,
        sizes: dict[str, Any],
        joined: bool = True,
        all_cut: bool = False,
    ) -> None:
        self.model = model
        self.path = path
        self.bands = bands
        self.sizes = sizes
        self.joined = joined
        self.all_cut = all_cut

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # a graph would end at each message
    def __call__(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(original).bind_partial(*args, **kwargs)
        name, sample = next(iter(given.arguments.items()))
        size = self._size(sample)
        self._check(sample, size[0], given.arguments)
        with at(self.path):
            given.arguments[name] = self.bands.first(sample)
            with self.bands.sharing(*size, **self.sizes):
                self._cut_all(given.arguments)
                result = original(*given.args, **given.kwargs)
                return tree_map_only(torch.Tensor, self._whole, result) if self.joined else result

    def _size(self, sample: Any) -> tuple[int, int]:
        """(height, width) of the map that the model is given."""
        return sample.shape[-2], sample.shape[-1]

    def _check(self, sample: Any, height: int, arguments: dict[str, Any]) -> None:
        if is_differentiated(self.model, *tree_leaves(sample)):
            raise RuntimeError(
                f"process_group: {self.path} runs in bands, which have no gradients: call it under torch.no_grad()"
            )
        if refused := self._refused(arguments):
            raise ValueError(
                f"process_group: {self.path} runs in bands of maps and cannot be given {refused[0]}, which is for "
                "whole ones; accepted are calls without"
            )
        count, least = self.bands.count, 1
        if self.all_cut:
            least = int(2 ** self.sizes.get("halvings", 0))
        if height < count * least:
            raise ValueError(
                f"process_group: {self.path} needs a map of at least {count * least} rows for {count} processes; got "
                f"{height}"
            )

    def _refused(self, arguments: dict[str, Any]) -> list[str]:
        """Arguments that are made for whole maps."""
        refused = [key for key in OF_WHOLE_MAPS if key in (arguments.get("cross_attention_kwargs") or ())]
        return refused + ["attention_mask"] * (arguments.get("attention_mask") is not None)

    def _cut_all(self, arguments: dict[str, Any]) -> None:
        """Leaves of maps among the arguments this process's rows."""
        sample = next(iter(arguments))
        arguments[sample] = self._cut(arguments[sample]).contiguous()
        for each in MAPS:
            if each in arguments:
                arguments[each] = tree_map_only(torch.Tensor, self._cut, arguments[each])

    def _whole(self, plane: torch.Tensor) -> torch.Tensor:
        return self.bands.of(plane).whole(plane)

    def _cut(self, plane: torch.Tensor) -> torch.Tensor:
        """This process's rows of a map that is whole; one that is in bands already as it is."""
        return self.bands.of_whole(*plane.shape[-2:]).own(plane)


class BandConvolution:
    """Takes the place of the ``forward`` of a 2-D convolution.

    It runs on the band as it is while the rows beside that are on their way; then the outermost rows of its result are
    computed again, with them.
    """

    def __init__(self, module: nn.Conv2d, path: str, bands: Bands) -> None:
        self.path = path
        self.bands = bands
        self.step = module.stride[0]
        span, padding = module.dilation[0] * (module.kernel_size[0] - 1), int(module.padding[0])
        self.upper = -(-padding // self.step)  # of the result: rows that see those above the band
        self.above = self.upper * self.step
        # Where the map goes on at its opposite edge, the last row of an odd height sees one row more.
        self.below = max(span - padding - (0 if bands.wrap else self.step - 1), 0)
        self.lower = -(-self.below // self.step)

    def __call__(self, original: Forward, hidden_states: torch.Tensor) -> torch.Tensor:
        band = self.bands.of(hidden_states)
        if band.alone or not (self.above or self.below):
            return original(hidden_states)
        with at(self.path):
            made = self.bands.next_to(band, 1) if self.step > 1 else None
            if made is not None and made.alone:
                return original(band.whole(hidden_states))
            return self._beside_others(original, hidden_states, band)

    def _beside_others(self, original: Forward, rows: torch.Tensor, band: Band) -> torch.Tensor:
        arriving = band.around(rows, self.above, self.below)
        height = -(-rows.shape[2] // self.step)
        if height < self.upper + max(self.upper, self.lower):  # some row looks at both neighbours
            above, below = arriving()
            first = 0 if above is None else above.shape[2] // self.step
            result = original(torch.cat([each for each in (above, rows, below) if each is not None], dim=2))
            return result[:, :, first : first + height]
        result = original(rows)
        above, below = arriving()
        if above is not None and self.upper:
            first = above.shape[2] // self.step
            again = original(torch.cat([above, rows[:, :, : 2 * self.above]], dim=2))
            result[:, :, : self.upper] = again[:, :, first : first + self.upper]
        if below is not None and self.lower:
            start = (height - self.lower - self.upper) * self.step
            again = original(torch.cat([rows[:, :, start:], below], dim=2))
            result[:, :, height - self.lower :] = again[:, :, self.upper : self.upper + self.lower]
        return result


class BandNorm:
    """Takes the place of a group norm's ``forward``: with the statistics of the whole map."""

    def __init__(self, module: nn.GroupNorm, path: str, bands: Bands) -> None:
        self.groups = module.num_groups
        self.path = path
        self.bands = bands

    def __call__(self, original: Forward, hidden_states: torch.Tensor) -> torch.Tensor:
        band = self.bands.of(hidden_states)
        if band.alone:
            return original(hidden_states)
        with at(self.path):
            statistics = band.pooled(record_by_rows(hidden_states, self.groups))
        with GivenStatistics(statistics):
            return original(hidden_states)


class BandUpsample:
    """Takes the place of the ``forward`` of an ``Upsample2D``: of a map that is whole in all processes it makes bands
    of the one that is not."""

    def __init__(self, bands: Bands) -> None:
        self.bands = bands

    def __call__(
        self, original: Forward, hidden_states: torch.Tensor, output_size: Any = None, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        here = self.bands.of(hidden_states)
        there = self.bands.next_to(here, -1)
        if not here.alone or there is None:
            return original(hidden_states, output_size, *args, **kwargs)
        doubled = there.size == (2 * here.rows.height, 2 * here.rows.width)
        return there.own(original(hidden_states, None if doubled else there.size, *args, **kwargs))


def bands_of(options: Any) -> Bands:
    """The processes that the options name, and whether maps go on at their opposite edges."""
    rows, *others = groups_of(options.process_group)
    return Bands(rows, options.padding_mode == "circular", *others)


def shared_map_sites(model: nn.Module, name: str, bands: Bands) -> Iterator[Site]:
    """All leaves of `model` that look at other rows of a map, but self-attentions.

    Raises:
        ValueError: there is one that bands are not known for.
    """
    for path, module in named_modules(model, name):
        match module:
            case nn.Conv2d(padding=str()) | Downsample2D(use_conv=False) | Downsample2D(padding=0):
                raise ValueError(f"process_group: it is not known how to run {path} in bands")
            case nn.Conv2d():
                yield Site(module, path, Order.IN_BANDS, BandConvolution(module, path, bands))
            case nn.GroupNorm():
                yield Site(module, path, Order.IN_BANDS, BandNorm(module, path, bands))
            case Upsample2D():
                yield Site(module, path, Order.IN_BANDS, BandUpsample(bands))
