"""Connections that ask for nothing, or hardly: they end, are bounded in number, and keep nobody out."""

from __future__ import annotations

import asyncio
import json
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from openai import AsyncOpenAI

from bagel.errors import ConfigError
from bagel_gateway.rest.connections import KEPT, RESERVE, connections_allowed
from tests.gateway_stages import Deployment
from tests.rest.test_front import CHAT, IMAGES, get, post, through
from tests.rest.test_limits import head

pytestmark = pytest.mark.slow  # it waits for real time limits, processes or large pictures

IN_TIME_S = 10.0
HALF = b"GET /healthz HTTP/1.1\r\nHost: loc"
WHOLE = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"


async def connect(at: Deployment, data: bytes = b"") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    assert at.gateway.rest is not None
    reader, writer = await asyncio.open_connection("127.0.0.1", at.gateway.rest.port)
    writer.write(data)
    return reader, writer


async def ends(reader: asyncio.StreamReader) -> bytes:
    """What comes until the connection ends, in time."""
    async with asyncio.timeout(IN_TIME_S):
        try:
            return await reader.read()
        except ConnectionResetError:
            return b""


def test_a_connection_without_a_whole_head_ends_and_an_idle_one_too() -> None:
    async def work(at: Deployment, client: AsyncOpenAI) -> None:
        for data in (b"", HALF, WHOLE, WHOLE + HALF):
            reader, writer = await connect(at, data)
            assert (await ends(reader)).count(b"200 OK") == data.count(b"\r\n\r\n"), data
            writer.close()
        reader, writer = await connect(at, WHOLE)
        await reader.readuntil(b"ok\n")
        writer.write(HALF)  # of a second request
        assert await ends(reader) == b""
        writer.close()

    through(work, header_timeout_s=0.3, idle_timeout_s=0.3)


def test_a_head_that_trickles_ends_as_a_silent_one() -> None:
    async def work(at: Deployment, client: AsyncOpenAI) -> None:
        reader, writer = await connect(at)
        ending = asyncio.create_task(ends(reader))
        for byte in WHOLE[:-2] * 100:
            if ending.done():
                break
            writer.write(bytes([byte]))
            await asyncio.sleep(0.02)
        assert await ending == b""
        writer.close()

    through(work, header_timeout_s=0.3)


def test_a_body_that_does_not_keep_its_pace_is_given_up_and_one_that_does_is_read() -> None:
    async def work(at: Deployment, client: AsyncOpenAI) -> None:
        body = json.dumps({"prompt": "x" * 4000}).encode()
        reader, writer = await connect(at, head(IMAGES, f"Content-Length: {len(body)}") + body[:3900])
        ending = asyncio.create_task(ends(reader))
        for byte in body[3900:]:
            if ending.done():
                break
            writer.write(bytes([byte]))
            await asyncio.sleep(0.05)
        answer = await ending
        writer.close()
        assert b"408 Request Timeout" in answer and b"send at least 1000 a second" in answer
        reader, writer = await connect(at, head(IMAGES, f"Content-Length: {len(body)}"))
        for start in range(0, len(body), 250):  # longer than --body-timeout in all
            writer.write(body[start : start + 250])
            await asyncio.sleep(0.07)
        assert b"200 OK" in await ends(reader)
        writer.close()

    through(work, body_timeout_s=0.5, min_body_rate=1000)


def test_silent_connections_give_way_to_those_that_ask() -> None:
    async def work(at: Deployment, client: AsyncOpenAI) -> None:
        silent = [await connect(at, HALF if i % 2 else b"") for i in range(100)]
        assert (await get(at, "/healthz"))[0] == 200
        assert (await client.images.generate(prompt="a cat")).data
        assert at.gateway.rest is not None
        assert len(at.gateway.rest._server._connections._open) <= 4 + RESERVE
        for reader, _ in silent[:50]:
            assert await ends(reader) == b""
        last, _ = silent[-1]
        assert not last.at_eof()
        for _, writer in silent:
            writer.close()

    through(work, max_connections=4)


