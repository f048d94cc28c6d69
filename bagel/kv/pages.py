"""Shapes and sizes of K/V: the layout of a segment and the pages that it is sent in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from bagel.errors import ConfigError

PAGE_BYTES = 1 << 20
"""Most payload of one page. The wire allows 2 MiB; smaller ones cost more calls, larger ones more memory traffic."""

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class PageKey(NamedTuple):
    """A page's name."""

    digest: bytes
    layer: int
    token_begin: int


@dataclass(frozen=True)
class KvLayout:
    """Shape and type of K/V. A segment is [layer][K rows, V rows], a row [kv head, head dim], little-endian.

    page_heads: heads of the whole model, which define the token ranges of pages, where a store keeps only
    some of them (a tensor-parallel rank); 0: kv_heads.
    """

    layers: int
    kv_heads: int
    head_dim: int
    dtype: str
    page_heads: int = 0

    def __post_init__(self) -> None:
        if self.dtype not in ITEM_BYTES:
            raise ConfigError(f"K/V type {self.dtype!r} is unknown; it must be one of {', '.join(ITEM_BYTES)}")
        # A row larger than a page could never be sent.
        if min(self.layers, self.kv_heads, self.head_dim) < 1 or self.page_tokens < 1:
            raise ConfigError(f"{self} fits no page of {PAGE_BYTES} bytes; sizes must be at least 1 and a row less")

    @property
    def itemsize(self) -> int:
        return ITEM_BYTES[self.dtype]

    @property
    def row_bytes(self) -> int:
        """Bytes of K of one token in one layer."""
        return self.kv_heads * self.head_dim * self.itemsize

    @property
    def page_tokens(self) -> int:
        """Tokens of a full page."""
        # By the whole model's heads, so that all ranks cut a segment into the same pages.
        heads = max(self.page_heads, self.kv_heads)
        return PAGE_BYTES // (2 * heads * self.head_dim * self.itemsize)

    def layer_bytes(self, length: int) -> int:
        """Bytes of K and V of one layer of `length` tokens."""
        return 2 * length * self.row_bytes

    def segment_bytes(self, length: int) -> int:
        """Bytes of K and V of all layers of `length` tokens."""
        return self.layers * self.layer_bytes(length)

    def page_ranges(self, length: int) -> list[tuple[int, int]]:
        """Token ranges (begin, end) of the pages of one layer of `length` tokens."""
        step = self.page_tokens
        return [(begin, min(begin + step, length)) for begin in range(0, length, step)]

    def page_end(self, length: int, begin: int) -> int | None:
        """The end of the page that begins at `begin`; None if no page does."""
        step = self.page_tokens
        return min(begin + step, length) if 0 <= begin < length and begin % step == 0 else None
