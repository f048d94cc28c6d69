"""The REST front between real sockets, on stages that draw nothing: parameters, errors, limits, who goes away."""

from __future__ import annotations

import asyncio
import base64
import inspect
import json
import re
import ssl
import struct
import zlib
from collections.abc import Callable, Coroutine
from io import BytesIO
from pathlib import Path
from typing import Any

import openai
import pytest
import trustme
from openai import AsyncOpenAI
from PIL import Image

from bagel import request
from bagel.deployment.gateway_config import MAX_IMAGES
from bagel.errors import ConfigError, InvalidRequest
from bagel.rpc.transport import Security
from bagel.v1 import common_pb2
from bagel_gateway.rest import parameters as rest_parameters
from bagel_gateway.rest.parameters import (
    QUALITY,
    REFUSED_CHAT,
    REFUSED_EDIT,
    REFUSED_GENERATION,
    ChatParameters,
    ImageParameters,
)
from tests.gateway_stages import Deployment, deployment, front

Work = Callable[[Deployment, AsyncOpenAI], Coroutine[Any, Any, None]]
OF_THE_CLIENT = {"self", "extra_headers", "extra_query", "extra_body", "timeout"}
REPLY = re.compile(rb"HTTP/1\.1 (\d+).*?\r\n\r\n(.*)", re.S)


def through(work: Work, topology: str = "bagel", **settings: Any) -> None:
    """Run work with a gateway that speaks HTTP, and OpenAI's client, strict about what its types do not have."""

    async def run() -> None:
        async with asyncio.timeout(60), deployment(topology, http="127.0.0.1:0", **settings) as made:
            assert made.gateway.rest is not None
            url = f"http://{made.gateway.rest.address}/v1"
            options: dict[str, Any] = {"max_retries": 0, "timeout": 30, "_strict_response_validation": True}
            async with AsyncOpenAI(base_url=url, api_key="none", **options) as client:
                await work(made, client)

    asyncio.run(run())


def photo(width: int = 80, height: int = 40, format_: str = "PNG") -> bytes:
    stream = BytesIO()
    Image.new("RGB", (width, height), "teal").save(stream, format_)
    return stream.getvalue()


def data_url(data: bytes) -> dict[str, Any]:
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    return {"type": "image_url", "image_url": {"url": url}}


def drawn(at: Deployment, which: int = 0) -> common_pb2.ImageSettings:
    """How the DiT was asked to draw."""
    return at.dits[0].asked[which].draw.image


def parts(at: Deployment) -> list[str]:
    """The longest context that the Thinker was asked for, an image as what it enters as."""
    longest = max(at.thinkers[0].asked, key=lambda build: len(build.parts))
    kinds = {True: "edit", False: "look"}
    return [part.text.text if part.HasField("text") else kinds[part.image.for_generation] for part in longest.parts]


async def raw(at: Deployment, request: bytes) -> tuple[int, bytes]:
    """Status and body of what bytes on the wire are answered with."""
    assert at.gateway.rest is not None
    reader, writer = await asyncio.open_connection("127.0.0.1", at.gateway.rest.port)
    try:
        writer.write(request)
        await writer.drain()
        answer = b""
        while piece := await reader.read(65536):
            answer += piece
    except ConnectionResetError:
        pass
    finally:
        writer.close()
    match = REPLY.search(answer)
    assert match, answer
    return int(match[1]), match[2]


async def get(at: Deployment, path: str) -> tuple[int, bytes]:
    return await raw(at, f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())


