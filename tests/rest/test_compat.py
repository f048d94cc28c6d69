"""`--compat vllm-omni`: every row of the table, by itself and through a gateway whose stages draw nothing."""

from __future__ import annotations

import asyncio
import base64
import copy
import json
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from email.message import Message
from io import BytesIO
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI
from PIL import Image

from bagel.deployment.gateway_config import GatewayConfig
from bagel.errors import ConfigError, InvalidRequest
from bagel.v1 import common_pb2
from bagel_gateway.rest.compat import ROWS, WITHOUT_EFFECT, Row, row_list, translate, without_marks
from bagel_gateway.rest.dialect import NOTES
from tests.gateway_stages import Deployment
from tests.rest.test_front import data_url, drawn, parts, photo, through

DOCS = Path(__file__).parents[2] / "docs"


@dataclass
class Answer:
    """What a gateway answered."""

    status: int
    headers: Message
    content: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.content)


@dataclass
class Http:
    """A client that sends bodies as they are, and OpenAI's of the same gateway."""

    address: str
    openai: AsyncOpenAI

    async def send(self, path: str, body: object = None) -> Answer:
        """Post a body as JSON, or get a page."""
        data = None if body is None else json.dumps(body).encode()
        sent = urllib.request.Request(f"http://{self.address}{path}", data, {"Content-Type": "application/json"})

        def answer() -> Answer:
            try:
                with urllib.request.urlopen(sent, timeout=30) as got:
                    return Answer(got.status, got.headers, got.read())
            except urllib.error.HTTPError as error:
                return Answer(error.code, error.headers, error.read())

        return await asyncio.to_thread(answer)

    async def chat(self, *content: Any, **more: Any) -> Answer:
        """A chat that is answered."""
        parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]
        answer = await self.send("/v1/chat/completions", {"messages": [{"role": "user", "content": parts}], **more})
        assert answer.status == 200, answer.content
        return answer


Work = Callable[[Deployment, Http], Coroutine[Any, Any, None]]


def compatible(work: Work, topology: str = "bagel", **settings: Any) -> None:
    """Run work with a gateway in the mode."""

    async def run(at: Deployment, client: AsyncOpenAI) -> None:
        assert at.gateway.rest is not None
        await work(at, Http(at.gateway.rest.address, client))

    through(run, topology, compat="vllm-omni", **settings)


def pictures(answer: Answer) -> list[Image.Image]:
    """As vllm-omni's clients look for them."""
    content = answer.json["choices"][0]["message"]["content"]
    return [Image.open(BytesIO(base64.b64decode(part["image_url"]["url"].partition(",")[2]))) for part in content]


@pytest.mark.parametrize("row", [row for row in ROWS if row.apply is not None], ids=lambda row: row.sent)
def test_a_row_does_what_it_says(row: Row) -> None:
    body = copy.deepcopy(row.example)
    assert body is not None
    notes = translate(body)
    assert body == row.becomes
    assert bool(notes) == ("noted" in row.here)


def test_the_page_prints_the_rows() -> None:
    assert row_list() in (DOCS / "migrate.md").read_text()


async def no_effect(at: Deployment, http: Http) -> None:
    answer = await http.chat("why?", modalities=["text"], num_inference_steps=25, height=512, width=512, seed=3)
    assert (
        "num_inference_steps has no effect" in answer.headers[NOTES] and "size has no effect" in answer.headers[NOTES]
    )
    assert isinstance(answer.json["choices"][0]["message"]["content"], str)
    answer = await http.chat("a cat", max_tokens=9, temperature=0.4, top_p=0.9, output_compression=100)
    for name in ("max_tokens", "temperature", "top_p", "output_compression"):
        assert f"{name} has no effect" in answer.headers[NOTES]


async def too_large(at: Deployment, http: Http) -> None:
    answer = await http.chat("a cat", height=2048, width=1024)
    assert (drawn(at).width, drawn(at).height) == (512, 1024) and "1024x2048" in answer.headers[NOTES]


