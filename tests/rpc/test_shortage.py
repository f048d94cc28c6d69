"""What the machine refuses a service is told as a shortage, and not as a bug."""

from __future__ import annotations

import asyncio
import errno

import pytest

from bagel.errors import BagelError, Busy, OutOfMemory
from tests.gateway_stages import deployment


@pytest.mark.parametrize(
    ("raised", "told"),
    [
        (OSError(errno.EMFILE, "Too many open files"), Busy),
        (RuntimeError("can't start new thread"), Busy),
        (MemoryError(), OutOfMemory),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), OutOfMemory),
    ],
    ids=["files", "threads", "memory", "memory of the kernel"],
)
def test_a_shortage_is_told_by_its_kind(raised: Exception, told: type[BagelError]) -> None:
    async def main() -> None:
        async with deployment() as running:
            running.thinkers[0].failure = raised
            with pytest.raises(told, match="try again later"):
                await running.client.generate("a cup", modality="text2text")

    asyncio.run(main())