async def post(at: Deployment, path: str, body: object, kind: str = "application/json") -> tuple[int, Any]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: {kind}\r\n"
    status, answer = await raw(at, f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    return status, json.loads(answer)


# Parameters


def documented(method: Callable[..., Any]) -> set[str]:
    return set(inspect.signature(method).parameters) - OF_THE_CLIENT


ENDPOINTS = [
    (openai.resources.Images.generate, ImageParameters, REFUSED_GENERATION),
    (openai.resources.Images.edit, ImageParameters, REFUSED_EDIT),
    (openai.resources.chat.Completions.create, ChatParameters, REFUSED_CHAT),
]


@pytest.mark.parametrize(("method", "model", "refused"), ENDPOINTS, ids=["generate", "edit", "chat"])
def test_every_documented_parameter_is_honoured_or_refused_and_in_the_docs(
    method: Callable[..., Any], model: Any, refused: Any
) -> None:
    known = {*model.model_fields, *refused, "image"}
    assert documented(method) - known == set()
    table = (Path(__file__).parents[2] / "docs" / "rest.md").read_text()
    rows = set(re.findall(r"`(\w+)`", "\n".join(line for line in table.splitlines() if line.startswith("| `"))))
    assert (documented(method) | set(model.model_fields)) - rows == set()


OPTIONS: dict[str, Any] = {
    "num_inference_steps": 7,
    "timestep_shift": 2.5,
    "cfg_text_scale": 3.5,
    "cfg_img_scale": 1.25,
    "cfg_interval": [0.25, 0.75],
    "cfg_renorm_type": "channel",
    "cfg_renorm_min": 0.5,
    "negative_prompt": "blurry",
    "seed": 9,
    "think": True,
    "max_think_tokens": 12,
    "do_sample": True,
    "text_temperature": 0.75,
    "top_p": 0.5,
    "top_k": 3,
    "repetition_penalty": 1.5,
    "stop_token_ids": [4, 5],
}


def check_options(at: Deployment) -> None:
    """Everything of OPTIONS has reached the stages."""
    image, build = drawn(at), next(build for build in at.thinkers[0].asked if build.HasField("decode"))
    text = build.decode.settings
    assert (image.steps, image.timestep_shift, image.cfg_text_scale, image.cfg_img_scale) == (7, 2.5, 3.5, 1.25)
    assert (image.cfg_interval.lo, image.cfg_interval.hi, image.cfg_renorm_min) == (0.25, 0.75, 0.5)
    assert image.cfg_renorm_type == common_pb2.RENORM_TYPE_CHANNEL
    assert (text.do_sample, text.temperature, text.top_p, text.top_k) == (True, 0.75, 0.5, 3)
    assert (text.repetition_penalty, text.max_tokens, list(text.stop_token_ids)) == (1.5, 12, [4, 5])
    assert at.dits[0].asked[0].draw.seed == 9
    said = [part.text.text for asked in at.thinkers[0].asked for part in asked.parts]
    assert "blurry" in said


def test_bagels_own_options_reach_the_stages_from_json() -> None:
    async def work(at: Deployment, client: AsyncOpenAI) -> None:
        answer = await client.images.generate(
            prompt="a cat", size="256x128", output_format="webp", output_compression=40, extra_body=OPTIONS
        )
        check_options(at)
        call = at.dits[0].asked[0]
        assert (call.draw.image.width, call.draw.image.height) == (256, 128)
        assert (call.output_format, call.output_compression) == (common_pb2.IMAGE_FORMAT_WEBP, 40)
        assert answer.data is not None and answer.size == "256x128"
        assert Image.open(BytesIO(base64.b64decode(answer.data[0].b64_json or ""))).size == (256, 128)

    through(work)


def test_bagels_own_options_reach_the_stages_from_a_form_with_four_images() -> None:
    async def work(at: Deployment, client: AsyncOpenAI) -> None:
        files = [(f"{i}.png", photo(64 + 16 * i), "image/png") for i in range(4)]
        await client.images.edit(image=files, prompt="blend", extra_body=OPTIONS | {"posterior": "mean"})
        check_options(at)
        build = max(at.thinkers[0].asked, key=lambda each: len(each.parts))
        images = [Image.open(BytesIO(part.image.data)).width for part in build.parts if part.HasField("image")]
        assert images == [64, 80, 96, 112]
        assert parts(at)[-5:] == ["edit"] * 4 + ["blend"]
        assert build.posterior == common_pb2.POSTERIOR_MODE_MEAN

    through(work)


def test_bagels_own_options_reach_the_stages_from_a_chat() -> None:
    async def work(at: Deployment, client: AsyncOpenAI) -> None:
        answer = await client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "a cat"}],
            modalities=["image"],  # type: ignore[list-item]
            extra_body=OPTIONS | {"size": "128x128"},
        )
        check_options(at)
        url = answer.choices[0].message.images[0]["image_url"]["url"]  # type: ignore[attr-defined]
        assert Image.open(BytesIO(base64.b64decode(url.partition("base64,")[2]))).size == (128, 128)

    through(work)


