"""The campaign's own honesty: what it plants is planted, and a seed says all of a round."""

from __future__ import annotations

import asyncio
import random
import resource
import socket
import struct
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from tests.campaign.faults import plan
from tests.campaign.frames import HEAD, PREFACE, PREFIX, Framed
from tests.campaign.machine import limit
from tests.campaign.plants import PLANTS, plant
from tests.campaign.proxy import Link, NetFault

LINKS = ["client>gateway/grpc", "client>gateway/http", "dit-0>thinker-0", "gateway>dit-0", "gateway-single>single"]
AT_ONCE = struct.pack("ii", 1, 0)
"""Of SO_LINGER: a connection that is closed is reset."""


@pytest.mark.parametrize("name", PLANTS)
def test_each_fault_of_the_product_can_still_be_planted(name: str, tmp_path: Path) -> None:
    plant(name, tmp_path / "code")
    for file, _, new in PLANTS[name].changes:
        assert new in (tmp_path / "code" / file).read_text()


def test_a_round_is_all_of_its_seed_and_number() -> None:
    rounds = [plan(7, number, LINKS, tls=number % 2 == 1) for number in range(60)]
    assert rounds == [plan(7, number, LINKS, tls=number % 2 == 1) for number in range(60)]
    assert {each.flavour for each in rounds} == {"network", "pages", "clients", "peers", "process"}
    assert rounds != [plan(8, number, LINKS, tls=number % 2 == 1) for number in range(60)]


@pytest.mark.parametrize("kind", ["page-twice", "page-late", "page-header", "page-payload", "page-lost"])
def test_a_fault_of_pages_hits_one_page_and_leaves_the_other_frames_whole(kind: str) -> None:
    chance = random.Random(kind)
    head = b"\x00\x00\x78\x00\x00\x00\x00\x00\x01"
    pages = [head + bytes(PREFIX) + b"\x0a\x10" + chance.randbytes(0x78 - PREFIX - 2) for _ in range(3)]
    settings = b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"
    sent = b"".join((settings, pages[0], settings, *pages[1:]))
    fault = NetFault(kind, True, 0, 0.0, 3)
    framed = Framed()
    # In pieces that end anywhere, as a socket has them.
    come = b"".join(framed.take(sent[at : at + 50], [fault]) for at in range(0, len(sent), 50))
    assert fault.fired and come != sent
    assert len(come) == len(sent) + (len(pages[0]) if kind == "page-twice" else 0)
    assert all(page in come for page in pages[1:]) and come.count(settings) >= 2 and len(pages[0]) == HEAD + 0x78


@pytest.mark.parametrize("kind", ["frame-head", "frame-lost"])
def test_a_fault_of_frames_hits_the_head_of_one_of_a_call(kind: str) -> None:
    preface, settings = bytes(PREFACE), b"\x00\x00\x04\x04\x00\x00\x00\x00\x00text"
    calls = [b"\x00\x00\x04\x01\x04\x00\x00\x00" + bytes((stream,)) + b"head" for stream in (1, 3, 5)]
    sent, fault = b"".join((preface, settings, *calls)), NetFault(kind, False, 1, 0.0, 3)
    framed = Framed(preface=True)
    come = b"".join(framed.take(sent[at : at + 7], [fault]) for at in range(0, len(sent), 7))
    assert fault.fired and len(come) == len(sent)
    begin = len(preface + settings + calls[0])
    assert (come[:begin], come[-len(calls[2]) :]) == (sent[:begin], calls[2])
    changed = [at - begin for at in range(len(sent)) if come[at] != sent[at]]
    assert len(changed) == 1 and 3 <= changed[0] < HEAD


@pytest.mark.parametrize("kind", ["delay", "reorder", "dribble", "stall"])
def test_what_is_only_slow_arrives_as_it_was_sent(kind: str) -> None:
    async def main() -> None:
        sent = random.Random(kind).randbytes(5000)

        async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(await reader.readexactly(len(sent)))
            await writer.drain()
            writer.close()

        server = await asyncio.start_server(echo, "127.0.0.1", 0)
        link = Link("any", f"127.0.0.1:{server.sockets[0].getsockname()[1]}")
        await link.open()
        faults = [NetFault(kind, down, 30, 0.05, 1) for down in (False, True)]
        for fault in faults:
            link.arm(fault)
        reader, writer = await asyncio.open_connection("127.0.0.1", link.port)
        writer.write(sent)
        assert await reader.readexactly(len(sent)) == sent and all(fault.fired for fault in faults)
        writer.close()
        await writer.wait_closed()
        await link.close()
        server.close()

    asyncio.run(main())


def test_a_reset_of_one_end_reaches_the_other() -> None:
    async def main() -> None:
        async def reset(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readexactly(1)
            writer.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, AT_ONCE)
            writer.transport.abort()

        server = await asyncio.start_server(reset, "127.0.0.1", 0)
        link = Link("any", f"127.0.0.1:{server.sockets[0].getsockname()[1]}")
        await link.open()
        reader, writer = await asyncio.open_connection("127.0.0.1", link.port)
        writer.write(b"?")
        with suppress(ConnectionResetError):
            async with asyncio.timeout(5):
                assert await reader.read() == b""
        writer.transport.abort()
        await link.close()
        server.close()

    asyncio.run(main())


def test_limits_that_overlap_leave_a_process_as_it_was() -> None:
    async def overlap(pid: int) -> list[bool]:
        return await asyncio.gather(*(limit(pid, resource.RLIMIT_NOFILE, 20, seconds) for seconds in (0.05, 0.1)))

    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        before = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
        assert asyncio.run(overlap(process.pid)) == [True, True]
        after = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
        process.kill()
    assert after == before
