"""The client of a running gateway for threads. No torch here.

with Client("127.0.0.1:50051") as client:
    client.generate("a large red circle", steps=24).image.save("circle.png")
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from types import TracebackType
from typing import Any, Self

import grpc

from bagel.client.base import ClientBase
from bagel.client.batch import generate_all
from bagel.client.calls import MANY, Call, OnServiceEvent, PromptInput, listed, refuse_unheard
from bagel.client.responses import GENERATE
from bagel.events import Result, ServiceEvent
from bagel.rpc.transport import PLAINTEXT, Security, sync_channel
from bagel.v1 import gateway_pb2, gateway_pb2_grpc

Events = Generator[ServiceEvent, None, None]


class Client(ClientBase[Events]):
    """A client for threads; see ClientBase. Errors are those of bagel.errors, as the gateway's."""

    def __init__(self, target: str, security: Security = PLAINTEXT, *, api_key: str | None = None) -> None:
        super().__init__(target, security, api_key=api_key)
        self._channel = sync_channel(target, security)
        self._stub = gateway_pb2_grpc.GatewayServiceStub(self._channel)
        self._serve = self._channel.unary_stream(GENERATE, request_serializer=None, response_deserializer=None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the connection up; calls under way end."""
        self._channel.close()

    def generate(self, prompt: PromptInput, *, on_event: OnServiceEvent | None = None, **settings: Any) -> Result:
        """One picture or one answer. settings: see `stream`; on_event gets every event."""
        refuse_unheard(settings, on_event)
        return _last(self.stream(prompt, **settings), on_event)

    def generate_many(
        self,
        requests: Sequence[Mapping[str, Any] | str],
        on_event: OnServiceEvent | None = None,
        *,
        at_once: int = MANY,
    ) -> list[Result]:
        """Several at once, results in their order; each is the arguments of `generate`, or a prompt alone.

        Events carry the request's index. The first error cancels the others. One that the gateway is too busy for
        waits and is sent again while others of them run (`bagel.client.busy_retry`).
        """
        several = listed(requests, on_event)
        return generate_all(
            self._target,
            several,
            on_event,
            at_once=at_once,
            security=self._security,
            api_key=self._api_key,
            check=False,
        )

    def describe(self, timeout: float | None = None) -> gateway_pb2.DescribeModelResponse:
        """What the gateway serves."""
        try:
            described: gateway_pb2.DescribeModelResponse = self._describe(timeout)
        except grpc.RpcError as error:
            raise self._describe_error(error) from None
        return described

    def _events(self, call: Call) -> Events:
        responses, reader = self._generate(call)
        try:
            for response in responses:
                if (event := reader.read(response)) is not None:
                    yield event
        except grpc.RpcError as error:
            raise reader.error(error) from None
        finally:
            # Also for an iterator that is closed early, which is how a caller cancels its request.
            responses.cancel()
        # Only a stream that was read to its end must have a result.
        yield reader.result(responses.trailing_metadata())


def _last(events: Events, on_event: OnServiceEvent | None) -> Result:
    """The Result of a stream; on_event may raise, which cancels the request."""
    result: ServiceEvent | None = None
    with closing(events):
        for result in events:
            if on_event is not None:
                on_event(result)
    assert isinstance(result, Result)
    return result
