"""VAE patch parallel: a large picture's overlapping tiles are computed by several ranks, and blended.

One rank's tiling is the same work in a group of one, so that pictures do not depend on the number of ranks: each tile
is computed by itself, and blended by its place. Sizes and blending are those of diffusers' AutoencoderKL.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bagel.parallel.groups import Group

Network = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Tile:
    """Where a tile lies: its row and column among the tiles, and its box in the input."""

    row: int
    column: int
    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True)
class Tiling:
    """Squares that a picture is cut into for one network.

    size: a side of a tile, result: a side of what the network makes of it; smaller tiles, at the lower and right edges,
    make as much less. channels: of the result. overlap: the part of a tile that its neighbours have too.
    """

    size: int
    result: int
    channels: int
    overlap: float

    def cuts(self, x: Tensor) -> bool:
        """Whether x [1, channels, height, width] is larger than one tile."""
        return max(x.shape[-2:]) > self.size

    def share(self, x: Tensor, network: Network, group: Group) -> Tensor:
        """The network's results for the tiles of this rank, one behind the other.

        Tensors of all ranks have one length. So many numbers, rather than tiles, pass between ranks.
        """
        divided = self._divided(x, group)
        most = max(sum(map(self._numel, tiles)) for tiles in divided)
        results, at = x.new_empty(most), 0
        for tile in divided[group.index]:
            cut = x[..., tile.top : tile.top + tile.height, tile.left : tile.left + tile.width]
            # Written at once, so that a rank holds the network's intermediate results of one tile at a time.
            results[at : at + self._numel(tile)] = network(cut.contiguous()).flatten()
            at += self._numel(tile)
        return results

    def blend(self, x: Tensor, shares: Tensor, group: Group) -> Tensor:
        """The result for all of x from the ranks' shares [ranks, numbers], whose memory is used up."""
        tiles: dict[tuple[int, int], Tensor] = {}
        for share, mine in zip(shares, self._divided(x, group), strict=True):
            at = 0
            for tile in mine:
                shape = (1, self.channels, self._scaled(tile.height), self._scaled(tile.width))
                tiles[tile.row, tile.column] = share[at : at + self._numel(tile)].view(shape)
                at += self._numel(tile)
        kept = self.result - self._blended
        lines: dict[int, list[Tensor]] = {}
        # From the upper left on, as a tile is blended with neighbours that have been blended themselves.
        for row, column in sorted(tiles):
            result = tiles[row, column]
            if row:
                _blend(tiles[row - 1, column], result, self._blended, dim=2)
            if column:
                _blend(tiles[row, column - 1], result, self._blended, dim=3)
            lines.setdefault(row, []).append(result[:, :, :kept, :kept])
        return torch.cat([torch.cat(line, dim=3) for line in lines.values()], dim=2)

    @property
    def _blended(self) -> int:
        """Lines of a result that are blended with a neighbour's."""
        return int(self.result * self.overlap)

    def _divided(self, x: Tensor, group: Group) -> list[list[Tile]]:
        """The tiles of x by rank: each gets about as much of their area."""
        height, width = x.shape[-2:]
        stride = int(self.size * (1 - self.overlap))
        tiles = [
            Tile(row, column, top, left, min(self.size, height - top), min(self.size, width - left))
            for row, top in enumerate(range(0, height, stride))
            for column, left in enumerate(range(0, width, stride))
        ]
        divided: list[list[Tile]] = [[] for _ in range(group.size)]
        # Largest first, so that the small ones make up for the differences. All ranks must come to the same division.
        for tile in sorted(tiles, key=self._numel, reverse=True):
            min(divided, key=lambda mine: sum(map(self._numel, mine))).append(tile)
        return divided

    def _numel(self, tile: Tile) -> int:
        """Numbers in a tile's result."""
        return self.channels * self._scaled(tile.height) * self._scaled(tile.width)

    def _scaled(self, side: int) -> int:
        """What a side of the input becomes."""
        return side * self.result // self.size


def _blend(before: Tensor, tile: Tensor, extent: int, *, dim: int) -> None:
    """Let a tile's first lines along a dimension pass over from the last ones of the tile before, in place."""
    extent = min(before.shape[dim], tile.shape[dim], extent)
    # In float64 first, as the products below are then those of weights that are exact before they are rounded.
    weights = torch.arange(extent, dtype=torch.float64, device=tile.device) / extent
    shape = [1, 1, 1, 1]
    shape[dim] = extent
    rising, falling = (each.to(tile.dtype).view(shape) for each in (weights, 1 - weights))
    begin = tile.narrow(dim, 0, extent)
    begin.copy_(before.narrow(dim, before.shape[dim] - extent, extent) * falling + begin * rising)
