"""What is damaged on its way in plaintext is found, and peers of another release are refused: nothing is dropped."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import grpc
import pytest

from bagel.client import AsyncClient
from bagel.errors import InvalidRequest, NoBackend, RemoteError, TransferDamaged
from bagel.events import Result, ServiceEvent
from bagel.rpc import integrity, transport
from bagel.rpc.errors import from_rpc_error
from bagel.v1 import gateway_pb2
from bagel.v1.gateway_pb2_grpc import GatewayServiceStub
from tests import gateway_stages
from tests.gateway_stages import deployment

FRAME_WITHOUT_END = b"\x00\x40\x00\x00\x00\x00\x00\x00\x01"
"""The head of a frame of 16 KiB for a connection's first call: all that follows is taken for its content."""
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, END_STREAM = 0, 1, 1
"""Of HTTP/2's frames."""
ASKED: dict[str, Any] = {"prompt": "a cup", "modality": "text2text", "max_tokens": 5}


class Damage:
    """A port that leads to another one, and changes bytes of one direction where they pass in one piece."""

    def __init__(self, target: str, up: tuple[bytes, bytes] | None, down: tuple[bytes, bytes] | None) -> None:
        self._target, self._up, self._down = target, up, down
        self._writers: list[asyncio.StreamWriter] = []
        self.inserted = b""
        """What comes before the next bytes that go up."""

    async def __aenter__(self) -> str:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for writer in self._writers:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, _, port = self._target.rpartition(":")
        theirs, out = await asyncio.open_connection(host, int(port))
        self._writers += [writer, out]
        await asyncio.gather(self._pass(reader, out, self._up, True), self._pass(theirs, writer, self._down, False))

    async def _pass(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, change: tuple[bytes, bytes] | None, up: bool
    ) -> None:
        with suppress(OSError):
            while data := await reader.read(1 << 16):
                if up:
                    data, self.inserted = self.inserted + data, b""
                writer.write(data if change is None else data.replace(*change))
                await writer.drain()
        writer.close()


class Losing(Damage):
    """Keeps frames of calls about a cup to itself: the request, with its end or without, the answer's begin or end."""

    def __init__(self, target: str, what: str) -> None:
        super().__init__(target, None, None)
        self._what, self._calls = what, set[bytes]()
        self.lost = 0

    async def _pass(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, change: tuple[bytes, bytes] | None, up: bool
    ) -> None:
        with suppress(OSError, asyncio.IncompleteReadError):
            if up:
                writer.write(await reader.readexactly(len(PREFACE)))
            while head := await reader.readexactly(9):
                body = await reader.readexactly(int.from_bytes(head[:3]))
                if self._is_lost(head, body, up):
                    self.lost += 1
                    if self._what == "message":  # its end comes, which the same frame has
                        writer.write(bytes(3) + head[3:])
                else:
                    writer.write(head + body)
        writer.close()

    def _is_lost(self, head: bytes, body: bytes, up: bool) -> bool:
        stream = head[5:]
        if up and b"a cup" in body:
            self._calls.add(stream)
        is_request = up and stream in self._calls  # what says that there is no more of it, too
        if self._what == "message":
            return is_request and b"a cup" in body
        if self._what == "request":
            return is_request
        is_answer = not up and stream in self._calls
        if self._what == "begin":
            return is_answer and head[3] == DATA and not self.lost
        return is_answer and head[3] == HEADERS and bool(head[4] & END_STREAM)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["request", "end"])
def test_a_call_between_services_that_is_lost_on_a_connection_that_lives_is_given_up(what: str) -> None:
    """Health checks pass, so that nobody is silent; and the client has no deadline."""

    async def main() -> None:
        async with deployment() as running:
            (backend,) = running.gateway.backends.thinkers
            losing = Losing(backend.address.target, what)
            async with (
                losing as address,
                deployment(thinkers_at=[f"thinker-0={address}"], silence_timeout_s=1) as other,
            ):
                async with asyncio.timeout(20):
                    with pytest.raises(RemoteError, match="answers, but has not said for 2 s") as told:
                        await other.client.generate(**ASKED)
                    assert told.value.grpc_status == "UNAVAILABLE" and losing.lost
                    assert (await other.client.generate(**{**ASKED, "prompt": "a hat"})).text == "so be it"

    asyncio.run(main())


