"""Clients of a running gateway, for threads and for asyncio. No torch here.

with Client("127.0.0.1:50051") as client:
    client.generate("a red cube", steps=24).image.save("cube.png")
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, CancelledError, ThreadPoolExecutor, wait
from contextlib import aclosing, closing
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any, Protocol, Self

import grpc
from PIL import Image

from bagel.client.busy_retry import Together
from bagel.effect import UNHEARD
from bagel.errors import BagelError, Busy, InvalidImage, InvalidRequest, RemoteError
from bagel.events import Accepted, DrawingStarted, PrefillDone, Preview, Result, ServiceEvent, StepDone, TextDelta
from bagel.images import StrPath, to_rgb
from bagel.prompts import ImagePart, TextPart
from bagel.request import Modality
from bagel.rpc import convert
from bagel.rpc.api_keys import key_metadata
from bagel.rpc.deadlines import deadline_of
from bagel.rpc.errors import from_rpc_error
from bagel.rpc.transport import PLAINTEXT, Security, channel, sync_channel
from bagel.telemetry.logs import REQUEST_ID, new_request_id
from bagel.telemetry.tracing import trace_metadata
from bagel.v1 import common_pb2, gateway_pb2, gateway_pb2_grpc

ImageInput = StrPath | bytes | Image.Image
PromptPart = str | TextPart | ImagePart | common_pb2.Part
PromptInput = str | Sequence[PromptPart]
OnServiceEvent = Callable[[ServiceEvent], None]
MANY = 64
"""Requests of generate_many that are under way at once; the gateway's own default limit."""
_READ_IMAGE = "give a path, the bytes of an image file or a PIL image"


class Client:
    """A client for threads. target: the gateway's host:port. Errors are those of bagel.errors, as the gateway's.

    api_key: what a gateway with API keys asks for; ConfigError where it would go to another machine without TLS and
    security does not say that the network is trusted.
    """

    def __init__(self, target: str, security: Security = PLAINTEXT, *, api_key: str | None = None) -> None:
        self._target, self._key = target, key_metadata(api_key, target, security)
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
        """One picture or one answer. settings: see `stream`; on_event hears everything that happens."""
        _refuse_unheard(settings, on_event)
        return _last(self.stream(prompt, **settings), on_event)

    def stream(
        self,
        prompt: PromptInput,
        *,
        modality: str = Modality.TEXT2IMG,
        image: ImageInput | None = None,
        timeout: float | None = None,
        request_id: str | None = None,
        output_format: str = "PNG",
        output_compression: int | None = None,
        partial_images: int = 0,
        **options: Any,
    ) -> Generator[ServiceEvent, None, None]:
        """What happens, the Result last; closing the iterator cancels the request.

        image: goes before the prompt. timeout: seconds for everything. output_format: PNG, JPEG or WEBP;
        output_compression: quality of the latter two, from 0 to 100. partial_images: Preview events wanted, at most 3.
        options: the fields of bagel.request, such as steps, seed or think; an unknown one raises InvalidRequest.
        """
        output = _Output(output_format, output_compression, partial_images)
        call = _Call.make(prompt, modality, image, timeout, request_id, output, options)
        return self._events(call, 0, _UnderWay())

    def generate_many(
        self,
        requests: Sequence[Mapping[str, Any] | str],
        on_event: OnServiceEvent | None = None,
        *,
        at_once: int = MANY,
    ) -> list[Result]:
        """Several at once, results in their order; each is the arguments of `generate`, or a prompt alone.

        Events carry the request's index, and come from several threads. The first error cancels the others. One that
        the gateway is too busy for waits and is sent again while others of them run (`bagel.together`).
        """
        calls, under_way, together = _calls(requests, on_event), _UnderWay(), Together()
        _check_at_once(at_once)

        def run(index: int, call: _Call) -> Result:
            return _last(self._patiently(call, index, under_way, together), on_event)

        with ThreadPoolExecutor(max(1, min(at_once, len(calls)))) as pool:
            futures = [pool.submit(run, index, call) for index, call in enumerate(calls)]
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
            return self._stub.DescribeModel(
                gateway_pb2.DescribeModelRequest(), timeout=deadline_of(timeout), metadata=self._key
            )
        except grpc.RpcError as error:
            raise from_rpc_error(error, self._target) from None

    def _patiently(
        self, call: _Call, index: int, under_way: _UnderWay, together: Together
    ) -> Generator[ServiceEvent, None, None]:
        left: _Call | None = call
        while left is not None:
            with together.attempt() as attempt, closing(self._events(left, index, under_way)) as events:
                for event in events:
                    attempt.begun = True
                    yield event
            left = None
            if attempt.refused is not None:
                turn = together.turn(attempt.refused)
                under_way.add(turn.free)
                try:
                    turn.free.result(call.until(turn.seconds))
                except TimeoutError:
                    turn.free.cancel()
                except CancelledError:  # with all others
                    raise attempt.refused from None
                left = call.again(attempt.refused)

    def _events(self, call: _Call, index: int, under_way: _UnderWay) -> Generator[ServiceEvent, None, None]:
        reader = _Reader(index)
        responses = self._stub.Generate(call.message, timeout=call.timeout, metadata=(*call.metadata, *self._key))
        under_way.add(responses)
        try:
            for response in responses:
                if (event := reader.read(response)) is not None:
                    yield event
        except grpc.RpcError as error:
            raise _of_request(from_rpc_error(error, self._target), index) from None
        finally:
            responses.cancel()
        reader.check_finished(self._target)


