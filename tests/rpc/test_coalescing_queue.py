"""Many texts at once: what a slow reader has not taken yet comes as one piece, and nothing is lost."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from bagel.rpc.coalescing_queue import CoalescingQueue
from bagel_thinker.post import Post


def _texts(one: object, other: object) -> object | None:
    return one + other if isinstance(one, str) and isinstance(other, str) else None


def test_what_piles_up_is_read_as_one_and_other_things_keep_their_place() -> None:
    async def run() -> list[object]:
        queue: CoalescingQueue[object] = CoalescingQueue(_texts)
        for item in ("a", "b", 1, "c", "d", 2, 3):
            queue.put(item)
        return [await queue.get() for _ in range(5)]

    assert asyncio.run(run()) == ["ab", 1, "cd", 2, 3]


def test_a_reader_who_waits_gets_each_item_as_it_comes() -> None:
    async def run() -> list[object]:
        queue: CoalescingQueue[object] = CoalescingQueue(_texts)
        read: list[object] = []

        async def reader() -> None:
            while (item := await queue.get()) is not None:
                read.append(item)

        reading = asyncio.create_task(reader())
        for item in ("a", "b", "c", None):
            await asyncio.sleep(0)
            queue.put(item)
            await asyncio.sleep(0)
        await asyncio.wait_for(reading, 5)
        return read

    assert asyncio.run(run()) == ["a", "b", "c"]


def test_what_a_thread_posts_arrives_in_order_and_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    wakes = 0

    async def run() -> str:
        loop = asyncio.get_running_loop()
        threadsafe = loop.call_soon_threadsafe

        def counted(call: Any) -> Any:
            nonlocal wakes
            wakes += 1
            return threadsafe(call)

        monkeypatch.setattr(loop, "call_soon_threadsafe", counted)
        queue: CoalescingQueue[object] = CoalescingQueue(_texts)
        post = Post(loop)

        def write() -> None:
            for i in range(1000):
                post.send(queue.put, f"{i} ")

        thread = threading.Thread(target=write)
        thread.start()
        thread.join()  # the loop does not look meanwhile
        text = await asyncio.wait_for(queue.get(), 5)
        post.send(queue.put, "end")
        assert await asyncio.wait_for(queue.get(), 5) == "end"
        return str(text)

    assert asyncio.run(run()).split() == [str(i) for i in range(1000)]
    assert wakes == 2


def test_a_post_to_a_closed_loop_is_dropped() -> None:
    loop = asyncio.new_event_loop()
    post = Post(loop)
    loop.close()
    post.send(lambda event: None, "nobody listens")
