"""Names of K/V by content, known before anything is computed.

A context is a chain of segments. A segment's digest covers its parent's digest, its kind, its content and the
fingerprint of what computes it, so equal prefixes of two contexts are the same segments.
"""

from __future__ import annotations

from enum import StrEnum
from hashlib import blake2b

LAYOUT_VERSION = 1
DIGEST_BYTES = 16
ROOT = b""


class SegmentKind(StrEnum):
    """What a segment's tokens are."""

    TEXT = "text"
    VAE = "vae"
    VIT = "vit"


def fingerprint(model: bytes, kv_dtype: str, quantization: str | None = None) -> bytes:
    """Who may share K/V: the model's content (checkpoint, tokenizer, transforms), K/V type and layout version.

    quantization: of the weights that made them, which changes them by more than rounding: of segments' digests alone,
    where a DiT takes K/V from Thinkers of both kinds. The compute type, the engine and the parallel size are no part.
    """
    weights = () if quantization is None else (quantization.encode(),)
    return _digest(b"bagel-kv", model, kv_dtype.encode(), LAYOUT_VERSION.to_bytes(4, "little"), *weights)


def segment_digest(parent: bytes, kind: SegmentKind, content: bytes, fingerprint: bytes) -> bytes:
    """The digest of a segment; parent is the digest of the one before it, ROOT for the first."""
    return _digest(b"bagel-segment", fingerprint, parent, kind.encode(), content)


def _digest(person: bytes, *fields: bytes) -> bytes:
    """BLAKE2b over length-prefixed fields, so that no two lists of fields collide."""
    digest = blake2b(digest_size=DIGEST_BYTES, person=person)
    for value in fields:
        digest.update(len(value).to_bytes(8, "little"))
        digest.update(value)
    return digest.digest()
