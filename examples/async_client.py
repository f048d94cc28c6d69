"""Follow one picture and cancel another, at the same time, with asyncio.

bagel serve
python -m examples.async_client 127.0.0.1:50051 pictures
"""

from __future__ import annotations

import asyncio
import sys
from contextlib import aclosing
from pathlib import Path

from bagel.client import AsyncClient
from bagel.events import Preview, Result, StepDone, TextDelta


async def main(address: str, folder: Path) -> None:
    """Write pictures and previews to the folder, the think text and the progress to stdout."""
    folder.mkdir(parents=True, exist_ok=True)
    async with AsyncClient(address) as client, asyncio.TaskGroup() as group:
        group.create_task(watch(client, folder))
        group.create_task(cancel(client))


async def watch(client: AsyncClient, folder: Path) -> None:
    """Follow a picture from its think text to its last step."""
    events = client.stream("four small pink hearts", think=True, partial_images=3, seed=7, steps=24)
    async for event in events:
        match event:
            case TextDelta():
                print(event.text, end="", flush=True)
            case StepDone():
                print(f"step {event.step} of {event.steps}")
            case Preview():
                event.image.save(folder / f"preview-{event.number}.png")
            case Result(image=image) if image is not None:
                image.save(folder / "picture.png")


async def cancel(client: AsyncClient) -> None:
    """Leave a stream early, which stops the work in every service within a step."""
    # aclosing closes the stream on return; without it, the stream stays open until it is garbage collected.
    async with aclosing(client.stream("a green triangle", seed=7, steps=500)) as events:
        async for event in events:
            if isinstance(event, StepDone) and event.step == 3:
                print("given up after step 3")
                return


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], Path(sys.argv[2] if len(sys.argv) > 2 else "pictures")))
