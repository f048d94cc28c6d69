"""What is told of a gateway that gives no description."""

from __future__ import annotations

import asyncio

import pytest

from bagel.client.omni import describe
from bagel.deployment.gateway_config import GatewayConfig
from bagel.errors import NoBackend
from bagel_gateway.server import Gateway


def test_a_gateway_that_waits_for_its_services_runs() -> None:
    async def work() -> None:
        nowhere = ("thinker-0=127.0.0.1:1",), ("dit-0=127.0.0.1:2",)
        gateway = Gateway(GatewayConfig(listen="127.0.0.1:0", thinkers=nowhere[0], dits=nowhere[1]))
        await gateway.start()
        try:
            with pytest.raises(NoBackend, match="runs, but is not ready: it waits for a Thinker or a DiT"):
                await asyncio.to_thread(describe, f"127.0.0.1:{gateway.host.port}", 0.5)
        finally:
            await gateway.close(0)

    asyncio.run(asyncio.wait_for(work(), 30))
