"""`AutoencoderKL`, and whatever is built of the same encoder and decoder (Flux 2's)."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from diffusers.models.attention_processor import Attention
from diffusers.utils.logging import tqdm
from torch import nn

from ..core.families import Order, Site, register
from ..core.hosts import Host
from ..core.modules import named_modules
from ..techniques.attention.blocked import Blocking, blocking_of
from ..techniques.attention.chunked_attention import in_blocks_or_chunks
from ..techniques.attention.sites import attends_map
from ..techniques.padding import padding_sites, reflection_sites
from ..techniques.shared_maps import InBands, bands_of
from ..techniques.vae.halves import Cutting, Exact
from ..techniques.vae.stages import Split, decoder_splits, encoder_splits
from ..techniques.vae.two_pass import TwoPass
from .any import AnyAutoencoder

HALVES = ("encoder", "decoder")


@register
class KL(AnyAutoencoder):
    """An encoder of convolutions, group norms and attention in the middle alone, and a decoder of the same."""

    rank = 0
    known = True
    reflected = 2  # cells that the smallest map must have for that
    shared_classes: Sequence[str] = ("AutoencoderKL", "AutoencoderKLFlux2")  # a family that names none shares none

    @property
    def shared(self) -> str:  # type: ignore[override]
        return ", ".join(self.shared_classes)

    def can_be_shared(self, model: Any) -> bool:
        return type(model).__name__ in self.shared_classes

    def matches(self, model: nn.Module) -> bool:
        encoder, decoder = (getattr(model, half, None) for half in HALVES)
        return type(encoder).__name__ == "Encoder" and type(decoder).__name__ == "Decoder" and _is_known(model)

    def sites(self, model: Any, name: str, options: Any, pipe: Any) -> Iterator[Site]:
        if hasattr(model, "use_tiling"):  # upstream's own, which blends tiles
            yield Site(model, name, Order.IN_STAGES, False, "use_tiling")
        if in_turns := getattr(model, "use_slicing", False):  # upstream's would mix results on device and host
            yield Site(model, name, Order.IN_STAGES, False, "use_slicing")
        for half in HALVES:
            yield from self._half(model, half, name, in_turns, options, pipe)
        yield from padding_sites(model, name, options.padding_mode)

    def _half(self, model: Any, which: str, name: str, in_turns: bool, options: Any, pipe: Any) -> Iterator[Site]:
        half, path = self.half(model, which, name)
        encodes, bands = which == "encoder", bands_of(options)
        factor, scale = self.factor(model), self.latent_scale(model) if encodes else 1
        cutting = Cutting(
            tile_height=options.vae_chunk_size_y,
            tile_width=options.vae_chunk_size_x,
            latent_scale=scale,
            wrap=options.padding_mode == "circular",
            progress_bar=progress_bar_of(pipe),
            title=f"VAE {which}",
            in_turns=in_turns,
            factor=factor,
            bands=bands,
        )
        host = Host() if options.vae_offload else None
        in_pieces = self.in_pieces(half, path, encodes, cutting, host, options)
        yield Site(half, path, Order.IN_STAGES, in_pieces, says=self.way(options, in_pieces))
        if options.process_group is not None and isinstance(in_pieces, Exact):
            in_bands = InBands(half, path, bands, in_pieces.sizes, all_cut=True)
            yield Site(half, path, Order.IN_BANDS, in_bands, says=f"maps in {bands}")
        least = self.reflected * scale
        yield from reflection_sites(half, path, options.padding_mode, least, factor // scale, self.reflected)
        yield from self.attention(half, path, options)

    def in_pieces(
        self, half: Any, path: str, encodes: bool, cutting: Cutting, host: Host | None, options: Any
    ) -> Exact | TwoPass:
        """What takes the place of an encoder's or decoder's ``forward``."""
        if options.vae_mode == "exact":
            return Exact(half, path, cutting, options.vae_recompute, host)
        return TwoPass(half, path, self.splits(half, encodes), cutting, options.vae_passes, host)

    def splits(self, half: Any, encodes: bool) -> list[Split]:
        """What of it may run in tiles, best first."""
        return encoder_splits(half) if encodes else decoder_splits(half)

    def attention(self, half: Any, path: str, options: Any) -> Iterator[Site]:
        """The attention of an encoder or decoder to its whole map, in blocks or in chunks."""
        blocking = blocking_of(options) if options.vae_attn == "blocked" else None
        says = "its attention in blocks" if blocking else ""
        found = [(place, module) for place, module in named_modules(half, path) if self.attends(module)]
        for layer, (place, module) in enumerate(found):
            yield Site(module, place, Order.IN_BLOCKS, self.attending(module, blocking, layer, options), says=says)

    def attends(self, module: nn.Module) -> bool:
        """Whether a module is such an attention."""
        return attends_map(module)

    def attending(self, module: Any, blocking: Blocking | None, layer: int, options: Any) -> Any:
        """What goes there, the `layer`-th one; `blocking` is None where that is to run in chunks."""
        return in_blocks_or_chunks(module, blocking, layer, bands_of(options))

    def way(self, options: Any, in_pieces: Exact | TwoPass) -> str:
        """What `repr` says of both halves."""
        if isinstance(in_pieces, Exact):
            way = f"exactly, in strips of {in_pieces.cutting.strip_height} rows"
            way += ", largest maps recomputed" if in_pieces.recompute else ""
        else:
            size = f"tiles of at most {options.vae_chunk_size_x}x{options.vae_chunk_size_y} latent pixels"
            passes = {1: "exactly, in one pass", 2: "in two passes"}
            way = f"{passes.get(in_pieces.passes, f'in {in_pieces.passes} passes')} over {size}"
        return f"encoder and decoder {way}" + (", whole maps on the host" if options.vae_offload else "")

    def half(self, model: Any, which: str, name: str) -> tuple[Any, str]:
        """The encoder or decoder, or what of it runs in pieces, and its path."""
        return getattr(model, which), f"{name}.{which}"

    def factor(self, model: Any) -> int:
        return int(2 ** (len(model.config.block_out_channels) - 1))

    def latent_scale(self, model: Any) -> int:
        """Cells of what the encoder is given to a latent pixel: sample pixels, unless these are packed before."""
        return self.factor(model)


def _is_known(model: Any) -> bool:
    """Whether its norms look at groups of the map alone, and attention occurs in the mid blocks only."""
    blocks = [*model.encoder.down_blocks, *model.decoder.up_blocks]
    attends = any(isinstance(module, Attention) for block in blocks for module in block.modules())
    return not attends and isinstance(getattr(model.decoder, "conv_norm_out", None), nn.GroupNorm)


def progress_bar_of(pipe: Any) -> Callable[..., Any]:
    """The pipeline's own; of one that is made of blocks that of the first which has any, or one that is not seen."""
    blocks = [pipe]
    while blocks:
        block = blocks.pop(0)
        if (found := getattr(block, "progress_bar", None)) is not None:
            return found  # type: ignore[no-any-return]
        blocks += getattr(getattr(block, "_blocks", block), "sub_blocks", {}).values()
    return partial(tqdm, disable=True)
