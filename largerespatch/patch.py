"""LargeResPatch: validate, discover, install, restore."""

import weakref
from types import TracebackType
from typing import Any, Self, TypeVar

from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from torch import nn

from .attention import COVERS, BlockedAttention, Blocking, MapNote, MapNoting, StepNote
from .feedforward import ChunkedFeedForward
from .padding import PADDING_MODES, install_padding
from .patching import PatchStack
from .unet import StepNoting
from .vae import VAE_MODES, Cutting, Exact, TwoPass, can_be_tiled, decoder_splits, encoder_splits
from .validation import one_of, positive_int, whole_number

# Which models are patched now, by which patch. Kept here, since the models themselves must carry no mark.
_PATCHED: weakref.WeakKeyDictionary[nn.Module, "LargeResPatch"] = weakref.WeakKeyDictionary()


_M = TypeVar("_M", bound=nn.Module)


def _modules(model: nn.Module, kind: type[_M]) -> dict[str, _M]:
    return {path: module for path, module in model.named_modules() if isinstance(module, kind)}


def _self_attentions(transformer: nn.Module) -> dict[str, Attention]:
    attentions = _modules(transformer, Attention)
    return {path: attention for path, attention in attentions.items() if not attention.is_cross_attention}


def _transformers(model: nn.Module) -> dict[str, Any]:
    from diffusers import Transformer2DModel  # here and below, not above: both bring transformers along

    transformers: dict[str, Any] = _modules(model, Transformer2DModel)
    return {path: each for path, each in transformers.items() if not each.is_input_vectorized}


def _is_vae(model: nn.Module) -> bool:
    from diffusers import AutoencoderKL

    return isinstance(model, AutoencoderKL)


def _can_be_patched(model: nn.Module) -> bool:
    return can_be_tiled(model) if _is_vae(model) else bool(_transformers(model))


