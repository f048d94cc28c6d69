"""Digests of weights: every byte counts, each file is read once a host, and no cache is believed that may be wrong."""

from __future__ import annotations

import json
import logging
import os
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bagel.checkpoint import hashing, identity
from bagel.checkpoint.digest_cache import DigestCache, Stamp
from bagel.checkpoint.hashing import content_digest
from bagel.checkpoint.headers import Header, read_header
from bagel.checkpoint.identity import weights_digest
from bagel.errors import CheckpointError

OLD_S = 10
"""Long enough ago that a change of the file would show in its times."""


def stored(path: Path, tensors: dict[str, bytes], **metadata: str) -> Path:
    """A safetensors file of U8 tensors, in the order given, last changed a while ago."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    at = 0
    for name, data in tensors.items():
        header[name] = {"dtype": "U8", "shape": [len(data)], "data_offsets": [at, at + len(data)]}
        at += len(data)
    packed = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(packed)) + packed + b"".join(tensors.values()))
    return aged(path)


def aged(path: Path) -> Path:
    then = time.time() - OLD_S
    os.utime(path, (then, then))
    return path


SOME = {"a": bytes(range(256)) * 40, "b": b"", "c": b"weights" * 3001}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return stored(tmp_path / "ema.safetensors", SOME)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the cache is."""
    monkeypatch.setenv("BAGEL_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "digests"


@pytest.fixture(autouse=True)
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if every file had been there for long: its inode's time cannot be set back."""
    monkeypatch.setattr(Stamp, "settled", property(lambda stamp: True))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Files that are read in full."""
    read: list[Path] = []

    def counted(path: Path) -> bytes:
        read.append(path)
        return content_digest(path)

    monkeypatch.setattr(identity, "content_digest", counted)
    return read


def digest(path: Path) -> bytes:
    return weights_digest(path, DigestCache.of_user()).digest


# -- the digest


@pytest.mark.parametrize("piece", [hashing.PIECE_BYTES, 1000], ids=["whole", "pieces"])
def test_each_byte_counts(file: Path, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashing, "PIECE_BYTES", piece)
    monkeypatch.setattr(hashing, "READ_BYTES", 300)
    data, before = bytearray(file.read_bytes()), content_digest(file)
    start = len(data) - sum(map(len, SOME.values()))
    for at in (start, start + 5000, start + 10239, start + 10240, len(data) // 2, len(data) - 1):
        data[at] ^= 1
        file.write_bytes(data)
        assert content_digest(file) != before, at
        data[at] ^= 1
    file.write_bytes(data)
    assert content_digest(file) == before


def test_names_types_and_shapes_count_and_the_order_does_not(tmp_path: Path) -> None:
    before = content_digest(stored(tmp_path / "a", SOME))
    assert content_digest(stored(tmp_path / "b", dict(reversed(SOME.items())), note="saved again")) == before
    assert content_digest(stored(tmp_path / "c", {"a": SOME["a"], "b": b"", "d": SOME["c"]})) != before
    assert content_digest(stored(tmp_path / "d", {**SOME, "e": b""})) != before
    swapped = (tmp_path / "a").read_bytes().replace(b'"U8"', b'"I8"', 1)
    (tmp_path / "e").write_bytes(swapped)
    assert content_digest(tmp_path / "e") != before


def test_the_digest_is_the_same_on_all_hosts(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the number of cores; and another release must know that it changes this (`VERSION` of the cache)."""
    found = {content_digest(file).hex()}
    for cores in (1, 3, 8):
        monkeypatch.setattr(hashing, "_cores", lambda cores=cores: cores)
        found.add(content_digest(file).hex())
    assert found == {"0017d043afc3dd22d41dd2530133be56"}


# -- the cache


def test_a_file_is_read_once(file: Path, folder: Path, reads: list[Path], tmp_path: Path) -> None:
    first = digest(file)
    link = tmp_path / "snapshot" / "ema.safetensors"
    link.parent.mkdir()
    link.symlink_to(file)  # as in the hub's cache
    assert digest(file) == digest(link) == first
    assert reads == [file]
    kept = {path.suffix: path for path in folder.iterdir()}
    assert kept.keys() == {".json", ".lock"}
    assert folder.stat().st_mode & 0o777 == 0o700 and kept[".json"].stat().st_mode & 0o777 == 0o600


def zero_the_middle(file: Path) -> None:
    """As an attacker or a careless copy would: same size, same times."""
    before = file.stat()
    with file.open("r+b") as stream:
        stream.seek(before.st_size // 2)
        stream.write(bytes(4))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def replace(file: Path) -> None:
    before = file.stat()
    other = file.with_name("other")
    other.write_bytes(file.read_bytes()[:-1] + b"!")
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(file)


@pytest.mark.parametrize(
    "change",
    [zero_the_middle, replace, lambda file: aged(file).write_bytes(file.read_bytes()[:-1] + b"?")],
    ids=["in-place-same-times", "replaced-same-times", "written-anew"],
)
def test_a_changed_file_is_read_again(
    file: Path, folder: Path, reads: list[Path], change: Callable[[Path], None]
) -> None:
    before = digest(file)
    change(file)
    assert digest(file) != before
    assert len(reads) == 2


def pipe(entry: Path) -> None:
    entry.unlink()
    os.mkfifo(entry)


@pytest.mark.parametrize(
    "harm",
    [
        lambda entry: entry.write_bytes(b""),
        lambda entry: entry.write_bytes(b"\xff" * 100),
        lambda entry: entry.write_bytes(b"[" * 60_000),
        lambda entry: entry.write_text("7"),
        lambda entry: entry.write_text('{"digest": 7, "about": {}}'),
        lambda entry: entry.write_text(entry.read_text().replace('"digest": "', '"digest": "00', 1)),
        lambda entry: entry.chmod(0o666),
        lambda entry: (entry.rename(entry.with_name("away")), entry.symlink_to(entry.with_name("away"))),
        lambda entry: (entry.unlink(), entry.mkdir()),
        pipe,
    ],
    ids="empty bytes deep number fields digest writable link folder pipe".split(),
)
def test_a_damaged_entry_is_not_believed(
    file: Path, folder: Path, reads: list[Path], harm: Callable[[Path], object]
) -> None:
    before = digest(file)
    [entry] = folder.glob("*.json")
    harm(entry)
    assert digest(file) == before
    assert len(reads) == 2


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("what", ["folder", "entry"])
def test_what_another_user_left_is_not_believed(file: Path, folder: Path, reads: list[Path], what: str) -> None:
    before = digest(file)
    os.chown(folder if what == "folder" else next(folder.glob("*.json")), 12345, 12345)
    assert digest(file) == before
    assert len(reads) == 2


def test_a_folder_that_others_may_write_to_is_not_used(
    file: Path, folder: Path, reads: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    assert digest(file) == digest(file)
    assert len(reads) == 2 and not list(folder.iterdir())
    assert "other users may write to it" in caplog.text and "BAGEL_CACHE_DIR" in caplog.text


@pytest.mark.parametrize("place", ["/proc/nowhere", "/dev/null/x", "a file"])
def test_a_cache_that_cannot_be_used_costs_time_alone(
    place: str, file: Path, reads: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a file").write_text("")
    monkeypatch.setenv("BAGEL_CACHE_DIR", place if place.startswith("/") else str(tmp_path / place))
    assert digest(file) == digest(file) == content_digest(file)
    assert len(reads) == 2


def test_the_folder_follows_the_environment(tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BAGEL_CACHE_DIR")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be ignored, says the standard
    digest(file)
    assert list((tmp_path / "home/.cache/bagel-serving/digests").glob("*.json"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    digest(file)
    assert list((tmp_path / "xdg/bagel-serving/digests").glob("*.json"))


def test_a_file_that_was_just_written_is_not_cached(
    file: Path, folder: Path, reads: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It could change again within the tick of its file system's clock, and would look the same."""
    monkeypatch.undo()
    stamp = Stamp.of(file)
    assert stamp is not None
    assert not Stamp(stamp.size, time.time_ns(), stamp.ctime_ns, stamp.inode).settled
    assert not Stamp(stamp.size, time.time_ns() // 10**9 * 10**9, 0, stamp.inode).settled
    assert Stamp(stamp.size, time.time_ns() - 10**9 + 1, 0, stamp.inode).settled


def test_a_file_that_changes_while_it_is_read_is_refused(
    file: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def written_to(path: Path) -> bytes:
        found = content_digest(path)
        zero_the_middle(path)
        return found

    monkeypatch.setattr(identity, "content_digest", written_to)
    with pytest.raises(CheckpointError, match=r"ema\.safetensors changed while it was read"):
        digest(file)
    assert not list(folder.glob("*.json"))

    monkeypatch.setattr(identity, "content_digest", content_digest)

    def then_cut(path: Path) -> Header:
        header = read_header(path)
        os.truncate(path, 4096)
        return header

    monkeypatch.setattr(hashing, "read_header", then_cut)
    with pytest.raises(CheckpointError, match=r"ema\.safetensors became shorter while it was read"):
        digest(file)


SLOW = """
import sys, time
from pathlib import Path
from bagel.checkpoint import digest_cache
from bagel.checkpoint import identity
digest_cache.Stamp.settled = property(lambda stamp: True)
read = identity.content_digest
def slowly(path):
    print("reads", flush=True)
    time.sleep(1.0)
    return read(path)
identity.content_digest = slowly
found = identity.weights_digest(Path(sys.argv[1]), digest_cache.DigestCache.of_user())
print(found.digest.hex(), flush=True)
"""


def test_of_services_that_start_together_one_reads(file: Path, folder: Path) -> None:
    several = [
        subprocess.Popen([sys.executable, "-c", SLOW, str(file)], stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    said = "".join(process.communicate(timeout=60)[0] for process in several).split()
    assert said.count("reads") == 1
    assert said.count(content_digest(file).hex()) == 3


def test_one_that_dies_while_it_reads_holds_nobody_up(file: Path, folder: Path) -> None:
    reader = subprocess.Popen([sys.executable, "-c", SLOW, str(file)], stdout=subprocess.PIPE, text=True)
    assert reader.stdout is not None and reader.stdout.readline() == "reads\n"
    reader.kill()
    reader.wait()
    reader.stdout.close()
    assert digest(file) == content_digest(file)


def test_the_log_says_what_was_read(file: Path, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from bagel.checkpoint.config import BAGEL_7B_MOT

    (tmp_path / "merges.txt").write_text("a b\n")
    with caplog.at_level(logging.INFO):
        first = identity.identify(tmp_path, BAGEL_7B_MOT, [file.name], ["merges.txt", "vocab.json"])
        again = identity.identify(tmp_path, BAGEL_7B_MOT, [file.name], ["merges.txt", "vocab.json"])
    assert first.fingerprint == again.fingerprint
    one, two = (record.fields for record in caplog.records if hasattr(record, "fields"))
    size = file.stat().st_size
    assert (one["bytes"], one["bytes_read"], one["cached"]) == (size + 4, size + 4, [])
    assert (two["bytes_read"], two["cached"]) == (4, [file.name])
    assert one["fingerprint"] == first.fingerprint.hex() and one["seconds"] >= 0
