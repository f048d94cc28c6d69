"""What a first request would otherwise wait for, done before a service is ready.

On a GPU the first run of each kind of work compiles and loads kernels, makes library handles, captures graphs and
takes memory from the driver. Here each kind runs once, through the objects that serve requests later and on their
threads, but on inputs of no request. Nothing of it stays but what it was run for: K/V space is given back, no context
is kept, nothing is counted.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping

import torch
from PIL import Image
from torch import Tensor

from bagel.engine.commands import PlacedContext
from bagel.engine.context import Context, ContextBuilder, SegmentCache
from bagel.engine.diffusion import DiffusionEngine
from bagel.engine.loading import LoadedModel
from bagel.engine.memory import is_out_of_memory
from bagel.engine.picture import ArrivingContext, Picture
from bagel.engine.slab import SharedSlab
from bagel.engine.text import TextRun
from bagel.engine.text_scheduler import TextScheduler
from bagel.errors import OutOfMemory
from bagel.prompts import BranchName, ImagePart, Prompt, TextPart
from bagel.request import ImageSettings, PosteriorMode, TextSettings

BRANCHES: Mapping[ImageSettings, tuple[BranchName, ...]] = {
    ImageSettings(steps=2, cfg_text_scale=1.0): (BranchName.GEN,),
    ImageSettings(steps=2): (BranchName.GEN, BranchName.CFG_TEXT),
    ImageSettings(steps=2, cfg_img_scale=1.5): tuple(BranchName),
}
"""Settings whose first step runs one, two and three rows."""
PARTS = (1, 2, 4)
"""Of each side of the default size, the parts that other usual sizes have: 512 and 256 pixels of 1024. Their steps are
CUDA graphs, which are captured here."""

logger = logging.getLogger(__name__)


def warm_up(
    loaded: LoadedModel, space: SharedSlab, diffusion: DiffusionEngine | None, texts: TextScheduler | None
) -> None:
    """Run each kind of work that `diffusion` and `texts` do for requests; `space` holds the K/V of both.

    Raises OutOfMemory if the device is too small for a picture or an image of the default size.
    """
    device, began = loaded.model.device, time.perf_counter()
    try:
        if texts is not None:
            _read(loaded)
            if texts.builder.texts is not None:
                texts.builder.texts.warm_up()
            _write(texts)
        if diffusion is not None:
            _draw(loaded, space, diffusion)
        if device.type == "cuda":
            # Without it, an error of a kernel would show in the first request.
            torch.cuda.synchronize(device)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(
            f"{device} has too little memory left for a request of the default size; lower kv_device_bytes, or "
            "choose a device with more"
        ) from error
    logger.info("warmed up", extra={"fields": {"seconds": round(time.perf_counter() - began, 2)}})


def _read(loaded: LoadedModel) -> None:
    """Compute a context of an image of the default size, with the blocks that the role has, and a short text."""
    height, width = loaded.model.config.default_image_size
    image = ImagePart(Image.new("RGB", (width, height)), for_generation=loaded.role.parts.encoder)
    prompt: Prompt = (image, TextPart("a"))
    images = loaded.planner.prepare_images(prompt, PosteriorMode.MEAN, seed=0)
    # A cache of no bytes keeps nothing of this.
    ContextBuilder(loaded.model, SegmentCache(0)).build(loaded.planner.chain(prompt, images))


def _write(texts: TextScheduler) -> None:
    """Decode a token of 1, 2, 4 … texts at once, up to the most that are decoded together."""
    batch, most = texts.texts, texts.max_num_seqs
    for count in (min(1 << i, most) for i in range((most - 1).bit_length() + 1)):
        runs = [TextRun(Context(), TextSettings(max_tokens=2), seed=0) for _ in range(count)]
        try:
            for run in runs:
                if batch.has_room(run):
                    batch.add(run)
            if len(batch):
                batch.step()
        finally:
            for run in runs:
                batch.remove(run)


def _draw(loaded: LoadedModel, space: SharedSlab, diffusion: DiffusionEngine) -> None:
    """Take a step of pictures of the usual sizes with each number of rows, and decode one of the default size."""
    config, device = loaded.model.config, loaded.model.device
    height, width = (side // config.latent_stride for side in config.default_image_size)
    noise = torch.zeros(height * width, config.latent_features)
    for parts in PARTS:
        grid = max(1, height // parts), max(1, width // parts)
        _take_steps(space, diffusion, grid, noise[: grid[0] * grid[1]])
    diffusion.vae.warm_up(noise.to(device), (height, width))


def _take_steps(space: SharedSlab, diffusion: DiffusionEngine, grid: tuple[int, int], noise: Tensor) -> None:
    """Take a step of a picture of rows x columns latents with each number of rows."""
    bucket = diffusion.bucket(len(noise))
    for settings, branches in BRANCHES.items():
        contexts = {name: ArrivingContext(PlacedContext(name.encode(), 0, 0)) for name in branches}
        picture = Picture(settings, grid, noise, contexts)
        if space.needed(picture.kv_tokens(bucket)) > space.size:
            continue  # a request of this size never has room either
        canvas = diffusion.canvas(bucket)
        drawing = canvas.add(picture)
        try:
            canvas.step([drawing])
        finally:
            canvas.remove(drawing)
