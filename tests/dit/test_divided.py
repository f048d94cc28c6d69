"""A DiT whose ranks divide branches, latents, weights and tiles: what one process makes, and requests that leave."""

from __future__ import annotations

import asyncio
import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from bagel.checkpoint.files import Checkpoint
from bagel.deployment.dit_config import DitConfig
from bagel.engine.commands import AddRequest
from bagel.engine.events import Begun, Done, Drawn, Previewed, StepTaken, TextDone
from bagel.engine.local import BagelEngine
from bagel.images.output import OutputFormat
from bagel.request import Request
from bagel_dit.runner_client import RunnerClient
from bagel_dit.workers import RankSettings
from tests.conftest import GOLDEN
from tests.helpers import agree, request, sketch

pytestmark = pytest.mark.slow  # it starts groups of processes

LIMIT_S = 300  # a machine that runs other tests too may be slow
TRANSFORMS = {"vae": [640, 64, 16], "vit": [140, 56, 14]}
"""Images of more than one tile to the autoencoder, and of few tokens to the ViT."""
WIDE: dict[str, Any] = {"height": 64, "width": 544}
"""A picture of two tiles."""
REQUESTS = (
    request("text2img", think=True, **WIDE),
    request("img2img", image=sketch(600, 64), cfg_img_scale=1.5),
    request("text2img", cfg_text_scale=1.0, height=80, width=112),  # 35 latents, which no two ranks divide
    request("text2img", text="a cup", cfg_interval=(0.7, 1.0), height=48, width=16),
    request("text2text", max_tokens=6),
)
SIZES: dict[str, dict[str, Any]] = {
    "hsdp 2, tiles 2": {"use_hsdp": True, "hsdp_shard_size": 2, "vae_patch_parallel_size": 2},
    "hsdp 2 x 2, cfg 2, context 2, tiles 3": {
        "use_hsdp": True,
        "hsdp_replicate_size": 2,
        "cfg_parallel_size": 2,
        "context_parallel_size": 2,
        "vae_patch_parallel_size": 3,
    },
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recordings' checkpoint with other image transforms."""
    folder = tmp_path_factory.mktemp("divided")
    for file in (GOLDEN / "checkpoint").iterdir():
        (folder / file.name).symlink_to(file)
    config = json.loads((folder / "config.json").read_text()) | {"image_transforms": TRANSFORMS}
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


async def serve(runner: RunnerClient, id_: int, asked: Request, *, leave_at: int = 0) -> list[Any]:
    """The events of a request until it is over. leave_at: the step after which its caller leaves."""
    queue: asyncio.Queue[Any] = asyncio.Queue()
    runner.listen(id_, queue)
    runner.send(AddRequest(id_, asked, OutputFormat("PNG", previews=2)))
    events = []
    while True:
        events.append(event := await queue.get())
        if isinstance(event, Begun):
            runner.begin(event)
        left = isinstance(event, StepTaken) and event.step == leave_at
        if left or isinstance(event, Drawn | Done | Exception):
            runner.forget(id_)
            return events


async def served(model: Path, sizes: dict[str, Any]) -> list[list[Any]]:
    """Events of REQUESTS, all at once beside one whose caller leaves."""

    async def on_health(healthy: bool) -> None: ...

    config = DitConfig(model=str(model), device="cpu", log_level="ERROR", single_stage=True, **sizes)
    async with asyncio.timeout(LIMIT_S):
        runner = RunnerClient(RankSettings(config, model), on_health)
        try:
            await runner.loaded()
            leaving = serve(runner, 99, request("text2img", steps=30, **WIDE), leave_at=7)
            *events, _ = await asyncio.gather(*(serve(runner, *each) for each in enumerate(REQUESTS)), leaving)
            return events
        finally:
            await runner.stop()


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_it_makes_what_one_process_makes(model: Path, sizes: dict[str, Any]) -> None:
    expected = BagelEngine.load(Checkpoint(model), vae_use_tiling=True).generate(list(REQUESTS))
    for events, one in zip(asyncio.run(served(model, sizes)), expected, strict=True):
        if one.image is None:
            assert isinstance(events[-1], Done), events[-1]
            assert [each.token_ids for each in events if isinstance(each, TextDone)] == [one.token_ids]
        else:
            assert isinstance(events[-1], Drawn) and isinstance(events[-1].picture, bytes), events[-1]
            assert agree(Image.open(io.BytesIO(events[-1].picture)), one.image)
            assert sum(isinstance(each, Previewed) for each in events) == 2
