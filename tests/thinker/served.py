"""A Thinker's server around an engine of the test's own process."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from bagel.images.pool import ImagePool
from bagel.rpc.admission import Admission
from bagel.rpc.errors import from_rpc_error
from bagel.rpc.transport import Host, channel
from bagel.v1 import common_pb2, thinker_pb2
from bagel.v1.thinker_pb2_grpc import ThinkerServiceStub, add_ThinkerServiceServicer_to_server
from bagel_thinker.server import ThinkerServicer
from bagel_thinker.torch_engine import TorchEngine

LIMIT_S = 30
PLACES = 4


def build(text: str = "a red cup", max_tokens: int = 3, *, kv: bool = True) -> thinker_pb2.BuildContextRequest:
    settings = common_pb2.TextSettings(max_tokens=max_tokens)
    decode = thinker_pb2.DecodeText(settings=settings, append=kv)
    part = common_pb2.Part(text=common_pb2.TextPart(text=text))
    return thinker_pb2.BuildContextRequest(parts=[part], decode=decode, send_kv=kv)


class Served:
    """An engine behind a Thinker's server."""

    def __init__(self, engine: TorchEngine, host: Host, target: str, stub: Any, health: Any) -> None:
        self.engine, self.host, self.target, self.stub, self._health = engine, host, target, stub, health

    async def text(self, request: thinker_pb2.BuildContextRequest) -> str:
        """The text that is written; raises what the call ends with."""
        try:
            events = [event async for event in self.stub.BuildContext(request, timeout=LIMIT_S)]
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error, "thinker") from None
        assert isinstance(events[-1], thinker_pb2.BuildContextResponse)
        return events[-1].built.text

    async def health(self) -> int:
        return int((await self._health.Check(health_pb2.HealthCheckRequest())).status)


def served(engine: TorchEngine, test: Callable[[Served], Awaitable[None]]) -> None:
    """Run a test with a Thinker's server."""

    async def main() -> None:
        host = Host("127.0.0.1:0", ["bagel.v1.ThinkerService"])
        admission, pool = Admission("thinker", PLACES, 5.0), ImagePool(2)
        servicer = ThinkerServicer(engine, "thinker", admission, pool, lease_s=5, room_wait_s=1, draining=host.draining)
        add_ThinkerServiceServicer_to_server(servicer, host.methods)
        await host.start()
        await host.ready()
        target = f"127.0.0.1:{host.port}"
        try:
            async with asyncio.timeout(LIMIT_S), channel(target) as connection:
                stub, health = ThinkerServiceStub(connection), health_pb2_grpc.HealthStub(connection)
                await test(Served(engine, host, target, stub, health))
        finally:
            await host.server.stop(None)
            await pool.close()

    asyncio.run(main())
