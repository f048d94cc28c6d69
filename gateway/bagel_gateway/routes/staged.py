"""A picture from two stages: the Thinker builds the contexts of all branches, and a DiT draws from their K/V.

The pipeline says when the DiT is called: as soon as the Thinker has named the contexts, or after gen's think text.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property

from bagel.errors import (
    BagelError,
    ContextRefused,
    IncompleteContext,
    KvTimeout,
    SourceUnavailable,
    TransferDamaged,
    UnknownSegment,
)
from bagel.guidance import needed_branches
from bagel.images import resized_size
from bagel.kv.lease_keeper import LeaseKeeper
from bagel.pipelines import kv_collector, prompt_expander
from bagel.prompts import Branch, BranchName, ImagePart
from bagel.request import PosteriorMode
from bagel.rpc import convert
from bagel.telemetry.stages import stages_before
from bagel.v1 import common_pb2, dit_pb2, gateway_pb2, kv_pb2, thinker_pb2
from bagel_gateway.planning import Plan
from bagel_gateway.routes.base import (
    Context,
    Event,
    Route,
    context_settings,
    length_of,
    without_total,
)
from bagel_gateway.routes.calls import result_of

CAUSE_S = 1.0
"""How long a DiT that lost its K/V waits for the Thinker's own account of why."""
_FROM_THE_THINKER = (ContextRefused, IncompleteContext, KvTimeout, SourceUnavailable)
_OF_THE_PROMPT = ("prompt_tokens", "image_tokens", "completion_tokens", "think_tokens")


@dataclass(frozen=True)
class Picture:
    """What a picture takes. contexts: to be built, each once; draw: the DiT's work, without its contexts yet.

    branches and needed: what is collected for the DiT. Nothing is built for a branch without parts.
    """

    contexts: tuple[Context, ...]
    draw: dit_pb2.DrawPicture
    branches: tuple[Branch, ...]
    needed: frozenset[BranchName]


def picture_of(plan: Plan) -> Picture:
    """The contexts that a picture needs, and the picture."""
    request = plan.request
    limits = {"max_think_tokens": request.max_think_tokens} if plan.pipeline.thinks else {}
    branches = prompt_expander(plan.path[0])(request.prompt, negative_prompt=request.negative_prompt, **limits)
    needed = needed_branches(request.image)
    alike: dict[object, list[Branch]] = {}
    for branch in branches:
        if branch.name in needed and branch.parts:
            # Equal parts have equal K/V, unless a text of its own is appended to one of them.
            alike.setdefault((branch.writes, branch.parts), []).append(branch)
    draw = dit_pb2.DrawPicture(
        image=plan.settings.image,
        seed=request.seed,
        posterior_shapes=_posterior_shapes(plan) if request.posterior is PosteriorMode.SEED else [],
    )
    return Picture(tuple(_context(plan, same) for same in alike.values()), draw, branches, needed)


@dataclass(eq=False)
class _Build:
    """A context on its way. handed_over: its reference, once the pipeline lets the DiT have it."""

    context: Context
    length: int = 0
    built: thinker_pb2.ContextBuilt | None = None
    handed_over: asyncio.Future[kv_pb2.ContextRef] = field(default_factory=lambda: asyncio.Future[kv_pb2.ContextRef]())


