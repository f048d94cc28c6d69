"""TLS of one service: its files, checked before they are used, and who may call it. No torch here."""

from __future__ import annotations

import ssl
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc

from bagel.errors import ConfigError, Forbidden

GATEWAY, THINKER, DIT = "gateway", "thinker", "dit"
"""What the services' certificates name them, as `deploy/dev-ca` makes them."""
_CERTIFICATE, _KEY = b"-----BEGIN CERTIFICATE-----", b"PRIVATE KEY-----"
_ROUNDS = 8
"""More than a handshake has flights."""


@dataclass(frozen=True)
class Security:
    """TLS of one service: PEM files. None of them: plaintext, for loopback and private networks.

    certificate and key are this service's own; ca is what the other side is checked against (and asked for, by a
    server that has one: mutual TLS). trusted_network: nobody else reads what a client sends, so that its API key may go
    over it without TLS. clients: the names of which a caller's certificate must have one; none: any of the CA may call.
    """

    certificate: Path | None = None
    key: Path | None = None
    ca: Path | None = None
    trusted_network: bool = False
    clients: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.key is None):
            raise ConfigError("TLS needs both a certificate and its key; give --tls-certificate and --tls-key")
        if not all(name.strip() for name in self.clients):
            raise ConfigError("--tls-allow-client is empty; give a name that callers' certificates have")
        if self.clients and self.ca is None:
            raise ConfigError("--tls-allow-client needs --tls-ca, the CA whose certificates have those names")

    @property
    def encrypted(self) -> bool:
        """Whether a client speaks TLS."""
        return self.ca is not None or self.certificate is not None

    @property
    def serves_tls(self) -> bool:
        """Whether a server speaks TLS: only one that has a certificate can."""
        return self.certificate is not None

    def channel_credentials(self) -> grpc.ChannelCredentials | None:
        """What a client shows and checks; None for plaintext."""
        if not self.encrypted:
            return None
        self._check_files(serving=False)
        return grpc.ssl_channel_credentials(_read(self.ca), _read(self.key), _read(self.certificate))

    def server_credentials(self) -> grpc.ServerCredentials | None:
        """What a server shows and checks; None for plaintext."""
        self.check_server()
        key, certificate, ca = _read(self.key), _read(self.certificate), _read(self.ca)
        if key is None or certificate is None:
            return None
        return grpc.ssl_server_credentials([(key, certificate)], ca, require_client_auth=ca is not None)

    def check_server(self) -> None:
        """Raise ConfigError for files that a server cannot use, and for a CA alone: its port would be plaintext."""
        if self.ca is not None and self.certificate is None:
            raise ConfigError("--tls-ca alone serves no TLS; give --tls-certificate and --tls-key too")
        self._check_files(serving=True)

    def check_names(self, names: Sequence[str]) -> None:
        """Raise Forbidden for a caller whose certificate has these names, and none that is allowed."""
        allowed = {name.lower() for name in self.clients}
        if allowed and not allowed.intersection(name.lower() for name in names):
            raise Forbidden(
                f"the certificate of this caller is for {', '.join(names) or 'nobody'}; this service takes calls of "
                f"{', '.join(self.clients)} (--tls-allow-client)"
            )

    def _check_files(self, *, serving: bool) -> None:
        if self.certificate is not None and self.key is not None:
            _check_pair(self.certificate, self.key, serving=serving)
        if self.ca is not None:
            _check_ca(self.ca)


PLAINTEXT = Security()


def names_of(shown: Mapping[str, Iterable[bytes]]) -> list[str]:
    """The names of a peer's certificate, of the auth_context of a gRPC call: alternative names and the common name."""
    found = (*shown.get("x509_subject_alternative_name", ()), *shown.get("x509_common_name", ()))
    return list(dict.fromkeys(name.decode("utf-8", "replace") for name in found if name))


def _check_pair(certificate: Path, key: Path, *, serving: bool) -> None:
    """Raise ConfigError, naming the flag, for a certificate and a key that cannot be used together."""
    told, held = _read(certificate), _read(key)
    assert told is not None and held is not None
    if _CERTIFICATE not in told:
        swapped = " but a private key; --tls-certificate and --tls-key are swapped" if _KEY in told else ""
        raise ConfigError(f"--tls-certificate {certificate} holds no PEM certificate{swapped}")
    if _KEY not in held:
        raise ConfigError(f"--tls-key {key} holds no PEM private key")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cafile=certificate)
    except ssl.SSLError as error:
        raise ConfigError(f"--tls-certificate {certificate} is damaged: {_reason(error)}") from None
    try:
        context.load_cert_chain(certificate, key, password=_refuse_password)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise ConfigError(f"--tls-key {key} is not the key of --tls-certificate {certificate}") from None
        raise ConfigError(f"--tls-key {key} is damaged: {_reason(error)}") from None
    except _PasswordAsked:
        raise ConfigError(f"--tls-key {key} is encrypted; give a key without a passphrase") from None
    if why := _refused(certificate, key, serving=serving):
        raise ConfigError(f"--tls-certificate {certificate} cannot be used: {why}")


def _check_ca(path: Path) -> None:
    """Raise ConfigError for a file without a certificate of an authority that is valid now."""
    if _CERTIFICATE not in (_read(path) or b""):
        raise ConfigError(f"--tls-ca {path} holds no PEM certificate")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(cafile=path)
    except ssl.SSLError as error:
        raise ConfigError(f"--tls-ca {path} is damaged: {_reason(error)}") from None
    authorities = context.get_ca_certs()
    if not authorities:
        raise ConfigError(f"--tls-ca {path} holds no certificate of an authority; give the CA's own, not one it signed")
    ends = [str(each["notAfter"]) for each in authorities]
    if all(ssl.cert_time_to_seconds(end) < time.time() for end in ends):
        raise ConfigError(f"--tls-ca {path} has expired on {ends[-1]}; make a new CA and new certificates")


def _refused(certificate: Path, key: Path, *, serving: bool) -> str | None:
    """Why a peer would not take this certificate: expired, not yet valid, not for that purpose. None if it would.

    A handshake with ourselves tells, as Python has no way to read a certificate's dates. Who signed it is not asked.
    """
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname, client.verify_mode = False, ssl.CERT_NONE
    checking = client if serving else server
    checking.verify_mode = ssl.CERT_REQUIRED
    checking.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    checking.load_verify_locations(cafile=certificate)
    for context in (server, client):
        context.load_cert_chain(certificate, key)
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    sides = [client.wrap_bio(down, up), server.wrap_bio(up, down, server_side=True)]
    for side in sides * _ROUNDS:
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            continue
        except ssl.SSLCertVerificationError as error:
            return error.verify_message
    return None


class _PasswordAsked(Exception):
    """OpenSSL wants the passphrase of a key, which nobody is there to type."""


def _refuse_password() -> str:
    raise _PasswordAsked


def _reason(error: ssl.SSLError) -> str:
    return (error.reason or "no PEM").replace("_", " ").lower()


def _read(path: Path | None) -> bytes | None:
    if path is None:
        return None
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"the TLS file {path} cannot be read: {error.strerror}") from None
