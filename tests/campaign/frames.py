"""Faults in HTTP/2 frames: those with a page of K/V, and the heads of any that belong to a call."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.campaign.proxy import NetFault

PREFACE = 24
"""Bytes that a client begins with."""
HEAD = 9
DATA, HEADERS, UNKNOWN = 0, 1, 0xFA
TYPE, FLAGS = 3, 4
"""Where they are in a frame's head; its stream comes behind them."""
PREFIX = 5
"""gRPC's own: a flag and a length before each message."""
LAYER, LAYER_TAG = 19, 0x10
"""Where a page says its layer, if that is not 0: behind its digest."""
HEADER_BYTES = 45
"""A page's header, from its digest to its checksum."""


class Framed:
    """One direction of one connection, cut into frames."""

    def __init__(self, *, preface: bool = False) -> None:
        """preface: it is a client's side."""
        self._rest = b""
        self._held: bytes = b""
        self._before = PREFACE if preface else 0

    def take(self, data: bytes, faults: Sequence[NetFault]) -> bytes:
        """What goes on: whole frames, some of them changed."""
        self._rest += data
        out: list[bytes] = []
        if self._before:
            begin, self._rest = self._rest[: self._before], self._rest[self._before :]
            self._before -= len(begin)
            out.append(begin)
        while len(self._rest) >= HEAD and len(self._rest) >= (end := HEAD + int.from_bytes(self._rest[:3])):
            frame, self._rest = self._rest[:end], self._rest[end:]
            fault = next((each for each in faults if _is_due(each, frame)), None)
            out.append(frame if fault is None else self._hit(frame, fault))
            if fault is None and self._held:
                out.append(self._held)
                self._held = b""
        return b"".join(out)

    def _hit(self, frame: bytes, fault: NetFault) -> bytes:
        fault.fired = True
        chance = random.Random(fault.seed)
        match fault.kind:
            case "page-twice":
                return frame + frame
            case "page-late":  # after the next frame: of another page, or of another call
                held, self._held = self._held, frame
                return held
            case "page-header":
                at = HEAD + PREFIX + LAYER
                if frame[at - 1] == LAYER_TAG and chance.random() < 0.5:  # another layer's page, by all that it says
                    return frame[:at] + bytes((frame[at] ^ (1 << chance.randrange(2)),)) + frame[at + 1 :]
                return flipped(frame, HEAD + PREFIX + chance.randrange(HEADER_BYTES), chance)
            case "page-payload":
                return flipped(
                    frame, chance.randrange(min(len(frame) - 1, HEAD + PREFIX + HEADER_BYTES), len(frame)), chance
                )
            case "page-lost":  # its bytes stay, so that the frames after it are still read: a page of zeros
                return frame[: HEAD + PREFIX] + bytes(len(frame) - HEAD - PREFIX)
            case "frame-head":  # of its type, its flags or its stream: whose it is, or that it is the last
                return flipped(frame, TYPE + chance.randrange(HEAD - TYPE), chance)
            case "frame-lost":  # taken for one of an extension, which is skipped
                return frame[:TYPE] + bytes((UNKNOWN,)) + frame[TYPE + 1 :]
            case _:
                raise AssertionError(fault.kind)


def _is_due(fault: NetFault, frame: bytes) -> bool:
    """Whether it hits this frame; one of heads lets a few of them pass."""
    if fault.fired:
        return False
    if fault.kind.startswith("page-"):
        return is_page(frame)
    if frame[TYPE] not in (DATA, HEADERS):
        return False
    fault.skip -= 1
    return fault.skip < 0


def is_page(frame: bytes) -> bool:
    """Whether a frame begins with a page: DATA, a message whose first field is a digest of 16 bytes."""
    start = HEAD + PREFIX
    return frame[3] == DATA and len(frame) > 100 and frame[start : start + 2] == b"\x0a\x10"


def flipped(frame: bytes, at: int, chance: random.Random) -> bytes:
    """The frame with one bit of that byte changed."""
    damaged = bytearray(frame)
    damaged[min(at, len(frame) - 1)] ^= 1 << chance.randrange(8)
    return bytes(damaged)
