"""The single stage: one DiT that has the whole model serves the whole request, a text or a picture."""

from __future__ import annotations

from bagel.rpc import convert
from bagel.v1 import dit_pb2, gateway_pb2
from bagel_gateway.routes.base import Route, without_total


class Whole(Route):
    """Sends a request on as it is, with every setting filled in."""

    async def check(self) -> None:
        """Ask a DiT."""
        request = dit_pb2.DitServiceGenerateRequest(check_only=True)
        async for _ in self._generate(await self._services.dit(), request, self._plan.settings):
            pass

    async def _serve(self) -> gateway_pb2.Finished:
        end = await self._call_dit(dit_pb2.DitServiceGenerateRequest(), self._plan.settings)
        return gateway_pb2.Finished(
            text=end.text,
            token_ids=end.token_ids,
            usage=end.usage,
            timings=convert.timings_to_wire(without_total(end.timings)),
            profile=end.profile,
        )
