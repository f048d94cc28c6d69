"""Turn a chain of segments into a vLLM request: token ids with placeholders for images, and each segment's place."""

from __future__ import annotations

from dataclasses import dataclass

from bagel.engine.segments import Chain, Segment
from bagel.kv.digests import SegmentKind
from bagel.model.tokenizer import BagelTokenizer


@dataclass(frozen=True)
class Placeholders:
    """Ids for tokens that have none of their own.

    start, end, vit, latent: tokens of image blocks; they only distinguish latents from the rest of a block. overflow:
    the token that follows logits which are not finite, the vocabulary's last row, which most models never use for text.
    """

    start: int
    end: int
    vit: int
    latent: int
    overflow: int = -1

    @classmethod
    def of(cls, tokenizer: BagelTokenizer, vocab_size: int) -> Placeholders:
        """Choose ids that every BAGEL tokenizer has; vocab_size: rows of the model's embedding."""
        return cls(tokenizer.image_start, tokenizer.image_end, tokenizer.eos, tokenizer.bos, vocab_size - 1)


def token_ids(chain: Chain, ids: Placeholders) -> list[int]:
    """The ids of a chain, one for each K/V row."""
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
