"""LargeResPatch: validate, discover, install, restore."""

import copy
import inspect
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Self, TypeVar

import torch
from diffusers.models.attention import BasicTransformerBlock, FeedForward
from diffusers.models.attention_processor import Attention
from torch import nn

from .attention import (
    COVERS,
    BlockedAttention,
    BlockedMapAttention,
    Blocking,
    ChunkedMapAttention,
    MapNote,
    MapNoting,
    StepNote,
)
from .feedforward import Attended, ChunkedBlock, ChunkedFeedForward, can_be_chunked
from .offload import Link
from .padding import PADDING_MODES, install_padding, pads
from .patching import PatchStack
from .planner import Estimator, MemoryEstimate, Plan, Planner, bare, memory_bytes
from .strips import Strips, unet_replacements
from .unet import SerialBatch, StepNoting, offloadings
from .vae import (
    VAE_ATTENTIONS,
    VAE_MODES,
    Cutting,
    Exact,
    TwoPass,
    can_be_tiled,
    decoder_splits,
    encoder_splits,
)
from .validation import boolean, noting_given, one_of, positive_int, whole_number

# Which models are patched now, by which patch. Kept here, since the models themselves must carry no mark.
_PATCHED: weakref.WeakKeyDictionary[nn.Module, "LargeResPatch"] = weakref.WeakKeyDictionary()


_M = TypeVar("_M", bound=nn.Module)


def _modules(model: nn.Module, kind: type[_M]) -> dict[str, _M]:
    return {path: module for path, module in model.named_modules() if isinstance(module, kind)}


def _self_attentions(transformer: nn.Module) -> dict[str, Attention]:
    attentions = _modules(transformer, Attention)
    return {path: attention for path, attention in attentions.items() if not attention.is_cross_attention}


def _attends_cells(module: nn.Module) -> bool:
    """Whether a module is a transformer whose tokens are the cells of a map that it is given.

    Those have a patch size in their config (None for 1). Temporal ones, whose tokens are frames, and priors have none.
    """
    blocks = getattr(module, "transformer_blocks", None)
    return (
        isinstance(blocks, nn.ModuleList)
        and any(isinstance(block, BasicTransformerBlock) for block in blocks)
        and "patch_size" in getattr(module, "config", ())
        and not getattr(module, "is_input_vectorized", False)
    )


def _transformers(model: nn.Module) -> dict[str, Any]:
    return {path: module for path, module in model.named_modules() if _attends_cells(module)}


def _map_attentions(model: nn.Module) -> dict[str, Attention]:
    """Self-attentions that are given a map rather than tokens: those that normalize it by groups themselves."""
    attentions = _modules(model, Attention)
    return {path: each for path, each in attentions.items() if each.group_norm and not each.only_cross_attention}


def _is_vae(model: nn.Module) -> bool:
    from diffusers import AutoencoderKL  # here and below, not above: both bring transformers along

    return isinstance(model, AutoencoderKL)


def _is_denoiser(model: nn.Module) -> bool:
    return "timestep" in inspect.signature(type(model).forward).parameters


def _can_be_patched(model: nn.Module) -> bool:
    if _is_vae(model):
        return can_be_tiled(model)
    return _is_denoiser(model) and bool(_transformers(model) or _map_attentions(model))


def _components(pipe: Any) -> dict[str, nn.Module]:
    """The models of a pipeline by component name; for one that has been compiled, the model inside."""
    components = getattr(pipe, "components", None)
    if not isinstance(components, dict):
        raise TypeError(f"pipe must be a diffusers pipeline, with `components`; got {type(pipe).__name__}")
    models = {name: model for name, model in components.items() if isinstance(model, nn.Module)}
    return {name: getattr(model, "_orig_mod", model) for name, model in models.items()}