def _discover(pipe: Any) -> dict[str, nn.Module]:
    """The models of a pipeline that can be patched, by component name."""
    components = getattr(pipe, "components", None)
    if not isinstance(components, dict):
        raise TypeError(f"pipe must be a diffusers pipeline, with `components`; got {type(pipe).__name__}")
    models = {name: model for name, model in components.items() if isinstance(model, nn.Module)}
    targets = {name: model for name, model in models.items() if _can_be_patched(model)}
    if not targets:
        held = ", ".join(f"{name} ({type(model).__name__})" for name, model in models.items()) or "no model"
        raise ValueError(
            "pipe must hold something to patch: a model with Transformer2DModel blocks (U-Net, ControlNet) or an "
            f"AutoencoderKL; got {type(pipe).__name__} with {held}"
        )
    return targets


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

    Inside the block self-attention is blocked (approximate), feed-forwards are chunked (exact) and the VAE runs in
    two passes over tiles (approximate). What is small enough to need none of it gives the unpatched result. On exit
    the pipeline is as it was before. A patch can be entered again later; `enable` and `disable` are the same two
    steps for notebooks.

    Args:
        pipe: a diffusers pipeline.
        width: of the image, in sample pixels. Other sizes work inside the block, too.
        height: likewise.
        attn_slice_x: width of a tile, half the width of a wide brick, in tokens of the attended map.
        attn_slice_y: height of a tile, half the height of a tall brick, in tokens of the attended map.
        attn_shape: "brick" for the four running-bond tilings, "tile" for four shifted grids.
        ff_chunk_size: tokens that pass through a feed-forward at once.
        padding_mode: what convolutions of U-Net and VAE see beyond the image's edge: "constant" (as trained),
            "circular" (the image continues at its opposite edge), "reflect" or "replicate".
        vae_chunk_size_x: width of a VAE tile in latent pixels.
        vae_chunk_size_y: height of a VAE tile in latent pixels.
        attn_full_tokens: maps of at most this many tokens are attended whole.
        vae_mode: "two-pass" (approximate, in tiles) or "exact": strip by strip with the statistics of the whole map,
            about as fast as untiled, with half of its memory. A strip has `vae_chunk_size_y` rows on every map.
        vae_passes: of "two-pass", at least 2, the last of which makes the result: the more, the closer to exact.

    Raises:
        TypeError, ValueError: an option is not what is accepted, or `pipe` has nothing to patch. Nothing is changed.

    It descends from StableDiffusionLargeResPatch (2022, public domain).
    """

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
        vae_mode: str = "two-pass",
        vae_passes: int = 2,
    ) -> None:
        targets = _discover(pipe)
        vaes = [model for model in targets.values() if _is_vae(model)]
        factor = max((_vae_factor(vae) for vae in vaes), default=getattr(pipe, "vae_scale_factor", 1))
        self.pipe = pipe
        self.width = _image_size("width", width, factor)
        self.height = _image_size("height", height, factor)
        self.blocking = Blocking(
            shape=one_of("attn_shape", attn_shape, tuple(COVERS)),
            slice_y=positive_int("attn_slice_y", attn_slice_y, "tokens"),
            slice_x=positive_int("attn_slice_x", attn_slice_x, "tokens"),
            full_tokens=positive_int("attn_full_tokens", attn_full_tokens, "tokens"),
        )
        self.ff_chunk_size = positive_int("ff_chunk_size", ff_chunk_size, "tokens")
        self.padding_mode = one_of("padding_mode", padding_mode, PADDING_MODES)
        if self.padding_mode == "reflect":
            _check_reflection("width", self.width, factor, targets)
            _check_reflection("height", self.height, factor, targets)
        self.vae_chunk_size_x = positive_int("vae_chunk_size_x", vae_chunk_size_x, "latent pixels")
        self.vae_chunk_size_y = positive_int("vae_chunk_size_y", vae_chunk_size_y, "latent pixels")
        self.vae_mode = one_of("vae_mode", vae_mode, VAE_MODES)
        self.vae_passes = whole_number("vae_passes", vae_passes, "", least=2)
        for name, vae in targets.items():
            if _is_vae(vae):
                self._vae_halves(name, vae)  # what cannot be run in this mode is an error now
        self._stack = PatchStack()

    def enable(self) -> Self:
        """Install every replacement; what ``with`` does on entry.

        Raises:
            ValueError: this patch or another one is already on the pipeline. Nothing is changed.
        """
        targets = _discover(self.pipe)
        for name, model in targets.items():
            if model in _PATCHED:
                which = "this" if _PATCHED[model] is self else "another"
                raise ValueError(
                    f"pipe.{name} is patched already, by {which} LargeResPatch; accepted is one at a time: "
                    "leave its block (or call its `disable`) first"
                )
        # Known to `disable` from the start, so that a half-done entry unwinds like a whole one.
        self._stack = PatchStack()
        try:
            for name, model in targets.items():
                _PATCHED[model] = self
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

    def _install(self, stack: PatchStack, name: str, model: nn.Module) -> None:
        if _is_vae(model):
            self._install_vae(stack, name, model)
        else:
            self._install_denoiser(stack, name, model)
        install_padding(stack, model, name, self.padding_mode)

    def _install_denoiser(self, stack: PatchStack, name: str, model: nn.Module) -> None:
        step_note = StepNote()
        stack.wrap(model, "forward", StepNoting(step_note, lambda: self.pipe.scheduler), f"{name}.forward")
        layer = 0
        for path, transformer in _transformers(model).items():
            map_note = MapNote()
            noting = MapNoting(map_note, transformer.config.patch_size or 1)
            stack.wrap(transformer, "forward", noting, f"{name}.{path}.forward")
            for inner, attention in _self_attentions(transformer).items():
                blocked = BlockedAttention(self.blocking, map_note, step_note, layer)
                stack.wrap(attention, "forward", blocked, f"{name}.{path}.{inner}.forward")
                layer += 1
        for path, feed_forward in _modules(model, FeedForward).items():
            stack.wrap(feed_forward, "forward", ChunkedFeedForward(self.ff_chunk_size), f"{name}.{path}.forward")

    def _install_vae(self, stack: PatchStack, name: str, vae: Any) -> None:
        stack.set(vae, "use_tiling", False, f"{name}.use_tiling")
        for half, replacement in self._vae_halves(name, vae).items():
            stack.wrap(getattr(vae, half), "forward", replacement, f"{name}.{half}.forward")

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
            if self.vae_mode == "exact":
                halves[half] = Exact(model, f"{name}.{half}", cutting)
            else:
                splits = encoder_splits(model) if half == "encoder" else decoder_splits(model)
                halves[half] = TwoPass(splits, cutting, self.vae_passes)
        return halves

    def __repr__(self) -> str:
        state = "active" if self._stack.active else "not active"
        lines = [f"LargeResPatch on {type(self.pipe).__name__}, {self.width}x{self.height} sample pixels, {state}"]
        for name, model in _discover(self.pipe).items():
            what = self._describe_vae() if _is_vae(model) else self._describe_denoiser(model)
            lines.append(f"  {name} ({type(model).__name__}): {what}")
        if self.padding_mode != "constant":
            lines.append(f"  convolutions pad by {self.padding_mode!r}")
        return "\n".join(lines)

    def _describe_denoiser(self, model: nn.Module) -> str:
        attentions = sum(len(_self_attentions(transformer)) for transformer in _transformers(model).values())
        x, y = self.blocking.slice_x, self.blocking.slice_y
        sizes = f"bricks of {2 * x}x{y} and {x}x{2 * y}" if self.blocking.shape == "brick" else f"tiles of {x}x{y}"
        return (
            f"{attentions} self-attentions in {sizes} tokens on maps of over {self.blocking.full_tokens}, "
            f"{len(_modules(model, FeedForward))} feed-forwards in chunks of {self.ff_chunk_size} tokens"
        )

    def _describe_vae(self) -> str:
        if self.vae_mode == "exact":
            return f"encoder and decoder exactly, in strips of {self.vae_chunk_size_y} rows"
        size = f"{self.vae_chunk_size_x}x{self.vae_chunk_size_y}"
        passes = "two" if self.vae_passes == 2 else self.vae_passes
        return f"encoder and decoder in {passes} passes over tiles of {size} latent pixels"
