"""Building contexts: the K/V of a chain, each of its segments computed at most once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from bagel.engine.latents import InputLatents
from bagel.engine.layout import latent_rows, text_rows, vit_rows
from bagel.engine.prefill_graphs import PrefillGraphs
from bagel.engine.segments import Chain, Segment
from bagel.kv.digests import SegmentKind
from bagel.model.attention import KvSlab, upload
from bagel.model.bagel import Bagel
from bagel.model.flow import latent_patchify
from bagel.model.layers import grid_position_ids
from bagel.model.mot import Block
from bagel.model.pixels import to_pixels
from bagel.model.vit import vit_patchify

OnKv = Callable[[Segment, range, Tensor, Tensor], None]
"""Called as soon as layers of a segment are computed: (segment, layers, k, v), k and v [layers, length, kv_heads,
head_dim]. One layer at a time, but all of a text that is one launch (prefill_graphs)."""

DEFAULT_CACHE_BYTES = 2 * 2**30
JOINED_TOKENS = 1024
"""Longest text that is computed together with the image before it: a fraction of the image's work."""


@dataclass(frozen=True)
class SegmentKv:
    """K/V of one segment, k and v [layers, length, kv_heads, head_dim]."""

    k: Tensor
    v: Tensor

    @property
    def nbytes(self) -> int:
        return self.k.nbytes + self.v.nbytes


@dataclass(frozen=True)
class Context:
    """A chain with its K/V, ready to go on from or to draw from."""

    chain: Chain = field(default_factory=Chain)
    kv: tuple[SegmentKv, ...] = ()

    @property
    def length(self) -> int:
        return self.chain.length

    @property
    def rope(self) -> int:
        return self.chain.rope

    @property
    def digest(self) -> bytes:
        return self.chain.digest

    def copy_to(self, slab: KvSlab, start: int) -> None:
        """Write all of it to a slab from token `start` on."""
        for segment in self.kv:
            stop = start + segment.k.shape[1]
            slab.k[:, start:stop] = segment.k
            slab.v[:, start:stop] = segment.v
            start = stop


class Cache(Protocol):
    """Where a builder finds segments and keeps them."""

    def get(self, digest: bytes) -> SegmentKv | None: ...

    def has(self, digest: bytes) -> bool: ...

    def put(self, digest: bytes, entry: SegmentKv) -> None: ...


class SegmentCache:
    """Segments by digest, bounded in bytes; the least recently used goes first."""

    def __init__(self, max_bytes: int = DEFAULT_CACHE_BYTES) -> None:
        self.max_bytes, self.nbytes = max_bytes, 0
        self._entries: OrderedDict[bytes, SegmentKv] = OrderedDict()

    def get(self, digest: bytes) -> SegmentKv | None:
        entry = self._entries.get(digest)
        if entry is not None:
            self._entries.move_to_end(digest)
        return entry

    def has(self, digest: bytes) -> bool:
        return digest in self._entries

    def put(self, digest: bytes, entry: SegmentKv) -> None:
        # An entry above the bound would drive out all others, then itself.
        if digest in self._entries or entry.nbytes > self.max_bytes:
            return
        self._entries[digest] = entry
        self.nbytes += entry.nbytes
        while self.nbytes > self.max_bytes:
            _, evicted = self._entries.popitem(last=False)
            self.nbytes -= evicted.nbytes

    def clear(self) -> None:
        """Forget all of them."""
        self._entries.clear()
        self.nbytes = 0


