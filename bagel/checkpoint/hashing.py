"""The digest of a safetensors file's content: several threads read every byte of every tensor once.

XXH3-128 is as fast as memory, so the disk sets the pace. It distinguishes files that differ by accident or training; it
does not protect against somebody who constructs two files with one digest.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from hashlib import blake2b
from pathlib import Path
from threading import Thread

from xxhash import xxh3_128

from bagel.checkpoint.headers import Header, TensorInfo, read_header
from bagel.errors import CheckpointError

DIGEST_BYTES = 16
PIECE_BYTES = 64 * 2**20
"""Size of the pieces in which a large tensor is hashed. It is part of the digest's definition."""
READ_BYTES = 2**18
"""Bytes of one read; they fit a core's cache."""
MOST_THREADS = 8

Piece = tuple[int, int]
"""Offset into the file, bytes."""


def content_digest(path: Path) -> bytes:
    """16 bytes that name a safetensors file's tensors: names, types, shapes and values, but not their order.

    BLAKE2b over each name, type and shape, and the XXH3-128 of each piece of the bytes. Raises CheckpointError for a
    file that is malformed or becomes shorter meanwhile.
    """
    header = read_header(path)
    pieces = {name: _pieces(header, info) for name, info in header.tensors.items()}
    # Read in the file's order, for the disk's sake; digested in the order of the names.
    in_order = sorted(piece for of_one in pieces.values() for piece in of_one)
    hashed = dict(zip(in_order, _hash_all(path, in_order), strict=True))
    digest = blake2b(digest_size=DIGEST_BYTES, person=b"bagel-tensors")
    for name, info in sorted(header.tensors.items()):
        digest.update(f"{len(name)} {name} {info.dtype} {list(info.shape)} ".encode("utf-8", "surrogatepass"))
        digest.update(b"".join(hashed[piece] for piece in pieces[name]))
    return digest.digest()


def _pieces(header: Header, info: TensorInfo) -> list[Piece]:
    start, end = header.data_start + info.begin, header.data_start + info.end
    return [(at, min(PIECE_BYTES, end - at)) for at in range(start, end, PIECE_BYTES)]


def _hash_all(path: Path, pieces: list[Piece]) -> list[bytes]:
    """The XXH3-128 of each piece, in the order given."""
    runs = list(_runs(pieces))
    found: list[list[bytes]] = [[] for _ in runs]
    numbers = itertools.count()

    def work() -> None:
        buffer = bytearray(READ_BYTES)
        with path.open("rb", buffering=0) as stream:  # one per thread: the kernel reads ahead per descriptor
            while (number := next(numbers)) < len(runs):
                found[number] = [_hash(stream.fileno(), *piece, buffer) for piece in runs[number]]

    try:
        in_threads(work, min(_cores(), MOST_THREADS, len(runs)))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except EOFError:
        raise CheckpointError(
            f"{path} became shorter while it was read; let it be written whole, then start again"
        ) from None
    return [digest for run in found for digest in run]


def _runs(pieces: list[Piece]) -> Iterator[list[Piece]]:
    """Group neighbouring pieces, so that even small tensors give a thread enough work."""
    run: list[Piece] = []
    for piece in pieces:
        run.append(piece)
        if sum(nbytes for _, nbytes in run) >= PIECE_BYTES // 4:
            yield run
            run = []
    if run:
        yield run


def _hash(descriptor: int, offset: int, nbytes: int, buffer: bytearray) -> bytes:
    digest, view, end = xxh3_128(), memoryview(buffer), offset + nbytes
    while offset < end:
        count = os.preadv(descriptor, [view[: end - offset]], offset)
        if not count:
            raise EOFError
        digest.update(view[:count])  # releases Python's lock, as preadv does
        offset += count
    return digest.digest()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_threads(work: Callable[[], None], count: int) -> None:
    """Run work in `count` threads at once and raise the first error. An interrupted process does not wait for them."""
    errors: list[BaseException] = []

    def guarded() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [Thread(target=guarded, name="hash", daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