def _discover(pipe: Any) -> dict[str, nn.Module]:
    """The models of a pipeline that can be patched, by component name."""
    models = _components(pipe)
    targets = {name: model for name, model in models.items() if _can_be_patched(model)}
    if not targets:
        held = ", ".join(f"{name} ({type(model).__name__})" for name, model in models.items()) or "no model"
        raise ValueError(
            "pipe must hold something to patch: a model with Transformer2DModel blocks (U-Net, ControlNet) or an "
            f"AutoencoderKL; got {type(pipe).__name__} with {held}"
        )
    return targets


def _others(pipe: Any) -> dict[str, nn.Module]:
    """The other models of diffusers that a pipeline holds: adapters, other autoencoders, unknown transformers."""
    from diffusers import ModelMixin

    targets = _discover(pipe)
    models = {name: model for name, model in _components(pipe).items() if isinstance(model, ModelMixin)}
    return {name: model for name, model in models.items() if name not in targets}


def _parts(model: nn.Module) -> Iterator[nn.Module]:
    """A model and the models that it is made of: several ControlNets are one, and pipelines may share any of them."""
    from diffusers import ModelMixin

    return (module for module in model.modules() if module is model or isinstance(module, ModelMixin))


def _vae_factor(vae: Any) -> int:
    """Sample pixels per latent pixel."""
    return int(2 ** (len(vae.config.block_out_channels) - 1))


def _image_size(option: str, value: object, factor: int) -> int:
    size = positive_int(option, value, "sample pixels")
    if size % factor:
        below = size - size % factor
        nearest = " and ".join(str(each) for each in (below, below + factor) if each > 0)
        raise ValueError(f"{option} must be a multiple of {factor} sample pixels; got {size}, nearest: {nearest}")
    return size


def _check_reflection(option: str, size: int, factor: int, targets: dict[str, nn.Module]) -> None:
    """A map must have two cells to be reflected, the smallest one of a U-Net too."""
    halvings = [
        len(getattr(model.config, "block_out_channels", ())) - 1
        for model in targets.values()
        if hasattr(model, "config") and not _is_vae(model)
    ]
    least = factor * (2 ** max(halvings, default=0) + 1)
    if size < least:
        raise ValueError(
            f"padding_mode 'reflect' needs a {option} of at least {least} sample pixels (two cells on the smallest "
            f"map); got {size}"
        )


