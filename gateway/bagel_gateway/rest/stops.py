"""Texts that end an answer: what may be the start of one is held back, and nothing is given out from it on."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import aclosing

from bagel.v1 import common_pb2, gateway_pb2
from bagel_gateway.rest.serve import Events

Event = gateway_pb2.GenerateResponse


class Stop:
    """One answer as it comes, up to the first of its stop texts."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts, self._held, self._tokens, self._prompt = tuple(texts), "", 0, 0
        self.given = ""
        """What was given out."""
        self.stopped = False
        """Whether a stop text came."""

    def push(self, text: str) -> str:
        """Take in more of the answer; what of it is certain to be given out."""
        text = self._held + text
        # The one that is complete first, wherever pieces are cut; of several that end together, the longest.
        found = [(at + len(stop), at) for stop in self._texts if (at := text.find(stop)) >= 0]
        self.stopped = bool(found)
        begun = [n for stop in self._texts for n in range(1, len(stop)) if text.endswith(stop[:n])]
        end = min(found)[1] if found else len(text) - max(begun, default=0)
        self._held = text[end:]
        self.given += text[:end]
        return text[:end]

    def end(self) -> str:
        """What was held back and began no stop text."""
        held, self._held = self._held, ""
        self.given += held
        return held

    def take(self, event: Event) -> list[Event]:
        """What the client gets for an event of the answer: at a stop text `finished`, after which no event is taken."""
        match event.WhichOneof("event"):
            case "prefill":
                self._prompt = event.prefill.tokens
            case "text":
                self._tokens = event.text.tokens
                passed = _text(self.push(event.text.text))
                return [*passed, self._finished()] if self.stopped else passed
            case "finished":
                passed = _text(self.end())
                event.finished.text = self.given
                return [*passed, event]
        return [event]

    def _finished(self) -> Event:
        """The end of an answer whose work is cancelled. Its tokens are those that were written by then."""
        usage = common_pb2.Usage(prompt_tokens=self._prompt, completion_tokens=self._tokens)
        return Event(finished=gateway_pb2.Finished(text=self.given, usage=usage))


async def stopped(events: Events, stops: Sequence[Stop]) -> Events:
    """The events of several answers, each up to its stop text; the work is cancelled once all have stopped."""
    async with aclosing(events):
        async for number, event in events:
            # The work goes on until all answers have stopped.
            if stops[number].stopped:
                continue
            for passed in stops[number].take(event):
                yield number, passed
            if all(stop.stopped for stop in stops):
                return


def _text(text: str) -> list[Event]:
    return [Event(text=common_pb2.TextDelta(text=text))] if text else []
