"""Signs of life of a call: empty messages that a service sends while it has nothing to say, as often as it is asked to.

A ping shows that a connection lives, but not that each call on it does. In plaintext a damaged frame may keep a request
from its service, or the end of a call from its caller, while pings and other calls pass. Without signs, a caller that
has no deadline would wait for ever. No torch here.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

KEY = "bagel-alive-ms"
"""The metadata with which a caller asks for them."""
SIGN = b""
"""No message of ours is empty."""
SHORTEST_S = 0.05
_OFTEN = 4
"""Signs within the time that a caller waits for one."""


def asking(silence_s: float) -> tuple[tuple[str, str], ...]:
    """The metadata of a call that is given up after a silence of that length."""
    return ((KEY, str(int(silence_s / _OFTEN * 1000))),) if math.isfinite(silence_s) else ()


def asked_s(metadata: Any) -> float | None:
    """How often a call's metadata ask for signs; None if they do not."""
    told = next((value for key, value in metadata or () if key == KEY), None)
    return max(int(told) / 1000, SHORTEST_S) if isinstance(told, str) and told.isdecimal() else None


@asynccontextmanager
async def signs(every_s: float | None, send: Callable[[], Awaitable[None]]) -> AsyncIterator[None]:
    """Send a sign so often during the block."""
    sending = None if every_s is None else asyncio.create_task(_send(every_s, send))
    try:
        yield
    finally:
        if sending is not None:
            sending.cancel()


async def _send(every_s: float, send: Callable[[], Awaitable[None]]) -> None:
    with suppress(Exception):  # the call has ended, which its own work is told
        while True:
            await asyncio.sleep(every_s)
            await send()
