"""API keys: how they look, the file that a gateway knows them by, and how a caller shows one. No torch here.

A key is 256 random bits, so that its plain SHA-256 tells nothing of it; slow, salted hashes are for passwords, which
can be guessed. The file holds `NAME sha256:HEX` lines, never a key.
"""

from __future__ import annotations

import hmac
import os
import re
import secrets
import stat
from collections.abc import Iterable
from hashlib import sha256
from ipaddress import ip_address
from pathlib import Path

from bagel.errors import ConfigError, Unauthenticated
from bagel.rpc.transport import Security
from bagel.text_files import decode_marked

PREFIX = "bagel_"
"""Tells people, and scanners of leaked secrets, what it is."""
KEY_BYTES = 32
AUTHORIZATION = "authorization"
"""The gRPC metadata key and HTTP header that carries `Bearer KEY`."""
_LINE = re.compile(r"(?P<name>\S+)\s+sha256:(?P<digest>[0-9a-fA-F]{64})")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_TOKEN = re.compile(r"[!-~]+")


def new_key() -> str:
    """A fresh random key of 256 bits."""
    return PREFIX + secrets.token_urlsafe(KEY_BYTES)


def key_line(name: str, key: str) -> str:
    """The line of a key file that makes a key known under a name; ConfigError for a name that cannot be one."""
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{name!r:.80} is no name of a key; use up to 64 letters, digits, '.', '_' and '-', a letter or digit first"
        )
    return f"{name} sha256:{_digest(key.encode()).hex()}"


class KeyRing:
    """The keys that a gateway knows, as (name, digest)."""

    def __init__(self, entries: Iterable[tuple[str, bytes]]) -> None:
        self._entries = tuple(entries)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self._entries)

    def name_of(self, key: bytes) -> str | None:
        """The name of a key, None for an unknown one; how long it takes does not depend on which it is."""
        digest, found = _digest(key), None
        # No early exit: the time must not say which key it is.
        for name, known in self._entries:
            if hmac.compare_digest(digest, known):
                found = name
        return found

    def check(self, authorizations: Iterable[str | bytes]) -> str:
        """The name of the key in a call's authorization values; Unauthenticated unless there is one that is known."""
        given = [value.encode() if isinstance(value, str) else value for value in authorizations]
        scheme, _, key = given[0].strip().partition(b" ") if len(given) == 1 else (b"", b"", b"")
        if scheme.lower() != b"bearer" or not key.strip():
            raise Unauthenticated(
                "an API key is needed here; send `authorization: Bearer KEY` "
                "(bagel: --api-key-file or BAGEL_API_KEY; OpenAI's client: api_key)"
            )
        if (name := self.name_of(key.strip())) is None:
            raise Unauthenticated("this API key is not known here, or no longer; ask whoever runs this gateway for one")
        return name


def read_keys(path: Path) -> tuple[KeyRing, bytes]:
    """The keys of a file, and its bytes; ConfigError for a file that is missing, malformed, empty or not safe.

    Others may read it, as nothing in it opens anything; anybody who can write it can add a key.
    """
    try:
        with path.open("rb") as file:
            # The mode of the open file, not of its path, which may name another file by now.
            mode, data = os.fstat(file.fileno()).st_mode, file.read()
    except OSError as error:
        raise ConfigError(f"the API keys {str(path)!r} cannot be read: {error.strerror}") from None
    if mode & stat.S_IWOTH:
        raise ConfigError(f"anyone on this machine can write the API keys {str(path)!r}; chmod o-w it")
    return parse_keys(data, str(path)), data


def parse_keys(data: bytes, source: str) -> KeyRing:
    """The keys of a file's bytes; ConfigError, naming the line, for what it cannot hold."""
    entries: dict[str, bytes] = {}
    for number, line in enumerate(decode_marked(data, "replace").splitlines(), 1):
        if not (text := line.strip()) or text.startswith("#"):
            continue
        match = _LINE.fullmatch(text)
        if match is None or not _NAME.fullmatch(match["name"]):
            # Without what is there: it may be a key.
            raise ConfigError(f"{source}: line {number} is not NAME sha256:HEX; bagel keys new NAME prints one that is")
        name, digest = match["name"], bytes.fromhex(match["digest"])
        if name in entries:
            raise ConfigError(f"{source}: line {number}: there is a key called {name} already; give each its own name")
        if digest in entries.values():
            raise ConfigError(f"{source}: line {number}: the key of {name} is another name's too; make one for each")
        entries[name] = digest
    if not entries:
        raise ConfigError(f"{source} holds no key, so nobody could call; add a line of bagel keys new NAME")
    return KeyRing(entries.items())


def key_metadata(key: str | None, target: str, security: Security) -> tuple[tuple[str, str], ...]:
    """Metadata that shows a key to the gateway at `target`; none without a key.

    Raises ConfigError for what is no key, and where others could read it on its way.
    """
    if key is None:
        return ()
    if not _TOKEN.fullmatch(key):
        raise ConfigError("the API key is no single word of ASCII characters; give one as bagel keys new printed it")
    if not (security.encrypted or security.trusted_network or is_local(target)):
        raise ConfigError(
            f"the API key would go to {target} without TLS, for others to read; give --tls-ca, or say --trusted-network"
        )
    return ((AUTHORIZATION, f"Bearer {key}"),)


def is_local(target: str) -> bool:
    """Whether what is sent to a target stays on this machine."""
    host = target.rpartition(":")[0].strip("[]")
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return target.startswith("unix:")


def _digest(key: bytes) -> bytes:
    return sha256(key).digest()
