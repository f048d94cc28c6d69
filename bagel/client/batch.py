"""Several requests at once to one gateway, for code that is not async. No torch here."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from queue import SimpleQueue
from threading import Thread
from typing import Any

from PIL.Image import Image

from bagel.client.async_client import AsyncClient
from bagel.client.calls import PromptInput
from bagel.effect import effective
from bagel.events import Result, ServiceEvent
from bagel.request import Request
from bagel.rpc.transport import PLAINTEXT, Security

ENDING_S = 1.0
"""Seconds that a call has to end after it was left."""
AT_ONCE = 8
"""Requests of one call that are under way together: more would only wait elsewhere, until they are refused as busy."""
OnServiceEvent = Callable[[ServiceEvent], None]
Inbox = SimpleQueue[ServiceEvent | BaseException | None]


@dataclass(frozen=True)
class Ask:
    """One request as the client takes it; options are those given, by their names in bagel.request."""

    prompt: PromptInput
    modality: str
    image: Image | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


def ask_of(request: Request) -> Ask:
    """A resolved request with every setting that has an effect on it, so that the gateway fills none of these in."""
    options = {name: getattr(request, name) for name in ("seed", "think", "max_think_tokens", "negative_prompt")}
    options["posterior"] = request.posterior
    if not request.modality.makes_image:  # max_tokens bounds the thought and the answer together, once resolved
        del options["max_think_tokens"]
    for settings in (request.text, request.image):
        options |= {each.name: getattr(settings, each.name) for each in fields(settings)}
    return Ask(request.prompt, request.modality, options=effective(request, options))


def generate_all(
    target: str,
    asks: Sequence[Ask],
    on_event: OnServiceEvent | None = None,
    *,
    at_once: int = AT_ONCE,
    security: Security = PLAINTEXT,
    api_key: str | None = None,
) -> list[Result]:
    """The results of all requests, in their order; on_event sees what happens meanwhile, in the calling thread.

    at_once of them are under way together. Several are all checked before any is begun; an InvalidRequest has the
    index of the one that it is about. Raises the first error there is, its own or on_event's, and cancels the others.
    """
    results: dict[int, Result] = {}
    with events_of(target, asks, at_once=at_once, security=security, api_key=api_key) as events:
        for event in events:
            if isinstance(event, Result):
                results[event.index] = event
            if on_event is not None:
                on_event(event)
    return [results[index] for index in range(len(asks))]


@contextmanager
def events_of(
    target: str,
    asks: Sequence[Ask],
    *,
    at_once: int = AT_ONCE,
    security: Security = PLAINTEXT,
    api_key: str | None = None,
) -> Iterator[Iterator[ServiceEvent]]:
    """What happens to the requests, as it happens; leaving ends those that are still under way."""
    inbox: Inbox = SimpleQueue()
    loop = asyncio.new_event_loop()
    task = loop.create_task(_ask_all(target, asks, at_once, inbox, security, api_key))
    thread = Thread(target=_run, args=(loop, task), name="bagel requests", daemon=True)
    thread.start()
    try:
        yield _drain(inbox)
    finally:
        loop.call_soon_threadsafe(task.cancel)
        thread.join()
        loop.close()


def _run(loop: asyncio.AbstractEventLoop, task: asyncio.Task[None]) -> None:
    with suppress(asyncio.CancelledError):
        loop.run_until_complete(task)
    loop.run_until_complete(loop.shutdown_asyncgens())
    if left := asyncio.all_tasks(loop):  # gRPC's own, of a cancelled call: cut short, it leaves the connection open
        loop.run_until_complete(asyncio.wait(left, timeout=ENDING_S))


def _drain(inbox: Inbox) -> Iterator[ServiceEvent]:
    while (item := inbox.get()) is not None:
        if isinstance(item, BaseException):
            raise item
        yield item


async def _ask_all(
    target: str, asks: Sequence[Ask], at_once: int, inbox: Inbox, security: Security, api_key: str | None
) -> None:
    """Fill the inbox: events, then None or the error that ended it."""
    requests = [{"prompt": ask.prompt, "modality": ask.modality, "image": ask.image, **ask.options} for ask in asks]
    try:
        async with AsyncClient(target, security, api_key=api_key) as client:
            if len(requests) > 1:
                await client.check_many(requests, at_once=1)  # so that none is too busy for another of the same call
            await client.generate_many(requests, inbox.put, at_once=at_once)
        inbox.put(None)
    except Exception as error:
        inbox.put(error)
