"""What the files of pictures say of how they were made, over gRPC and over HTTP."""

from __future__ import annotations

import asyncio
import base64
from pathlib import Path
from typing import Any

from openai import AsyncOpenAI

from bagel.deployment.defaults import NANO_FOLDERS, model_label
from bagel.images import read_settings
from tests.gateway_stages import Deployment, deployment
from tests.rest.test_front import through

ASKED: dict[str, Any] = {"negative_prompt": "a dog", "steps": 7, "seed": 3, "height": 32, "width": 48}
TEXTS = {"prompt": "a cat", "negative_prompt": "a dog", "think_text": "so be it"}


def file_of(**settings: Any) -> bytes:
    """The file that a client gets, of a picture with think."""

    async def run() -> bytes:
        async with asyncio.timeout(30), deployment("bagel_think", **settings) as at:
            return (await at.client.generate("a cat", think=True, **ASKED)).file

    return asyncio.run(run())


def test_a_picture_says_how_it_was_made() -> None:
    read = read_settings(file_of())
    assert {name: read[name] for name in TEXTS} == TEXTS
    assert {name: read[name] for name in ASKED} == {name: str(value) for name, value in ASKED.items()}
    assert (read["model"], read["think"]) == ("tiny", "true")


def test_a_model_is_called_by_no_path_of_this_machine(tmp_path: Path) -> None:
    names = ["org/name", "/data/models--org--name/snapshots/0123", "/data/mine", str(NANO_FOLDERS[1]), str(tmp_path)]
    assert [*map(model_label, names)] == ["org/name", "org/name", "mine", "bagel-nano", tmp_path.name]


def test_texts_are_left_out_or_all_is() -> None:
    read = read_settings(file_of(picture_settings="no-prompt"))
    assert read["seed"] == "3" and not TEXTS.keys() & read.keys()
    assert read_settings(file_of(picture_settings="none")) == {}


def test_over_http() -> None:
    async def work(at: Deployment, client: AsyncOpenAI) -> None:
        answer = await client.images.generate(prompt="a cat", n=2, extra_body={"seed": 3})
        files = [base64.b64decode(each.b64_json or "") for each in answer.data or ()]
        assert [read_settings(file)["seed"] for file in files] == ["3", "4"]

    through(work)