class Staged(Route):
    """Has all contexts built at once, and calls the DiT as soon as the pipeline hands them over."""

    @cached_property
    def _picture(self) -> Picture:
        return picture_of(self._plan)

    @cached_property
    def _builds(self) -> list[_Build]:
        return [_Build(context) for context in self._picture.contexts]

    async def check(self) -> None:
        """Ask the Thinker for each context."""
        await self._check_contexts(self._picture.contexts)

    async def _serve(self) -> gateway_pb2.Finished:
        """Keep the contexts until the DiT has taken them over."""
        self._leases = leases = LeaseKeeper(self._thinker.lessor)
        # A think text may take longer than the leases of its companions last.
        renewing = asyncio.create_task(leases.renew())
        try:
            async with asyncio.TaskGroup() as group:
                builds = [group.create_task(self._build_one(build, leases)) for build in self._builds]
                drawing = group.create_task(self._draw(builds))
        except BaseException as failed:
            # The Thinker would keep the K/V until the leases run out otherwise.
            leases.release()
            if isinstance(failed, BaseExceptionGroup):
                raise _first_error(failed) from None
            raise
        finally:
            renewing.cancel()
        return self._merged([task.result() for task in builds], drawing.result())

    # At the Thinker

    async def _build_one(self, build: _Build, leases: LeaseKeeper) -> thinker_pb2.ContextBuilt:
        """Have one context built, and hand it over when the pipeline says so: when it is named, or complete."""
        early, refs = self._plan.path[0].omni_kv_config.sends_early, list[kv_pb2.ContextRef]()
        # The gateway names the lease, so that it can give it back even if no answer comes.
        lease_id = leases.new() if build.context.settings.send_kv else ""
        async for event in self._build(build.context, lease_id=lease_id):
            match event.WhichOneof("event"):
                case "context":
                    refs.append(event.context)
                    leases.hold(event.context.lease_id, event.context.lease_seconds)
                    build.length = length_of(event.context)
                    # Without a think text the picture begins at the DiT; with one, once the Thinker has all contexts.
                    if not early and all(each.length for each in self._builds):
                        self._begin()
                    complete = len(refs) == 2  # the second one has the think text
                    if (early or complete) and not build.handed_over.done():
                        build.handed_over.set_result(event.context)
                case "text":
                    if not build.length:
                        # Nobody else would name it, and its digest comes after all texts.
                        raise TransferDamaged(
                            f"{self._thinker.name} has written text before it named its context: what it said first "
                            "was lost on its way; send the request again, and use TLS where this comes again"
                        )
                    await self._begun.wait()  # for the other contexts, which may have to wait for room
                    self._emit(Event(text=event.text))
                case "built":
                    build.built = event.built
        built = result_of(build.built if refs else None, self._thinker, "context")
        if not build.handed_over.done():
            # A context without a think text has one reference, and is handed over when it is complete.
            build.handed_over.set_result(refs[-1])
        if all(each.built for each in self._builds):
            self._emit_prefill(sum(each.length for each in self._builds))
        return built

    # At the DiT

    async def _draw(
        self, builds: Sequence[asyncio.Task[thinker_pb2.ContextBuilt]]
    ) -> dit_pb2.DitServiceGenerateFinished:
        refs = await asyncio.gather(*(build.handed_over for build in self._builds))
        request = dit_pb2.DitServiceGenerateRequest(draw=self._picture.draw)
        request.draw.contexts.extend(self._collect(refs))
        try:
            return await self._call_dit(request)
        except _FROM_THE_THINKER as error:
            # The DiT lost its K/V because something failed at the Thinker, whose own error says more. A build
            # may even be cancelled because this DiT has given its lease back.
            with suppress(asyncio.CancelledError):
                await asyncio.wait(builds, timeout=CAUSE_S, return_when=asyncio.FIRST_EXCEPTION)
            raise error

    def _collect(self, refs: Sequence[kv_pb2.ContextRef]) -> list[dit_pb2.BranchContext]:
        """The contexts of all branches needed; one without parts is empty and was not built."""
        picture = self._picture
        contexts = {name: ref for context, ref in zip(picture.contexts, refs, strict=True) for name in context.branches}
        gen = contexts[BranchName.GEN]
        for branch in picture.branches:
            if not branch.parts:
                contexts[branch.name] = kv_pb2.ContextRef(source=gen.source, fingerprint=gen.fingerprint)
        collected = kv_collector(self._plan.path[-1])(picture.branches, contexts, picture.needed)
        return [
            dit_pb2.BranchContext(branch=convert.branch_to_wire(name), context=ref) for name, ref in collected.items()
        ]

    # The end

    def _merged(
        self, builds: Sequence[thinker_pb2.ContextBuilt], drawn: dit_pb2.DitServiceGenerateFinished
    ) -> gateway_pb2.Finished:
        """The end of both stages. The prompt's tokens are gen's; work is that of all branches."""
        gen = next(i for i, context in enumerate(self._picture.contexts) if BranchName.GEN in context.branches)
        text = builds[gen]
        usage = common_pb2.Usage()
        usage.CopyFrom(drawn.usage)
        for name in _OF_THE_PROMPT:
            setattr(usage, name, getattr(text.usage, name))
        usage.computed_tokens += sum(built.usage.computed_tokens for built in builds)
        usage.reused_tokens += sum(built.usage.reused_tokens for built in builds)
        timings: dict[str, float] = {}
        for built in builds:  # contexts are built side by side
            for stage, seconds in without_total(built.timings).items():
                timings[stage] = max(seconds, timings.get(stage, 0.0))
        for stage, seconds in without_total(drawn.timings).items():
            timings[stage] = timings.get(stage, 0.0) + seconds
        profile = convert.timings_from_wire(drawn.profile)
        if profile:  # the DiT knows only its own part
            profile = stages_before(timings) | profile
        return gateway_pb2.Finished(
            text=text.text,
            token_ids=text.token_ids,
            usage=usage,
            timings=convert.timings_to_wire(timings),
            profile=convert.timings_to_wire(profile),
        )


def _context(plan: Plan, same: Sequence[Branch]) -> Context:
    """The context of branches with the same parts; a text is decoded after it only if the context keeps that text."""
    settings, branch = context_settings(plan.request), same[0]
    settings.send_kv = plan.path[0].omni_kv_config.need_send_cache
    if branch.writes:
        written = convert.text_settings_to_wire(replace(plan.request.text, max_tokens=branch.max_tokens))
        settings.decode.CopyFrom(thinker_pb2.DecodeText(settings=written, append=True))
    return Context(branch.parts, settings, tuple(each.name for each in same))


def _posterior_shapes(plan: Plan) -> list[dit_pb2.LatentShape]:
    """Latents of the input images, whose noise the request's generator gives first."""
    model, shapes = plan.model, []
    transform = convert.picture_limits(model).vae_transform
    for part in plan.request.prompt:
        if isinstance(part, ImagePart) and part.for_generation:
            # The reference resizes twice before it encodes.
            width, height = resized_size(*resized_size(*part.image.size, transform), transform)
            sides = {"height": height // model.vae_downsample, "width": width // model.vae_downsample}
            shapes.append(dit_pb2.LatentShape(channels=model.latent_channels, **sides))
    return shapes


def _first_error(failed: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first error of a stage. Calls that were cancelled after it are not in the group.

    A build whose lease was given back, as a DiT that failed does, fails for want of it: that is no cause.
    """
    ours = [error for error in failed.exceptions if isinstance(error, BagelError)]
    causes = [error for error in ours if not isinstance(error, UnknownSegment)]
    return next(iter([*causes, *ours, *failed.exceptions]))
