"""Several requests at once to one gateway, for code that is not async. No torch here."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields
from queue import SimpleQueue
from threading import Thread
from typing import Any

from bagel.client.async_client import AsyncClient
from bagel.client.calls import OnServiceEvent
from bagel.effect import effective
from bagel.events import Result, ServiceEvent
from bagel.request import Request
from bagel.rpc.transport import PLAINTEXT, Security

ENDING_S = 1.0
"""Seconds that a call has to end after it was left."""
AT_ONCE = 8
"""Requests of one call that are under way together: more would only wait elsewhere, until they are refused as busy."""
Inbox = SimpleQueue[ServiceEvent | BaseException | None]


def ask_of(request: Request) -> dict[str, Any]:
    """The arguments of `generate` for a resolved request.

    They have every setting that has an effect on it, so that the gateway fills none of these in.
    """
    options = {name: getattr(request, name) for name in ("seed", "think", "max_think_tokens", "negative_prompt")}
    options["posterior"] = request.posterior
    if not request.modality.makes_image:  # max_tokens bounds the thought and the answer together, once resolved
        del options["max_think_tokens"]
    for settings in (request.text, request.image):
        options |= {each.name: getattr(settings, each.name) for each in fields(settings)}
    return {"prompt": request.prompt, "modality": request.modality, **effective(request, options)}


def generate_all(
    target: str,
    requests: Sequence[Mapping[str, Any] | str],
    on_event: OnServiceEvent | None = None,
    *,
    at_once: int = AT_ONCE,
    security: Security = PLAINTEXT,
    api_key: str | None = None,
    check: bool = True,
) -> list[Result]:
    """The results of requests, in their order; each is the arguments of `generate`, or a prompt alone.

    on_event sees what happens meanwhile, in the calling thread. at_once of them are under way together. check: several
    are all checked before any is begun, and an InvalidRequest has the index of the one that it is about. Raises the
    first error there is, its own or on_event's, and cancels the others.
    """
    results: dict[int, Result] = {}
    with events_of(target, requests, at_once=at_once, security=security, api_key=api_key, check=check) as events:
        for event in events:
            if isinstance(event, Result):
                results[event.index] = event
            if on_event is not None:
                on_event(event)
    return [results[index] for index in range(len(requests))]


@contextmanager
def events_of(
    target: str,
    requests: Sequence[Mapping[str, Any] | str],
    *,
    at_once: int = AT_ONCE,
    security: Security = PLAINTEXT,
    api_key: str | None = None,
    check: bool = True,
) -> Iterator[Iterator[ServiceEvent]]:
    """What happens to the requests, as it happens; leaving ends those that are still under way."""
    inbox: Inbox = SimpleQueue()
    loop = asyncio.new_event_loop()
    asking = _ask_all(target, requests, inbox, at_once=at_once, security=security, api_key=api_key, check=check)
    task = loop.create_task(asking)
    # The loop runs in a thread of its own, while the caller's thread takes the events.
    thread = Thread(target=_run, args=(loop, task), name="bagel requests", daemon=True)
    thread.start()
    try:
        yield _drain(inbox)
    finally:
        # Tasks are not thread-safe, and the loop may be asleep until this wakes it.
        loop.call_soon_threadsafe(task.cancel)
        thread.join()
        loop.close()


def _run(loop: asyncio.AbstractEventLoop, task: asyncio.Task[None]) -> None:
    with suppress(asyncio.CancelledError):
        loop.run_until_complete(task)
    loop.run_until_complete(loop.shutdown_asyncgens())
    if left := asyncio.all_tasks(loop):  # gRPC's own, of a cancelled call: cut short, it leaves the connection open
        loop.run_until_complete(asyncio.wait(left, timeout=ENDING_S))
    if task.cancelled():
        gc.collect()  # a cancelled call may hold its connection, open, in a cycle


def _drain(inbox: Inbox) -> Iterator[ServiceEvent]:
    while (item := inbox.get()) is not None:
        if isinstance(item, BaseException):
            raise item
        yield item


async def _ask_all(
    target: str,
    requests: Sequence[Mapping[str, Any] | str],
    inbox: Inbox,
    *,
    at_once: int,
    security: Security,
    api_key: str | None,
    check: bool,
) -> None:
    """Fill the inbox: events, then None or the error that ended it."""
    try:
        async with AsyncClient(target, security, api_key=api_key) as client:
            if check and len(requests) > 1:
                await client.check_many(requests, at_once=1)  # so that none is too busy for another of the same call
            await client.generate_many(requests, inbox.put, at_once=at_once)
        inbox.put(None)
    except Exception as error:
        inbox.put(error)