class AsyncClient:
    """As Client, for asyncio; to be made inside the running loop."""

    def __init__(self, target: str, security: Security = PLAINTEXT, *, api_key: str | None = None) -> None:
        self._target, self._key = target, key_metadata(api_key, target, security)
        self._channel = channel(target, security)
        self._stub = gateway_pb2_grpc.GatewayServiceStub(self._channel)

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
        """One picture or one answer. settings: see `stream`; on_event hears everything that happens."""
        _refuse_unheard(settings, on_event)
        return await _last_of(self.stream(prompt, **settings), on_event)

    def stream(
        self,
        prompt: PromptInput,
        *,
        modality: str = Modality.TEXT2IMG,
        image: ImageInput | None = None,
        timeout: float | None = None,
        request_id: str | None = None,
        output_format: str = "PNG",
        output_compression: int | None = None,
        partial_images: int = 0,
        **options: Any,
    ) -> AsyncGenerator[ServiceEvent, None]:
        """What happens, the Result last; see Client.stream."""
        output = _Output(output_format, output_compression, partial_images)
        return self._events(_Call.make(prompt, modality, image, timeout, request_id, output, options), 0)

    async def generate_many(
        self,
        requests: Sequence[Mapping[str, Any] | str],
        on_event: OnServiceEvent | None = None,
        *,
        at_once: int = MANY,
    ) -> list[Result]:
        """Several at once, results in their order; see Client.generate_many."""
        calls, places, together = _calls(requests, on_event), _places(at_once), Together()

        async def run(index: int, call: _Call) -> Result:
            async with places:
                return await _last_of(self._patiently(call, index, together), on_event)

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(run(index, call)) for index, call in enumerate(calls)]
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None
        return [task.result() for task in tasks]

    async def check_many(self, requests: Sequence[Mapping[str, Any]], *, at_once: int = MANY) -> None:
        """Ask whether all of these can be served, computing nothing; each is the arguments of `generate`.

        Raises the error of the first that cannot be; an InvalidRequest says which it is in its `index`.
        """
        calls, places = [_Call.of(request) for request in requests], _places(at_once)

        async def check(index: int, call: _Call) -> None:
            message = gateway_pb2.GenerateRequest()
            message.CopyFrom(call.message)
            message.check_only = True
            async with places, aclosing(self._events(replace(call, message=message), index)) as events:
                async for _ in events:
                    return  # accepted, which a gateway that only checks says last

        checks = (check(index, call) for index, call in enumerate(calls))
        for outcome in await asyncio.gather(*checks, return_exceptions=True):
            if isinstance(outcome, BaseException):
                raise outcome

    async def describe(self, timeout: float | None = None) -> gateway_pb2.DescribeModelResponse:
        """What the gateway serves."""
        try:
            return await self._stub.DescribeModel(
                gateway_pb2.DescribeModelRequest(), timeout=deadline_of(timeout), metadata=self._key
            )
        except grpc.RpcError as error:
            raise from_rpc_error(error, self._target) from None

    async def _patiently(self, call: _Call, index: int, together: Together) -> AsyncGenerator[ServiceEvent, None]:
        left: _Call | None = call
        while left is not None:
            with together.attempt() as attempt:
                async with aclosing(self._events(left, index)) as events:
                    async for event in events:
                        attempt.begun = True
                        yield event
            left = None
            if attempt.refused is not None:
                turn = together.turn(attempt.refused)
                await asyncio.wait([asyncio.wrap_future(turn.free)], timeout=call.until(turn.seconds))
                turn.free.cancel()
                left = call.again(attempt.refused)

    async def _events(self, call: _Call, index: int) -> AsyncGenerator[ServiceEvent, None]:
        reader = _Reader(index)
        responses = self._stub.Generate(call.message, timeout=call.timeout, metadata=(*call.metadata, *self._key))
        try:
            async for response in responses:
                if (event := reader.read(response)) is not None:
                    yield event
        except grpc.RpcError as error:
            raise _of_request(from_rpc_error(error, self._target), index) from None
        finally:
            responses.cancel()
        reader.check_finished(self._target)


