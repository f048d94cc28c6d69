"""The key file of a gateway."""

from __future__ import annotations

from collections.abc import Iterable

from bagel.errors import ConfigError
from bagel.rpc.api_keys import key_line, parse_keys
from bagel.text_files import decode_marked
from tests.fuzz.target import Target

KEYS = ("one", "two")


def check(data: bytes) -> None:
    ring = parse_keys(data, "keys")
    # Said by words alone: each line that is no comment names a key and its digest.
    lines = [line.split() for line in decode_marked(data, "replace").splitlines()]
    told = [words for words in lines if words and not words[0].startswith("#")]
    assert [name for name, _ in ring._entries] == [words[0] for words in told]
    assert [f"sha256:{digest.hex()}" for _, digest in ring._entries] == [w[1][:7] + w[1][7:].lower() for w in told]
    assert all(len(words) == 2 for words in told) and len(set(ring.names)) == len(ring.names)
    for name, known in ((key, ring.name_of(key.encode())) for key in KEYS):
        assert known is None or key_line(known, name).split()[1] in [w[1][:7] + w[1][7:].lower() for w in told]


def seeds() -> Iterable[bytes]:
    lines = "\n".join(key_line(f"caller-{key}", key) for key in KEYS)
    yield lines.encode()
    yield f"# who\r\n\r\n  {lines}  \n".encode("utf-16")
    yield b"\xef\xbb\xbf" + lines.encode()
    yield b"name bagel_secret"


WORDS = (b"sha256:", b"#", b"\xff\xfe", b"\x00\x00\xfe\xff", b"\xc2\x85", b"\x1c")
TARGET = Target(check, (ConfigError,), seeds, words=WORDS)
