"""A text from two stages: the Thinker reads the prompt and writes the answer. No DiT takes part, and no K/V leave."""

from __future__ import annotations

from bagel.prompts import text_prompt
from bagel.request import Request, text_settings
from bagel.rpc import convert
from bagel.v1 import gateway_pb2, thinker_pb2
from bagel_gateway.routes.base import Context, Event, Route, context_settings, length_of, without_total
from bagel_gateway.routes.calls import result_of


class Text(Route):
    """Has one context built, and text decoded after it."""

    async def check(self) -> None:
        """Ask the Thinker."""
        await self._check_contexts([answer_context(self._plan.request)])

    async def _serve(self) -> gateway_pb2.Finished:
        built, length = None, None
        async for event in self._build(answer_context(self._plan.request)):
            match event.WhichOneof("event"):
                case "context":
                    length = length_of(event.context)
                    self._begin()
                case "text":  # by then the prompt is computed
                    self._emit_prefill(length or 0)
                    self._emit(Event(text=event.text))
                case "built":
                    built = event.built
        built = result_of(None if length is None else built, self._thinker, "context")
        self._emit_prefill(length or 0)
        return gateway_pb2.Finished(
            text=built.text,
            token_ids=built.token_ids,
            usage=built.usage,
            timings=convert.timings_to_wire(without_total(built.timings)),
        )


def answer_context(request: Request) -> Context:
    """The context that an answer is decoded after."""
    settings = context_settings(request)
    answer = convert.text_settings_to_wire(text_settings(request))
    settings.decode.CopyFrom(thinker_pb2.DecodeText(settings=answer, append=False))
    return Context(text_prompt(request.prompt, think=request.think), settings)
