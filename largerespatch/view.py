"""A picture of the four tilings, to see how a map of tokens is divided before anything is generated."""

import os
from collections.abc import Sequence
from fractions import Fraction
from functools import cache
from itertools import chain
from pathlib import Path
from typing import NamedTuple, SupportsIndex

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor, ImageDraw, ImageFont

from .core.checks import one_of, positive_int, whole_number
from .core.tilings import COVERS, PHASES, Tile

# Two families of colours: courses take turns, so that bricks of adjacent courses never share a colour.
WARM = ("#C2492F", "#E8A33D", "#F3CDA6", "#73203F")  # brick red, ochre, sand, plum
COOL = ("#18807E", "#A3CDB0", "#262C5C", "#5F94D1")  # teal, sage, navy, sky
PALETTE = np.array([ImageColor.getrgb(colour) for colour in WARM + COOL], np.uint8)
PAPER, INK, FAINT = "#FBF8F3", "#2A2733", "#767080"

PAGE = (1400, 1000)  # drawn pixels: what a screen of 1920 x 1080 shows whole, beside a window's frame or a notebook's
VERY_WIDE = 5  # times as wide as high: from about here on a single column draws a map larger than two
LARGEST_TOKEN = 48  # drawn pixels: a map of one token need not fill the page
SLIMMEST = 12  # drawn pixels: a row of 8192 tokens would vanish at its true proportions
MARGIN, GAP, GUTTER = 30, 8, 36  # around the page, under a legend, between columns
HEADING, TITLE, LEGEND = 24, 18, 14  # font sizes
MOST_BRICKS = 2**22  # per phase: they are listed one by one, and far fewer already blur in the drawing
SIZES_LISTED = 3  # of each phase; rounding can make a dozen

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
    """Draw the four tilings of an attended map, two by two, each with its title and its sizes.

    Neighbouring bricks, also those that touch at a corner, differ in colour. Maps grow or shrink so that the picture
    fits a screen: about 1400 x 1000 drawn pixels at most. The tilings of a map at least five times as wide as high are
    drawn under each other. A notebook shows the returned picture by itself.

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
    shape = one_of("attn_shape", attn_shape, tuple(PHASE_NAMES))
    rng = np.random.default_rng(whole_number("seed", seed, "", least=0))
    path = None if outPath is None else _image_path(outPath)
    _check_count(width, height, slice_x, slice_y)

    columns = 1 if width >= VERY_WIDE * height else 2
    size = _drawn_size(width, height, columns)
    covers = (COVERS[shape](height, width, phase, slice_y, slice_x) for phase in range(PHASES))
    panels = [_panel(cover, shape, phase, size, rng) for phase, cover in enumerate(covers)]
    heading = f"The four tilings of a map of {width} x {height} tokens"
    legend = f"width x height  ·  attn_slice_x {slice_x}  ·  attn_slice_y {slice_y}  ·  attn_shape {shape}"
    page = _page(heading, legend, panels, columns)
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


def _panel(cover: Sequence[Tile], shape: str, phase: int, size: tuple[int, int], rng: np.random.Generator) -> _Panel:
    edges = np.fromiter(chain.from_iterable(cover), np.int64, 4 * len(cover)).reshape(-1, 4)
    upright = shape == "brick" and phase % 2 == 1
    title = f"Phase {phase}: {PHASE_NAMES[shape][phase]}"
    return _Panel(title, _sizes(edges, shape), _drawing(edges, size, upright, rng))


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


def _drawn_size(width: int, height: int, columns: int) -> tuple[int, int]:
    """Width and height in drawn pixels of a map of `width` by `height` tokens on a page of so many columns."""
    rows = PHASES // columns
    most_x = (PAGE[0] - 2 * MARGIN - (columns - 1) * GUTTER) // columns
    most_y = (PAGE[1] - _leading(HEADING) - _leading(LEGEND) - 2 * MARGIN) // rows - _above_drawing()
    token = min(Fraction(most_x, width), Fraction(most_y, height), Fraction(LARGEST_TOKEN))
    return max(int(token * width), SLIMMEST), max(int(token * height), SLIMMEST)


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


def _page(heading: str, legend: str, panels: Sequence[_Panel], columns: int) -> Image.Image:
    """Heading and panels in rows of `columns`, each column as wide as the widest drawing or text of a panel."""
    across, down = panels[0].drawing.size
    texts = [(text, size) for panel in panels for text, size in ((panel.title, TITLE), (panel.legend, LEGEND))]
    step_x = max(across, *(_length(*text) for text in texts)) + GUTTER
    step_y = _above_drawing() + down
    content = max(columns * step_x - GUTTER, _length(heading, HEADING), _length(legend, LEGEND))
    top = MARGIN + _leading(HEADING) + _leading(LEGEND)
    page = Image.new("RGB", (content + 2 * MARGIN, top + len(panels) // columns * step_y + MARGIN), PAPER)
    pen = ImageDraw.Draw(page)

    def write(x: int, y: int, text: str, size: int, colour: str) -> int:
        pen.text((x, y), text, fill=colour, font=_font(size))
        return y + _leading(size)

    write(MARGIN, write(MARGIN, MARGIN, heading, HEADING, INK), legend, LEGEND, FAINT)
    for i, panel in enumerate(panels):
        x, y = MARGIN + i % columns * step_x, top + i // columns * step_y + MARGIN
        y = write(x, write(x, y, panel.title, TITLE, INK), panel.legend, LEGEND, FAINT)
        page.paste(panel.drawing, (x, y + GAP))
    return page


def _above_drawing() -> int:
    """Drawn pixels from the end of what is above a panel to its drawing."""
    return MARGIN + _leading(TITLE) + _leading(LEGEND) + GAP


def _length(text: str, size: int) -> int:
    return round(_font(size).getlength(text))


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)  # has no multiplication sign and no dash, hence "64 x 64"


def _leading(size: int) -> int:
    return size * 3 // 2
