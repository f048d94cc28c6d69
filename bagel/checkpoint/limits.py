"""Sizes that a model allows: of pictures, of prompts and texts. No torch here: checked before a model is loaded."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from bagel.checkpoint.config import ModelConfig
from bagel.errors import InvalidRequest
from bagel.images import ImageTransform, resized_size
from bagel.prompts import ImagePart
from bagel.request import Request, text_settings

SMALLEST_BUCKET = 16


@dataclass(frozen=True)
class PictureLimits:
    """What a picture's size depends on. default_image_size: (height, width); the rest in pixels a side."""

    default_image_size: tuple[int, int]
    max_image_size: int
    latent_stride: int
    vae_transform: ImageTransform


def picture_size(request: Request, config: ModelConfig | PictureLimits) -> tuple[int, int]:
    """(height, width): the user's, an edit's resized input's, or the model's default; rounded down to the grid.

    Raises InvalidRequest for a side that the latent position table has no rows for.
    """
    default = config.default_image_size
    images = [part.image for part in request.prompt if isinstance(part, ImagePart)]
    if images:
        width, height = resized_size(*images[-1].size, config.vae_transform)
        default = (height, width)
    given = request.image
    return (
        check_side("height", default[0] if given.height is None else given.height, config),
        check_side("width", default[1] if given.width is None else given.width, config),
    )


def check_side(name: str, pixels: int, config: ModelConfig | PictureLimits) -> int:
    """A side of a picture, rounded down to the grid; InvalidRequest if the model has no positions for it."""
    stride, largest = config.latent_stride, config.max_image_size
    if not stride <= pixels < largest + stride:
        raise InvalidRequest(name, f"{name} is {pixels}; this model draws {stride} to {largest} pixels a side")
    return pixels // stride * stride


def check_stop_ids(ids: Iterable[int], vocabulary: int) -> None:
    """Refuse a stop token that the model does not have, and could never write; raises InvalidRequest."""
    if outside := [token for token in ids if token >= vocabulary]:
        told = f"stop_token_ids has {outside[0]}; this model's tokens are 0 to {vocabulary - 1}"
        raise InvalidRequest("stop_token_ids", told)


def text_positions(request: Request) -> int:
    """Positions that the request's text may take: that of an answer or a think text, 0 if there is none."""
    return text_settings(request).max_tokens if request.think or not request.modality.makes_image else 0


def check_positions(prompt: int, text: int, limit: int) -> None:
    """Refuse a prompt of so many positions with so much text after it; raises InvalidRequest naming the remedy."""
    if prompt + text <= limit:
        return
    raise InvalidRequest(
        "max_tokens" if prompt <= limit else "prompt",
        f"the prompt takes {prompt} positions and the text after it up to {text}; the limit is {limit} "
        "(max_model_len of the deploy file, at most the model's max_position_embeddings): "
        + ("lower max_tokens or max_think_tokens, or shorten the prompt" if prompt <= limit else "shorten the prompt"),
    )


def latent_bucket(tokens: int) -> int:
    """Latents that a row is padded to, so that few shapes exist to compile or capture: eight to an octave."""
    granularity = max(SMALLEST_BUCKET, 1 << max(0, tokens.bit_length() - 4))
    return -(-tokens // granularity) * granularity


def padded_latents(tokens: int, device: str) -> int:
    """Latents of a row on a device; on a CPU nothing is compiled or captured, so there nothing is padded."""
    return latent_bucket(tokens) if device.startswith("cuda") else tokens


def row_kv_tokens(context: int, padded: int) -> int:
    """Tokens of K/V of a picture's row: its context, its latents and their two delimiters."""
    return context + padded + 2


def check_kv_room(needed: int, there: int) -> None:
    """Refuse what can never fit the K/V of a DiT's device; raises InvalidRequest naming the remedy."""
    if needed > there:
        raise InvalidRequest(
            "prompt",
            f"the request takes {needed} tokens of K/V on the DiT's device, which holds {there} (--kv-device-bytes): "
            "draw it smaller, shorten the prompt or the text, use fewer or smaller images, or give the DiT more",
        )


def position_limit(config: ModelConfig, max_model_len: int | None) -> int:
    """Positions of prompt and text together."""
    positions = config.llm.max_position_embeddings
    return min(max_model_len or positions, positions)
