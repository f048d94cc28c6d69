"""Attacks on the HTTP port, each bounded in bytes, connections and time. Each returns its outcome in words."""

from __future__ import annotations

import asyncio
import base64
import json
import socket
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass

from bench.attack_files import deep_json, large_png, many_values, scans_jpeg

Work = Callable[[], Awaitable[str]]
"""Sends one request of an attacker and returns the answer."""

MIB = 2**20
CHAT = "/v1/chat/completions"


@dataclass(frozen=True)
class Target:
    """The target of an attack: the gateway's gRPC and HTTP addresses, and how many seconds the attack lasts."""

    grpc: str
    http: str
    seconds: float

    @property
    def at(self) -> tuple[str, int]:
        """The HTTP address in the form that sockets take."""
        host, _, port = self.http.rpartition(":")
        return host, int(port)


def head(length: str, path: str = CHAT) -> bytes:
    """The head of a POST with this Content-Length."""
    lines = [f"POST {path} HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/json", f"Content-Length: {length}"]
    return "\r\n".join([*lines, "", ""]).encode()


async def post(target: Target, body: bytes, limit_s: float) -> str:
    """Post a body; returns the status of the answer, or "none"."""
    with suppress(OSError, asyncio.IncompleteReadError):
        async with asyncio.timeout(limit_s):
            reader, writer = await asyncio.open_connection(*target.at)
            with closing(writer):
                with suppress(ConnectionError):  # the gateway may answer, and close, before it has read everything
                    writer.write(head(str(len(body))) + body)
                    await writer.drain()
                return (await reader.readline()).decode().split(" ")[1]
    return "none"


async def huge_length(target: Target) -> str:
    """A 20-digit Content-Length, followed by 192 MiB."""
    sent, answer, piece = 0, b"", b" " * MIB
    with suppress(OSError, TimeoutError):
        async with asyncio.timeout(target.seconds):
            reader, writer = await asyncio.open_connection(*target.at)
            with closing(writer):
                writer.write(head("9" * 20))
                while sent < 192:
                    writer.write(piece)
                    await writer.drain()
                    sent += 1
                answer = await reader.readline()
    return f"{sent} MiB were taken, then {answer.decode().strip() or 'closed'}"


async def large_pictures(target: Target) -> str:
    """Eight chats at once, each with four pictures of 64 megapixels."""
    return await _chats(target, [large_png()] * 4, "png", 8)


async def many_scans(target: Target) -> str:
    """Eight chats at once, each with a progressive JPEG of 1,000 scans."""
    return await _chats(target, [scans_jpeg()], "jpeg", 8)


async def many_json_values(target: Target) -> str:
    """60 MiB of empty objects."""
    body = many_values(60 * MIB)
    return await _again(target, [lambda: post(target, body, target.seconds)])


async def deep_json_values(target: Target) -> str:
    """4 MiB of deeply nested lists."""
    body = deep_json(4 * MIB - 100)
    return await _again(target, [lambda: post(target, body, target.seconds)])


async def silent(target: Target) -> str:
    """800 connections that send nothing, or half a head."""
    return await hold(target.at, 800, [b"", b"GET / HTTP/1.1\r\nHost: x\r\nX-"], target.seconds)


async def trickling(target: Target) -> str:
    """600 connections that send their head, or body, at one byte per second."""
    starts = [b"GET / HTTP/1.1\r\nHost: x\r\nX-", head("1000000")]
    return await hold(target.at, 600, starts, target.seconds, b"a")


async def unread_streams(target: Target) -> str:
    """Streams of quick pictures in all places of the gateway, of which the client reads nothing."""
    request = {"prompt": "a large red circle", "stream": True, "partial_images": 1, "num_inference_steps": 4}
    body = json.dumps(request).encode()
    data = head(str(len(body)), "/v1/images/generations") + body
    return await hold(target.at, 64, [data], target.seconds, window=4096)


async def hold(
    at: tuple[str, int], count: int, starts: list[bytes], seconds: float, again: bytes = b"", window: int | None = None
) -> str:
    """Open connections, send one of `starts` on each and `again` every second; counts those that stay open.

    window: the size of the receive buffer, so that a server that is not read soon notices.
    """
    with ExitStack() as stack:
        held: list[socket.socket] = []
        for number in range(count):
            one = stack.enter_context(closing(socket.socket()))
            if window is not None:
                one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, window)
            one.settimeout(1)
            with suppress(OSError):
                one.connect(at)
                one.sendall(starts[number % len(starts)])
                one.setblocking(False)
                held.append(one)
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            await asyncio.sleep(1)
            for one in held if again else ():
                with suppress(OSError):
                    one.send(again)
        return f"{len(held)} of {count} connected, {sum(map(_is_open, held))} open after {seconds:.0f} s"


def _is_open(one: socket.socket) -> bool:
    try:
        return bool(one.recv(1, socket.MSG_PEEK))
    except BlockingIOError:
        return True
    except OSError:
        return False


async def _chats(target: Target, images: list[bytes], kind: str, at_once: int) -> str:
    urls = [f"data:image/{kind};base64,{base64.b64encode(image).decode()}" for image in images]
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    chat = {"messages": [{"role": "user", "content": [*parts, {"type": "text", "text": "what is it?"}]}]}
    body = json.dumps({**chat, "max_tokens": 2}).encode()
    return f"{len(body) // 1024} KiB each: " + await _again(
        target, [lambda: post(target, body, target.seconds)] * at_once
    )


async def _again(target: Target, works: Sequence[Work]) -> str:
    """Repeat each work until the time is over, all at once; returns the counted answers."""
    ends, answers = time.monotonic() + target.seconds, Counter[str]()

    async def repeat(work: Work) -> None:
        while time.monotonic() < ends:
            answers[await work()] += 1

    await asyncio.gather(*map(repeat, works))
    return ", ".join(f"{count} x {answer}" for answer, count in answers.most_common())
