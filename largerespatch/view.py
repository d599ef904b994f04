"""A picture of the four tilings, to see how a map of tokens is divided before anything is generated."""

import os
from collections.abc import Sequence
from functools import cache
from itertools import chain
from pathlib import Path
from typing import NamedTuple, SupportsIndex

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor, ImageDraw, ImageFont

from largerespatch.tilings import PHASES, bricks, tiles
from largerespatch.validation import one_of, positive_int, whole_number

# Two families of colours: courses take turns, so that bricks of adjacent courses never share a colour.
WARM = ("#C2492F", "#E8A33D", "#F3CDA6", "#73203F")  # brick red, ochre, sand, plum
COOL = ("#18807E", "#A3CDB0", "#262C5C", "#5F94D1")  # teal, sage, navy, sky
PALETTE = np.array([ImageColor.getrgb(colour) for colour in WARM + COOL], np.uint8)
PAPER, INK, FAINT = "#FBF8F3", "#2A2733", "#767080"

ENLARGE_TO = 768  # drawn pixels: smaller maps grow by a whole factor up to this ...
SHRINK_TO = 1024  # ... and larger ones are scaled down to this
LARGEST_TOKEN = 48  # drawn pixels: a map of one token need not fill the page
SLIMMEST = 12  # drawn pixels: a row of 8192 tokens would vanish at its true proportions
MARGIN, GAP = 40, 10
HEADING, TITLE, LEGEND = 30, 22, 17  # font sizes
MOST_BRICKS = 2**22  # per phase: they are listed one by one, and far fewer already blur in the drawing
SIZES_LISTED = 4  # of each phase; rounding can make a dozen

PHASE_NAMES = {
    "brick": ("wide bricks", "tall bricks", "wide bricks, flipped", "tall bricks, flipped"),
    "tile": ("even tiles", "staggered tiles", "tiles of staggered columns", "tiles of staggered rows"),
}

Edges = NDArray[np.int64]  # [N, 4]: top, left, bottom, right of every brick, course by course


class _Panel(NamedTuple):
    title: str
    legend: str
    drawing: Image.Image


def viewBricks(
    width: SupportsIndex,
    height: SupportsIndex,
    attn_slice_x: SupportsIndex,
    attn_slice_y: SupportsIndex,
    outPath: str | os.PathLike[str] | None = None,
    *,
    attn_shape: str = "brick",
    seed: SupportsIndex = 0,
) -> Image.Image:
    """Draw the four tilings of an attended map under each other, each with its title and its sizes.

    Neighbouring bricks, also those that touch at a corner, differ in colour. Small maps are enlarged and large ones
    scaled down, so the picture's size hardly depends on the map's. A notebook shows the returned picture by itself.

    Args:
        width, height: size of the attended map in tokens (for Stable Diffusion's finest level, that of the image in
            sample pixels divided by 8).
        attn_slice_x, attn_slice_y: as given to `LargeResPatch`, in tokens.
        outPath: where to save the picture; ``.png`` is appended to a name without an image suffix that Pillow writes.
        attn_shape: ``"brick"`` or ``"tile"``.
        seed: chooses the colours.

    Raises:
        TypeError, ValueError: for an option that is not accepted, naming it.
        OSError: where the folder of `outPath` does not exist, before anything is drawn.
    """
    width, height = positive_int("width", width, "tokens"), positive_int("height", height, "tokens")
    slice_x = positive_int("attn_slice_x", attn_slice_x, "tokens")
    slice_y = positive_int("attn_slice_y", attn_slice_y, "tokens")
    attn_shape = one_of("attn_shape", attn_shape, tuple(PHASE_NAMES))
    rng = np.random.default_rng(whole_number("seed", seed, "", least=0))
    path = None if outPath is None else _image_path(outPath)
    _check_count(width, height, slice_x, slice_y)

    panels = [_panel(width, height, slice_x, slice_y, attn_shape, phase, rng) for phase in range(PHASES)]
    heading = f"The four tilings of a map of {width} x {height} tokens"
    legend = f"width x height  ·  attn_slice_x {slice_x}  ·  attn_slice_y {slice_y}  ·  attn_shape {attn_shape}"
    page = _page(heading, legend, panels)
    if path is not None:
        page.save(path)
    return page