def test_a_think_text_whose_context_was_never_named_ends_its_request() -> None:
    """It waits for the contexts, and its call for it, so that no silence would end it."""

    async def main() -> None:
        async with deployment("bagel_think") as running:
            (thinker,), (backend,) = running.thinkers, running.gateway.backends.thinkers
            thinker.go.clear()  # the first message has a frame of its own
            losing = Losing(backend.address.target, "begin")
            async with losing as address, deployment("bagel_think", thinkers_at=[f"thinker-0={address}"]) as other:
                asking = asyncio.create_task(other.client.generate("a cup", height=16, width=16))
                while not (losing.lost or asking.done()):
                    await asyncio.sleep(0.01)
                thinker.go.set()
                async with asyncio.timeout(20):
                    with pytest.raises(TransferDamaged, match="what it said first was lost on its way"):
                        await asking

    asyncio.run(main())


def test_a_request_that_comes_to_another_method_is_not_told_as_wrong() -> None:
    """As where a frame with headers is lost, by which later ones are packed."""

    async def main() -> None:
        async with deployment() as running:
            (backend,) = running.gateway.backends.dits
            to_another = Damage(backend.address.target, (b"DitService/Generate", b"DitService/Describe"), None)
            async with to_another as address, deployment(dits_at=[f"dit-0={address}"]) as other:
                with pytest.raises((TransferDamaged, RemoteError), match="damaged on its way") as told:
                    await other.client.generate("a cup", height=16, width=16)
                assert told.value.grpc_status == "UNAVAILABLE"

    asyncio.run(main())


def test_a_request_that_is_lost_before_its_end_is_not_told_as_wrong() -> None:
    async def main() -> None:
        async with (
            deployment() as running,
            Losing(running.target, "message") as address,
            AsyncClient(address) as client,
        ):
            with pytest.raises(TransferDamaged, match="damaged on its way; send the request again"):
                await client.generate(**ASKED)
            assert (await client.generate(**{**ASKED, "prompt": "a hat"})).text == "so be it"

    asyncio.run(main())


@pytest.mark.slow
def test_a_call_that_has_nothing_to_say_for_long_lives_by_its_signs() -> None:
    async def main() -> None:
        async with deployment(silence_timeout_s=0.5) as running:
            (thinker,) = running.thinkers
            thinker.go.clear()
            asking = asyncio.create_task(running.client.generate(**ASKED))
            done, _ = await asyncio.wait({asking}, timeout=3.0)  # several silences long
            assert not done
            thinker.go.set()
            assert (await asking).text == "so be it"

    asyncio.run(main())


async def _collect(stream: AsyncIterator[ServiceEvent], events: list[ServiceEvent]) -> None:
    async for event in stream:
        events.append(event)


@pytest.mark.parametrize(
    ("up", "down"),
    [((b"a cup", b"a cut"), None), (None, (b"so be it", b"so be if"))],
    ids=["the request", "the answer"],
)
def test_a_changed_text_is_found_at_the_end_of_its_call(
    up: tuple[bytes, bytes] | None, down: tuple[bytes, bytes] | None
) -> None:
    async def main() -> None:
        async with deployment() as running, Damage(running.target, up, down) as address:
            async with AsyncClient(address) as client:
                events: list[ServiceEvent] = []
                with pytest.raises(TransferDamaged, match="damaged on its way; send the request again"):
                    await _collect(client.stream(**ASKED), events)
                # Who reads no further than the result would else have taken it for right.
                assert events and not any(isinstance(event, Result) for event in events)
            assert (await running.client.generate(**ASKED)).text == "so be it"

    asyncio.run(main())


def test_an_error_about_another_request_than_the_one_that_was_sent_is_not_told_as_its_own() -> None:
    async def main() -> None:
        asked = {**ASKED, "seed": 5, "do_sample": True, "temperature": 1.0}
        one, other = struct.pack("<d", 1.0), struct.pack("<d", -1.0)
        async with deployment() as running:
            damage = Damage(running.target, (one, other), None)
            async with damage as address, AsyncClient(address) as client:
                with pytest.raises(TransferDamaged):
                    await client.generate(**asked)

    asyncio.run(main())