def test_texts_and_images_of_messages_become_parts_in_their_order() -> None:
    async def work(at: Deployment, client: AsyncOpenAI) -> None:
        answer = await client.chat.completions.create(
            model="tiny",
            messages=[
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": [data_url(photo()), {"type": "text", "text": "What is it?"}]},  # type: ignore[list-item, misc]
                {"role": "assistant", "content": "A cat."},
                {"role": "user", "content": "Sure?"},
            ],
            temperature=0.5,
            max_completion_tokens=2,
            seed=3,
        )
        assert parts(at) == ["Be brief.", "look", "What is it?", "A cat.", "Sure?"]
        [build] = at.thinkers[0].asked
        assert (build.decode.settings.do_sample, build.decode.settings.temperature, build.seed) == (True, 0.5, 3)
        assert build.decode.settings.max_tokens == 2
        assert answer.choices[0].message.content == "so be it"
        assert answer.usage is not None and answer.usage.prompt_tokens == 3

    through(work)


@pytest.mark.parametrize("interleave", [None, False, True])
def test_images_of_a_users_message_come_before_its_texts_unless_interleaved(
    interleave: bool | None,
) -> None:
    def text(words: str) -> dict[str, Any]:
        return {"type": "text", "text": words}

    given: Any = [
        {"role": "user", "content": [text("First."), data_url(photo()), text("What is it?"), data_url(photo(40, 40))]},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": [text("And this?"), data_url(photo(60, 60))]},
    ]

    async def work(at: Deployment, client: AsyncOpenAI) -> None:
        await client.chat.completions.create(model="tiny", messages=given, extra_body={"interleave": interleave})
        kept = ["First.", "look", "What is it?", "look", "A cat.", "And this?", "look"]
        sorted_ = ["look", "look", "First.", "What is it?", "A cat.", "look", "And this?"]
        assert parts(at) == (kept if interleave else sorted_)
        [build] = at.thinkers[0].asked
        files = [Image.open(BytesIO(part.image.data)).width for part in build.parts if part.HasField("image")]
        assert files == [80, 40, 60]

    through(work)


QUALITIES = [
    ({}, 50, None),
    ({"quality": "auto"}, 50, None),
    ({"quality": "standard"}, 50, "high"),
    ({"quality": "hd"}, 75, "xhigh"),
    *(({"quality": name}, QUALITY[name], name) for name in ("low", "medium", "high", "xhigh", "max")),
    ({"quality": "low", "extra_body": {"num_inference_steps": 9}}, 9, None),
]


@pytest.mark.parametrize(("asked", "steps", "told"), QUALITIES)
def test_a_quality_is_timesteps_unless_they_are_given(asked: dict[str, Any], steps: int, told: str | None) -> None:
    async def work(at: Deployment, client: AsyncOpenAI) -> None:
        answer = await client.images.generate(prompt="a cat", **asked)
        assert (drawn(at).steps, answer.quality) == (steps, told)
        *_, last = [event async for event in await client.images.edit(image=photo(), prompt="x", stream=True, **asked)]
        assert (drawn(at, 1).steps, last.quality) == (steps, told or "auto")
        docs = (Path(__file__).parents[2] / "docs" / "rest.md").read_text()
        if told is not None:
            assert f"| `{asked['quality']}` | {steps} |" in docs

    through(work)