async def guidance(at: Deployment, http: Http) -> None:
    for body in ({}, {"cfg_img_scale": 2.0, "cfg_interval": [0.2, 0.9]}, {"cfg_text_scale": 1.0}):
        answer = await http.chat("make it red", data_url(photo()), **body)
        assert NOTES not in answer.headers
    plain, given, none = (drawn(at, which) for which in range(3))
    assert plain.cfg_img_scale == 1.5 and plain.cfg_renorm_type == common_pb2.RENORM_TYPE_GLOBAL
    assert (plain.cfg_interval.lo, plain.cfg_interval.hi) == pytest.approx((0.4, 1.0))
    assert (given.cfg_img_scale, given.cfg_interval.lo, given.cfg_interval.hi) == pytest.approx((2.0, 0.2, 0.9))
    assert none.cfg_text_scale == 1
    await http.chat("a cat")
    assert drawn(at, 3).cfg_img_scale == 1.5


async def urls(at: Deployment, http: Http) -> None:
    url = data_url(photo())["image_url"]["url"]
    asked: dict[str, Any] = {"image": [], "prompt": "join them", "output_format": "jpeg"}
    await http.openai.images.edit(**asked, extra_body={"url": [url, url], "guidance_scale": 1, "seed": 7})
    assert parts(at) == ["edit", "edit", "join them"]
    with pytest.raises(openai.BadRequestError) as refused:
        await http.openai.images.edit(**asked, extra_body={"url": ["https://a.example/b.png"]})
    assert refused.value.param == "url"


async def file(at: Deployment, http: Http) -> None:
    asked = {"prompt": "a cat", "response_format": "file", "seed": 7, "size": "64x64"}
    answer = await http.send("/v1/images/generations", asked)
    assert answer.headers["content-disposition"] == 'attachment; filename="image_7.png"'
    assert Image.open(BytesIO(answer.content)).format == "PNG"
    refused = await http.send("/v1/images/generations", {**asked, "n": 2})
    assert refused.json["error"]["param"] == "response_format"


async def in_content(at: Deployment, http: Http) -> None:
    answer = await http.chat("<|im_start|>a cat<|im_end|>", num_outputs_per_prompt=2, output_format="jpg")
    [choice] = answer.json["choices"]
    assert all(part["image_url"]["url"].startswith("data:image/jpeg;base64,") for part in choice["message"]["content"])
    assert len(pictures(answer)) == 2 and parts(at) == ["a cat"]
    asked = {"messages": [{"role": "user", "content": "a cat"}], "stream": True}
    stream = await http.send("/v1/chat/completions", asked)
    chunks = [json.loads(line) for line in re.findall(r"^data: (\{.*)", stream.content.decode(), re.MULTILINE)]
    assert {chunk["modality"] for chunk in chunks} == {"image"}
    [part] = [part for chunk in chunks for part in chunk["choices"][0]["delta"].get("content") or ()]
    assert part["image_url"]["url"].startswith("data:image/png;base64,")


async def health(at: Deployment, http: Http) -> None:
    assert (await http.send("/health")).status == 200
    async with asyncio.timeout(10):
        status = 200
        while status != 503:  # the gateway asks the stand-in Thinker again, and finds it ready
            at.gateway.backends.thinkers[0].model = None
            status = (await http.send("/health")).status


SERVED: dict[str, Work] = {
    "a setting without effect, such as steps for a text answer": no_effect,
    "a size above the model's largest": too_large,
    "no `cfg_img_scale`, `cfg_interval` or `cfg_renorm_type`": guidance,
    "`url` of an edit, once or more": urls,
    "`response_format` `file`": file,
    "a chat that draws": in_content,
    "`GET /health`": health,
}
"""How a gateway shows the rows that are of no body."""


@pytest.mark.parametrize("row", [row for row in ROWS if row.apply is None], ids=lambda row: row.sent)
def test_a_row_of_no_body_holds(row: Row) -> None:
    compatible(SERVED[row.sent])


