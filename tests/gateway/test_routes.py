"""Requests through the gateway: what each stage is asked, in which order, and what the client hears."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import replace
from io import BytesIO
from typing import Any

import pytest
from PIL import Image

from bagel.client import PromptPart
from bagel.errors import BagelError, IncompleteContext, InvalidRequest, RemoteError
from bagel.events import Accepted, DrawingStarted, PrefillDone, Result, ServiceEvent, StepDone, TextDelta
from bagel.images.output import OutputFormat
from bagel.pipelines import BAGEL, pipeline
from bagel.prompts import THINK_IMAGE_PROMPT, THINK_TEXT_PROMPT, ImagePart, TextPart
from bagel.request import Modality, resolve, with_settings
from bagel.v1 import common_pb2, dit_pb2, thinker_pb2
from bagel_gateway.planning import Asked, plan
from bagel_gateway.routes import route_of
from bagel_gateway.routes.base import Route
from bagel_gateway.routes.staged import Staged, picture_of
from bagel_gateway.routes.text import Text
from bagel_gateway.routes.whole import Whole
from tests.gateway_stages import Deployment, deployment, model

GEN, CFG_TEXT, CFG_IMG = dit_pb2.BRANCH_NAME_GEN, dit_pb2.BRANCH_NAME_CFG_TEXT, dit_pb2.BRANCH_NAME_CFG_IMG


def photo(width: int = 80, height: int = 40, format_: str = "JPEG") -> bytes:
    stream = BytesIO()
    Image.new("RGB", (width, height), "teal").save(stream, format_)
    return stream.getvalue()


def through(work: Callable[[Deployment], Coroutine[Any, Any, None]], topology: str = "bagel", **settings: Any) -> None:
    """Run work with a deployment."""

    async def run() -> None:
        async with asyncio.timeout(30), deployment(topology, **settings) as made:
            await work(made)

    asyncio.run(run())


def texts(build: thinker_pb2.BuildContextRequest) -> list[str]:
    """The parts of a build, an image as its format."""
    return [part.text.text if part.HasField("text") else "image" for part in build.parts]


def test_a_picture_is_drawn_while_its_contexts_are_built() -> None:
    async def work(at: Deployment) -> None:
        thinker, dit = at.thinkers[0], at.dits[0]
        thinker.go.clear()
        drawn = asyncio.create_task(at.client.generate("a red cube", seed=5, cfg_img_scale=1.5, request_id="cube"))
        await dit.called.wait()  # the Thinker has not finished, and will not before the DiT is called
        thinker.go.set()
        result = await drawn
        assert result.image is not None and result.image.size == (512, 1024)
        assert at.journal.events.count("build begins") == 1
        assert at.journal.events.index("draw begins") < at.journal.events.index("build ends")
        assert at.journal.request_ids == {"cube"}
        # cfg_img is gen in text-to-image: built once. cfg_text is empty: not built, nothing to pull.
        [build], [draw] = thinker.asked, [call.draw for call in dit.asked]
        assert texts(build) == ["a red cube"] and build.send_kv and not build.HasField("decode")
        contexts = {context.branch: context.context for context in draw.contexts}
        assert set(contexts) == {GEN, CFG_TEXT, CFG_IMG} and contexts[GEN] == contexts[CFG_IMG]
        assert contexts[GEN].lease_id and len(contexts[GEN].segments) == 1
        empty = contexts[CFG_TEXT]
        assert not empty.segments and (empty.source, empty.fingerprint) == ("thinker-0", b"k")
        assert (draw.seed, draw.image.height, draw.image.width) == (5, 1024, 512)

    through(work)


def test_a_result_says_with_which_settings_it_was_made() -> None:
    async def work(at: Deployment) -> None:
        asked: dict[str, Any] = {"steps": 3, "seed": 5, "think": True, "do_sample": True, "top_k": 7}
        result = await at.client.generate("a red cube", **asked)
        mine = resolve(Modality.TEXT2IMG, (TextPart("a red cube"),), asked)
        drawn = with_settings(mine, result.settings)
        assert drawn == resolve(Modality.TEXT2IMG, mine.prompt, asked | {"height": 1024, "width": 512}, defaults)
        assert (drawn.image.cfg_text_scale, drawn.text.temperature, drawn.negative_prompt) == (2.5, 0.9, "blurred")

    defaults = {"cfg_text_scale": 2.5, "temperature": 0.9, "negative_prompt": "blurred", "posterior": "mean"}
    through(work, sampling_defaults=defaults)


def test_what_a_picture_tells() -> None:
    async def work(at: Deployment) -> None:
        heard: list[ServiceEvent] = []
        result = await at.client.generate("a red cube", seed=5, steps=3, on_event=heard.append, request_id="cube")
        assert heard[0] == Accepted(0, "cube", 5, "bagel")
        assert isinstance(heard[0], Accepted) and heard[0].settings == result.settings
        assert heard[-1] == result
        assert {PrefillDone(0, 2), DrawingStarted(0, 0.25), StepDone(0, 1, 2)} <= set(heard[1:-1])
        assert (result.seed, result.request_id, result.text) == (5, "cube", "")
        assert result.usage["prompt_tokens"] == 3 and result.usage["computed_tokens"] == 4
        assert result.usage["steps"] == 2 and result.usage["pulled_bytes"] == 9
        assert {**result.timings, "total": 0} == {"context": 0.5, "denoise": 2.0, "total": 0}

    through(work)


def test_an_edit_builds_three_contexts_of_the_users_own_bytes() -> None:
    async def work(at: Deployment) -> None:
        data = photo()
        await at.client.generate("make it red", modality="img2img", image=data, negative_prompt="blurred")
        builds = {tuple(texts(build)): build for build in at.thinkers[0].asked}
        assert set(builds) == {("image", "make it red"), ("image", "blurred"), ("make it red",)}
        image = builds[("image", "make it red")].parts[0].image
        assert image.data == data and image.for_generation and image.for_understanding
        draw = at.dits[0].asked[0].draw
        assert [context.branch for context in draw.contexts] == [GEN, CFG_TEXT, CFG_IMG]
        assert (draw.image.height, draw.image.width) == (512, 1024)  # 80x40, resized
        assert not draw.posterior_shapes

    through(work)


@pytest.mark.parametrize(
    ("options", "built"),
    [({"cfg_text_scale": 1.0}, 1), ({"cfg_interval": (0.0, 0.0)}, 1), ({"cfg_img_scale": 1.0}, 2), ({}, 3)],
)
def test_only_what_guides_is_built(options: dict[str, Any], built: int) -> None:
    async def work(at: Deployment) -> None:
        await at.client.generate("make it red", modality="img2img", image=photo(), steps=5, **options)
        assert len(at.thinkers[0].asked) == len(at.dits[0].asked[0].draw.contexts) == built

    through(work)


def test_posterior_mode_seed_tells_the_dit_what_was_drawn_first() -> None:
    async def work(at: Deployment) -> None:
        seen = ImagePart(Image.new("RGB", (600, 600)), for_generation=False)
        edited = ImagePart(Image.new("RGB", (2048, 1024)), for_generation=True)
        await at.client.generate([seen, edited, "make it red"], modality="img2img", posterior="seed")
        [shape] = at.dits[0].asked[0].draw.posterior_shapes
        assert (shape.channels, shape.height, shape.width) == (16, 64, 128)
        assert {build.posterior for build in at.thinkers[0].asked} == {common_pb2.POSTERIOR_MODE_SEED}

    through(work)


@pytest.mark.parametrize("topology", ["bagel", "bagel_think"])
def test_thinking_comes_before_the_dit_is_called(topology: str) -> None:
    async def work(at: Deployment) -> None:
        heard: list[ServiceEvent] = []
        asked = {"cfg_img_scale": 1.5, "max_think_tokens": 1, "do_sample": True, "top_k": 3}
        asked |= {} if topology == "bagel_think" else {"think": True}
        result = await at.client.generate("a red cube", on_event=heard.append, **asked)
        assert heard[0] == Accepted(0, result.request_id, result.seed, "bagel_think")
        texts_heard = [event for event in heard if isinstance(event, TextDelta)]  # what comes together may be told so
        assert "".join(event.text for event in texts_heard) == "so be it" and all(event.think for event in texts_heard)
        assert (result.text, result.token_ids) == ("so be it", (5, 6))
        events = at.journal.events
        assert events.index("think text appended") < events.index("draw begins")
        assert events.count("build ends") == 3
        gen, *companions = sorted(at.thinkers[0].asked, key=lambda build: not build.HasField("decode"))
        assert texts(gen) == [THINK_IMAGE_PROMPT, "a red cube"] and gen.decode.append and gen.send_kv
        assert (gen.decode.settings.max_tokens, gen.decode.settings.top_k) == (1, 3)
        assert not any(build.HasField("decode") for build in companions)
        contexts = {context.branch: context.context for context in at.dits[0].asked[0].draw.contexts}
        assert [len(contexts[name].segments) for name in (GEN, CFG_TEXT, CFG_IMG)] == [3, 1, 2]

    through(work, topology)


def test_what_waits_for_a_think_text_is_kept_meanwhile() -> None:
    """The companions' contexts are built long before the DiT is called; their leases would run out."""

    async def work(at: Deployment) -> None:
        thinker = at.thinkers[0]
        thinker.think_go.clear()
        drawn = asyncio.create_task(at.client.generate("a red cube", cfg_img_scale=1.5))
        while len(thinker.leases.renewed) < 3:
            await asyncio.sleep(0.01)
        thinker.think_go.set()
        await drawn
        assert not thinker.leases.released  # the DiT's by now

    through(work, "bagel_think")