IMAGES, CHAT = "/v1/images/generations", "/v1/chat/completions"
ASK = {"messages": [{"role": "user", "content": "hello"}]}
WRONG: list[tuple[str, dict[str, Any], str, str]] = [
    (IMAGES, {}, "prompt", "missing"),
    (IMAGES, {"prompt": "x", "nonsense": 1}, "nonsense", "no parameter"),
    (IMAGES, {"prompt": "x", "height": 64, "width": 64}, "height", "height .*: send size: .*; width .*: send size"),
    (IMAGES, {"prompt": "x", "guidance_scale": 4}, "guidance_scale", "send cfg_text_scale"),
    (IMAGES, {"prompt": "x", "extra_body": {"seed": 1}}, "extra_body", "top level"),
    (IMAGES, {"prompt": "x", "negative_promt": "y"}, "negative_promt", "did you mean negative_prompt"),
    (
        IMAGES,
        {"prompt": "x", "true_cfg_scale": 4, "style": "vivid", "n": 11, "num_outputs_per_prompt": 2, "mask": None},
        "true_cfg_scale",
        "cfg_text_scale; num_outputs_per_prompt .*send n; mask .*; style .*prompt; leave it out; n is 11",
    ),
    (IMAGES, {"prompt": "x", "n": 11}, "n", "10"),
    (IMAGES, {"prompt": "x", "n": "2"}, "n", "integer"),
    (IMAGES, {"prompt": "x", "size": "big"}, "size", "WIDTHxHEIGHT"),
    (IMAGES, {"prompt": "x", "size": "99999x64"}, "size", "1024"),
    (IMAGES, {"prompt": "x", "quality": "best"}, "quality", "'low', 'medium'"),
    (IMAGES, {"prompt": "x", "background": "transparent"}, "background", "opaque"),
    (IMAGES, {"prompt": "x", "response_format": "url"}, "response_format", "b64_json"),
    (IMAGES, {"prompt": "x", "style": "vivid"}, "style", "prompt"),
    (IMAGES, {"prompt": "x", "output_format": "gif"}, "output_format", "png"),
    (IMAGES, {"prompt": "x", "output_compression": 50}, "output_compression", "PNG"),
    (IMAGES, {"prompt": "x", "partial_images": 2}, "partial_images", "stream"),
    (IMAGES, {"prompt": "x", "partial_images": 4, "stream": True}, "partial_images", "3"),
    (IMAGES, {"prompt": "x", "num_inference_steps": 1}, "num_inference_steps", "at least|from 2"),
    (IMAGES, {"prompt": "x", "num_inference_steps": 10**9}, "num_inference_steps", "1000"),
    (IMAGES, {"prompt": "x", "seed": -1}, "seed", "0"),
    (IMAGES, {"prompt": "x", "seed": 2**70}, "seed", "seed"),
    (IMAGES, {"prompt": "x", "seed": 2**63 - 1, "n": 2}, "seed", "at most"),
    (IMAGES, {"prompt": "x", "cfg_interval": [0.9, 0.1]}, "cfg_interval", "rise"),
    (IMAGES, {"prompt": "x", "cfg_text_scale": 1e9}, "cfg_text_scale", "from 0 to 100"),
    (IMAGES, {"prompt": "x", "max_think_tokens": 5}, "max_think_tokens", "no effect"),
    (IMAGES, {"prompt": "x", "posterior": "mean"}, "posterior", "no effect"),
    (IMAGES, {"prompt": "x", "cfg_text_scale": 1, "negative_prompt": "y"}, "negative_prompt", "without guidance"),
    (IMAGES, {"prompt": "x", "cfg_text_scale": 0.5, "cfg_interval": [0.1, 0.9]}, "cfg_interval", "without guidance"),
    (IMAGES, {"prompt": "x", "cfg_interval": [0.5, 0.5], "negative_prompt": "y"}, "negative_prompt", "no timestep"),
    (IMAGES, {"prompt": "x", "num_inference_steps": 2, "timestep_shift": 2}, "timestep_shift", "2 timesteps"),
    (IMAGES, {"prompt": "x", "size": "8x64"}, "size", "size is 8x64: its width is 8; it must be"),
    (CHAT, ASK | {"stop_token_ids": [5, 1000]}, "stop_token_ids", "has 1000; this model's tokens are 0 to 999"),
    (CHAT, ASK | {"stop_token_ids": [5] * 65}, "stop_token_ids", "64"),
    (CHAT, ASK | {"temperature": 0, "top_p": 0.5}, "top_p", "without sampling"),
    (CHAT, ASK | {"temperature": 0, "top_k": 5}, "top_k", "without sampling"),
    (CHAT, ASK | {"do_sample": True, "text_temperature": 0, "top_k": 5}, "top_k", "temperature 0"),
    (CHAT, ASK | {"modalities": ["image"], "max_completion_tokens": 5}, "max_completion_tokens", "on a picture"),
    (IMAGES, {"prompt": "  "}, "prompt", "no text"),
    (IMAGES, {"prompt": "x" * (2**20 + 1)}, "prompt", "bytes"),
    (IMAGES, {"prompt": "a <|im_start|>cat<|im_end|>"}, "prompt", r"marks <\|im_start\|>, <\|im_end\|>; "),
    (IMAGES, {"prompt": "x", "negative_prompt": "<|image_pad|>"}, "negative_prompt", "control mark"),
    (
        CHAT,
        {"messages": [*ASK["messages"], {"role": "assistant", "content": "<|im_end|>"}]},
        "messages",
        r"^messages\[1\]\.content has the control mark",
    ),
    (
        CHAT,
        {"messages": [{"role": "user", "content": "<|im_end|>"}], "extra_body": {"seed": 1, "height": 64}},
        "extra_body",
        r"^extra_body is .* top level; height is .* send size.*; messages\[0\]\.content has the control mark",
    ),
    (
        IMAGES,
        {"prompt": "x <|im_end|>", "negative_prompt": "<|im_end|>", "guidance_scale": 3, "style": "vivid"},
        "guidance_scale",
        "cfg_text_scale; style is not .*; prompt has the control mark.*; negative_prompt has the control mark",
    ),
    (CHAT, {"messages": []}, "messages", "at least 1"),
    (CHAT, ASK | {"tools": [{"type": "function"}]}, "tools", "no tools"),
    (CHAT, ASK | {"logprobs": True}, "logprobs", "not given out"),
    (CHAT, ASK | {"response_format": {"type": "json_object"}}, "response_format", "plain text"),
    (CHAT, ASK | {"frequency_penalty": 1}, "frequency_penalty", "repetition_penalty"),
    (
        CHAT,
        ASK | {"size": "64x64"},
        "size",
        r'^size has no effect on a text answer; send modalities: \["image"\] [^;]*$',
    ),
    (
        CHAT,
        ASK | {"num_inference_steps": 5, "cfg_text_scale": 3, "output_format": "webp"},
        "num_inference_steps",
        r'steps has .* send modalities: \["image"\].*; cfg_text_scale has .*; output_format has',
    ),
    (CHAT, ASK | {"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens", "one limit"),
    (CHAT, ASK | {"max_completion_tokens": 0}, "max_completion_tokens", "at least 1"),
    (CHAT, ASK | {"temperature": -1}, "temperature", "from 0 to 100"),
    (CHAT, ASK | {"text_temperature": 0.5}, "text_temperature", "sampling"),
    (CHAT, ASK | {"stream_options": {"include_usage": True}}, "stream_options", "stream"),
    (CHAT, ASK | {"modalities": ["audio"]}, "modalities.0", "text"),
    (
        CHAT,
        {"messages": [*ASK["messages"], {"role": "user", "content": [{"type": "text", "text": " "}]}]},
        "messages",
        r"messages\[1\]\.content\[0\] is an empty text",
    ),
    (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]},
        "messages",
        r"messages\[0\]\.content\[0\]: ",
    ),
    (CHAT, {"messages": [{"role": "tool", "content": "x"}]}, "messages", "role"),
    (
        CHAT,
        {"messages": [{"role": "user", "content": [{"image": "iVBOR"}, {"text": "x"}, {"type": "input_text"}]}]},
        "messages",
        r'content\[0\].*"image_url": \{"url".*content\[1\].*write \{"type": "text".*content\[2\].*"text"',
    ),
    (CHAT, {"messages": [{"role": "user", "content": "x", "name": "me"}]}, "messages", "name"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "messages", "type"),
    (CHAT, {"messages": [{"role": "user", "content": [data_url(b"nothing")]}]}, "messages", "text"),
    (CHAT, {"messages": [{"role": "user", "content": [data_url(photo())] * 8}]}, "messages", "8 images; .* 7"),
]


