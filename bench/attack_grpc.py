"""Attacks on the gRPC port, each bounded in bytes, streams and time. Each returns its outcome in words."""

from __future__ import annotations

import asyncio
import socket
import struct
import time
from collections import Counter
from contextlib import ExitStack, closing, suppress
from typing import Any

import grpc
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from bagel.request import Modality
from bagel.rpc import convert
from bagel.rpc.transport import channel
from bagel.v1 import common_pb2, gateway_pb2
from bagel.v1.gateway_pb2_grpc import GatewayServiceStub
from bench.attack_files import large_png, scans_jpeg
from bench.attack_http import MIB, Target, hold

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, SETTINGS = 0, 1, 4
END_STREAM, END_HEADERS = 1, 4
GENERATE = "/bagel.v1.GatewayService/Generate"
AT_ONCE = 8


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """One HTTP/2 frame."""
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def begin(stream: int, path: str) -> bytes:
    """The headers frame that begins a call."""
    pairs = {":method": "POST", ":scheme": "http", ":path": path, ":authority": "x", "te": "trailers"}
    pairs["content-type"] = "application/grpc"
    # Literal fields without Huffman coding or indexing, which HPACK allows and which need no library.
    texts = [text.encode() for pair in pairs.items() for text in pair]
    block = b"".join(
        (b"\0" if number % 2 == 0 else b"") + bytes([len(text)]) + text for number, text in enumerate(texts)
    )
    return frame(HEADERS, END_HEADERS, stream, block)


def settings(window: int) -> bytes:
    """The start of a connection that lets the server send `window` bytes per stream."""
    return PREFACE + frame(SETTINGS, 0, 0, struct.pack(">HI", 4, window))


async def large_pictures(target: Target) -> str:
    """Eight requests at once, each with 63 pictures of 64 megapixels and a text."""
    return await _generate(target, [large_png()] * 63)


async def many_scans(target: Target) -> str:
    """Eight requests at once, each with four progressive JPEGs of 1,000 scans."""
    return await _generate(target, [scans_jpeg()] * 4)


async def unread(target: Target) -> str:
    """One connection with a closed window that asks for quick pictures in all places and reads nothing of them."""
    parts = [common_pb2.Part(text=common_pb2.TextPart(text="a large red circle"))]
    asked = convert.options_to_wire(Modality.TEXT2IMG, parts, {"steps": 4})
    message = gateway_pb2.GenerateRequest(request=asked, partial_images=1).SerializeToString()
    data = settings(0)
    for stream in range(1, 129, 2):  # clients' streams have odd numbers
        data += begin(stream, GENERATE)
        data += frame(DATA, END_STREAM, stream, b"\0" + struct.pack(">I", len(message)) + message)
    return await hold(_at(target), 1, [data], target.seconds)


async def half_messages(target: Target) -> str:
    """96 requests on eight connections. Each announces 60 MiB, sends up to 16 of them and stops."""
    calls, ends = 0, time.monotonic() + target.seconds
    with ExitStack() as stack:
        sockets = [stack.enter_context(closing(socket.create_connection(_at(target)))) for _ in range(8)]
        sent = 0
        for one in sockets:
            one.settimeout(0.2)
            with suppress(OSError):
                one.sendall(settings(2**16))
                for stream in range(1, 25, 2):
                    one.sendall(begin(stream, GENERATE) + frame(DATA, 0, stream, b"\0" + struct.pack(">I", 60 * MIB)))
                    calls += 1
        room = {(one, stream): 16 * MIB for one in sockets for stream in range(1, 25, 2)}
        piece = bytes(16000)
        while time.monotonic() < ends:
            for one, stream in room:
                if room[one, stream] > 0:
                    with suppress(OSError):  # it ignores flow control, so the server may close the connection
                        sent += one.send(frame(DATA, 0, stream, piece))
                        room[one, stream] -= len(piece)
            await asyncio.sleep(0.01)
    return f"{calls} calls, {sent // MIB} MiB taken"


async def half_messages_in_windows(target: Target) -> str:
    """64 calls of a gRPC client, each sending a stream of 20 MiB of messages to a method that takes only one."""
    async with channel(target.grpc) as one:
        method: Any = one.stream_stream(GENERATE, request_serializer=lambda data: data)
        calls = [method() for _ in range(64)]
        outcomes = Counter[str]()

        async def push(call: Any) -> None:
            try:
                async with asyncio.timeout(target.seconds):
                    for _ in range(4):
                        await call.write(bytes(5 * MIB))
                    outcomes[(await call.code()).name] += 1
            except (grpc.RpcError, asyncio.InvalidStateError) as error:
                outcomes[type(error).__name__] += 1
            except TimeoutError:
                outcomes["open"] += 1

        await asyncio.gather(*map(push, calls))
        for call in calls:
            call.cancel()
    return _counted(outcomes)


