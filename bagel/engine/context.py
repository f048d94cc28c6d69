"""Building contexts: the K/V of a chain, segment by segment, each computed at most once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from bagel.engine.layout import latent_rows, text_rows, vit_rows
from bagel.engine.prefill_graphs import PrefillGraphs
from bagel.engine.segments import Chain, Segment
from bagel.images import pixel_digest
from bagel.kv.digests import SegmentKind
from bagel.model.attention import KvSlab, Rows, upload
from bagel.model.bagel import Bagel
from bagel.model.flow import latent_patchify
from bagel.model.layers import grid_position_ids
from bagel.model.pixels import to_pixels
from bagel.model.vit import vit_patchify

OnKv = Callable[[Segment, int, Tensor, Tensor], None]
"""Called as soon as a layer of a segment is computed: (segment, layer, k, v), k and v [length, kv_heads, head_dim]."""

DEFAULT_CACHE_BYTES = 2 * 2**30


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
        self.segments_computed = 0
        self._delimiters = model.delimiter_embeddings()

    def build(self, chain: Chain, on_kv: OnKv | None = None) -> Context:
        """The context of a chain. on_kv sees each layer of each segment that is computed, as it is computed."""
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
        """As `build`, pausing before each segment that is to be computed, so that other work can go between.

        with_kv: False for a context that only has to be in the cache; if it is, it comes without K/V.
        """
        if not with_kv and all(self.cache.has(segment.digest) for segment in chain.segments):
            return Context(chain)
        known = [self.cache.get(segment.digest) for segment in chain.segments]
        # Nothing is allocated for a context that is known as a whole.
        if all(kv is not None for kv in known):
            return Context(chain, tuple(kv for kv in known if kv is not None))
        slab = KvSlab(self.model.kv_shape, chain.length, dtype=self.model.dtype, device=self.model.device)
        kvs, past = [], 0
        for segment, kv in zip(chain.segments, known, strict=True):
            span = slice(past, past + segment.length)
            if kv is None:
                yield segment
                kv = self.cache.get(segment.digest)  # another build may have made it meanwhile
            if kv is None:
                self._compute(segment, past, slab, on_kv)
                # Copies: a view would keep the whole slab alive for as long as this segment is cached.
                kv = SegmentKv(slab.k[:, span].clone(), slab.v[:, span].clone())
                self.cache.put(segment.digest, kv)
            else:
                slab.k[:, span], slab.v[:, span] = kv.k, kv.v
            kvs.append(kv)
            past = span.stop
        return Context(chain, tuple(kvs))

    def _compute(self, segment: Segment, past: int, slab: KvSlab, on_kv: OnKv | None) -> None:
        """Run one segment through the decoder; its K/V go to the slab behind `past` rows of context."""
        self.segments_computed += 1
        span = slice(past, past + segment.length)

        def on_layer(layer: int) -> None:
            if on_kv is not None:
                on_kv(segment, layer, slab.k[layer, span], slab.v[layer, span])

        if self._captured(segment, past, slab):
            for layer in range(self.model.kv_shape.layers):
                on_layer(layer)
            return
        und, gen, rows = _INPUTS[segment.kind](self, segment, past)
        self.model.language_model(und, gen, rows, slab, on_layer)

    def _captured(self, segment: Segment, past: int, slab: KvSlab) -> bool:
        """Whether the segment was a short text, and a graph has computed it."""
        if self.texts is None or segment.kind is not SegmentKind.TEXT:
            return False
        return self.texts.compute(segment.token_ids, past, segment.rope, slab)

    def _text(self, segment: Segment, past: int) -> tuple[Tensor, None, Rows]:
        ids = upload([segment.token_ids], torch.int64, self.model.device)
        rows = text_rows(self.model.language_model, [0], [past], [segment.rope], segment.length)
        return self.model.embed(ids), None, rows

    def _vit(self, segment: Segment, past: int) -> tuple[Tensor, None, Rows]:
        assert segment.image is not None
        patches = vit_patchify(to_pixels(segment.image, self.model.device), self.model.config.vit.patch_size)
        start, end = self._delimiters[:, None]
        inputs = torch.cat((start, self.model.embed_vit(patches, *segment.grid), end))
        return inputs[None], None, vit_rows(self.model.language_model, past, segment.rope, len(patches))

    def _vae(self, segment: Segment, past: int) -> tuple[Tensor, Tensor, Rows]:
        tokens = latent_patchify(self._latent(segment), self.model.config.latent_patch_size)
        ids = grid_position_ids(*segment.grid, self.model.config.max_latent_size, self.model.device)
        # Latents of a context are clean, which is time 0. The embedding of 0 is added too.
        clean = torch.zeros(1, device=self.model.device)
        count = len(tokens)
        rows = latent_rows(self.model.language_model, [0], [past], [segment.rope], [count], count)
        return self._delimiters[None], self.model.embed_latents(tokens[None], clean, ids), rows

    def _latent(self, segment: Segment) -> Tensor:
        """The clean latent of an image, [z, h, w], sampled with the segment's posterior noise."""
        assert segment.image is not None and segment.posterior is not None
        vae = self.model.autoencoder()
        mean, logvar = vae.encode(to_pixels(segment.image, self.model.device)[None])
        # Drawn on the CPU and moved, as each device's own generator draws other numbers.
        noise = segment.posterior.draw(tuple(mean.shape), pixel_digest(segment.image))
        return vae.sample(mean, logvar, upload(noise, torch.float32, mean.device))[0]


_INPUTS = {
    SegmentKind.TEXT: ContextBuilder._text,
    SegmentKind.VIT: ContextBuilder._vit,
    SegmentKind.VAE: ContextBuilder._vae,
}