def test_what_cannot_be_honoured_is_refused_by_name() -> None:
    async def work(at: Deployment, client: AsyncOpenAI) -> None:
        for path, body, param, said in WRONG:
            status, answer = await post(at, path, body)
            assert status == 400, (body, answer)
            error = answer["error"]
            assert set(error) == {"message", "type", "param", "code"}
            assert (error["type"], error["param"]) == ("invalid_request_error", param), error
            assert re.search(said, error["message"]), error
        assert at.thinkers[0].asked == [] and at.dits[0].asked == []

    through(work)


def test_images_are_checked_before_they_are_decoded() -> None:
    header = b"IHDR" + struct.pack(">IIBBBBB", 8000, 9000, 8, 2, 0, 0, 0)
    bomb = photo()[:12] + header + struct.pack(">I", zlib.crc32(header)) + photo()[33:]

    async def work(at: Deployment, client: AsyncOpenAI) -> None:
        wrong = {b"no image": "no intact", photo()[:20]: "damaged|no intact", bomb: "8000x9000 pixels"}
        for data, said in wrong.items():
            with pytest.raises(openai.BadRequestError, match=said) as caught:
                await client.images.edit(image=data, prompt="x")
            assert caught.value.param == "image"
        with pytest.raises(openai.BadRequestError, match="8 images; one request may have 7"):
            await client.images.edit(image=[photo()] * 8, prompt="x")
        wrong_names = {"url": [1, 2], "n": 99}  # a name is checked before its count
        with pytest.raises(openai.BadRequestError, match=r"url\[\] is no parameter .*: send files.*; n is '99'"):
            await client.images.edit(image=photo(), prompt="x", extra_body=wrong_names)
        with pytest.raises(openai.BadRequestError, match="mask is not supported"):
            await client.images.edit(image=photo(), mask=photo(), prompt="x")
        status, answer = await post(at, "/v1/images/edits", {"prompt": "x"})
        assert status == 415 and "multipart" in answer["error"]["message"]

    through(work)


