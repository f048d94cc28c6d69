"""The client of a running gateway for asyncio. No torch here."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from types import TracebackType
from typing import Any, Self

import grpc

from bagel.client.base import ClientBase
from bagel.client.busy_retry import BusyRetry
from bagel.client.calls import MANY, Call, OnServiceEvent, PromptInput, call_of, check_at_once, listed, refuse_unheard
from bagel.client.responses import GENERATE
from bagel.events import Result, ServiceEvent
from bagel.rpc.transport import PLAINTEXT, Security, channel
from bagel.v1 import gateway_pb2, gateway_pb2_grpc

AsyncEvents = AsyncGenerator[ServiceEvent, None]


class AsyncClient(ClientBase[AsyncEvents]):
    """As Client, for asyncio; to be made inside the running loop."""

    def __init__(self, target: str, security: Security = PLAINTEXT, *, api_key: str | None = None) -> None:
        super().__init__(target, security, api_key=api_key)
        self._channel = channel(target, security)
        self._stub = gateway_pb2_grpc.GatewayServiceStub(self._channel)
        self._serve = self._channel.unary_stream(GENERATE, request_serializer=None, response_deserializer=None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Give the connection up; calls under way end."""
        await self._channel.close()

    async def generate(self, prompt: PromptInput, *, on_event: OnServiceEvent | None = None, **settings: Any) -> Result:
        """One picture or one answer. settings: see `stream`; on_event gets every event."""
        refuse_unheard(settings, on_event)
        return await _last(self.stream(prompt, **settings), on_event)

    async def generate_many(
        self,
        requests: Sequence[Mapping[str, Any] | str],
        on_event: OnServiceEvent | None = None,
        *,
        at_once: int = MANY,
    ) -> list[Result]:
        """Several at once, results in their order; see Client.generate_many."""
        calls = [call_of(request, index) for index, request in enumerate(listed(requests, on_event))]
        check_at_once(at_once)
        retry, places = BusyRetry(), asyncio.Semaphore(at_once)

        async def run(call: Call) -> Result:
            async with places:
                return await self._served(call, retry, on_event)

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(run(call)) for call in calls]
        except ExceptionGroup as failed:
            # The first error is the cause; the other requests were cancelled for it.
            raise failed.exceptions[0] from None
        return [task.result() for task in tasks]

    async def check_many(self, requests: Sequence[Mapping[str, Any] | str], *, at_once: int = MANY) -> None:
        """Ask whether all of these can be served, computing nothing; each is the arguments of `generate`.

        Raises the error of the first that cannot be; an InvalidRequest says which it is in its `index`.
        """
        check_at_once(at_once)
        places = asyncio.Semaphore(at_once)

        async def check(call: Call) -> None:
            async with places, aclosing(self._events(call.check_only())) as events:
                async for _ in events:
                    return  # accepted, which a gateway that only checks says last

        checks = [check(call_of(request, index)) for index, request in enumerate(requests)]
        # All are awaited: the error is that of the first request, not of the one that fails first.
        for outcome in await asyncio.gather(*checks, return_exceptions=True):
            if isinstance(outcome, BaseException):
                raise outcome

    async def describe(self, timeout: float | None = None) -> gateway_pb2.DescribeModelResponse:
        """What the gateway serves."""
        try:
            described: gateway_pb2.DescribeModelResponse = await self._describe(timeout)
        except grpc.RpcError as error:
            raise self._describe_error(error) from None
        return described

    async def _served(self, call: Call, retry: BusyRetry, on_event: OnServiceEvent | None) -> Result:
        """The result of one of several calls, which is made again when the gateway was too busy with the others."""
        result: Result | None = None
        while result is None:
            with retry.attempt() as attempt:
                result = await _last(self._events(call), attempt.hearing(on_event))
            if attempt.refused is not None:
                await retry.turn(attempt.refused, call.left_s)
                call = call.again(attempt.refused)
        return result

    async def _events(self, call: Call) -> AsyncEvents:
        responses, reader = self._generate(call)
        try:
            # Not by `async for`: gRPC's iterator and its call hold each other, so one that is left early would keep the
            # connection open until Python collects its garbage.
            while (response := await responses.read()) is not grpc.aio.EOF:
                if (event := reader.read(response)) is not None:
                    yield event
        except grpc.RpcError as error:
            raise reader.error(error) from None
        finally:
            # Also for an iterator that is closed early, which is how a caller cancels its request.
            responses.cancel()
        # Only a stream that was read to its end must have a result.
        yield reader.result(await responses.trailing_metadata())


async def _last(events: AsyncEvents, on_event: OnServiceEvent | None) -> Result:
    """The Result of a stream; on_event may raise, which cancels the request."""
    result: ServiceEvent | None = None
    async with aclosing(events):
        async for result in events:
            if on_event is not None:
                on_event(result)
    assert isinstance(result, Result)
    return result
