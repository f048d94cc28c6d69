"""TLS of one service: its files, which are checked before use, and the callers that it accepts. No torch here."""

from __future__ import annotations

import ssl
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc

from bagel.errors import ConfigError, Forbidden

StrPath = str | Path
GATEWAY, THINKER, DIT = "gateway", "thinker", "dit"
"""The names in the services' certificates, as `deploy/dev-ca` makes them."""
CERTIFICATE, KEY, CA, ALLOWED = "tls_certificate", "tls_key", "tls_ca", "tls_allow_client"
_CERTIFICATE, _KEY = b"-----BEGIN CERTIFICATE-----", b"PRIVATE KEY-----"
_ROUNDS = 8  # a handshake has fewer flights


@dataclass(frozen=True)
class Security:
    """TLS of one service, as PEM files. Without any it is plaintext, for loopback and private networks.

    certificate, key: this service's own; ca: checks the other side's certificate, which a server then also demands
    (mutual TLS). trusted_network: nobody else can read the traffic, so a client may send its API key without TLS.
    clients: a caller's certificate must have one of these names; empty: every certificate of the CA may call.
    """

    certificate: StrPath | None = None
    key: StrPath | None = None
    ca: StrPath | None = None
    trusted_network: bool = False
    clients: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("certificate", "key", "ca"):
            if (given := getattr(self, name)) is not None:
                # The dataclass is frozen.
                object.__setattr__(self, name, Path(given))
        if (self.certificate is None) != (self.key is None):
            raise ConfigError(
                f"TLS needs both a certificate and its key; give {CERTIFICATE} and {KEY}", CERTIFICATE, KEY
            )
        if not all(name.strip() for name in self.clients):
            raise ConfigError(f"{ALLOWED} is empty; give a name that callers' certificates have", ALLOWED)
        if self.clients and self.ca is None:
            raise ConfigError(f"{ALLOWED} needs {CA}, the CA whose certificates have those names", ALLOWED, CA)

    @property
    def encrypted(self) -> bool:
        """Whether a client speaks TLS."""
        return self.ca is not None or self.certificate is not None

    @property
    def serves_tls(self) -> bool:
        """Whether a server speaks TLS: only one that has a certificate can."""
        return self.certificate is not None

    def channel_credentials(self) -> grpc.ChannelCredentials | None:
        """A client's credentials; None for plaintext."""
        if not self.encrypted:
            return None
        self._check_files(serving=False)
        return grpc.ssl_channel_credentials(_read(self.ca), _read(self.key), _read(self.certificate))

    def server_credentials(self) -> grpc.ServerCredentials | None:
        """A server's credentials; None for plaintext."""
        self.check_server()
        key, certificate, ca = _read(self.key), _read(self.certificate), _read(self.ca)
        if key is None or certificate is None:
            return None
        return grpc.ssl_server_credentials([(key, certificate)], ca, require_client_auth=ca is not None)

    def check_server(self) -> None:
        """Raise ConfigError for files that a server cannot use."""
        if self.ca is not None and self.certificate is None:  # the port would be plaintext, against the user's wish
            raise ConfigError(f"{CA} alone serves no TLS; give {CERTIFICATE} and {KEY} too", CA, CERTIFICATE, KEY)
        self._check_files(serving=True)

    def check_names(self, names: Sequence[str]) -> None:
        """Raise Forbidden if none of the names in a caller's certificate is allowed."""
        allowed = {name.lower() for name in self.clients}
        if allowed and not allowed.intersection(name.lower() for name in names):
            raise Forbidden(
                f"the certificate of this caller is for {', '.join(names) or 'nobody'}; this service takes calls of "
                f"{', '.join(self.clients)} (its {ALLOWED})"
            )

    def _check_files(self, *, serving: bool) -> None:
        if self.certificate is not None and self.key is not None:
            _check_pair(self.certificate, self.key, serving=serving)
        if self.ca is not None:
            _check_ca(self.ca)