async def silent(target: Target) -> str:
    """1,500 connections that send nothing."""
    return await hold(_at(target), 1500, [b""], target.seconds)


async def watches(target: Target) -> str:
    """2,000 streams of Watch on 20 connections."""
    request = health_pb2.HealthCheckRequest()
    return await _idle_streams(target, 2000, lambda one: health_pb2_grpc.HealthStub(one).Watch(request))


async def reflections(target: Target) -> str:
    """2,000 streams of reflection on 20 connections."""

    def ask(one: aio.Channel) -> Any:
        question = reflection_pb2.ServerReflectionRequest(list_services="")

        async def requests() -> Any:
            yield question
            await asyncio.sleep(target.seconds)  # keeps the stream open

        return reflection_pb2_grpc.ServerReflectionStub(one).ServerReflectionInfo(requests())

    return await _idle_streams(target, 2000, ask)


async def checks(target: Target) -> str:
    """Health checks without a pause, 200 at once."""
    ends, outcomes = time.monotonic() + target.seconds, Counter[str]()
    async with channel(target.grpc) as one:
        check: Any = health_pb2_grpc.HealthStub(one).Check

        async def again() -> None:
            while time.monotonic() < ends:
                try:
                    await check(health_pb2.HealthCheckRequest(), timeout=target.seconds)
                    outcomes["OK"] += 1
                except grpc.RpcError as error:
                    outcomes[error.code().name] += 1

        await asyncio.gather(*(again() for _ in range(200)))
    return _counted(outcomes)


async def calls_without_a_request(target: Target) -> str:
    """1,000 calls that never send their request."""
    async with channel(target.grpc) as one:
        method: Any = one.stream_stream(GENERATE)
        calls = [method() for _ in range(1000)]
        await asyncio.sleep(target.seconds)
        ended = sum(call.done() for call in calls)
        for call in calls:
            call.cancel()
    return f"{ended} of {len(calls)} ended"


async def _idle_streams(target: Target, count: int, ask: Any) -> str:
    channels = [channel(target.grpc) for _ in range(20)]
    calls = [ask(channels[number % len(channels)]) for number in range(count)]
    outcomes = Counter[str]()

    async def first(call: Any) -> None:
        try:
            async with asyncio.timeout(target.seconds):
                outcomes["ended" if await call.read() is aio.EOF else "open"] += 1
        except grpc.RpcError as error:
            outcomes[error.code().name] += 1
        except TimeoutError:
            outcomes["late"] += 1

    began = time.monotonic()
    await asyncio.gather(*map(first, calls))
    await asyncio.sleep(max(0.0, target.seconds - (time.monotonic() - began)))
    for call in calls:
        call.cancel()
    for one in channels:
        await one.close()
    return _counted(outcomes)


async def _generate(target: Target, images: list[bytes]) -> str:
    """Repeat requests with these pictures, AT_ONCE at a time."""
    parts = [common_pb2.Part(image=common_pb2.ImagePart(data=image)) for image in images]
    parts.append(common_pb2.Part(text=common_pb2.TextPart(text="what is it?")))
    request = convert.options_to_wire(Modality.IMG2TEXT, parts, {"max_tokens": 2})
    message, outcomes = gateway_pb2.GenerateRequest(request=request), Counter[str]()
    ends = time.monotonic() + target.seconds

    async def again(one: aio.Channel) -> None:
        while (left := ends - time.monotonic()) > 0:
            call: Any = GatewayServiceStub(one).Generate(message, timeout=left + 1)
            try:
                async for _ in call:
                    pass
                outcomes["OK"] += 1
            except grpc.RpcError as error:
                outcomes[error.code().name] += 1

    async with channel(target.grpc) as one:
        await asyncio.gather(*(again(one) for _ in range(AT_ONCE)))
    return f"{message.ByteSize() // 1024} KiB each: {_counted(outcomes)}"


def _at(target: Target) -> tuple[str, int]:
    host, _, port = target.grpc.rpartition(":")
    return host, int(port)


def _counted(outcomes: Counter[str]) -> str:
    return ", ".join(f"{count} x {outcome}" for outcome, count in outcomes.most_common())
