"""Captions from the maps themselves: what a crop shows, and how near, as a sentence."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .data import Pixels, sea

DEEP, SHALLOW, GREEN, DESERT, ICE = range(5)
MOUNTAIN = 8  # added to what covers it
DROPPED = 0.1  # captions left out for guidance
DETAIL_KEPT = 0.8

# For each width of the whole planet in sample pixels, how far away it is seen from; the first is what the examples say.
SCALE_WORDS = {
    512: ("a whole planet", "a planet", "a planet from far away"),
    1024: ("half a planet", "a hemisphere", "half a planet from space"),
    2048: ("a continent", "a continent from space", "part of a continent"),
    4096: ("a region", "a country", "a region from above"),
    5400: ("a region from near", "from near", "seen from near"),
}
# For sheets, benchmarks and the blind test.
PROMPTS = (
    "a whole planet, green and desert continents by a deep sea, some ice, bays and islands",
    "a whole planet, icy continents by a dark blue sea",
    "half a planet, desert continents by a deep sea, mountains",
    "half a planet, small islands in a dark blue sea",
    "a hemisphere, green continents by a shallow sea, bays and islands",
    "a continent, green and desert coast by a deep sea, mountains",
    "a continent, icy land by a sea with shallow shelves, a long ragged coast",
    "a continent, green islands in a shallow sea, a long ragged coast",
    "a continent, desert land, mountains",
    "a continent, green land, some desert",
    "a region, desert coast by a shallow sea",
    "a region, green coast by a deep sea, mountains",
    "a region, icy land",
    "a region, green and icy land, mountains",
    "a region, open sea, a dark blue sea",
    "a region, small islands in bright shallow water",
    "a region, desert and green land, mountain ranges",
    "a region from near, green land",
    "a region from near, desert land",
    "a region from near, open sea, a shallow sea",
    "a region from near, green islands in a deep sea, mountains",
    "a region from near, desert coast by a deep sea, mountains",
    "a region from near, icy coast by a dark blue sea, bays and islands",
    "a region from near, icy and green land, mountains",
)
COVER_WORDS = {
    GREEN: ("green", "forest", "lush green"),
    DESERT: ("desert", "sandy", "dry"),
    ICE: ("icy", "snowy", "white ice"),
}
DETAIL_WORDS = {
    GREEN: ("some green", "forests"),
    DESERT: ("some desert", "sands"),
    ICE: ("some ice", "snow"),
}
MUCH, SOME = 0.3, 0.12  # shares that are worth a word
# Cells of the native map to each side; the maps disagree by some cells on where a coast runs.
RELIEF_WINDOW, COAST_WIDTH = 16, 5
RELIEF_ROUGH = 13.0


def scale_words(width: int) -> str:
    """The words for a planet `width` sample pixels wide, or the nearest width there are words for."""
    return SCALE_WORDS[min(SCALE_WORDS, key=lambda known: abs(np.log(known / width)))][0]


def classes(blue_marble: Pixels, etopo: Pixels, relief: Pixels) -> NDArray[np.uint8]:
    """What each cell of the map shows."""
    red, green, blue = (blue_marble[..., i].astype(np.float32) for i in range(3))
    wet = sea(etopo)
    cover = np.where((red > 1.1 * green) & (red > 70), DESERT, GREEN)
    white = (np.minimum(red, blue) > 130) & (red - blue < 40)
    cover = np.where(wet, np.where(blue > 78, SHALLOW, DEEP), cover)
    # The sea of the far north is frozen on one map and not on the other.
    cover = np.where(white, ICE, cover)
    rough = spread_on_land(relief.mean(axis=2), ~wet) > RELIEF_ROUGH
    return (cover + MOUNTAIN * (rough & ~wet & (cover != ICE))).astype(np.uint8)


def spread_on_land(grey: NDArray[np.float32], land: NDArray[np.bool_]) -> NDArray[np.float32]:
    """The standard deviation of `grey` over the land in a window around each cell; coasts themselves do not count."""
    inland = (_window_mean(land.astype(np.float64), COAST_WIDTH) > 0.999).astype(np.float64)
    share = np.maximum(_window_mean(inland, RELIEF_WINDOW), 1e-3)
    first, second = (_window_mean(grey.astype(np.float64) ** power * inland, RELIEF_WINDOW) for power in (1, 2))
    return np.sqrt(np.maximum(second / share - (first / share) ** 2, 0)).astype(np.float32)


def _window_mean(values: NDArray[np.float64], reach: int) -> NDArray[np.float64]:
    """The mean over a square window of `reach` cells to each side."""
    for axis in (0, 1):
        length = values.shape[axis]
        padding = [(0, 0), (0, 0)]
        padding[axis] = (reach + 1, reach)
        sums = np.pad(values, padding, mode="edge").cumsum(axis)
        upper, lower = (np.take(sums, range(start, start + length), axis) for start in (2 * reach + 1, 0))
        values = (upper - lower) / (2 * reach + 1)
    return values


@dataclass(frozen=True)
class Sight:
    """What a crop shows, in shares; `covers` are shares of the land, largest first."""

    land: float
    shallow: float
    covers: tuple[tuple[int, float], ...]
    mountains: float
    coast: float

    def attributes(self, width: int) -> list[float]:
        """All of it as numbers of about the same size, and the scale."""
        covers = dict(self.covers)
        shares = [self.land * covers[kind] for kind in (GREEN, DESERT, ICE)]
        others = [self.land, self.shallow * (1 - self.land), self.mountains * self.land, self.coast / 2]
        return [*shares, *others, np.log2(width / 512) / 3]


def look(cells: NDArray[np.uint8]) -> Sight:
    """From the classes of every eighth cell, which is how windows keep them: coasts have fewer turns then."""
    cover = cells % MOUNTAIN
    dry = cover >= GREEN
    land = float(dry.mean())
    count = max(1, int(dry.sum()))
    shares = sorted(((float((cover == kind).sum() / count), kind) for kind in (GREEN, DESERT, ICE)), reverse=True)
    wet = max(1, int((~dry).sum()))
    edges = (dry[1:] != dry[:-1]).sum() + (dry[:, 1:] != dry[:, :-1]).sum()
    return Sight(
        land=land,
        shallow=float((cover == SHALLOW).sum() / wet),
        covers=tuple((kind, share) for share, kind in shares),
        mountains=float((cells >= MOUNTAIN).sum() / count),
        coast=float(edges / sum(dry.shape)),
    )


def caption(cells: NDArray[np.uint8], width: int, rng: np.random.Generator) -> str:
    """A sentence about a crop of a planet `width` sample pixels wide; now and then shorter, or nothing at all."""
    if rng.random() < DROPPED:
        return ""
    sight = look(cells)

    def say(*ways: str) -> str:
        return ways[rng.integers(len(ways))]

    parts = [say(*SCALE_WORDS[width])]
    water = (
        say("a shallow sea", "bright shallow water") if sight.shallow > 0.5 else say("a deep sea", "a dark blue sea")
    )
    if 0.5 >= sight.shallow > 0.2:
        water = say("a sea with shallow shelves", "deep and shallow sea")
    cover = " and ".join(say(*COVER_WORDS[kind]) for kind, share in sight.covers if share > MUCH)
    if sight.land < 0.01:
        parts.append(say("open sea", "nothing but sea"))
        parts.append(water)
    elif sight.land < 0.3:
        islands = say("islands", "small islands") if sight.land < 0.08 or sight.coast > 0.8 else "a coast"
        parts.append(f"{cover} {islands} in {water}" if islands != "a coast" else f"a {cover} coast and {water}")
    elif sight.land < 0.85:
        place = say("continents", "lands") if width <= 1024 else say("coast", "land")
        parts.append(f"{cover} {place} by {water}")
    else:
        parts.append(f"{cover} land")
    details = [say(*DETAIL_WORDS[kind]) for kind, share in sight.covers if SOME < share <= MUCH and sight.land > 0.1]
    if sight.mountains > MUCH and sight.land > 0.1:
        details.append(say("mountains", "mountain ranges"))
    if sight.land >= 0.1 and sight.coast > 1.2:
        details.append(say("a long ragged coast", "bays and islands"))
    return ", ".join([*parts, *(detail for detail in details if rng.random() < DETAIL_KEPT)])
