"""A chain of segments as a vLLM request: token ids with placeholders for images, and where each segment lies."""

from __future__ import annotations

from dataclasses import dataclass

from bagel.engine.segments import Chain, Segment
from bagel.kv.digests import SegmentKind
from bagel.model.tokenizer import BagelTokenizer


@dataclass(frozen=True)
class Placeholders:
    """Ids that stand for what has none.

    start, end, vit, latent: tokens of image blocks; they only tell latents apart within a block. overflow: what a text
    whose logits are not finite goes on with, the last row of the vocabulary, which most models have for no text.
    """

    start: int
    end: int
    vit: int
    latent: int
    overflow: int = -1

    @classmethod
    def of(cls, tokenizer: BagelTokenizer, vocab_size: int) -> Placeholders:
        """Ids that every BAGEL tokenizer has; vocab_size: rows of the model's vocabulary."""
        return cls(tokenizer.image_start, tokenizer.image_end, tokenizer.eos, tokenizer.bos, vocab_size - 1)


def token_ids(chain: Chain, ids: Placeholders) -> list[int]:
    """One id for each K/V row of a chain."""
    tokens: list[int] = []
    for segment in chain.segments:
        tokens += segment.token_ids if segment.kind is SegmentKind.TEXT else _block(segment, ids)
    return tokens


def _block(segment: Segment, ids: Placeholders) -> list[int]:
    inner = ids.latent if segment.kind is SegmentKind.VAE else ids.vit
    return [ids.start, *[inner] * (segment.length - 2), ids.end]


def segment_starts(chain: Chain) -> list[int]:
    """The first row of each segment."""
    starts, at = [], 0
    for segment in chain.segments:
        starts.append(at)
        at += segment.length
    return starts
