"""A DiT whose ranks divide the branches and the latents of pictures: it draws what one process draws."""

from __future__ import annotations

import asyncio
import io
from typing import Any

import pytest
from PIL import Image

from bagel.deployment.dit_config import DitConfig
from bagel.engine.commands import AddRequest
from bagel.engine.events import Drawn
from bagel.engine.local import BagelEngine
from bagel.images.output import OutputFormat
from bagel_dit.runner_client import RunnerClient
from bagel_dit.workers import RankSettings
from tests.conftest import GOLDEN
from tests.helpers import agree, request

pytestmark = pytest.mark.slow  # it starts processes

LIMIT_S = 300  # a machine that runs other tests too may be slow
REQUESTS = [
    request("text2img", height=80, width=112),  # 35 latents
    request("text2img", text="a blue cup", cfg_text_scale=1.0),
    request("text2img", text="a cup", cfg_interval=(0.7, 1.0), height=48, width=16),
    request("img2img", cfg_img_scale=1.5, height=64, width=48),
    request("text2img", text="a bowl", think=True),
]


async def draw(runner: RunnerClient, id_: int) -> Any:
    events: asyncio.Queue[Any] = asyncio.Queue()
    runner.listen(id_, events)
    runner.send(AddRequest(id_, REQUESTS[id_], OutputFormat("PNG")))
    while True:
        event = await events.get()
        if hasattr(event, "bucket"):
            runner.begin(event)
        if isinstance(event, Drawn | Exception):
            runner.forget(id_)
            return event


@pytest.mark.parametrize("sizes", [{"context_parallel_size": 2, "cfg_parallel_size": 2}], ids=str)
def test_pictures_are_those_of_one_process(sizes: dict[str, int], engine: BagelEngine) -> None:
    async def together() -> list[Any]:
        async def on_health(healthy: bool) -> None: ...

        folder = GOLDEN / "checkpoint"
        config = DitConfig(model=str(folder), device="cpu", log_level="ERROR", single_stage=True, **sizes)  # type: ignore[arg-type]
        async with asyncio.timeout(LIMIT_S):
            runner = RunnerClient(RankSettings(config, folder), on_health)
            try:
                await runner.loaded()
                return await asyncio.gather(*(draw(runner, id_) for id_ in range(len(REQUESTS))))
            finally:
                await runner.stop()

    drawn = asyncio.run(together())
    for each, wanted in zip(drawn, engine.generate(REQUESTS), strict=True):
        assert isinstance(each, Drawn), each
        assert isinstance(each.picture, bytes) and wanted.image is not None
        assert agree(Image.open(io.BytesIO(each.picture)), wanted.image)
