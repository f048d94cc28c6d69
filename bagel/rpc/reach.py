"""Why an address cannot be listened on, or a service cannot be reached: the cause in a few words."""

from __future__ import annotations

import errno
import socket
import ssl
from contextlib import suppress

from bagel.errors import BagelError, ConfigError, SourceUnavailable
from bagel.rpc.security import CA, CERTIFICATE, KEY, Security

PATIENCE_S = 3.0
_BUSY = {
    errno.EADDRINUSE: "it is in use: another program, or another gateway, listens there",
    errno.EADDRNOTAVAIL: "this machine has no such address",
    errno.EACCES: "this user may not listen on it",
}
_UNTRUSTED = {2, 18, 19, 20, 21}
"""OpenSSL's codes for a certificate that no authority of ours has signed."""


def split(address: str) -> tuple[str, int]:
    """Host and port of HOST:PORT; an IPv6 host without its brackets."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def why_not_free(address: str) -> str:
    """Why nothing can listen on HOST:PORT; empty if something can, as on port 0."""
    host, port = split(address)
    try:
        [(family, kind, protocol, _, where), *_] = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        with socket.socket(family, kind, protocol) as trial:
            # As servers do: a port whose last connections have just ended counts as free.
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind(where)
            trial.listen(1)  # on some systems only this fails where another listens
    except (OSError, OverflowError) as error:
        number = error.errno if isinstance(error, OSError) else None
        return _BUSY.get(number or 0, getattr(error, "strerror", None) or str(error))
    return ""


def check_free(address: str, flags: str) -> None:
    """Raise ConfigError, naming the flags that set it, for an address that cannot be listened on."""
    if why := why_not_free(address):
        raise ConfigError(f"{address} cannot be listened on: {why}; choose another with {flags}")


def unreachable(what: str, address: str, security: Security, timeout_s: float = PATIENCE_S) -> BagelError:
    """The error that says why a call to a service found none. what: what is expected there, like "gateway".

    A ConfigError where the caller's TLS settings do not fit to the service's, else SourceUnavailable.
    """
    where = f"the {what} at {address}"
    try:
        tls = _speaks_tls(address, timeout_s)
        if tls and not security.encrypted:
            return ConfigError(f"{where} speaks TLS; give {CA}, the CA that its certificate is of", CA)
        if not tls and security.encrypted:
            settings = CA if security.ca is not None else f"{CERTIFICATE} and {KEY}"
            return ConfigError(f"{where} speaks no TLS; leave {settings} out", CA, CERTIFICATE, KEY)
        if tls and (why := _why_no_handshake(address, security, timeout_s)):
            return ConfigError(f"{where} and this side do not agree on TLS: {why}", CA, CERTIFICATE, KEY)
    except ConnectionRefusedError:
        how = "; start one with bagel serve" if what == "gateway" else ""
        return SourceUnavailable(f"no {what} answers at {address}: nothing listens there{how}")
    except OSError as error:
        why = "no answer" if isinstance(error, TimeoutError) else error.strerror or str(error)
        return SourceUnavailable(
            f"no {what} answers at {address}: {why}; check the address, and that it can be reached"
        )
    return SourceUnavailable(f"{where} listens, but does not answer in time; its log says what it does")


def _speaks_tls(address: str, timeout_s: float) -> bool:
    """Whether a TLS handshake is understood there, whatever the certificates are."""
    with socket.create_connection(split(address), timeout_s) as plain:
        try:
            with _context().wrap_socket(plain):
                return True
        except ssl.SSLError as error:
            return "ALERT" in (error.reason or "")  # only TLS sends one
        except OSError:  # what is no TLS waits for more, or hangs up
            return False


def _why_no_handshake(address: str, security: Security, timeout_s: float) -> str:
    """Why a handshake with our certificates fails; empty if it does not."""
    host, port = split(address)
    # The host's name is compared below, so that the message can list the names that would do.
    context = ssl.create_default_context(cafile=security.ca)
    context.check_hostname = False
    context.set_alpn_protocols(["h2"])
    if security.certificate is not None:
        context.load_cert_chain(security.certificate, security.key)
    with socket.create_connection((host, port), timeout_s) as plain:
        try:
            with context.wrap_socket(plain, server_hostname=host) as secure:
                names = [str(pair[1]) for pair in (secure.getpeercert() or {}).get("subjectAltName", ())]
                with suppress(TimeoutError):
                    if not secure.recv(1):  # a server that wants another certificate of us hangs up, or says so, now
                        return _refused(security)
        except ssl.SSLCertVerificationError as error:
            if error.verify_code in _UNTRUSTED:
                return f"its certificate is not of {CA} {security.ca or '(the system has no such CA)'}"
            return f"its certificate cannot be used: {error.verify_message}"
        except ssl.SSLError:
            return _refused(security)
    if names and not _named(host, names):
        return f"its certificate is for {', '.join(names)}, not for {host}; call it by that name"
    return ""


def _refused(security: Security) -> str:
    if security.certificate is None:
        return f"it asks for our certificate; give {CERTIFICATE} and {KEY}"
    return f"it does not take {CERTIFICATE} {security.certificate}; give one that its own CA has signed"


def _context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    return context


def _named(host: str, names: list[str]) -> bool:
    """Whether a certificate for these names is one for a host; a star stands for one label."""
    _, _, rest = host.lower().partition(".")
    return any(name.lower() in (host.lower(), f"*.{rest}") for name in names)