class ContextBuilder:
    """Computes contexts on one model. segments_computed counts those that no cache had.

    texts: the graphs that compute short texts, where there are any.
    """

    def __init__(self, model: Bagel, cache: Cache | None = None, texts: PrefillGraphs | None = None) -> None:
        self.model, self.texts = model, texts
        self.cache: Cache = cache if cache is not None else SegmentCache()
        self.latents = InputLatents(model)
        self.segments_computed = 0
        self._delimiters = model.delimiter_embeddings()

    def build(self, chain: Chain, on_kv: OnKv | None = None) -> Context:
        """The context of a chain. on_kv sees all layers of each segment that is computed, as they are computed."""
        steps = self.steps(chain, on_kv)
        while True:
            try:
                next(steps)
            except StopIteration as done:
                context: Context = done.value
                return context

    @torch.inference_mode()
    def steps(
        self, chain: Chain, on_kv: OnKv | None = None, *, with_kv: bool = True
    ) -> Generator[Segment, None, Context]:
        """As `build`, pausing before each unit (`units`) that is to be computed, so that other work can go between.

        with_kv: False for a context that only has to be in the cache; if it is, it comes without K/V.
        """
        if not with_kv and all(self.cache.has(segment.digest) for segment in chain.segments):
            return Context(chain)
        known = {segment.digest: self.cache.get(segment.digest) for segment in chain.segments}
        # Nothing is allocated for a context that is known as a whole.
        if all(kv is not None for kv in known.values()):
            return Context(chain, tuple(kv for kv in known.values() if kv is not None))
        slab = KvSlab(self.model.kv_shape, chain.length, dtype=self.model.dtype, device=self.model.device)
        past = 0
        for unit in units(chain.segments):
            if any(known[segment.digest] is None for segment in unit):
                yield unit[0]
                # Another build may have made them meanwhile.
                known |= {each.digest: known[each.digest] or self.cache.get(each.digest) for each in unit}
            past = self._fill(unit, past, slab, known, on_kv)
        return Context(chain, tuple(kv for kv in known.values() if kv is not None))

    def _fill(
        self,
        unit: Sequence[Segment],
        past: int,
        slab: KvSlab,
        known: dict[bytes, SegmentKv | None],
        on_kv: OnKv | None,
    ) -> int:
        """Write a unit's K/V to a slab behind `past` tokens, those not known computed and noted; the tokens then."""
        missing = list[tuple[Segment, slice]]()
        for segment in unit:
            span = slice(past, past + segment.length)
            if (kv := known[segment.digest]) is None:
                missing.append((segment, span))
            else:
                slab.k[:, span], slab.v[:, span] = kv.k, kv.v
            past = span.stop
        if missing:
            self._compute(missing, slab, on_kv)
        for segment, span in missing:
            # Copies: a view would keep the whole slab alive for as long as this segment is cached.
            made = known[segment.digest] = SegmentKv(slab.k[:, span].clone(), slab.v[:, span].clone())
            self.cache.put(segment.digest, made)
        return past

    def _compute(self, segments: Sequence[tuple[Segment, slice]], slab: KvSlab, on_kv: OnKv | None) -> None:
        """Run segments through the decoder, a layer of all before the next; their K/V go to these tokens of the slab.

        So a layer's K/V are all there while the next one is computed, and a picture's first step can begin with it.
        """
        self.segments_computed += len(segments)

        def computed(layers: range, at: int) -> None:
            segment, span = segments[at]
            if on_kv is not None:
                on_kv(segment, layers, *(kv[layers.start : layers.stop, span] for kv in (slab.k, slab.v)))

        if len(segments) == 1 and self._captured(segments[0][0], segments[0][1].start, slab):
            computed(range(self.model.kv_shape.layers), 0)
            return
        blocks = [_BLOCKS[segment.kind](self, segment, span.start) for segment, span in segments]
        self.model.language_model.together(blocks, slab, lambda layer, at: computed(range(layer, layer + 1), at))

    def _captured(self, segment: Segment, past: int, slab: KvSlab) -> bool:
        """Whether the segment was a short text, and a graph has computed it."""
        if self.texts is None or segment.kind is not SegmentKind.TEXT:
            return False
        return self.texts.compute(segment.token_ids, past, segment.rope, slab)

    def _text(self, segment: Segment, past: int) -> Block:
        ids = upload([segment.token_ids], torch.int64, self.model.device)
        rows = text_rows(self.model.language_model, [0], [past], [segment.rope], segment.length)
        return Block(self.model.embed(ids), None, rows)

    def _vit(self, segment: Segment, past: int) -> Block:
        assert segment.image is not None
        patches = vit_patchify(to_pixels(segment.image, self.model.device), self.model.config.vit.patch_size)
        start, end = self._delimiters[:, None]
        inputs = torch.cat((start, self.model.embed_vit(patches, *segment.grid), end))
        return Block(inputs[None], None, vit_rows(self.model.language_model, past, segment.rope, len(patches)))

    def _vae(self, segment: Segment, past: int) -> Block:
        tokens = latent_patchify(self.latents.of(segment), self.model.config.latent_patch_size)
        ids = grid_position_ids(*segment.grid, self.model.config.max_latent_size, self.model.device)
        # Latents of a context are clean, which is time 0. The embedding of 0 is added too.
        clean = torch.zeros(1, device=self.model.device)
        count = len(tokens)
        rows = latent_rows(self.model.language_model, [0], [past], [segment.rope], [count], count)
        return Block(self._delimiters[None], self.model.embed_latents(tokens[None], clean, ids), rows)


_BLOCKS = {
    SegmentKind.TEXT: ContextBuilder._text,
    SegmentKind.VIT: ContextBuilder._vit,
    SegmentKind.VAE: ContextBuilder._vae,
}


def units(segments: Sequence[Segment]) -> list[list[Segment]]:
    """Segments as they are computed together: an image's VAE and ViT blocks with the text behind it, or one text."""
    found: list[list[Segment]] = []
    for segment in segments:
        if found and _joins(segment, found[-1]):
            found[-1].append(segment)
        else:
            found.append([segment])
    return found


def _joins(segment: Segment, unit: Sequence[Segment]) -> bool:
    match segment.kind:
        case SegmentKind.VIT:
            return unit[-1].kind is SegmentKind.VAE
        case SegmentKind.TEXT:
            return unit[0].kind is not SegmentKind.TEXT and segment.length <= JOINED_TOKENS
    return False
