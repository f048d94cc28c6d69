"""Digests of large files that were read before, in a folder of the user's: services of a host read each file once.

A digest is taken from here while the file's path, size, times and inode are those it was computed for. Nothing that
another user could have written is believed, and a folder that cannot be used only costs the time to read again.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import stat
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

CACHE_FOLDER = "BAGEL_CACHE_DIR"
"""Environment variable with the cache's folder; else XDG_CACHE_HOME's bagel-serving, else that in ~/.cache."""
NAME, DIGESTS = "bagel-serving", "digests"
KEY_BYTES = 16
VERSION = 1
"""Of what is stored and of how digests are computed."""
LARGEST_ENTRY = 2**16
WAIT_S = 600.0
"""For another process that reads the same file; after that, read it ourselves."""
LOOK_S = 0.05
FRESH_NS, FRESH_COARSE_NS = 100 * 10**6, 2 * 10**9
"""A file changed so short a time ago could change again and keep its time: file systems count in ticks, or seconds."""


@dataclass(frozen=True)
class Stamp:
    """What changes when a file does. ctime: not even who sets a file's times back keeps that."""

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int

    @classmethod
    def of(cls, path: Path) -> Stamp | None:
        """A file's, links followed; None if there is none."""
        try:
            found = path.stat()
        except OSError:
            return None
        return cls(found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)

    @property
    def settled(self) -> bool:
        """Whether any later change of the file gives another stamp."""
        latest = max(self.mtime_ns, self.ctime_ns)
        tick = FRESH_COARSE_NS if latest % 10**9 == 0 else FRESH_NS
        return time.time_ns() - latest > tick


class DigestCache:
    """The folder of one user. Every method does its best: what cannot be read or written is as if it were not there."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    @classmethod
    def of_user(cls) -> DigestCache:
        """The cache in the environment's folder, which is made if missing."""
        return cls(_own_folder(_folder_named()))

    def get(self, path: Path, stamp: Stamp) -> bytes | None:
        """The digest that a file with this stamp has, if it is known."""
        if self._folder is None:
            return None
        key, about = _key(path), _about(path, stamp)
        try:
            entry = json.loads(_read_own(self._folder / f"{key}.json"))
            digest = bytes.fromhex(entry["digest"])
            known = entry["about"] == about and entry["check"] == _check(about, digest)
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None
        return digest if known else None

    def put(self, path: Path, stamp: Stamp, digest: bytes) -> bool:
        """Keep a digest; the entry appears whole or not at all. False if it is not kept."""
        if self._folder is None or not stamp.settled:
            return False
        about = _about(path, stamp)
        entry = {"about": about, "digest": digest.hex(), "check": _check(about, digest)}
        target = self._folder / f"{_key(path)}.json"
        part = None
        try:
            with tempfile.NamedTemporaryFile("w", dir=self._folder, prefix=".", suffix=".tmp", delete=False) as stream:
                part = Path(stream.name)
                json.dump(entry, stream)
            part.replace(target)  # mkstemp's mode: nobody else's to read or write
        except OSError as error:
            logger.warning(
                "a digest could not be cached", extra={"fields": {"file": str(target), "why": error.strerror}}
            )
            if part is not None:
                with contextlib.suppress(OSError):
                    part.unlink()
            return False
        return True

    @contextlib.contextmanager
    def alone(self, path: Path) -> Iterator[None]:
        """While another process of this user is in here for the same file, wait: it will leave the digest behind."""
        descriptor = None
        if self._folder is not None:
            with contextlib.suppress(OSError):
                flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
                descriptor = os.open(self._folder / f"{_key(path)}.lock", flags, 0o600)
        try:
            if descriptor is not None:
                _lock(descriptor, path)
            yield
        finally:
            if descriptor is not None:
                os.close(descriptor)  # the lock goes with it, as it does with a process that dies


def _lock(descriptor: int, path: Path) -> None:
    began, told = time.monotonic(), False
    while time.monotonic() - began < WAIT_S:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if not told:
                logger.info("waiting for another process that reads the file", extra={"fields": {"file": str(path)}})
                told = True
            time.sleep(LOOK_S)
        except OSError:  # a file system without locks
            return
    logger.warning("the other process takes too long", extra={"fields": {"file": str(path), "seconds": WAIT_S}})


def _folder_named() -> Path | None:
    """Where the environment wants the digests; None where there is no place for them."""
    if named := os.environ.get(CACHE_FOLDER, "").strip():
        return Path(os.path.abspath(os.path.expanduser(named)), DIGESTS)
    shared = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(shared):  # another is to be ignored, says the standard
        return Path(shared, NAME, DIGESTS)
    home = os.path.expanduser("~")
    return Path(home, ".cache", NAME, DIGESTS) if os.path.isabs(home) else None


def _own_folder(folder: Path | None) -> Path | None:
    """The folder, made if missing; None, with a word in the log, if it cannot be used or is not ours alone.

    It is one of our own making within what is named: a mounted volume's top often belongs to root.
    """
    if folder is None:
        return None
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        why = _not_ours(folder.stat())
    except OSError as error:
        why = error.strerror or str(error)
    if not why:
        return folder
    logger.warning(
        "no cache of digests in %s: %s; the checkpoint is read in full (%s names another folder)",
        folder,
        why,
        CACHE_FOLDER,
    )
    return None


def _not_ours(found: os.stat_result) -> str:
    """Why somebody else could have written there; empty if nobody could."""
    if found.st_uid != os.geteuid():
        return f"it belongs to user {found.st_uid}, and this is user {os.geteuid()}"
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"other users may write to it (mode {stat.S_IMODE(found.st_mode):o})"
    return ""


def _read_own(path: Path) -> bytes:
    """A file's bytes; OSError unless it is a plain file that only we can have written."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as stream:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or _not_ours(found):
            raise PermissionError
        return stream.read(LARGEST_ENTRY)


def _key(path: Path) -> str:
    """The name of a file's entry: of where it really is, so that a hub's snapshots share it."""
    return blake2b(os.fsencode(path.resolve()), digest_size=KEY_BYTES).hexdigest()


def _about(path: Path, stamp: Stamp) -> Mapping[str, Any]:
    return {"version": VERSION, "path": str(path.resolve()), **asdict(stamp)}


def _check(about: Mapping[str, Any], digest: bytes) -> str:
    """A checksum of an entry, against what a damaged disk makes of it."""
    return blake2b(json.dumps(about, sort_keys=True).encode() + digest, digest_size=KEY_BYTES).hexdigest()
