"""What a gateway takes of memory: headers of images, never their pixels, and only so many bytes of requests."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import re
import struct
import subprocess
import sys
import urllib.request
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from PIL import Image

from bagel.client import AsyncClient
from bagel.errors import Busy, ConfigError, InvalidImage
from bagel.prompts import ImagePart, TextPart
from bagel.rpc.transport import Host, channel
from bagel.v1 import common_pb2, dit_pb2, dit_pb2_grpc, kv_pb2_grpc, thinker_pb2, thinker_pb2_grpc
from bagel_gateway.images import ImageFile
from bagel_gateway.room import SMALL_BYTES, Room
from bagel_gateway.uploads import bytes_of, field_of, with_prompt
from tests.gateway_stages import Dit, Journal, Thinker, deployment

LIMIT_S = 120


def png(side: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side)).save(buffer, "PNG")
    return buffer.getvalue()


def part(data: bytes) -> common_pb2.Part:
    return common_pb2.Part(image=common_pb2.ImagePart(data=data))


class TestRoom:
    def test_is_bounded_and_given_back(self) -> None:
        room = Room(4 * SMALL_BYTES)
        with room.hold() as one, room.hold() as other:
            one.resize(3 * SMALL_BYTES)
            with pytest.raises(Busy, match="--max-bytes-in-flight, 1048576"):
                other.resize(2 * SMALL_BYTES)
            one.resize(2 * SMALL_BYTES)
            other.resize(2 * SMALL_BYTES)
        assert room.free == room.nbytes

    def test_a_small_request_always_has_room(self) -> None:
        room = Room(SMALL_BYTES + 1)
        with room.hold() as one, room.hold() as other:
            one.resize(SMALL_BYTES + 1)
            other.resize(SMALL_BYTES)


class TestUploads:
    @pytest.mark.parametrize("size", [0, 1, 127, 128, 16_383, 16_384, 3_000_000])
    def test_the_pieces_are_the_message(self, size: int) -> None:
        image = common_pb2.ImagePart(data=b"\x80" * size, for_generation=False, for_understanding=True)
        parts = [common_pb2.Part(text=common_pb2.TextPart(text="é")), common_pb2.Part(image=image)]
        prompt = (TextPart("é"), ImagePart(ImageFile((1, 1), image), for_generation=False))
        settings = thinker_pb2.BuildContextRequest(seed=7, lease_id="one", send_kv=True)
        wanted = thinker_pb2.BuildContextRequest(parts=parts, seed=7, lease_id="one", send_kv=True)
        assert thinker_pb2.BuildContextRequest.FromString(b"".join(with_prompt(settings, "parts", prompt))) == wanted
        assert bytes_of(prompt) >= size
        inner = with_prompt(common_pb2.Request(seed=5), "prompt", prompt)
        whole = b"".join(field_of(dit_pb2.DitServiceGenerateRequest(), "request", inner))
        assert dit_pb2.DitServiceGenerateRequest.FromString(whole).request == common_pb2.Request(seed=5, prompt=parts)


def frame(kind: int, flags: int, stream: int, body: bytes) -> bytes:
    """A frame of HTTP/2."""
    return struct.pack(">I", len(body))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + body


def call_of(stream: int) -> bytes:
    """The beginning of a call of Generate: its headers."""
    headers = {
        ":method": "POST",
        ":scheme": "http",
        ":path": "/bagel.v1.GatewayService/Generate",
        ":authority": "x",
        "content-type": "application/grpc",
        "te": "trailers",
    }
    block = b"".join(
        b"\0" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()
        for name, value in headers.items()
    )
    return frame(1, 4, stream, block)


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, b"")


class Trickle:
    """A caller whose message of 60 MB begins and does not go on."""

    def __init__(self, port: int) -> None:
        self._port = port

    async def __aenter__(self) -> Trickle:
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
        self._writer.write(PREFACE + call_of(1))
        self._writer.write(frame(0, 0, 1, b"\0" + struct.pack(">I", 60_000_000) + bytes(10_000)))
        await self._writer.drain()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._writer.close()

    async def refused(self) -> None:
        """Wait for the end of its call: trailers, a frame of headers that ends the stream."""
        async with asyncio.timeout(LIMIT_S):
            while True:
                head = await self._reader.readexactly(9)
                await self._reader.readexactly(int.from_bytes(head[:3]))
                if head[3] == 1 and head[4] & 1:
                    return


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not true():
            await asyncio.sleep(0.02)


def test_messages_on_their_way_are_bounded_and_texts_pass_them() -> None:
    large = png(16) + bytes(SMALL_BYTES)

    async def main() -> None:
        async with deployment(max_bytes_in_flight=64 * 2**20) as at:
            room = at.gateway.room
            async with Trickle(at.gateway.host.port):
                await until(lambda: room.free < room.nbytes)  # before the second comes, which is then the one refused
                async with Trickle(at.gateway.host.port) as second:
                    await second.refused()
                    assert (await at.client.generate("a text", modality="text2text")).text
                    with pytest.raises(Busy, match="--max-bytes-in-flight"):
                        await at.client.generate("large", modality="img2text", image=large)
            await until(lambda: room.free == room.nbytes)
            assert (await at.client.generate("large", modality="img2text", image=large)).text

    asyncio.run(main())


def test_a_connection_of_calls_without_a_message_keeps_no_turn_from_others() -> None:
    async def main() -> None:
        async with deployment() as at:
            _, writer = await asyncio.open_connection("127.0.0.1", at.gateway.host.port)
            writer.write(PREFACE + b"".join(map(call_of, range(1, 1000, 2))))
            await writer.drain()
            await asyncio.sleep(0.5)  # they are there
            assert (await at.client.generate("a text", modality="text2text", timeout=4)).text
            writer.close()

    asyncio.run(main())


def test_images_of_one_request_are_bounded() -> None:
    async def main() -> None:
        async with deployment(max_images=2, max_image_pixels=40_000) as at:
            for images, wanted in (
                ([png(10)] * 3, "there are 3 images; one request may have 2"),
                ([png(150)] * 2, "45000 pixels or more in all; scale them down to at most 40000"),
            ):
                with pytest.raises(InvalidImage, match=wanted):
                    await at.client.generate([*map(part, images), "what is this?"], modality="img2text")
            assert not at.thinkers[0].asked

    asyncio.run(main())


@pytest.mark.parametrize(("name", "value"), [("max_bytes_in_flight", 2**20), ("max_images", 9), ("max_images", 0)])
def test_limits_are_checked(name: str, value: int) -> None:
    async def main() -> None:
        limits: dict[str, Any] = {name: value}
        with pytest.raises(ConfigError, match=name.replace("_", "[_-]")):
            async with deployment(**limits):
                pass

    asyncio.run(main())


@asynccontextmanager
async def gateway_process() -> AsyncIterator[tuple[subprocess.Popen[bytes], str, str]]:
    """A gateway in a process of its own, with its addresses for gRPC and HTTP, before stages that do nothing."""
    journal = Journal()
    thinker, dit = Thinker(journal), Dit(journal, single_stage=False, kv_fingerprint=b"k")
    hosts = [Host("127.0.0.1:0", ()), Host("127.0.0.1:0", ())]
    thinker_pb2_grpc.add_ThinkerServiceServicer_to_server(thinker, hosts[0].methods)
    kv_pb2_grpc.add_KvBlocksServiceServicer_to_server(thinker.leases, hosts[0].methods)
    dit_pb2_grpc.add_DitServiceServicer_to_server(dit, hosts[1].methods)
    for host in hosts:
        await host.start()
        await host.ready()
    stages = [f"--thinker=thinker-0=127.0.0.1:{hosts[0].port}", f"--dit=dit-0=127.0.0.1:{hosts[1].port}"]
    command = [sys.executable, "-m", "bagel_gateway", "--listen=127.0.0.1:0", "--http=127.0.0.1:0", *stages]
    gateway = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        assert gateway.stdout is not None
        listening = json.loads(await asyncio.to_thread(gateway.stdout.readline))
        await asyncio.to_thread(gateway.stdout.readline)  # ready
        yield gateway, listening["address"], listening["http"]
    finally:
        gateway.kill()
        gateway.wait()
        gateway.stdout.close()  # type: ignore[union-attr]
        for host in hosts:
            await host.drain(0)


def test_pictures_that_compress_to_nothing_take_no_memory() -> None:
    """Eight requests of 4 x 64 megapixels, each 1 GB as pixels; the compose file gives a gateway 1 GiB in all."""

    async def main() -> None:
        data = png(8000)
        url = {"url": "data:image/png;base64," + base64.b64encode(data).decode()}
        content = [*[{"type": "image_url", "image_url": url}] * 4, {"type": "text", "text": "what are these?"}]
        body = json.dumps({"messages": [{"role": "user", "content": content}]}).encode()

        def ask(http: str) -> int:
            headers = {"Content-Type": "application/json"}
            request = urllib.request.Request(f"http://{http}/v1/chat/completions", body, headers)
            with urllib.request.urlopen(request, timeout=LIMIT_S) as response:
                return int(response.status)

        async with gateway_process() as (gateway, address, http), AsyncClient(address) as client:
            prompt: list[Any] = [*[part(data)] * 4, "what are these?"]
            chats = [asyncio.to_thread(ask, http) for _ in range(4)]
            calls = [client.generate(prompt, modality="img2text") for _ in range(4)]
            assert await asyncio.gather(*chats) == [200] * 4
            assert all(result.text for result in await asyncio.gather(*calls))
            status = Path(f"/proc/{gateway.pid}/status").read_text()
            most = re.search(r"VmHWM:\s+(\d+) kB", status)
            assert most is not None and int(most[1]) < 250_000

    asyncio.run(main())


def test_a_request_that_does_not_come_has_its_time() -> None:
    async def run() -> None:
        async with (
            asyncio.timeout(LIMIT_S),
            deployment(grpc_message_timeout_s=0.3) as made,
            channel(f"127.0.0.1:{made.gateway.host.port}") as connection,
        ):
            call: Any = connection.stream_unary("/bagel.v1.GatewayService/Generate")()
            assert await call.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            assert "--grpc-message-timeout" in await call.details()

    asyncio.run(run())
