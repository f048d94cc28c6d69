"""The client of a running gateway for threads. No torch here.

with Client("127.0.0.1:50051") as client:
    client.generate("a large red circle", steps=24).image.save("circle.png")
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, CancelledError, ThreadPoolExecutor, wait
from contextlib import closing
from threading import Lock
from types import TracebackType
from typing import Any, Protocol, Self

import grpc

from bagel.client.base import ClientBase
from bagel.client.busy_retry import BusyRetry
from bagel.client.calls import MANY, Call, OnServiceEvent, PromptInput, calls_of, check_at_once, refuse_unheard
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

        Events carry the request's index, and come from several threads. The first error cancels the others. One that
        the gateway is too busy for waits and is sent again while others of them run (`bagel.client.busy_retry`).
        """
        calls, under_way, retry = calls_of(requests, on_event), _UnderWay(), BusyRetry()
        check_at_once(at_once)

        def run(call: Call) -> Result:
            return _last(self._retried(call, under_way, retry), on_event)

        with ThreadPoolExecutor(max(1, min(at_once, len(calls)))) as pool:
            futures = [pool.submit(run, call) for call in calls]
            try:
                done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            finally:
                under_way.cancel()
        for future in (future for future in futures if future in done):
            future.result()  # the first error, not the cancelling that followed from it
        return [future.result() for future in futures]

    def describe(self, timeout: float | None = None) -> gateway_pb2.DescribeModelResponse:
        """What the gateway serves."""
        try:
            described: gateway_pb2.DescribeModelResponse = self._describe(timeout)
        except grpc.RpcError as error:
            raise self._reader().error(error) from None
        return described

    def _retried(self, call: Call, under_way: _UnderWay, retry: BusyRetry) -> Events:
        left: Call | None = call
        while left is not None:
            with retry.attempt() as attempt, closing(self._events(left, under_way)) as events:
                for event in events:
                    attempt.begun = True
                    yield event
            left = None
            if attempt.refused is not None:
                turn = retry.turn(attempt.refused)
                under_way.add(turn.free)
                try:
                    turn.free.result(call.until(turn.seconds))
                except TimeoutError:
                    turn.free.cancel()
                except CancelledError:  # with all others
                    raise attempt.refused from None
                left = call.again(attempt.refused)

    def _events(self, call: Call, under_way: _UnderWay | None = None) -> Events:
        responses, reader = self._generate(call)
        if under_way is not None:
            under_way.add(responses)
        try:
            for response in responses:
                if (event := reader.read(response)) is not None:
                    yield event
        except grpc.RpcError as error:
            raise reader.error(error) from None
        finally:
            responses.cancel()
        reader.check_finished()


class _Cancellable(Protocol):
    def cancel(self) -> object: ...


class _UnderWay:
    """Calls of several threads that end together."""

    def __init__(self) -> None:
        self._lock, self._cancelled = Lock(), False
        self._calls: list[_Cancellable] = []

    def add(self, call: _Cancellable) -> None:
        with self._lock:
            self._calls.append(call)
            if self._cancelled:
                call.cancel()

    def cancel(self) -> None:
        with self._lock:
            self._cancelled = True
            for call in self._calls:
                call.cancel()


def _last(events: Events, on_event: OnServiceEvent | None) -> Result:
    """The Result of a stream; on_event may raise, which cancels the request."""
    result: ServiceEvent | None = None
    with closing(events):
        for result in events:
            if on_event is not None:
                on_event(result)
    assert isinstance(result, Result)
    return result
