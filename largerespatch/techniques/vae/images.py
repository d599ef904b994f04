"""An image of 8-bit pixels that a decoder writes as its strips and tiles come: never all of it in floating point."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from PIL import Image

from ...core.hosts import Host
from ...core.planes import Map, copy
from ...core.tilings import Run, Tile

CHANNELS = 3  # red, green, blue


class ImageMap(Map):
    """A map ``[1, 3, H, W]`` of numbers from -1 to 1 that is written to an image, and not read.

    Rounded as `diffusers.image_processor.VaeImageProcessor` does it: the same pixels, bit for bit.
    """

    host = None

    def __init__(self, shape: Sequence[int], like: torch.Tensor, image: Image.Image) -> None:
        self.image = image

    def fetch(self, runs: Sequence[Run]) -> Iterator[torch.Tensor]:
        raise RuntimeError("an image that is written as it is decoded cannot be read as a map")

    def write(self, tile: Tile, values: torch.Tensor) -> None:
        rows = (values[0] * 0.5 + 0.5).clamp(0, 1).float().mul(255).round().to(torch.uint8)
        pixels = rows.permute(1, 2, 0).contiguous().cpu().numpy()
        self.image.paste(Image.fromarray(pixels), (tile.left, tile.top))


_WANTED: ContextVar[Image.Image | None] = ContextVar("wanted", default=None)


@contextmanager
def writing(width: int, height: int, at_once: bool = True) -> Iterator[Image.Image]:
    """Inside, a decoder whose result is of that size writes it to this image, if `at_once`.

    The image's memory is there before it starts.
    """
    image = Image.new("RGB", (width, height))
    token = _WANTED.set(image if at_once else None)
    try:
        yield image
    finally:
        _WANTED.reset(token)


def wanted(like: torch.Tensor, shape: Sequence[int]) -> ImageMap | None:
    """Where a decoder's result of that shape goes, if it is wanted as an image."""
    image = _WANTED.get()
    if image is None or tuple(shape) != (1, CHANNELS, image.height, image.width):
        return None
    return ImageMap(shape, like, image)


def written(result: torch.Tensor, image: Image.Image) -> None:
    """What a decoder gave, ``[1, 3, H, W]``, in the image, if it was not written there."""
    if not isinstance(result, ImageMap):
        copy(result, ImageMap(result.shape, result, image), Host())
