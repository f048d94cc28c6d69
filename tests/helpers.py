"""Helpers that several tests use."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from bagel.checkpoint.roles import Role
from bagel.engine.loading import LoadedModel
from bagel.engine.local import BagelEngine
from bagel.engine.text_scheduler import ContextDone, ContextEvent, ContextFailed
from bagel.images import ImageTransform
from bagel.prompts import ImagePart, Prompt, TextPart
from bagel.request import Modality, Request, resolve

FINGERPRINT = b"tests"


def small_images(
    engine: BagelEngine,
    vae: ImageTransform = ImageTransform(128, 64, 16),  # noqa: B008 - frozen
    vit: ImageTransform = ImageTransform(140, 56, 14),  # noqa: B008 - frozen
    **limits: Any,
) -> BagelEngine:
    """An engine with the same model and an empty cache, which resizes images to few tokens."""
    model = copy(engine.model)
    model.config = replace(model.config, vae_transform=vae, vit_transform=vit)
    loaded = LoadedModel.of(
        model, engine.tokenizer, Role.FULL, FINGERPRINT, max_model_len=limits.pop("max_model_len", None)
    )
    return BagelEngine(loaded, **limits)


def sketch(width: int = 112, height: int = 80, colour: str = "crimson") -> Image.Image:
    """A small picture."""
    image = Image.new("RGB", (width, height), "beige")
    ImageDraw.Draw(image).ellipse((width // 4, height // 4, width // 2, height // 2), fill=colour)
    return image


def request(modality: str, text: str = "a red cup", image: Image.Image | None = None, **options: Any) -> Request:
    """A request with few steps and tokens."""
    kind = Modality(modality)
    parts: Prompt = (TextPart(text),)
    if kind.reads_image:
        parts = (ImagePart(image or sketch(), for_generation=kind.makes_image), *parts)
    size = {"height": 64, "width": 64} if kind is Modality.TEXT2IMG else {}
    return resolve(kind, parts, {**size, **options}, {"steps": 5, "seed": 7, "max_think_tokens": 8})


def agree(one: Image.Image, other: Image.Image) -> bool:
    """Whether two pictures are equal but for single steps of 255 in at most 0.1% of their values."""
    difference = np.abs(np.asarray(one, dtype=np.int16) - np.asarray(other, dtype=np.int16))
    return bool(one.size == other.size and difference.max() <= 1 and (difference > 0).mean() <= 1e-3)


def keep_in(came: list[ContextDone | Exception]) -> Callable[[ContextEvent], None]:
    """A receiver of a context's events that keeps its result, or its error."""

    def emit(event: ContextEvent) -> None:
        if isinstance(event, ContextDone):
            came.append(event)
        elif isinstance(event, ContextFailed):
            came.append(event.error)

    return emit