def test_a_refusal_that_has_lost_its_digest_is_not_told_as_the_requests_fault() -> None:
    """As where a frame with headers is lost: names in later ones become others."""

    async def main() -> None:
        async with deployment() as running:
            damage = Damage(running.target, None, (b"bagel-digest-bin", b"bagel-digits-bin"))
            async with damage as address, AsyncClient(address) as client:
                with pytest.raises(TransferDamaged, match="did not say what it received"):
                    await client.generate(**{**ASKED, "max_tokens": 0})
            with pytest.raises(InvalidRequest, match="max_tokens"):
                await running.client.generate(**{**ASKED, "max_tokens": 0})

    asyncio.run(main())


@pytest.mark.slow
def test_a_connection_whose_peer_understands_nothing_any_more_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """It still pings, which counts as life; a minute would pass until gRPC's own limit."""
    limits = {"grpc.keepalive_time_ms": 1000, "grpc.keepalive_timeout_ms": 900, "grpc.http2.ping_timeout_ms": 900}
    for name in ("CHANNEL_OPTIONS", "SERVER_OPTIONS"):
        options = getattr(transport, name)
        assert limits.keys() <= dict(options).keys()
        monkeypatch.setattr(transport, name, tuple((key, limits.get(key, value)) for key, value in options))

    async def main() -> None:
        async with deployment() as running:
            damage = Damage(running.target, None, None)
            async with damage as address, AsyncClient(address) as client:
                running.thinkers[0].go.clear()
                asking = asyncio.create_task(client.generate(**ASKED))
                while not (running.journal.open_calls or asking.done()):
                    await asyncio.sleep(0.01)
                damage.inserted = FRAME_WITHOUT_END
                with pytest.raises(RemoteError):
                    async with asyncio.timeout(20):
                        await asking

    asyncio.run(main())


def test_what_a_thinker_says_is_held_against_its_digest_too() -> None:
    async def main() -> None:
        async with deployment() as running:
            (backend,) = running.gateway.backends.thinkers
            damage = Damage(backend.address.target, None, (b"so be it", b"so be if"))
            async with damage as address, deployment(thinkers_at=[f"thinker-0={address}"]) as other:
                with pytest.raises(TransferDamaged, match="what thinker-0 received and sent"):
                    await other.client.generate(**ASKED)

    asyncio.run(main())


@pytest.mark.parametrize("theirs", [0, integrity.WIRE_VERSION + 1])
def test_a_service_of_another_wire_version_gets_no_request(monkeypatch: pytest.MonkeyPatch, theirs: int) -> None:
    monkeypatch.setattr(gateway_stages, "WIRE_VERSION", theirs)

    async def main() -> None:
        async with deployment(ready=False, backend_timeout_s=0.2) as running:
            with pytest.raises(NoBackend, match=rf"speaks version {theirs or 1}.*run the same release"):
                await running.client.generate(**ASKED)
            assert not running.journal.open_calls and not running.thinkers[0].asked

    asyncio.run(main())


def test_a_field_of_another_release_is_refused_and_not_dropped() -> None:
    async def main() -> None:
        async with deployment() as running, grpc.aio.insecure_channel(running.target) as channel:
            request = gateway_pb2.GenerateRequest()
            request.request.prompt.add().text.text = "a cup"
            request.request.text.MergeFromString(b"\xf8\x3e\x07")  # number 1007
            with pytest.raises(grpc.RpcError) as told:
                async for _ in GatewayServiceStub(channel).Generate(request):
                    pass
            error = from_rpc_error(told.value, "the gateway")
            assert isinstance(error, InvalidRequest) and "fields that this release does not know" in str(error)

    asyncio.run(main())


def test_a_status_that_no_service_of_ours_gives_means_that_the_connection_broke() -> None:
    async def unknown(request: bytes, context: Any) -> bytes:
        await context.abort(grpc.StatusCode.UNKNOWN, "Stream removed")
        return b""

    async def main() -> None:
        server = grpc.aio.server()
        handler: dict[str, Any] = {"Ask": grpc.unary_unary_rpc_method_handler(unknown)}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("any", handler),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            ask: Any = channel.unary_unary("/any/Ask")
            with pytest.raises(grpc.RpcError) as told:
                await ask(b"")
        await server.stop(None)
        for inside in (False, True):
            error = from_rpc_error(told.value, "dit-0", inside=inside)
            assert isinstance(error, RemoteError) and error.grpc_status == "UNAVAILABLE"

    asyncio.run(main())