@pytest.mark.parametrize(
    ("url", "said"),
    [("http://127.0.0.1/x.png", "refused here"), ("file:///etc/passwd", "refused here"), ("data:,", "data URL")],
)
def test_urls_of_images_are_refused(url: str, said: str) -> None:
    async def work(at: Deployment, client: AsyncOpenAI) -> None:
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "x"}]
        with pytest.raises(openai.BadRequestError, match=said):
            await client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": content}])  # type: ignore[list-item, misc]

    through(work)


def test_urls_of_other_hosts_than_those_allowed_are_refused() -> None:
    async def work(at: Deployment, client: AsyncOpenAI) -> None:
        for url in ("http://images.example/x", "https://images.example@127.0.0.1/x", "https://images.example:8443/x"):
            content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "x"}]
            with pytest.raises(openai.BadRequestError, match=r"these hosts alone: images\.example"):
                await client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": content}])  # type: ignore[list-item, misc]

    through(work, allow_image_hosts=("images.example",))


# Bodies


def test_a_body_is_bounded_while_it_is_read() -> None:
    async def work(at: Deployment, client: AsyncOpenAI) -> None:
        head = f"POST {IMAGES} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n".encode()
        status, body = await raw(at, head + b"Content-Length: 10000000\r\n\r\n{")
        assert status == 413 and json.loads(body)["error"]["code"] == "request_too_large"
        piece = b"4000\r\n" + b" " * 0x4000 + b"\r\n"
        status, _ = await raw(at, head + b"Transfer-Encoding: chunked\r\n\r\n" + piece * 8)  # it never ends
        assert status == 413
        assert (await client.images.generate(prompt="a cat")).data

    through(work, max_body_bytes=65_536)


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'"x"', b"[" * 100_000, b'{"prompt": "\xff"}', b'{"n": ' + b"9" * 5000 + b"}"]
)
def test_a_body_that_is_no_object_is_refused(body: bytes) -> None:
    async def work(at: Deployment, client: AsyncOpenAI) -> None:
        status, answer = await post(at, IMAGES, body)
        assert (status, answer["error"]["param"]) == (400, "body")

    through(work)


# Models, operators


def test_the_model_and_its_aliases_are_listed_and_another_name_is_told_which_there_are() -> None:
    async def work(at: Deployment, client: AsyncOpenAI) -> None:
        assert [model.id async for model in client.models.list()] == ["ours", "org/alias"]
        assert (await client.models.retrieve("org/alias")).id == "org/alias"
        assert (await client.chat.completions.create(model="org/alias", **ASK)).model == "org/alias"  # type: ignore[call-overload]
        with pytest.raises(
            openai.NotFoundError, match="'gpt' is not served here; these are: ours, org/alias"
        ) as caught:
            await client.images.generate(prompt="x", model="gpt")
        assert (caught.value.param, caught.value.code) == ("model", "model_not_found")

    through(work, served_model_names=("ours", "org/alias"))


def test_operators_see_health_readiness_counters_and_docs_without_a_network() -> None:
    async def work(at: Deployment, client: AsyncOpenAI) -> None:
        assert [(await get(at, path))[0] for path in ("/healthz", "/readyz")] == [200, 200]
        await client.images.generate(prompt="x", n=2)
        _, text = await get(at, "/metrics")
        assert b'bagel_requests_total{modality="text2img",status="OK"} 2.0' in text
        assert b'bagel_backend_ready{backend="dit-0"} 1.0' in text
        _, playground = await get(at, "/")
        assert f'<meta name="grpc" content="{at.gateway.host.port} plaintext">'.encode() in playground
        status, page = await get(at, "/docs")
        assert status == 200 and not re.search(rb"https?://", page)
        for asset in re.findall(rb'(?:src|href)="(/docs/assets[^"]+)"', page):
            assert (await get(at, asset.decode()))[0] == 200
        schema = json.loads((await get(at, "/openapi.json"))[1])
        assert {IMAGES, CHAT, "/v1/images/edits", "/v1/models"} <= set(schema["paths"])
        at.gateway.host.draining.set()
        assert (await get(at, "/readyz"))[0] == 503
        with pytest.raises(openai.InternalServerError, match="shutting down") as caught:
            await client.images.generate(prompt="x")
        assert caught.value.status_code == 503

    through(work)