def test_what_no_dit_took_over_is_given_back() -> None:
    async def work(at: Deployment) -> None:
        thinker = at.thinkers[0]
        thinker.think_go.clear()
        leaving = asyncio.create_task(at.client.generate("a red cube", cfg_img_scale=1.5))
        while at.journal.events.count("build ends") < 2:
            await asyncio.sleep(0.01)
        leaving.cancel()
        while len(thinker.leases.released) < 3:
            await asyncio.sleep(0.01)

    through(work, "bagel_think")


def test_a_request_may_ask_not_to_think() -> None:
    async def work(at: Deployment) -> None:
        at.thinkers[0].go.clear()
        heard: list[ServiceEvent] = []
        drawn = asyncio.create_task(at.client.generate("a red cube", think=False, on_event=heard.append))
        await at.dits[0].called.wait()
        at.thinkers[0].go.set()
        await drawn
        assert isinstance(heard[0], Accepted) and heard[0].pipeline == "bagel"

    through(work, "bagel_think")


def test_an_answer_needs_the_thinker_alone() -> None:
    async def work(at: Deployment) -> None:
        heard: list[ServiceEvent] = []
        result = await at.client.generate(
            "what is it?", modality="img2text", image=photo(), think=True, max_tokens=9, on_event=heard.append
        )
        assert result.text == "so be it" and result.image is None and not at.dits[0].asked
        pieces = [event for event in heard if isinstance(event, TextDelta)]
        assert "".join(piece.text for piece in pieces) == "so be it" and not any(piece.think for piece in pieces)
        assert heard[2:-1] == pieces and [type(event) for event in (*heard[:2], heard[-1])] == [
            Accepted,
            PrefillDone,
            Result,
        ]
        [build] = at.thinkers[0].asked
        assert texts(build) == [THINK_TEXT_PROMPT, "image", "what is it?"]
        assert not build.send_kv and not build.decode.append and build.decode.settings.max_tokens == 9
        assert not build.parts[1].image.for_generation and build.parts[1].image.for_understanding

    through(work)