@dataclass(frozen=True)
class _Output:
    """How a picture is given out."""

    format: str
    quality: int | None
    previews: int

    def request(self) -> gateway_pb2.GenerateRequest:
        """A request for that, else empty; raises InvalidRequest for what no message can say."""
        if self.format.upper() not in convert.FORMATS:
            names = ", ".join(convert.FORMATS)
            raise InvalidRequest("output_format", f"output_format is {self.format!r}; it must be one of {names}")
        format_ = convert.FORMATS[self.format.upper()]
        convert.check_output(format_, self.quality, self.previews)
        return gateway_pb2.GenerateRequest(
            output_format=format_, output_compression=self.quality, partial_images=self.previews
        )


@dataclass(frozen=True)
class _Call:
    """One request as it goes out."""

    message: gateway_pb2.GenerateRequest
    timeout: float | None
    metadata: tuple[tuple[str, str], ...]
    deadline: float | None = None

    def until(self, seconds: float) -> float:
        """So many seconds, or those until the deadline."""
        return seconds if self.deadline is None else max(0.0, min(seconds, self.deadline - time.monotonic()))

    def again(self, refused: Busy) -> _Call:
        """The call to make once more; Busy if its time is over."""
        if self.deadline is None:
            return self
        if (left := self.deadline - time.monotonic()) <= 0:
            raise refused
        return replace(self, timeout=left)

    @classmethod
    def make(
        cls,
        prompt: PromptInput,
        modality: str,
        image: ImageInput | None,
        timeout: float | None,
        request_id: str | None,
        output: _Output,
        options: Mapping[str, Any],
    ) -> _Call:
        """Raises InvalidRequest for what no message can say; the gateway checks the rest."""
        if modality not in list(Modality):
            raise InvalidRequest("modality", f"modality is {modality!r}; it must be one of {', '.join(Modality)}")
        message = output.request()
        message.request.CopyFrom(convert.options_to_wire(Modality(modality), _parts(prompt, image), options))
        seconds = deadline_of(timeout)
        deadline = None if seconds is None else time.monotonic() + seconds
        return cls(message, seconds, ((REQUEST_ID, request_id or new_request_id()), *trace_metadata()), deadline)

    @classmethod
    def of(cls, arguments: Mapping[str, Any] | str) -> _Call:
        """A call from the arguments of `generate`, or from a prompt."""
        if not isinstance(arguments, Mapping | str):
            raise InvalidRequest(
                "requests",
                f"a request is {arguments!r:.80}; give a prompt or the arguments of generate, by their names",
            )
        options: dict[str, Any] = {"prompt": arguments} if isinstance(arguments, str) else dict(arguments)
        if "prompt" not in options:
            raise InvalidRequest("prompt", "a request has no prompt; give each one, like {'prompt': 'a red cube'}")
        return cls.make(
            prompt=options.pop("prompt"),
            modality=options.pop("modality", Modality.TEXT2IMG),
            image=options.pop("image", None),
            timeout=options.pop("timeout", None),
            request_id=options.pop("request_id", None),
            output=_Output(
                options.pop("output_format", "PNG"),
                options.pop("output_compression", None),
                options.pop("partial_images", 0),
            ),
            options=options,
        )


def _check_at_once(at_once: object) -> None:
    if isinstance(at_once, bool) or not isinstance(at_once, int) or at_once < 1:
        raise InvalidRequest("at_once", f"at_once is {at_once!r:.80}; it must be a whole number at least 1")


def _places(at_once: int) -> asyncio.Semaphore:
    _check_at_once(at_once)  # a semaphore of none would be waited for without end
    return asyncio.Semaphore(at_once)


def _calls(requests: Iterable[Mapping[str, Any] | str], on_event: OnServiceEvent | None) -> list[_Call]:
    """A call for each; InvalidRequest for what is no list of requests, or asks for what nobody would hear."""
    if isinstance(requests, str | bytes | Mapping) or not isinstance(requests, Iterable):
        raise InvalidRequest("requests", f"requests is {requests!r:.80}; give a list, like ['a cat', 'a dog']")
    requests = list(requests)
    for request in requests:
        if isinstance(request, Mapping):
            _refuse_unheard(request, on_event)
    return [_Call.of(request) for request in requests]


