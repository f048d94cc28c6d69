"""grpc.health.v1: what a service says of itself. No torch here.

The servicer of grpcio-health-checking holds a lock while it writes to a watcher, so one that does not read would stop
every other and the service's own change of state; and it remembers each unknown name that was ever watched.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # that package is untyped
    """The state of some services, NOT_SERVING at first; each watcher is written to by itself."""

    def __init__(self, services: Iterable[str]) -> None:
        self._status = dict.fromkeys(("", *services), NOT_SERVING)
        self._changed = asyncio.Event()
        self._ending = False

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Any) -> health_pb2.HealthCheckResponse:
        """The state of one service; NOT_FOUND for one that is not served here."""
        if request.service not in self._status:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no service of that name is here")
        return health_pb2.HealthCheckResponse(status=self._status[request.service])

    async def List(self, request: health_pb2.HealthListRequest, context: Any) -> health_pb2.HealthListResponse:
        """The state of every service."""
        statuses = {name: health_pb2.HealthCheckResponse(status=status) for name, status in self._status.items()}
        return health_pb2.HealthListResponse(statuses=statuses)

    async def Watch(
        self, request: health_pb2.HealthCheckRequest, context: Any
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        """The state now, and again whenever it has changed; states between two readings are left out."""
        sent: int | None = None
        while True:
            # The event is taken together with the state: a change after this sets that very event.
            changed, status = self._changed, self._status.get(request.service, _UNKNOWN)
            if status == sent:
                await changed.wait()
                continue
            yield health_pb2.HealthCheckResponse(status=status)
            sent = status

    def set(self, status: int) -> None:
        """The state of all services from now on, unless they are ending."""
        if self._ending:
            return
        self._status = dict.fromkeys(self._status, status)
        self._changed.set()
        # The next change has an event of its own; watchers that wait have the one that is set.
        self._changed = asyncio.Event()

    def end(self) -> None:
        """NOT_SERVING for good."""
        self.set(NOT_SERVING)
        self._ending = True