def test_a_single_stage_gets_the_whole_request() -> None:
    async def work(at: Deployment) -> None:
        heard: list[ServiceEvent] = []
        data = photo()
        await at.client.generate("make it red", modality="img2img", image=data, seed=3, on_event=heard.append)
        assert [type(event) for event in heard] == [Accepted, PrefillDone, DrawingStarted, StepDone, Result]
        request = at.dits[0].asked[0].request
        assert (request.seed, request.think, request.image.height, request.image.steps) == (3, False, 512, 50)
        assert request.prompt[0].image.data == data

    through(work, "bagel_single_stage")


def test_the_accepted_event_has_every_setting_but_no_image() -> None:
    async def work(at: Deployment) -> None:
        from bagel.rpc.transport import channel
        from bagel.v1 import gateway_pb2, gateway_pb2_grpc

        image = common_pb2.Part(image=common_pb2.ImagePart(data=photo()))
        text = common_pb2.Part(text=common_pb2.TextPart(text="make it red"))
        wanted = common_pb2.Request(modality=common_pb2.MODALITY_IMG2IMG, prompt=[image, text])
        async with channel(at.target) as connection:
            stub = gateway_pb2_grpc.GatewayServiceStub(connection)
            events = [event async for event in stub.Generate(gateway_pb2.GenerateRequest(request=wanted))]
        resolved = events[0].accepted.resolved
        assert resolved.image.steps == 24 and resolved.image.cfg_img_scale == 1.5 and resolved.HasField("think")
        assert not resolved.prompt[0].image.data and resolved.prompt[1].text.text == "make it red"
        assert events[-1].WhichOneof("event") == "finished"

    through(work, sampling_defaults={"steps": 24})