def test_it_is_not_ready_without_its_stages_and_says_which() -> None:
    async def work(at: Deployment, client: AsyncOpenAI) -> None:
        for host in at.hosts:
            await host.not_ready()
        async with asyncio.timeout(10):
            while at.gateway.backends.ready:
                await asyncio.sleep(0.01)
        status, body = await get(at, "/readyz")
        assert status == 503 and b"dit-0" in body

    through(work, backend_timeout_s=0.1)


def test_a_full_gateway_says_when_to_come_back() -> None:
    async def work(at: Deployment, client: AsyncOpenAI) -> None:
        at.dits[0].go.clear()
        first = asyncio.create_task(client.images.generate(prompt="a cat"))
        await at.dits[0].called.wait()
        with pytest.raises(openai.RateLimitError, match="limit") as caught:
            await client.images.generate(prompt="a dog")
        assert int(caught.value.response.headers["retry-after"]) >= 1
        at.dits[0].go.set()
        assert (await first).data

    through(work, max_requests=1, batch_timeout_s=0)


def test_pictures_of_one_call_wait_for_each_other_and_share_their_prompt() -> None:
    async def work(at: Deployment, client: AsyncOpenAI) -> None:
        answer = await client.images.generate(prompt="a cat", n=5, extra_body={"seed": 10})
        assert answer.data is not None and answer.usage is not None
        assert [item.seed for item in answer.data] == [10, 11, 12, 13, 14]  # type: ignore[attr-defined]
        assert sorted(call.draw.seed for call in at.dits[0].asked) == [10, 11, 12, 13, 14]
        assert (answer.usage.input_tokens, answer.usage.output_tokens) == (3, 5 * 32 * 64)
        assert len({part.SerializeToString() for build in at.thinkers[0].asked for part in build.parts}) == 1
        await at.settled()

    through(work, max_requests=2, batch_timeout_s=0)


# Who goes away


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_cancels_its_work_in_every_stage(stream: bool) -> None:
    async def work(at: Deployment, client: AsyncOpenAI) -> None:
        at.dits[0].go.clear()
        more = {"stream": True, "progress": True} if stream else {}
        asked = asyncio.create_task(client.images.generate(prompt="a cat", n=3, stream=stream, extra_body=more))
        async with asyncio.timeout(10):
            while at.journal.events.count("draw begins") < 3:
                await asyncio.sleep(0.01)
        if stream:
            answer = await asked
            assert isinstance(answer, openai.AsyncStream)
            await answer.close()
        else:
            asked.cancel()
            await asyncio.gather(asked, return_exceptions=True)
        await at.settled()
        assert at.journal.events.count("draw is cancelled") == 3
        at.dits[0].go.set()
        assert (await client.images.generate(prompt="a dog")).data

    through(work)


def test_an_error_after_the_stream_has_begun_is_its_last_event() -> None:
    async def work(at: Deployment, client: AsyncOpenAI) -> None:
        at.dits[0].go.clear()
        lenient: Any = client.copy(_extra_kwargs={"_strict_response_validation": False})  # progress is of our own
        stream = await lenient.images.generate(prompt="a cat", stream=True, extra_body={"progress": True})
        await at.hosts[1].server.stop(None)
        with pytest.raises(openai.APIError):
            async for _ in stream:
                pass

    through(work)


def test_the_requests_name_is_in_the_answer_and_goes_to_the_stages() -> None:
    async def work(at: Deployment, client: AsyncOpenAI) -> None:
        answer = await client.images.generate(prompt="a cat", extra_headers={"X-Request-ID": "mine"})
        assert answer._request_id == "mine"
        assert at.journal.request_ids == {"mine"}

    through(work)


