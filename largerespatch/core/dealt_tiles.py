"""The tiles of a map that several processes have bands of, dealt out among them. Exact."""

from collections.abc import Callable, Iterator, Sequence
from itertools import chain

import torch

from .band_rows import dealt, split
from .bands import Band
from .pieces import Putting, assemble
from .tilings import Tile

Compute = Callable[[Tile, torch.Tensor], torch.Tensor]


def dealt_out(
    band: Band,
    cells: torch.Tensor,
    cover: Sequence[Tile],
    compute: Compute,
    make: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """What `compute` makes of each tile ``[B, h, w, C]`` of a map, in the place of a band's cells ``[B, rows, W, C]``.

    `make` makes the memory for these, of the first result; it may be that of the cells. Each process computes some of
    the tiles, which have to come out as large as they were. Rows of them that are in another's band come from there,
    and their results go back.
    """
    if band.alone:
        return assemble(  # type: ignore[no-any-return]
            cover,
            lambda tile: compute(tile, cells[:, tile.rows, tile.columns]),
            place=lambda tile: (slice(None), tile.rows, tile.columns),
            make=make,
        )
    return _dealt(band, cells, cover, compute, make(cells))


def _dealt(
    band: Band, cells: torch.Tensor, cover: Sequence[Tile], compute: Compute, output: torch.Tensor
) -> torch.Tensor:
    rank, others, (first, _) = band.bands.rank, range(band.bands.count), band.run
    hands = dealt(cover, band.bands.count)
    parts = {tile: list(split(tile, band.rows.cuts)) for hand in hands for tile in hand}

    def crossing(computes: int, has: int) -> list[Tile]:
        """What one process has of the tiles that another one computes."""
        tiles = hands[computes] if computes != has else ()
        return [some for tile in tiles for owner, some in parts[tile] if owner == has]

    def here(some: Tile) -> tuple[slice, ...]:
        return slice(None), slice(some.top - first, some.bottom - first), some.columns

    def shape(some: Tile) -> tuple[int, ...]:
        return len(cells), *some.size(), cells.shape[-1]

    def sent(
        give: Sequence[Sequence[Tile]], take: Sequence[Sequence[Tile]], rows: Callable[[Tile], torch.Tensor]
    ) -> dict[Tile, torch.Tensor]:
        shapes = [list(map(shape, each)) for each in take]
        found = band.bands.exchange(cells, [list(map(rows, each)) for each in give], shapes, "tiles")()
        return dict(zip(chain(*take), chain(*found), strict=True))

    lent = [crossing(i, rank) for i in others]
    borrowed = [crossing(rank, i) for i in others]
    there = sent(lent, borrowed, lambda some: cells[here(some)])
    results = {some: cells.new_empty(shape(some)) for some in there}

    def read(tiles: Sequence[Tile]) -> Iterator[torch.Tensor]:
        for tile in tiles:
            rows = [there[some] if some in there else cells[here(some)] for _, some in parts[tile]]
            yield torch.cat(rows, dim=1) if len(rows) > 1 else rows[0]

    def put(tile: Tile, result: torch.Tensor) -> None:
        for _, some in parts[tile]:
            target = results[some] if some in results else output[here(some)]
            target.copy_(result[:, some.top - tile.top : some.bottom - tile.top])

    assemble(hands[rank], compute, place=lambda tile: tile, into=Putting(put), read=read)
    there.clear()
    for some, result in sent(borrowed, lent, results.__getitem__).items():
        output[here(some)] = result
    return output