@pytest.mark.parametrize(
    ("field", "arguments"),
    [
        ("prompt", {"prompt": "  "}),
        ("prompt", {"prompt": []}),
        ("prompt", {"prompt": [common_pb2.Part()]}),
        ("image", {"prompt": "red", "image": photo()}),
        ("image", {"prompt": "red", "modality": "img2img"}),
        ("image", {"prompt": "red", "modality": "img2img", "image": b"GIF89a?"}),
        ("image", {"prompt": "red", "modality": "img2text", "image": b""}),
        ("steps", {"prompt": "red", "steps": 1}),
        ("steps", {"prompt": "red", "steps": 0}),
        ("top_p", {"prompt": "red", "top_p": 0.0}),
        ("cfg_interval", {"prompt": "red", "cfg_interval": (0.9, 0.1)}),
        ("height", {"prompt": "red", "height": 4096}),
        ("width", {"prompt": "red", "width": 8}),
        ("seed", {"prompt": "red", "seed": 2**63}),
    ],
)
@pytest.mark.parametrize("topology", ["bagel", "bagel_single_stage"])
def test_what_is_wrong_is_named(topology: str, field: str, arguments: dict[str, Any]) -> None:
    async def work(at: Deployment) -> None:
        with pytest.raises(InvalidRequest) as refused:
            await at.client.generate(**arguments)
        assert refused.value.field == field and "\n" not in str(refused.value)
        assert not at.journal.events and at.gateway.admission.under_way == 0

    through(work, topology)


def test_a_build_that_fails_cancels_the_rest() -> None:
    async def work(at: Deployment) -> None:
        thinker, dit = at.thinkers[0], at.dits[0]
        thinker.go.clear()
        dit.go.clear()
        thinker.failure = InvalidRequest("max_tokens", "the prompt is too long")
        drawn = asyncio.create_task(at.client.generate("a red cube", cfg_text_scale=1.0))
        await dit.called.wait()
        thinker.go.set()
        with pytest.raises(InvalidRequest, match="too long"):
            await drawn
        await at.settled()
        assert "draw is cancelled" in at.journal.events

    through(work)


