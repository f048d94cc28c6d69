"""Name a checkpoint's content: one digest per file that shapes the result, and one fingerprint over all of them."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from bagel.checkpoint.config import ModelConfig
from bagel.checkpoint.digest_cache import DigestCache, Stamp
from bagel.checkpoint.hashing import DIGEST_BYTES, content_digest
from bagel.errors import CheckpointError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FileDigest:
    """A file's digest and size. cached: the cache had the digest; known: the cached digest of a file read anew."""

    name: str
    nbytes: int
    digest: bytes
    cached: bool = False
    known: bytes | None = None


@dataclass(frozen=True)
class Identity:
    """The fingerprint, and the digests of the files that it covers."""

    fingerprint: bytes
    files: tuple[FileDigest, ...]


def identify(folder: Path, config: ModelConfig, weights: Iterable[str], texts: Iterable[str]) -> Identity:
    """Name the content of a folder: its configuration, its tokenizer's files (texts) and every byte of its weights.

    Raises CheckpointError for a file that cannot be read or that changes meanwhile.
    """
    began, cache = time.monotonic(), DigestCache.of_user()
    files = [text_digest(folder / name) for name in texts if (folder / name).is_file()]
    files += [weights_digest(folder / name, cache) for name in weights]
    identity = Identity(fingerprint_of(config, files), tuple(files))
    fields = {
        "fingerprint": identity.fingerprint.hex(),
        "seconds": round(time.monotonic() - began, 3),
        "bytes": sum(file.nbytes for file in files),
        "bytes_read": sum(file.nbytes for file in files if not file.cached),
        "cached": [file.name for file in files if file.cached],
    }
    logger.info("fingerprint of the checkpoint", extra={"fields": fields})
    return identity


def fingerprint_of(config: ModelConfig, files: Iterable[FileDigest]) -> bytes:
    """The fingerprint of a model: a digest over its configuration and its other files, ordered by name."""
    digest = blake2b(digest_size=DIGEST_BYTES, person=b"bagel-model")
    # The configuration as read, not its files: a comment or a key that nothing reads makes no other model.
    digest.update(repr(config).encode())
    for file in sorted(files, key=lambda each: each.name):
        digest.update(f"{file.name}:".encode() + file.digest)
    return digest.digest()


def text_digest(path: Path) -> FileDigest:
    """The digest of a small file's bytes; raises CheckpointError if it cannot be read."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    return FileDigest(path.name, len(data), blake2b(data, digest_size=DIGEST_BYTES).digest())


def weights_digest(path: Path, cache: DigestCache, *, anew: bool = False) -> FileDigest:
    """The digest of a safetensors file, from the cache or read now. anew: read it in any case, and note the cached one.

    Raises CheckpointError for a file that cannot be read or that changes meanwhile.
    """
    stamp = Stamp.of(path)
    if stamp is None:
        raise CheckpointError(f"{path} is missing")
    known = cache.get(path, stamp)
    if known is not None and not anew:
        return FileDigest(path.name, stamp.size, known, cached=True)
    with cache.alone(path):
        # Another process may have stored the digest while this one waited for the lock.
        if not anew and (stored := cache.get(path, stamp)) is not None:
            return FileDigest(path.name, stamp.size, stored, cached=True)
        digest = content_digest(path)
        if Stamp.of(path) != stamp:  # the digest would mix two versions of the file
            raise CheckpointError(f"{path} changed while it was read; let it be written whole, then start again")
        cache.put(path, stamp, digest)
    return FileDigest(path.name, stamp.size, digest, known=known)