def test_more_requests_than_connections_are_worked_for_are_busy_and_probes_are_answered() -> None:
    async def work(at: Deployment, client: AsyncOpenAI) -> None:
        at.dits[0].go.clear()
        under_way = [asyncio.create_task(post(at, IMAGES, {"prompt": "a cat"})) for _ in range(4)]
        async with asyncio.timeout(IN_TIME_S):
            while len(at.dits[0].asked) < 4:
                await asyncio.sleep(0.01)
        status, answer = await post(at, IMAGES, {"prompt": "a cat"})
        assert status == 429 and "4 connections" in answer["error"]["message"]
        for path in ("/healthz", "/readyz", "/metrics"):
            assert (await get(at, path))[0] == 200
        at.dits[0].go.set()
        assert [status for status, _ in await asyncio.gather(*under_way)] == [200] * 4
        assert (await post(at, IMAGES, {"prompt": "a cat"}))[0] == 200

    through(work, max_connections=4)


def test_requests_whose_bodies_do_not_come_give_way_to_those_that_are_whole() -> None:
    async def work(at: Deployment, client: AsyncOpenAI) -> None:
        starts = [head(CHAT, "Content-Length: 100") + b"{", head("/v1/none", "Content-Length: 9", "Origin: http://x.y")]
        held = [await connect(at, starts[i % 2]) for i in range(40)]
        for _ in range(6):
            assert (await post(at, IMAGES, {"prompt": "a cat"}))[0] == 200
        told = await ends(held[0][0])
        assert b"429 Too Many" in told and b"the body had not come" in told and b"Retry-After" in told.title()
        assert b"403 Forbidden" in await ends(held[1][0])
        reader, writer = held[38]  # of those that came last, which have waited least
        writer.write(b'"messages": []' + b" " * 84 + b"}")
        assert b"400 Bad Request" in await ends(reader)
        for _, writer in held:
            writer.close()

    through(work, max_connections=4)


@contextmanager
def descriptors(most: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_without_a_descriptor_one_line_is_logged_and_it_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    async def work(at: Deployment, client: AsyncOpenAI) -> None:
        assert at.gateway.rest is not None
        sockets = [socket.socket() for _ in range(20)]
        with descriptors(max(each.fileno() for each in sockets) + 1):
            for each in sockets:
                each.setblocking(False)
                await asyncio.get_running_loop().sock_connect(each, ("127.0.0.1", at.gateway.rest.port))
            await asyncio.sleep(1)
        for each in sockets:
            each.close()
        told = [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]
        assert [record.message for record in told] == ["connections wait: none can be accepted"]
        assert (await get(at, "/healthz"))[0] == 200

    through(work)


def test_connections_leave_descriptors_for_everything_else() -> None:
    with descriptors(400):
        assert connections_allowed(None) == 200 - KEPT - RESERVE == connections_allowed(104)
        with pytest.raises(ConfigError, match=r"--max-connections is 105; .* 400 files, of which 104"):
            connections_allowed(105)


def test_a_service_raises_its_limit_of_open_files_and_bears_more_connections_than_that() -> None:
    command = [sys.executable, "-m", "bagel_gateway", "--listen", "127.0.0.1:0", "--http", "127.0.0.1:0"]
    command += ["--thinker", "thinker-0=127.0.0.1:1", "--dit", "dit-0=127.0.0.1:2"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, preexec_fn=lambda: few()) as gateway:
        assert gateway.stdout is not None
        port = int(json.loads(gateway.stdout.readline())["http"].rpartition(":")[2])
        assert resource.prlimit(gateway.pid, resource.RLIMIT_NOFILE) == (256, 256)
        held = [socket.create_connection(("127.0.0.1", port), IN_TIME_S) for _ in range(300)]
        began = time.monotonic()
        with socket.create_connection(("127.0.0.1", port), IN_TIME_S) as asking:
            asking.sendall(WHOLE.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
            assert asking.recv(100).startswith(b"HTTP/1.1 200 OK")
        assert time.monotonic() - began < IN_TIME_S
        for each in held:
            each.close()
        gateway.terminate()
        _, logged = gateway.communicate(timeout=60)
    assert len(logged.splitlines()) < 20, logged


def few() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 256))