def test_a_dit_that_fails_cancels_the_builds() -> None:
    async def work(at: Deployment) -> None:
        at.thinkers[0].go.clear()
        at.dits[0].failure = RemoteError("the runner died", "INTERNAL")
        with pytest.raises(RemoteError, match="the runner died"):
            await at.client.generate("make it red", modality="img2img", image=photo())
        await at.settled()
        assert at.journal.events.count("build is cancelled") == 3

    through(work)


def test_the_cause_is_told_not_what_followed_from_it() -> None:
    """The DiT misses K/V because the Thinker failed, and may say so first."""

    async def work(at: Deployment) -> None:
        thinker = at.thinkers[0]
        thinker.go.clear()
        thinker.failure = BagelError("the engine broke")
        at.dits[0].failure = IncompleteContext("a segment is not held here")
        drawn = asyncio.create_task(at.client.generate("a red cube"))
        while "draw begins" not in at.journal.events:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        thinker.go.set()
        with pytest.raises(BagelError, match="the engine broke"):
            await drawn

    through(work)


def test_a_text_part_alone_can_be_the_prompt() -> None:
    async def work(at: Deployment) -> None:
        parts: list[PromptPart] = [TextPart("one"), "two"]
        await at.client.generate(parts, modality="text2text")
        assert texts(at.thinkers[0].asked[0]) == ["one", "two"]

    through(work)


@pytest.mark.parametrize(
    ("field", "change", "said"),
    [
        ("stop_token_ids", {"stop_token_ids": [1000]}, "tokens are 0 to 999"),
        ("stop_token_ids", {"stop_token_ids": range(65)}, "has 65 ids; it may have 64"),
        ("prompt", {"prompt": ["x"] * 65}, "has 65 parts; it may have 64"),
        ("prompt", {"prompt": ["x" * 2**19] * 3}, "bytes of text"),
        ("request", {"prompt": [""] * 1001}, "more than 1000 fields"),
        ("request", {"stop_token_ids": [2**31] * 10**5}, "more than 1000 fields"),
        ("top_k", {"top_k": 5}, "top_k has no effect without sampling"),
        ("output_format", {"output_format": "JPEG"}, "on a text answer"),
    ],
)
def test_what_rest_bounds_or_refuses_grpc_does_too(field: str, change: dict[str, Any], said: str) -> None:
    async def work(at: Deployment) -> None:
        with pytest.raises(InvalidRequest, match=said) as caught:
            await at.client.generate(**{"prompt": "a red cube", "modality": "text2text", **change})
        assert caught.value.field == field
        assert at.thinkers[0].asked == []

    through(work)


@pytest.mark.parametrize(
    ("topology", "modality", "route"),
    [
        ("bagel", Modality.TEXT2IMG, Staged),
        ("bagel_think", Modality.TEXT2IMG, Staged),
        ("bagel_single_stage", Modality.TEXT2IMG, Whole),
        ("bagel", Modality.TEXT2TEXT, Text),
        ("bagel_think", Modality.TEXT2TEXT, Text),
        ("bagel_single_stage", Modality.TEXT2TEXT, Whole),
    ],
)
def test_the_fields_of_the_stages_choose_the_route(topology: str, modality: Modality, route: type[Route]) -> None:
    unknown = replace(pipeline(topology), model_type="a name that no code knows")
    asked = Asked(resolve(modality, (TextPart("a red cube"),), {}), unknown, OutputFormat())
    assert route_of(plan(asked, model())) is route


def test_the_thinker_keeps_kv_if_its_stage_sends_them() -> None:
    request = resolve(Modality.TEXT2IMG, (TextPart("a red cube"),), {})
    thinker = BAGEL.stage("thinker")
    keeps = replace(thinker, omni_kv_config=replace(thinker.omni_kv_config, need_send_cache=False))
    for stage, sends in ((thinker, True), (keeps, False)):
        spec = replace(BAGEL, stages=(stage, BAGEL.stage("dit")))
        [context] = picture_of(plan(Asked(request, spec, OutputFormat()), model())).contexts
        assert context.settings.send_kv is sends