class LargeResPatch:
    """Makes a diffusers pipeline of the Stable Diffusion family work far beyond its training size on small memory.

        with LargeResPatch(pipe, width=4096, height=4096):
            image = pipe(prompt, width=4096, height=4096).images[0]

    Inside the block self-attention is blocked, with a context that stands for the rest of the map (approximate),
    feed-forwards are chunked (exact) and the VAE runs in two passes over tiles (approximate). What is small enough to
    need none of it gives the unpatched result. On exit the pipeline is as it was before. A patch can be entered again
    later; `enable` and `disable` are the same two steps for notebooks.

    Args:
        pipe: a diffusers pipeline.
        width: of the image, in sample pixels. Other sizes work inside the block, too.
        height: likewise.
        attn_slice_x: width of a tile, half the width of a wide brick, in tokens of the attended map.
        attn_slice_y: height of a tile, half the height of a tall brick, in tokens of the attended map.
        attn_shape: "brick" for the four running-bond tilings, "tile" for four shifted grids.
        ff_chunk_size: tokens that pass at once through a feed-forward, and through all else that follows self-attention
            in a transformer block.
        padding_mode: what convolutions of U-Net and VAE see beyond the image's edge: "constant" (as trained),
            "circular" (the image continues at its opposite edge), "reflect" or "replicate".
        vae_chunk_size_x: width of a VAE tile in latent pixels.
        vae_chunk_size_y: height of a VAE tile in latent pixels.
        attn_full_tokens: maps of at most this many tokens are attended whole.
        attn_context: tokens outside its block that a block attends to as well: half *heavy* ones, which most queries
            want, half *sampled* ones that stand for the rest of the map. 0 for none.
        vae_mode: "two-pass" (approximate, in tiles) or "exact": strip by strip with the statistics of the whole map,
            about as fast as untiled, with half of its memory. A strip has `vae_chunk_size_y` rows on every map.
        vae_passes: of "two-pass", at least 2, the last of which makes the result: the more, the closer to exact.
        vae_attn: "full", or "blocked": the VAE's mid-block attention is blocked like the U-Net's, with the same
            `attn_` options. Approximate. Beyond about 4096 x 4096 full attention takes most of a decode's time.
        vae_recompute: whether an exact VAE computes its largest maps strip by strip each time they are read, the
            last upsampler's output among them, rather than keep them: about 27 % of the untiled memory, 30 % more time
            for a decode. Exact.
        vae_offload: whether whole maps of the VAE are kept in (pinned) host memory while their strips or tiles visit
            the device: what it takes there hardly grows with the image, but for the mid-block attention. An image that
            the device has no room for is given back on the host by an exact VAE. Changes no result; and nothing at all
            where the VAE runs on the host.
        unet_serial: whether U-Net and ControlNet run the samples of a batch (guidance makes two of one) one after
            another. Exact.
        unet_strip_rows: run the residual blocks and upsamplers of U-Nets and ControlNets in strips of at most so many
            rows of the feature map (exact; less memory at about the same time); None runs them whole.
        unet_offload: whether skip connections wait for their block in (pinned) host memory. Exact; nothing changes
            where the models run on the host.
        memory_limit: what the pipeline may take on its device, weights included: "8GiB", a number of bytes, or "auto"
            for what the device has free, less a margin. The cheapest settings that fit are picked in the order of
            `largerespatch.planner`; options that you give are kept. `repr` says what was picked.

    Raises:
        TypeError, ValueError: an option is not what is accepted, or `pipe` has nothing to patch. Nothing is changed.

    It descends from StableDiffusionLargeResPatch (2022, public domain).
    """

    _given: frozenset[str]  # options that the caller gave

    @noting_given
    def __init__(
        self,
        pipe: Any,
        width: int,
        height: int,
        attn_slice_x: int = 64,
        attn_slice_y: int = 64,
        attn_shape: str = "brick",
        ff_chunk_size: int = 4096,
        padding_mode: str = "constant",
        vae_chunk_size_x: int = 64,
        vae_chunk_size_y: int = 64,
        *,
        attn_full_tokens: int = 16384,
        attn_context: int = 512,
        vae_mode: str = "two-pass",
        vae_passes: int = 2,
        vae_attn: str = "full",
        vae_recompute: bool = False,
        vae_offload: bool = False,
        unet_serial: bool = False,
        unet_strip_rows: int | None = None,
        unet_offload: bool = False,
        memory_limit: str | int | None = None,
    ) -> None:
        targets = _discover(pipe)
        vaes = [model for model in targets.values() if _is_vae(model)]
        factor = max((_vae_factor(vae) for vae in vaes), default=getattr(pipe, "vae_scale_factor", 1))
        self.pipe = pipe
        self._factor = factor
        self.width = _image_size("width", width, factor)
        self.height = _image_size("height", height, factor)
        self.blocking = Blocking(
            shape=one_of("attn_shape", attn_shape, tuple(COVERS)),
            slice_y=positive_int("attn_slice_y", attn_slice_y, "tokens"),
            slice_x=positive_int("attn_slice_x", attn_slice_x, "tokens"),
            full_tokens=positive_int("attn_full_tokens", attn_full_tokens, "tokens"),
            context=whole_number("attn_context", attn_context, "tokens", least=0),
        )
        self.ff_chunk_size = positive_int("ff_chunk_size", ff_chunk_size, "tokens")
        self.padding_mode = one_of("padding_mode", padding_mode, PADDING_MODES)
        if self.padding_mode == "reflect":
            _check_reflection("width", self.width, factor, targets)
            _check_reflection("height", self.height, factor, targets)
        self.vae_chunk_size_x = positive_int("vae_chunk_size_x", vae_chunk_size_x, "latent pixels")
        self.vae_chunk_size_y = positive_int("vae_chunk_size_y", vae_chunk_size_y, "latent pixels")
        self.vae_mode = one_of("vae_mode", vae_mode, VAE_MODES)
        self.vae_recompute = boolean("vae_recompute", vae_recompute)
        if vae_recompute and vae_mode != "exact":
            raise ValueError(f"vae_recompute=True needs vae_mode 'exact'; got vae_mode {vae_mode!r}")
        self.vae_offload = boolean("vae_offload", vae_offload)
        self.unet_strip_rows = unet_strip_rows
        if unet_strip_rows is not None:
            self.unet_strip_rows = positive_int("unet_strip_rows", unet_strip_rows, "rows of the feature map")
        self.unet_serial = boolean("unet_serial", unet_serial)
        self.unet_offload = boolean("unet_offload", unet_offload)
        self.vae_attn = one_of("vae_attn", vae_attn, VAE_ATTENTIONS)
        self.vae_passes = whole_number("vae_passes", vae_passes, "", least=2)
        for name, vae in targets.items():
            if _is_vae(vae):
                self._vae_halves(name, vae)  # what cannot be run in this mode is an error now
        self._stack = PatchStack()
        self.memory_limit = None if memory_limit is None else memory_bytes(memory_limit, pipe)
        self._plan = None if self.memory_limit is None else self._planned(self.memory_limit)

    def enable(self) -> Self:
        """Install every replacement; what ``with`` does on entry.

        Raises:
            ValueError: this patch or another one is already on the pipeline. Nothing is changed.
        """
        models = _discover(self.pipe)
        if self.padding_mode != "constant":
            models |= {name: model for name, model in _others(self.pipe).items() if pads(model)}
        for name, model in models.items():
            for part in _parts(model):
                if part in _PATCHED:
                    which = "this" if _PATCHED[part] is self else "another"
                    raise ValueError(
                        f"pipe.{name} is patched already, by {which} LargeResPatch; accepted is one at a time: "
                        "leave its block (or call its `disable`) first"
                    )
        # Known to `disable` from the start, so that a half-done entry unwinds like a whole one.
        self._stack = PatchStack()
        try:
            for name, model in models.items():
                _PATCHED.update(dict.fromkeys(_parts(model), self))
                self._install(self._stack, name, model)
        except BaseException:
            self.disable()
            raise
        return self

    def disable(self) -> None:
        """Restore the pipeline; what ``with`` does on exit. Harmless if there is nothing to restore.

        Raises:
            RuntimeError: other code has replaced one of the replacements. Everything else is restored first.
        """
        self.__exit__(None, None, None)

    def __enter__(self) -> Self:
        return self.enable()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self._stack.__exit__(kind, error, traceback)
        finally:
            if not self._stack.active:  # else the undo was interrupted and may be finished by another call
                for model in [model for model, patch in _PATCHED.items() if patch is self]:
                    del _PATCHED[model]

    def estimate(self, patched: bool = True) -> MemoryEstimate:
        """The peak of memory on the pipeline's device, in bytes, for one image of the patch's size, guidance on.

        Found by running copies of the models on tensors without data, in seconds; nothing is allocated. The pipeline
        stays as it is, inside the block and outside. Hooks on its modules are left out, but for what they keep off the
        device; so is the private workspace of kernels.

        Args:
            patched: with this patch on; else as the pipeline is without any.

        Raises:
            ValueError: the pipeline has a denoiser that the estimate does not know how to call.
        """
        return self._estimator(self._on if patched else bare).estimate(self.height, self.width, {})

    def _estimator(self, patched: Callable[..., AbstractContextManager[Any]]) -> Estimator:
        stacks = {_PATCHED[model]._stack for model in _discover(self.pipe).values() if model in _PATCHED}
        return Estimator(self.pipe, self._factor, list(stacks), patched)

    def _planned(self, limit: int) -> Plan:
        """Takes over the cheapest settings that fit, but for options that were given."""
        plan = Planner(self._estimator(self._on), limit, self.vae_mode, self._given).plan(self.height, self.width)
        vars(self).update(plan.settings)
        return plan

    def _on(self, pipe: Any, **settings: Any) -> AbstractContextManager[Any]:
        """This patch for another pipeline, with other `settings`."""
        other = copy.copy(self)
        vars(other).update(settings, pipe=pipe, _stack=PatchStack())
        return other

    def _install(self, stack: PatchStack, name: str, model: nn.Module) -> None:
        if _is_vae(model) and can_be_tiled(model):
            self._install_vae(stack, name, model)
        elif _can_be_patched(model):
            self._install_denoiser(stack, name, model)
        install_padding(stack, model, name, self.padding_mode)

    def _install_denoiser(self, stack: PatchStack, name: str, model: nn.Module) -> None:
        step_note = StepNote()
        if self.unet_serial:  # inside the noting, so that all samples see the tilings that the batch would
            stack.wrap(model, "forward", SerialBatch(model), f"{name}.forward")
        stack.wrap(model, "forward", StepNoting(step_note, lambda: self.pipe.scheduler), f"{name}.forward")
        layer = 0
        for path, transformer in _transformers(model).items():
            map_note = MapNote()
            place = f"{name}.{path}" if path else name
            noting = MapNoting(map_note, transformer.config.patch_size or 1)
            stack.wrap(transformer, "forward", noting, f"{place}.forward")
            for inner, attention in _self_attentions(transformer).items():
                blocked = BlockedAttention(attention, self.blocking, map_note, step_note, layer)
                stack.wrap(attention, "forward", blocked, f"{place}.{inner}.forward")
                layer += 1
        for path, attention in _map_attentions(model).items():
            blocked_map = BlockedMapAttention(attention, self.blocking, step_note, layer)
            stack.wrap(attention, "forward", blocked_map, f"{name}.{path}.forward")
            layer += 1
        for path, feed_forward in _modules(model, FeedForward).items():
            stack.wrap(feed_forward, "forward", ChunkedFeedForward(self.ff_chunk_size), f"{name}.{path}.forward")
        for path, block in _modules(model, BasicTransformerBlock).items():
            if can_be_chunked(block):  # over what its parts have by now
                attended = Attended()
                stack.wrap(block.attn1, "forward", attended, f"{name}.{path}.attn1.forward")
                chunked = ChunkedBlock(block, attended, self.ff_chunk_size)
                stack.wrap(block, "forward", chunked, f"{name}.{path}.forward")
        if self.unet_strip_rows is not None:
            strips = Strips(self.unet_strip_rows, wrap=self.padding_mode == "circular")
            for path, module, replacement in unet_replacements(model, strips, name):
                stack.wrap(module, "forward", replacement, f"{path}.forward")
        if self.unet_offload:  # around the strips, which do not always call what they replace
            for path, module, offloading in offloadings(model, Link()):
                stack.wrap(module, "forward", offloading, f"{name}.{path}.forward")

    def _install_vae(self, stack: PatchStack, name: str, vae: Any) -> None:
        stack.set(vae, "use_tiling", False, f"{name}.use_tiling")
        for half, replacement in self._vae_halves(name, vae).items():
            stack.wrap(getattr(vae, half), "forward", replacement, f"{name}.{half}.forward")
            for layer, (path, attention) in enumerate(_map_attentions(getattr(vae, half)).items()):
                attended: BlockedMapAttention | ChunkedMapAttention = ChunkedMapAttention(attention)
                if self.vae_attn == "blocked":
                    attended = BlockedMapAttention(attention, self.blocking, StepNote(), layer, in_place=True)
                stack.wrap(attention, "forward", attended, f"{name}.{half}.{path}.forward")

    def _vae_halves(self, name: str, vae: Any) -> dict[str, TwoPass | Exact]:
        halves: dict[str, TwoPass | Exact] = {}
        for half, latent_scale in (("encoder", _vae_factor(vae)), ("decoder", 1)):
            cutting = Cutting(
                tile_height=self.vae_chunk_size_y,
                tile_width=self.vae_chunk_size_x,
                latent_scale=latent_scale,
                wrap=self.padding_mode == "circular",
                progress_bar=self.pipe.progress_bar,
                title=f"VAE {half}",
            )
            model = getattr(vae, half)
            host = torch.device("cpu") if self.vae_offload else None
            if self.vae_mode == "exact":
                halves[half] = Exact(model, f"{name}.{half}", cutting, self.vae_recompute, host)
            else:
                splits = encoder_splits(model) if half == "encoder" else decoder_splits(model)
                halves[half] = TwoPass(splits, cutting, self.vae_passes, host)
        return halves

    def __repr__(self) -> str:
        state = "active" if self._stack.active else "not active"
        lines = [f"LargeResPatch on {type(self.pipe).__name__}, {self.width}x{self.height} sample pixels, {state}"]
        for name, model in _discover(self.pipe).items():
            what = self._describe_vae() if _is_vae(model) else self._describe_denoiser(model)
            lines.append(f"  {name} ({type(model).__name__}): {what}")
        for name, model in _others(self.pipe).items():
            lines.append(f"  {name} ({type(model).__name__}): {self._describe_other(model)}")
        if self.padding_mode != "constant":
            lines.append(f"  convolutions pad by {self.padding_mode!r}")
        if self._plan is not None and self.memory_limit is not None:
            lines.append(f"  {self._plan.describe(self.memory_limit)}")
        return "\n".join(lines)

    def _describe_denoiser(self, model: nn.Module) -> str:
        attentions = sum(len(_self_attentions(transformer)) for transformer in _transformers(model).values())
        attentions += len(_map_attentions(model))
        x, y = self.blocking.slice_x, self.blocking.slice_y
        sizes = f"bricks of {2 * x}x{y} and {x}x{2 * y}" if self.blocking.shape == "brick" else f"tiles of {x}x{y}"
        context = f"with {self.blocking.context} of context " if self.blocking.context else ""
        return (
            f"{attentions} self-attentions in {sizes} tokens {context}on maps of over {self.blocking.full_tokens}, "
            f"{len(_modules(model, FeedForward))} feed-forwards in chunks of {self.ff_chunk_size} tokens"
            + ("" if self.unet_strip_rows is None else f", convolutions in strips of {self.unet_strip_rows} rows")
            + (", one sample at a time" if self.unet_serial else "")
            + (", skip connections off the device" if self.unet_offload else "")
        )

    def _describe_other(self, model: nn.Module) -> str:
        return "only its convolutions" if self.padding_mode != "constant" and pads(model) else "left as it is"

    def _describe_vae(self) -> str:
        attention = ", its attention in blocks" if self.vae_attn == "blocked" else ""
        return self._describe_vae_mode() + attention + (", whole maps on the host" if self.vae_offload else "")

    def _describe_vae_mode(self) -> str:
        if self.vae_mode == "exact":
            return f"encoder and decoder exactly, in strips of {self.vae_chunk_size_y} rows" + (
                ", largest maps recomputed" if self.vae_recompute else ""
            )
        size = f"{self.vae_chunk_size_x}x{self.vae_chunk_size_y}"
        passes = "two" if self.vae_passes == 2 else self.vae_passes
        return f"encoder and decoder in {passes} passes over tiles of {size} latent pixels"
