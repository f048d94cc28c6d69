"""What all routes share: calls to the stages, moves to another DiT, events to the client, and timings."""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from bagel.errors import BagelError, Draining, Loading
from bagel.kv.lease_keeper import LeaseKeeper
from bagel.prompts import BranchName, Prompt
from bagel.request import Request
from bagel.rpc import convert
from bagel.telemetry.logs import Log, current_request, request_metadata
from bagel.v1 import common_pb2, dit_pb2, gateway_pb2, kv_pb2, thinker_pb2
from bagel_gateway.backend import DitBackend, ThinkerBackend
from bagel_gateway.backends import Services
from bagel_gateway.planning import Plan
from bagel_gateway.routes.calls import is_unreachable, responses, result_of
from bagel_gateway.uploads import Pieces, bytes_of, field_of, with_prompt, without_data

log = Log("bagel_gateway.routes")
Event = gateway_pb2.GenerateResponse
Put = Callable[[Event], None]
"""Takes an event of a request; it does not wait for the client to read it."""
Remaining = Callable[[], float | None]
"""Seconds until the client's deadline; None without one."""

MOVES = 4
"""How often a request is taken to another DiT because one that seemed ready refuses it."""


@dataclass(frozen=True)
class Context:
    """A context to build, for every branch with the same parts.

    settings: the Thinker's request without the prompt, which may be large and is put in when it is sent.
    """

    prompt: Prompt
    settings: thinker_pb2.BuildContextRequest
    branches: tuple[BranchName, ...] = (BranchName.GEN,)