PLAINTEXT = Security()


def names_of(shown: Mapping[str, Iterable[bytes]]) -> list[str]:
    """The names in a peer's certificate, from a gRPC call's auth_context: alternative names and the common name."""
    found = (*shown.get("x509_subject_alternative_name", ()), *shown.get("x509_common_name", ()))
    return list(dict.fromkeys(name.decode("utf-8", "replace") for name in found if name))


def _check_pair(certificate: StrPath, key: StrPath, *, serving: bool) -> None:
    """Raise ConfigError, naming the setting, for a certificate and a key that cannot be used together."""
    public, private = _read(certificate, CERTIFICATE), _read(key, KEY)
    assert public is not None and private is not None
    if _CERTIFICATE not in public:
        swapped = f" but a private key; {CERTIFICATE} and {KEY} are swapped" if _KEY in public else ""
        raise ConfigError(f"{CERTIFICATE} {certificate} holds no PEM certificate{swapped}", CERTIFICATE, KEY)
    if _KEY not in private:
        raise ConfigError(f"{KEY} {key} holds no PEM private key", KEY)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # Read by itself first, so that the key is not blamed for a damaged certificate.
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cafile=certificate)
    except ssl.SSLError as error:
        raise ConfigError(f"{CERTIFICATE} {certificate} is damaged: {_reason(error)}", CERTIFICATE) from None
    try:
        # OpenSSL would ask for a passphrase on the terminal otherwise.
        context.load_cert_chain(certificate, key, password=_refuse_password)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            message = f"{KEY} {key} is not the key of {CERTIFICATE} {certificate}"
            raise ConfigError(message, KEY, CERTIFICATE) from None
        raise ConfigError(f"{KEY} {key} is damaged: {_reason(error)}", KEY) from None
    except _PasswordAsked:
        raise ConfigError(f"{KEY} {key} is encrypted; give a key without a passphrase", KEY) from None
    if why := _refused(certificate, key, serving=serving):
        raise ConfigError(f"{CERTIFICATE} {certificate} cannot be used: {why}", CERTIFICATE)


def _check_ca(path: StrPath) -> None:
    """Raise ConfigError for a file without the certificate of an authority that is valid now."""
    if _CERTIFICATE not in (_read(path, CA) or b""):
        raise ConfigError(f"{CA} {path} holds no PEM certificate", CA)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(cafile=path)
    except ssl.SSLError as error:
        raise ConfigError(f"{CA} {path} is damaged: {_reason(error)}", CA) from None
    authorities = context.get_ca_certs()
    if not authorities:
        message = f"{CA} {path} holds no certificate of an authority; give the CA's own, not one it signed"
        raise ConfigError(message, CA)
    ends = [str(each["notAfter"]) for each in authorities]
    if all(ssl.cert_time_to_seconds(end) < time.time() for end in ends):
        raise ConfigError(f"{CA} {path} has expired on {ends[-1]}; make a new CA and new certificates", CA)


def _refused(certificate: StrPath, key: StrPath, *, serving: bool) -> str | None:
    """Why a peer would refuse this certificate: expired, not yet valid, not for this purpose. None if it would not."""
    # A handshake with ourselves, since Python cannot read a certificate's dates. It does not check who signed it.
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname, client.verify_mode = False, ssl.CERT_NONE
    checking = client if serving else server
    checking.verify_mode = ssl.CERT_REQUIRED
    # The certificate itself is trusted here, as its authority may be in no file of ours.
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
    """OpenSSL asks for the passphrase of a key, which a service cannot type."""


def _refuse_password() -> str:
    raise _PasswordAsked


def _reason(error: ssl.SSLError) -> str:
    return (error.reason or "it is no PEM").replace("_", " ").lower().replace("pem", "PEM")


def _read(path: StrPath | None, setting: str = "TLS file") -> bytes | None:
    if path is None:
        return None
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{setting} {path} cannot be read: {error.strerror}", setting) from None