def _image_path(outPath: object) -> Path:
    """The file to save to, with a suffix that Pillow can write; its folder must exist."""
    if not isinstance(outPath, str | os.PathLike):
        raise TypeError(f"outPath must be None or the path of an image as str or os.PathLike; got {outPath!r}")
    path = Path(outPath)
    if path.is_dir():
        raise IsADirectoryError(f"outPath must be the path of an image, not of a folder; got {outPath!r}")
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"outPath must lie in an existing folder; got {outPath!r} and there is no {path.parent}"
        )
    known = Image.registered_extensions().get(path.suffix.lower())
    return path if known in Image.SAVE else path.with_name(path.name + ".png")


def _check_count(width: int, height: int, slice_x: int, slice_y: int) -> None:
    """Refuse what would fill the memory before it is listed."""
    most = -(-width // slice_x) * -(-height // slice_y)
    if most > MOST_BRICKS:
        raise ValueError(
            f"attn_slice_x and attn_slice_y must divide the map into at most {MOST_BRICKS} slices to be drawn; "
            f"got {slice_x} and {slice_y} for {width} x {height} tokens, which makes {most}"
        )


def _panel(
    width: int, height: int, slice_x: int, slice_y: int, attn_shape: str, phase: int, rng: np.random.Generator
) -> _Panel:
    cover = {"brick": bricks, "tile": tiles}[attn_shape](height, width, phase, slice_y, slice_x)
    edges = np.fromiter(chain.from_iterable(cover), np.int64, 4 * len(cover)).reshape(-1, 4)
    upright = attn_shape == "brick" and phase % 2 == 1
    title = f"Phase {phase}: {PHASE_NAMES[attn_shape][phase]}"
    return _Panel(title, _sizes(edges, attn_shape), _drawing(edges, _drawn_size(width, height), upright, rng))


def _sizes(edges: Edges, noun: str) -> str:
    """Count and sizes in tokens, the most frequent first: ``"6 bricks:  2 of 85 x 64,  1 of 86 x 64 tokens"``."""
    heights, widths = (edges[:, 2:] - edges[:, :2]).T
    span = int(heights.max()) + 1  # a pair of sizes as one number sorts far faster than as a pair
    pairs, counts = np.unique(widths * span + heights, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    sizes = [f"{pairs[i] // span} x {pairs[i] % span}" for i in order[:SIZES_LISTED]]
    bricks_in_all = _counted(len(edges), noun)
    if len(pairs) == 1:
        return f"{bricks_in_all} of {sizes[0]} tokens"
    listed = ",  ".join(f"{count} of {size}" for count, size in zip(counts[order], sizes, strict=False))
    left = len(pairs) - len(sizes)
    return f"{bricks_in_all}:  {listed} tokens" + (f",  and {_counted(left, 'other size')}" if left else "")


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _drawn_size(width: int, height: int) -> tuple[int, int]:
    """Width and height in drawn pixels of a map of `width` by `height` tokens."""
    longest = max(width, height)
    if longest > SHRINK_TO:
        drawn = (width * SHRINK_TO // longest, height * SHRINK_TO // longest)
    else:
        token = min(max(ENLARGE_TO // longest, 1), LARGEST_TOKEN)
        drawn = (width * token, height * token)
    return max(drawn[0], SLIMMEST), max(drawn[1], SLIMMEST)


def _drawing(edges: Edges, size: tuple[int, int], upright: bool, rng: np.random.Generator) -> Image.Image:
    """Bricks in their colours, with mortar between them where there is room for it; `size` is (width, height).

    `upright` says that the courses are columns; they are drawn as rows and the drawing is turned.
    """
    if upright:
        edges, size = edges[:, [1, 0, 3, 2]], size[::-1]
    first = np.flatnonzero(np.diff(edges[:, 0], prepend=-1))  # of each course
    colours = _colours(np.diff(first, append=len(edges)), rng)
    edges = _scaled(edges, size)
    owner = _owners(edges, first)
    pixels = PALETTE[colours][owner]
    pixels[_mortar(owner, _mortar_width(edges))] = ImageColor.getrgb(PAPER)
    return Image.fromarray(np.ascontiguousarray(pixels.swapaxes(0, 1)) if upright else pixels)


def _scaled(edges: Edges, size: tuple[int, int]) -> Edges:
    """Edges in drawn pixels; they still meet, but a brick of less than one may become empty."""
    scaled: Edges = edges * np.tile(size[::-1], 2) // np.tile(edges[-1, 2:], 2)
    return scaled


def _colours(course_lengths: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
    """An index into `PALETTE` for every brick, course by course, given how many bricks each course has.

    Bricks that touch along an edge or at a corner get different ones: in the next course the other family is used,
    and the next brick in a course is at least one step, but less than a full turn, further in the same family.
    """
    family = len(PALETTE) // 2
    course = np.repeat(np.arange(len(course_lengths)), course_lengths)
    steps = rng.integers(1, family, len(course))
    return course % 2 * family + np.cumsum(steps) % family


def _owners(edges: Edges, first: NDArray[np.int64]) -> NDArray[np.int64]:
    """The number of the brick at each drawn pixel; `first` are the bricks that begin a course."""
    height, width = edges[-1, 2:]
    lines = np.repeat(np.arange(len(edges)), edges[:, 3] - edges[:, 1]).reshape(len(first), width)
    return np.repeat(lines, np.diff(edges[first, 0], append=height), axis=0)


def _mortar_width(edges: Edges) -> int:
    """Drawn pixels between bricks: none where bricks are so small that it would wash out their colours."""
    shortest = int((edges[:, 2:] - edges[:, :2]).min())
    return 0 if shortest < 4 else min(max(shortest // 20, 1), 3)


def _mortar(owner: NDArray[np.int64], thickness: int) -> NDArray[np.bool_]:
    """The drawn pixels on the seams, `thickness` of them across each."""
    mortar = np.zeros(owner.shape, bool)
    if thickness:
        for plane, mask in ((owner, mortar), (owner.T, mortar.T)):
            before = thickness // 2
            mask[before : len(mask) - thickness + before] |= plane[thickness:] != plane[:-thickness]
    return mortar


def _page(heading: str, legend: str, panels: Sequence[_Panel]) -> Image.Image:
    """Heading and panels under each other, on a page as wide as the widest drawing or text."""
    texts = [(heading, HEADING), (legend, LEGEND)]
    texts += [line for panel in panels for line in ((panel.title, TITLE), (panel.legend, LEGEND))]
    content = max(*(round(_font(size).getlength(text)) for text, size in texts), *(p.drawing.width for p in panels))
    top = MARGIN + _leading(HEADING) + _leading(LEGEND)
    step = MARGIN + _leading(TITLE) + _leading(LEGEND) + GAP + panels[0].drawing.height
    page = Image.new("RGB", (content + 2 * MARGIN, top + step * len(panels) + MARGIN), PAPER)
    pen = ImageDraw.Draw(page)

    def write(y: int, text: str, size: int, colour: str) -> int:
        pen.text((MARGIN, y), text, fill=colour, font=_font(size))
        return y + _leading(size)

    write(write(MARGIN, heading, HEADING, INK), legend, LEGEND, FAINT)
    for i, panel in enumerate(panels):
        y = write(top + i * step + MARGIN, panel.title, TITLE, INK)
        y = write(y, panel.legend, LEGEND, FAINT) + GAP
        page.paste(panel.drawing, (MARGIN, y))
    return page


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)  # has no multiplication sign and no dash, hence "64 x 64"


def _leading(size: int) -> int:
    return size * 3 // 2
