"""`python -m bagel_gateway`: run a gateway until SIGTERM."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from bagel.deployment.gateway_config import GatewayConfig
from bagel.rpc import service
from bagel.rpc.heap import keep_loaded
from bagel.telemetry.logs import Log
from bagel_gateway.server import Gateway
from bagel_gateway.settings import exposes_keys

log = Log("bagel_gateway")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the service until SIGTERM; the process's exit code."""
    return service.run(lambda: GatewayConfig.read(argv), _serve, "gateway")


async def _serve(config: GatewayConfig) -> None:
    gateway = Gateway(config)
    # After everything is made and before anything is served: what is there now stays.
    keep_loaded()
    await gateway.start()
    await gateway.images.start()
    service.announce(gateway.host, config.listen, gateway.rest.address if gateway.rest is not None else None)
    log.info("configuration", **config.shown(), **gateway.tls.shown())
    if exposes_keys(config):
        log.warning("API keys come in plaintext", remedy="--tls-certificate and --tls-key, or TLS before this gateway")
    announcing = asyncio.create_task(_announce_ready(gateway))
    await gateway.until_stopped()
    announcing.cancel()


async def _announce_ready(gateway: Gateway) -> None:
    """Say on stdout that the gateway is ready: the process that started it may have no certificate to ask with."""
    await gateway.was_ready.wait()
    service.announce_ready()


if __name__ == "__main__":
    service.leave(main())