class Route(ABC):
    """One request, from its plan to its end. The first error of a stage ends it and cancels its other calls.

    put takes its events: first `accepted`, once every stage that it needs at its beginning has taken it on, last
    `finished`. Until it is accepted a stage may refuse it as busy; from then on it waits for its places. begun: it is
    accepted at once, as one more result of a call that was accepted. waited_s: seconds that it waited for its place at
    the gateway, which count to its queue and its total.
    """

    _leases: LeaseKeeper | None = None
    """Keeps the leases of contexts at the Thinker until the DiT takes them over."""

    def __init__(
        self,
        plan: Plan,
        services: Services,
        remaining: Remaining,
        put: Put = lambda event: None,
        *,
        waited_s: float = 0.0,
        begun: bool = False,
    ) -> None:
        self._plan, self._services, self._remaining, self._put = plan, services, remaining, put
        self._started, self._waited_s = time.perf_counter(), waited_s
        self._begun, self._held_back = asyncio.Event(), list[Event]()
        self._prefill_emitted = self._dit_began = False
        if begun:
            self._begin()

    @property
    def accepted(self) -> gateway_pb2.Accepted:
        """The first event: the settings as they are used, and no image."""
        accepted = gateway_pb2.Accepted(
            request_id=current_request.get(),
            seed=self._plan.request.seed,
            pipeline=self._plan.pipeline.model_type,
            resolved=self._plan.settings,
        )
        accepted.resolved.prompt.extend(map(without_data, self._plan.request.prompt))
        return accepted

    @abstractmethod
    async def check(self) -> None:
        """Ask the stages whether they could serve it; raises what they refuse it with. They compute nothing."""

    async def run(self) -> None:
        """Serve it; raises the BagelError of the stage that failed."""
        finished = await self._serve()
        timings = convert.timings_from_wire(finished.timings)
        if self._waited_s:
            timings = {"queue": self._waited_s + timings.pop("queue", 0.0), **timings}
        # Measured here, since no stage sees the whole of a request.
        timings["total"] = time.perf_counter() - self._started + self._waited_s
        del finished.timings[:]
        finished.timings.extend(convert.timings_to_wire(timings))
        self._emit(Event(finished=finished))

    @abstractmethod
    async def _serve(self) -> gateway_pb2.Finished:
        """The stages' work; its end with their timings, which `run` completes."""

    # Events to the client

    def _begin(self) -> None:
        """Emit once that the request is accepted, then what was held back until then."""
        if not self._begun.is_set():
            self._begun.set()
            for event in (Event(accepted=self.accepted), *self._held_back):
                self._put(event)
            self._held_back.clear()

    def _emit(self, event: Event) -> None:
        """Pass an event on: at once, or after `accepted`."""
        if self._begun.is_set():
            self._put(event)
        else:
            self._held_back.append(event)

    def _emit_prefill(self, tokens: int) -> None:
        """Emit once that the Thinker has computed the contexts, of so many tokens."""
        if not self._prefill_emitted:
            self._prefill_emitted = True
            self._emit(Event(prefill=common_pb2.PrefillDone(tokens=tokens)))

    def _emit_drawing(self, admitted: dit_pb2.Admitted) -> None:
        self._emit(Event(drawing=gateway_pb2.DrawingStarted(waited_seconds=admitted.waited_seconds)))

    # Calls to the Thinker

    @property
    def _thinker(self) -> ThinkerBackend:
        assert self._services.thinker is not None
        return self._services.thinker

    def _build(self, context: Context, **more: Any) -> AsyncIterator[thinker_pb2.BuildContextResponse]:
        """The Thinker's call for one context. more: further fields of its request."""

        def message() -> Pieces:
            settings = thinker_pb2.BuildContextRequest(begun=self._begun.is_set(), **more)
            settings.MergeFrom(context.settings)
            return with_prompt(settings, "parts", context.prompt)

        metadata, nbytes = request_metadata(), bytes_of(context.prompt)
        call = self._thinker.build(message, nbytes, timeout=self._remaining(), metadata=metadata)
        return responses(call, self._thinker)

    async def _check_contexts(self, contexts: Iterable[Context]) -> None:
        for context in contexts:
            async for _ in self._build(context, check_only=True):
                pass

    # Calls to the DiT

    async def _call_dit(
        self, request: dit_pb2.DitServiceGenerateRequest, settings: common_pb2.Request | None = None
    ) -> dit_pb2.DitServiceGenerateFinished:
        """The DiT's part, at one that is ready when its turn comes. If that one shuts down, another one gets it.

        settings: of a whole request, whose prompt goes with them.
        """
        convert.output_to_wire(self._plan.output, request)
        moves = 0
        while True:
            dit = await self._services.dit()
            # Set for each try, since the request may have been accepted after the last one.
            request.begun = self._begun.is_set()
            try:
                with dit.busy():
                    return await self._follow(dit, request, settings)
            except BagelError as error:
                going = isinstance(error, Draining | Loading) or is_unreachable(error)
                if self._dit_began or dit.silent.is_set() or not going or moves == MOVES:
                    raise
                moves += 1
                log.info("refused by a DiT; another is chosen", dit=str(dit.address), **error.for_log())

    async def _follow(
        self, dit: DitBackend, request: dit_pb2.DitServiceGenerateRequest, settings: common_pb2.Request | None
    ) -> dit_pb2.DitServiceGenerateFinished:
        """The call of one DiT, whose events are passed on as they come; its last one."""
        finished, admitted = None, dit_pb2.Admitted()
        async for event in self._generate(dit, request, settings):
            # From here on it is not moved to another DiT: the client may have events of this one.
            self._dit_began = True
            # The DiT renews and releases the leases from its first event on.
            if self._leases is not None:
                self._leases.hand_over()
            match event.WhichOneof("event"):
                case "admitted":
                    admitted = event.admitted
                    self._begin()
                    # A DiT that draws from K/V begins at once; one that has the whole request reads its prompt first.
                    if settings is None:
                        self._emit_drawing(admitted)
                case "prefill":
                    self._emit(Event(prefill=event.prefill))
                    if self._plan.request.modality.makes_image:  # of a whole request, which the DiT has read by now
                        self._emit_drawing(admitted)
                case "text":
                    self._emit(Event(text=event.text))
                case "step":
                    self._emit(Event(step=event.step))
                case "preview":
                    self._emit(Event(preview=event.preview))
                case "picture":
                    self._emit(Event(picture=event.picture))
                case "finished":
                    finished = event.finished
        return result_of(finished, dit, "request")

    def _generate(
        self, dit: DitBackend, request: dit_pb2.DitServiceGenerateRequest, settings: common_pb2.Request | None
    ) -> AsyncIterator[dit_pb2.DitServiceGenerateResponse]:
        prompt = () if settings is None else self._plan.request.prompt

        def message() -> Pieces:
            pieces = [request.SerializeToString()]
            if settings is not None:
                pieces += field_of(request, "request", with_prompt(settings, "prompt", prompt))
            return pieces

        metadata = request_metadata()
        call = dit.generate(message, bytes_of(prompt), timeout=self._remaining(), metadata=metadata)
        return responses(call, dit)


def context_settings(request: Request) -> thinker_pb2.BuildContextRequest:
    """The settings that all contexts of a request share."""
    posterior = convert.posterior_to_wire(request.posterior)
    return thinker_pb2.BuildContextRequest(seed=request.seed, posterior=posterior)


def length_of(ref: kv_pb2.ContextRef) -> int:
    """Tokens of a context."""
    return sum(segment.length for segment in ref.segments)


def without_total(timings: Iterable[common_pb2.StageTiming]) -> Mapping[str, float]:
    """Seconds by stage; the total of the request is for the gateway to add."""
    return {stage: seconds for stage, seconds in convert.timings_from_wire(timings).items() if stage != "total"}