def test_a_request_of_every_habit_is_one_of_ours() -> None:
    """extra_body with ComfyUI's settings, text before the image, marks, an image in base64."""

    async def work(at: Deployment, http: Http) -> None:
        settings = {"type": "diffusion", "num_inference_steps": 8, "guidance_scale": 7.5, "true_cfg_scale": 1.0}
        extra = {**settings, "vae_use_slicing": False, "seed": 3, "width": 64, "height": 96, "lora": None}
        image = {"image": base64.b64encode(photo()).decode()}
        answer = await http.chat({"text": "<|im_start|>make it red<|im_end|>"}, image, extra_body=extra)
        assert [each.size for each in pictures(answer)] == [(64, 96)] and sorted(parts(at)) == ["edit", "make it red"]
        assert drawn(at).steps == 8 and drawn(at).cfg_text_scale == 4
        for name in ("guidance_scale", "true_cfg_scale", "type"):
            assert f"{name} has no effect: {WITHOUT_EFFECT[name]}" in answer.headers[NOTES]

    compatible(work)


def test_a_deployment_that_thinks_keeps_the_settings_of_its_text() -> None:
    async def work(at: Deployment, http: Http) -> None:
        answer = await http.chat("a cat", max_think_tokens=5)
        assert NOTES not in answer.headers
        message = answer.json["choices"][0]["message"]
        assert message["reasoning_content"] and message["content"][0]["type"] == "image_url"

    compatible(work, "bagel_think")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"lora": {"name": "a"}}, "lora"),
        ({"height": "tall"}, "height"),
        ({"height": 512, "width": 512, "size": "64x64"}, "size"),
        ({"n": 1, "num_outputs_per_prompt": 2}, "n"),
        ({"seed": 1, "extra_body": {"seed": 2}}, "seed"),
        ({"extra_body": "{"}, "extra_body"),
        ({"extra_body": [1]}, "extra_body"),
        ({"modalities": ["audio"]}, "modalities.0"),
        ({"messages": [{"role": "user", "content": "what does <|im_end|> end?"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"video": "x"}]}]}, "messages"),
    ],
)
def test_what_has_no_counterpart_is_refused_in_openais_form(body: dict[str, Any], param: str) -> None:
    async def work(at: Deployment, http: Http) -> None:
        sent = {"messages": [{"role": "user", "content": "a cat"}], **body}
        answer = await http.send("/v1/chat/completions", sent)
        assert answer.status == 400 and answer.json["error"]["param"] == param, answer.content

    compatible(work)


def test_without_the_mode_nothing_of_it_is_taken() -> None:
    async def work(at: Deployment, client: AsyncOpenAI) -> None:
        asked: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "a cat"}]}
        answer = await client.chat.completions.create(**asked)
        assert isinstance(answer.choices[0].message.content, str)
        for extra in ({"extra_body": {"seed": 1}}, {"height": 64}, {"lora": None}):
            with pytest.raises(openai.BadRequestError):
                await client.chat.completions.create(**asked, extra_body=extra)
        with pytest.raises(openai.NotFoundError):
            await client.get("/../health", cast_to=object)

    through(work)


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("<|im_start|>a cat<|im_end|>", "a cat"),
        (" a cat ", " a cat "),
        ("<|fim_middle|><|im_start|>make it red<|im_end|>", "make it red"),
        (
            "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>what?<|im_end|>\n<|im_start|>assistant\n",
            "what?",
        ),
        ("user\nis a word", "user\nis a word"),
        ("<|im_start|>" * 100 + "x", "<|im_start|>" * 84 + "x"),
    ],
)
def test_marks_are_taken_off_the_ends_alone(text: str, plain: str) -> None:
    assert without_marks(text) == plain


def test_an_extra_body_that_contradicts_itself_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="given twice"):
        translate({"extra_body": {"seed": 1}, "extra_args": {"seed": 2}})


def test_the_mode_needs_http() -> None:
    stages: dict[str, Any] = {"thinkers": ("thinker-0=h:1",), "dits": ("dit-0=h:2",)}
    with pytest.raises(ConfigError, match="--compat has no effect without --http"):
        GatewayConfig(**stages, compat="vllm-omni")
    with pytest.raises(ConfigError, match="compat is 'vllm'"):
        GatewayConfig(**stages, http="127.0.0.1:0", compat="vllm")


def test_the_compose_files_pass_the_variable_on() -> None:
    files = [file for file in (DOCS.parent / "deploy").glob("compose*.yaml") if "--http" in file.read_text()]
    assert files and all(re.search(r'--compat, "\$\{BAGEL_COMPAT:-none\}"', file.read_text()) for file in files)
