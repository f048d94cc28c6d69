"""Cache the digests of large files in a folder of the user, so that the services of a host read each file once.

An entry is valid while the file's path, size, times and inode are unchanged. The cache trusts nothing that another user
could have written; an unusable folder costs only the time to read the files again.
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
"""Environment variable with the cache's folder; by default bagel-serving in XDG_CACHE_HOME, else in ~/.cache."""
NAME, DIGESTS = "bagel-serving", "digests"
KEY_BYTES = 16
VERSION = 1
"""Version of the entries and of the digests' computation."""
LARGEST_ENTRY = 2**16
WAIT_S = 600.0
"""How long to wait for another process that reads the same file, before reading it too."""
LOOK_S = 0.05
FRESH_NS, FRESH_COARSE_NS = 100 * 10**6, 2 * 10**9
"""Age below which a file could change again and keep its times: file systems count in ticks, some in seconds."""


@dataclass(frozen=True)
class Stamp:
    """The properties that change whenever a file does. A user can set mtime back, but not ctime."""

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int

    @classmethod
    def of(cls, path: Path) -> Stamp | None:
        """The stamp of a file, links followed; None if there is no file."""
        try:
            found = path.stat()
        except OSError:
            return None
        return cls(found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)

    @property
    def settled(self) -> bool:
        """Whether any later change of the file would give another stamp."""
        latest = max(self.mtime_ns, self.ctime_ns)
        # A time in whole seconds suggests a file system that stores nothing finer.
        tick = FRESH_COARSE_NS if latest % 10**9 == 0 else FRESH_NS
        return time.time_ns() - latest > tick


class DigestCache:
    """The cache of one user. Its methods never fail: an entry that cannot be read or written counts as absent."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    @classmethod
    def of_user(cls) -> DigestCache:
        """The cache in the folder that the environment names; makes the folder if it is missing."""
        return cls(_own_folder(_folder_named()))

    def get(self, path: Path, stamp: Stamp) -> bytes | None:
        """The digest of the file with this stamp; None if it is unknown."""
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
        """Store a digest; the entry appears whole or not at all. Returns False if it was not stored."""
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
            part.replace(target)  # keeps the mode of the temporary file, which other users can neither read nor write
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
        """Let one process of this user at a time read a file: the others wait, then find its digest in the cache."""
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
                os.close(descriptor)  # releases the lock, as the death of a process does


def _lock(descriptor: int, path: Path) -> None:
    """Wait for the lock of a file, at most WAIT_S."""
    began, logged = time.monotonic(), False
    while time.monotonic() - began < WAIT_S:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if not logged:
                logger.info("waiting for another process that reads the file", extra={"fields": {"file": str(path)}})
                logged = True
            time.sleep(LOOK_S)
        except OSError:  # a file system without locks: two processes may then read the file, which only costs time
            return
    logger.warning("the other process takes too long", extra={"fields": {"file": str(path), "seconds": WAIT_S}})


def _folder_named() -> Path | None:
    """The folder that the environment names for the digests; None if there is no place for them."""
    if named := os.environ.get(CACHE_FOLDER, "").strip():
        return Path(os.path.abspath(os.path.expanduser(named)), DIGESTS)
    shared = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(shared):  # the XDG standard says to ignore a relative path
        return Path(shared, NAME, DIGESTS)
    home = os.path.expanduser("~")
    return Path(home, ".cache", NAME, DIGESTS) if os.path.isabs(home) else None


def _own_folder(folder: Path | None) -> Path | None:
    """Make the folder if it is missing; None, with a warning in the log, if it is unusable or not ours alone."""
    if folder is None:
        return None
    try:
        # Always a subfolder of the named one, since the top of a mounted volume often belongs to root.
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
    """Why another user could have written there; empty if none could."""
    if found.st_uid != os.geteuid():
        return f"it belongs to user {found.st_uid}, and this is user {os.geteuid()}"
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"other users may write to it (mode {stat.S_IMODE(found.st_mode):o})"
    return ""


def _read_own(path: Path) -> bytes:
    """A file's bytes; OSError unless it is a regular file that only we can have written."""
    # NOFOLLOW and NONBLOCK: another user's link must lead nowhere, and a pipe must not hang us.
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as stream:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or _not_ours(found):
            raise PermissionError
        return stream.read(LARGEST_ENTRY)


def _key(path: Path) -> str:
    """The name of a file's entry, by its resolved path: snapshots of the hub link to one file and share its entry."""
    return blake2b(os.fsencode(path.resolve()), digest_size=KEY_BYTES).hexdigest()


def _about(path: Path, stamp: Stamp) -> Mapping[str, Any]:
    return {"version": VERSION, "path": str(path.resolve()), **asdict(stamp)}


def _check(about: Mapping[str, Any], digest: bytes) -> str:
    """The checksum of an entry, which reveals a damaged disk."""
    return blake2b(json.dumps(about, sort_keys=True).encode() + digest, digest_size=KEY_BYTES).hexdigest()