def test_a_gateway_that_is_told_to_stop_ends_what_is_under_way_first() -> None:
    async def work(at: Deployment, client: AsyncOpenAI) -> None:
        at.dits[0].go.clear()
        asked = asyncio.create_task(client.images.generate(prompt="a cat"))
        await at.dits[0].called.wait()
        closing = asyncio.create_task(at.gateway.close(20))
        async with asyncio.timeout(10):
            while not at.gateway.host.draining.is_set():
                await asyncio.sleep(0.01)
        with pytest.raises(openai.InternalServerError, match="shutting down"):
            await client.images.generate(prompt="too late")
        at.dits[0].go.set()
        assert (await asked).data
        await closing
        with pytest.raises(openai.APIConnectionError):
            await client.images.generate(prompt="nobody listens")

    through(work)


def test_tls_of_the_gateway_is_https_too(tmp_path: Path) -> None:
    authority = trustme.CA()
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    issued = authority.issue_cert("localhost")
    issued.cert_chain_pems[0].write_to_path(certificate)
    issued.private_key_pem.write_to_path(key)
    trusts = ssl.create_default_context()
    authority.configure_trust(trusts)

    async def run() -> None:
        async with (
            asyncio.timeout(60),
            deployment(http="127.0.0.1:0", **front(Security(certificate, key))) as made,
        ):
            assert made.gateway.rest is not None
            port = made.gateway.rest.port
            reader, writer = await asyncio.open_connection("localhost", port, ssl=trusts)
            writer.write(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            assert (await reader.read()).endswith(b"ok\n")
            writer.close()
            await writer.wait_closed()
            reader, writer = await asyncio.open_connection("localhost", port, ssl=trusts)
            writer.write(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            assert f'<meta name="grpc" content="{made.gateway.host.port} tls">'.encode() in await reader.read()
            writer.close()
            await writer.wait_closed()

    asyncio.run(run())


def test_an_address_that_is_taken_is_told() -> None:
    async def run() -> None:
        async with deployment(http="127.0.0.1:0") as made:
            assert made.gateway.rest is not None
            with pytest.raises(ConfigError, match=r"cannot be listened on.*--http"):
                async with deployment(http=made.gateway.rest.address):
                    pass

    asyncio.run(run())


@pytest.mark.parametrize(
    ("steps", "previews", "wanted"),
    [(49, 0, ()), (49, 1, (10,)), (49, 3, (10, 23, 36)), (2, 3, (1,)), (1, 3, ()), (10, 2, (2, 6))],
)
def test_previews_begin_after_a_fifth_of_the_steps(steps: int, previews: int, wanted: tuple[int, ...]) -> None:
    from bagel.engine.sampler import preview_steps

    assert preview_steps(steps, previews) == wanted


def test_docs_list_every_limit_as_the_code_has_it() -> None:
    """A limit that a parameter gets must come into the table, and to this test."""
    text = (Path(__file__).parents[2] / "docs/rest.md").read_text().partition("## Limits")[2].partition("## Safety")[0]
    told = {name: int(value) for name, value in re.findall(r"^\| (.+?) \| (\d+) \|$", text, re.MULTILINE)}
    code = {
        "images": MAX_IMAGES,
        "parts of a prompt, texts and images together": request.MAX_PARTS,
        "bytes of its texts in UTF-8, and of `negative_prompt`": request.MAX_TEXT_BYTES,
        "`num_inference_steps`": request.MAX_STEPS,
        "`cfg_text_scale`, `cfg_img_scale`, `timestep_shift`": int(request.MAX_SCALE),
        "`temperature`, `text_temperature`": int(request.MAX_TEMPERATURE),
        "`seed`": request.MAX_SEED,
    }
    assert code.items() <= told.items()
    left = {name: value for name, value in told.items() if name not in code}
    for model in (rest_parameters.ChatParameters, rest_parameters.ImageParameters):
        for name, field in model.model_fields.items():
            ends = [getattr(each, "le", getattr(each, "max_length", None)) for each in field.metadata]
            for end in (end for end in ends if end is not None and name not in ("cfg_interval", "modalities")):
                assert [value for said, value in left.items() if f"`{name}`" in said] == [end], name


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"messages": [{}] * 65}, "messages has 65 entries; it must have at most 64"),
        ({"messages": []}, "messages has 0 entries; it must have at least 1"),
        ({"messages": [{}], "stop_token_ids": [1] * 65}, "stop_token_ids has 65 entries; it must have at most 64"),
    ],
)
def test_a_list_of_the_wrong_length_is_told_its_bound(given: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidRequest, match=f"^{words}$"):
        rest_parameters.read(rest_parameters.ChatParameters, {}, given, typed=True)
