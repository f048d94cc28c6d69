"""Frames between a pool and its workers: JSON and a file's bytes to a worker, JSON alone back.

No pickle: a worker decodes untrusted files, so the service must not run what a worker sends.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import struct
from contextlib import suppress
from typing import IO, Any

_HEAD = struct.Struct("<IQ")  # bytes of the JSON, bytes of the data
_ANSWER = struct.Struct("<I")  # bytes of the JSON
_PIECE = 2**20


def widen(pipe: int) -> None:
    """Let a pipe hold a mebibyte, of 64 KiB: both ends wait for each other less. Nothing where the system does not."""
    # macOS has no such call, and Linux refuses it to a user of many wide pipes.
    with suppress(AttributeError, OSError):
        fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, _PIECE)


async def send(writer: asyncio.StreamWriter, fields: dict[str, Any], data: bytes) -> None:
    """Send a worker one frame."""
    text = json.dumps(fields).encode()
    writer.write(_HEAD.pack(len(text), len(data)) + text)
    # In pieces: asyncio copies what the pipe does not take at once, and a whole file would be held twice.
    for at in range(0, len(data), _PIECE):
        await writer.drain()
        writer.write(memoryview(data)[at : at + _PIECE])
    await writer.drain()


async def receive(reader: asyncio.StreamReader) -> dict[str, Any]:
    """Receive a worker's next answer; IncompleteReadError if it has ended, ValueError for what is none."""
    (length,) = _ANSWER.unpack(await reader.readexactly(_ANSWER.size))
    fields = json.loads(await reader.readexactly(length))
    if not isinstance(fields, dict):
        raise ValueError("an answer has fields")
    return fields


def read(stream: IO[bytes]) -> tuple[dict[str, Any], bytes] | None:
    """Read the next frame of a worker's input; None at its end."""
    head = stream.read(_HEAD.size)
    if len(head) < _HEAD.size:
        return None
    length, nbytes = _HEAD.unpack(head)
    fields: dict[str, Any] = json.loads(stream.read(length))
    return fields, stream.read(nbytes)


def write(stream: IO[bytes], fields: dict[str, Any]) -> None:
    """Write a worker's answer."""
    text = json.dumps(fields).encode()
    stream.write(_ANSWER.pack(len(text)) + text)
    stream.flush()