class _Reader:
    """Responses of one request as events. The picture comes in the Result, with the rest of it."""

    def __init__(self, index: int) -> None:
        self._index = index
        self._accepted = gateway_pb2.Accepted()
        self._settings: Mapping[str, Any] = {}
        self._image: Image.Image | None = None
        self._finished = False

    def read(self, response: gateway_pb2.GenerateResponse) -> ServiceEvent | None:
        """The event of a response; None for the picture and for what a newer gateway may send."""
        match response.WhichOneof("event"):
            case "accepted":
                self._accepted = told = response.accepted
                self._settings = convert.options_from_wire(told.resolved)
                return Accepted(self._index, told.request_id, told.seed, told.pipeline, self._settings)
            case "prefill":
                return PrefillDone(self._index, response.prefill.tokens)
            case "text":
                return TextDelta(self._index, response.text.text, response.text.think)
            case "drawing":
                return DrawingStarted(self._index, response.drawing.waited_seconds)
            case "step":
                return StepDone(self._index, response.step.step, response.step.steps)
            case "preview":
                told_preview = response.preview
                image = _image(told_preview.picture)
                return Preview(self._index, told_preview.index, told_preview.step, image)
            case "picture":
                self._image = _image(response.picture)
            case "finished":
                self._finished = True
                return self._result(response.finished)
        return None

    def check_finished(self, target: str) -> None:
        """Raise if the gateway ended the stream without its last event."""
        if not self._finished:
            raise RemoteError(f"{target} ended the request without its result", "INTERNAL")

    def _result(self, finished: gateway_pb2.Finished) -> Result:
        usage = {field.name: getattr(finished.usage, field.name) for field in common_pb2.Usage.DESCRIPTOR.fields}
        return Result(
            self._index,
            self._image,
            finished.text,
            tuple(finished.token_ids),
            self._accepted.seed,
            convert.timings_from_wire(finished.timings),
            usage,
            self._accepted.request_id,
            self._settings,
            convert.timings_from_wire(finished.profile),
        )


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


def _parts(prompt: PromptInput, image: ImageInput | None) -> list[common_pb2.Part]:
    """The prompt's parts, an image given beside it first."""
    before = [] if image is None else [common_pb2.Part(image=common_pb2.ImagePart(data=_image_bytes(image)))]
    if isinstance(prompt, str):
        return [*before, _part(prompt)]
    if isinstance(prompt, bytes | Mapping) or not isinstance(prompt, Iterable):
        raise InvalidRequest(
            "prompt", f"prompt is {prompt!r:.80}; it must be a text, or a list of texts, TextPart and ImagePart"
        )
    return [*before, *map(_part, prompt)]


def _part(part: object) -> common_pb2.Part:
    if isinstance(part, common_pb2.Part):
        return part
    if isinstance(part, str):
        part = TextPart(part)
    if isinstance(part, TextPart | ImagePart):
        return convert.part_to_wire(part)
    raise InvalidRequest("prompt", f"a part of the prompt is {part!r:.80}; it must be a text, a TextPart or ImagePart")


def _image_bytes(image: ImageInput) -> bytes:
    """An image's file; a PIL image becomes a PNG."""
    if isinstance(image, bytes):
        return image
    if isinstance(image, Image.Image):
        return convert.encode_picture(to_rgb(image), common_pb2.IMAGE_FORMAT_PNG)
    try:
        return Path(image).read_bytes()
    except TypeError:
        raise InvalidImage("image", f"image is {image!r:.80}; {_READ_IMAGE}") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InvalidImage("image", f"the image {str(image)!r} cannot be read: {reason}; {_READ_IMAGE}") from None


def _image(picture: common_pb2.Picture) -> Image.Image:
    image = Image.open(BytesIO(picture.data))
    image.load()
    return image


def _of_request(error: BagelError, index: int) -> BagelError:
    """The error, of this one of several requests."""
    if isinstance(error, InvalidRequest):
        error.index = index
    return error


def _refuse_unheard(settings: Mapping[str, Any], on_event: OnServiceEvent | None) -> None:
    """Raise InvalidRequest for what is told on the way, where nobody listens."""
    if on_event is None:
        UNHEARD.refuse(settings)


def _last(events: Generator[ServiceEvent, None, None], on_event: OnServiceEvent | None) -> Result:
    """The Result of a stream; on_event may raise, which cancels the request."""
    result: ServiceEvent | None = None
    with closing(events):
        for result in events:
            if on_event is not None:
                on_event(result)
    assert isinstance(result, Result)
    return result


async def _last_of(events: AsyncGenerator[ServiceEvent, None], on_event: OnServiceEvent | None) -> Result:
    result: ServiceEvent | None = None
    async with aclosing(events):
        async for result in events:
            if on_event is not None:
                on_event(result)
    assert isinstance(result, Result)
    return result
