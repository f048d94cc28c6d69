"""The device mesh: which ranks there are, and what share of a layer each one computes. No torch here.

Ranks divide the work along four axes: data (other requests), cfg (other branches of guidance), context (other tokens of
a row) and tp (other heads and columns of every layer). A single process is the mesh of size one.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import prod

from bagel.checkpoint.config import LlmConfig, VitConfig
from bagel.errors import ConfigError


@dataclass(frozen=True)
class Share:
    """Items start to stop of `whole`: one rank's contiguous part of heads or columns."""

    start: int
    stop: int
    whole: int

    @classmethod
    def all(cls, whole: int) -> Share:
        """The share of a rank that keeps everything."""
        return cls(0, whole, whole)

    @property
    def count(self) -> int:
        return self.stop - self.start

    def times(self, width: int) -> Share:
        """The same share in columns, where each item is `width` columns wide."""
        return Share(self.start * width, self.stop * width, self.whole * width)


@dataclass(frozen=True)
class DecoderShare:
    """What one rank computes of every decoder layer: query heads, K/V heads and columns of the MLP."""

    heads: Share
    kv_heads: Share
    columns: Share


@dataclass(frozen=True)
class VitShare:
    """What one rank computes of every layer of the ViT: heads and columns of the MLP."""

    heads: Share
    columns: Share


@dataclass(frozen=True)
class Mesh:
    """Ranks along each axis. Raises ConfigError for an axis without ranks."""

    data: int = 1
    cfg: int = 1
    context: int = 1
    tp: int = 1

    def __post_init__(self) -> None:
        for axis in fields(self):
            if (size := getattr(self, axis.name)) < 1:
                raise ConfigError(f"the mesh has {size} ranks along {axis.name}; at least 1 is needed")

    @property
    def size(self) -> int:
        """All ranks."""
        return prod(self._sizes)

    def rank(self, index: int) -> Rank:
        """The rank of this index, from 0. Ranks of one tp group are neighbours, as they exchange the most."""
        if not 0 <= index < self.size:
            raise ConfigError(f"rank {index} is not in a mesh of {self.size} ranks")
        coordinates = []
        for size in reversed(self._sizes):
            index, coordinate = divmod(index, size)
            coordinates.append(coordinate)
        return Rank(self, *reversed(coordinates))

    @property
    def _sizes(self) -> tuple[int, ...]:
        return tuple(getattr(self, axis.name) for axis in fields(self))


@dataclass(frozen=True)
class Rank:
    """One process's coordinates in the mesh."""

    mesh: Mesh = Mesh()
    data: int = 0
    cfg: int = 0
    context: int = 0
    tp: int = 0

    @property
    def index(self) -> int:
        """Its number among all ranks; the inverse of Mesh.rank."""
        mesh = self.mesh
        return ((self.data * mesh.cfg + self.cfg) * mesh.context + self.context) * mesh.tp + self.tp

    def decoder(self, llm: LlmConfig) -> DecoderShare:
        """This rank's share of a decoder.

        Ranks that are more than the K/V heads share them: each keeps a copy of the one head that its queries attend
        to. Raises ConfigError, naming the sizes that work, for a model that does not divide among so many ranks.
        """
        ranks, heads, kv_heads = self.mesh.tp, llm.num_attention_heads, llm.num_key_value_heads
        if not _divides(llm, ranks):
            sizes = ", ".join(str(n) for n in range(1, heads + 1) if _divides(llm, n))
            raise ConfigError(
                f"{heads} heads, {kv_heads} K/V heads and {llm.intermediate_size} columns of this model do not divide "
                f"among {ranks} tensor-parallel ranks; choose a size of {sizes}"
            )
        kept = self.equal(kv_heads) if kv_heads >= ranks else self._copied(kv_heads)
        return DecoderShare(self.equal(heads), kept, self.equal(llm.intermediate_size))

    def vit(self, vit: VitConfig) -> VitShare:
        """This rank's share of a ViT; all of it where its heads or columns do not divide.

        It is a thirtieth of the model, and sizes that fit the decoder are not refused for its sake.
        """
        heads, columns = vit.num_attention_heads, vit.intermediate_size
        if heads % self.mesh.tp or columns % self.mesh.tp:
            return VitShare(Share.all(heads), Share.all(columns))
        return VitShare(self.equal(heads), self.equal(columns))

    def most(self, whole: int) -> int:
        """The most items that a tensor-parallel rank gets of so many."""
        return -(-whole // self.mesh.tp)

    def equal(self, whole: int) -> Share:
        """This tensor-parallel rank's share of items; the last ranks have fewer where they do not divide."""
        each = self.most(whole)
        return Share(min(self.tp * each, whole), min((self.tp + 1) * each, whole), whole)

    def _copied(self, whole: int) -> Share:
        head = self.tp * whole // self.mesh.tp
        return Share(head, head + 1, whole)


def _divides(llm: LlmConfig, ranks: int) -> bool:
    """Whether every rank gets as many whole heads and columns as the others, and one or more whole K/V heads."""
    kv_heads = llm.num_key_value_heads
    shared = kv_heads % ranks == 0 or ranks % kv_heads == 0
    return shared and llm.num_attention_heads % ranks == 0 and llm.intermediate_size % ranks == 0
