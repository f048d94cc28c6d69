"""What the gateway makes of its configuration: TLS towards its callers and towards the services, and their names."""

from __future__ import annotations

from dataclasses import dataclass, replace

from bagel.deployment import serving
from bagel.deployment.gateway_config import GatewayConfig
from bagel.errors import ConfigError
from bagel.rpc.api_keys import is_local
from bagel.rpc.transport import PLAINTEXT, Security


@dataclass(frozen=True)
class Tls:
    """front: of the gateway's own ports; inner: of its calls to the services, each with the name of its certificate."""

    front: Security
    inner: Security
    server_names: dict[str, str]

    def shown(self) -> dict[str, object]:
        """What comes of the settings, for the log."""
        clients = list(self.front.clients) or ("any" if self.front.ca else "not asked")
        return {"tls": self.front.serves_tls, "tls_clients": clients, "tls_to_services": self.inner.encrypted}


def tls_of(config: GatewayConfig) -> Tls:
    """TLS as the configuration says; ConfigError for settings that mean nothing together."""
    front, inner = _front_and_inner(config)
    names = [service.partition("=")[0] for service in (*config.thinkers, *config.dits)]
    return Tls(front, inner, serving.server_names(config, names, tls=inner.encrypted))


def exposes_keys(config: GatewayConfig) -> bool:
    """Whether callers on other machines send their API keys in plaintext."""
    fronts = (address for address in (config.listen, config.http) if address is not None)
    plaintext = config.plaintext_front or config.tls_certificate is None
    return config.api_keys is not None and plaintext and not all(map(is_local, fronts))


def _front_and_inner(config: GatewayConfig) -> tuple[Security, Security]:
    secure = serving.security(config)
    # The allowed clients are the gateway's callers; they say nothing about the services that it calls.
    inner = PLAINTEXT if config.plaintext_services else replace(secure, clients=())
    if config.plaintext_front:
        if not inner.encrypted:
            raise ConfigError("--plaintext-front leaves TLS to the services, and there is none; give --tls-ca")
        if config.tls_any_client or config.tls_allow_clients:
            raise ConfigError(
                "--plaintext-front asks nobody for a certificate; leave out --tls-any-client and the like"
            )
        return PLAINTEXT, inner
    if config.tls_any_client and config.tls_allow_clients:
        raise ConfigError("--tls-any-client and --tls-allow-client exclude each other; give one of them")
    if config.tls_any_client and (config.tls_ca is None or config.plaintext_services):
        raise ConfigError("--tls-any-client leaves --tls-ca to the services, which are not asked; give --tls-ca alone")
    if secure.ca is not None and secure.certificate is None:
        raise ConfigError(
            "--tls-ca alone serves no TLS; give --tls-certificate and --tls-key too, or say --plaintext-front if only "
            "the services speak TLS"
        )
    return (replace(secure, ca=None, clients=()) if config.tls_any_client else secure), inner
