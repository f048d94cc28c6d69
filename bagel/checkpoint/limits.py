"""Limits that a model sets on pictures, prompts and texts. No torch here: they are checked before a model is loaded."""

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
    """The settings that a picture's size depends on. default_image_size: (height, width); all in pixels per side."""

    default_image_size: tuple[int, int]
    max_image_size: int
    latent_stride: int
    vae_transform: ImageTransform


def picture_size(request: Request, config: ModelConfig | PictureLimits) -> tuple[int, int]:
    """(height, width) of a request's picture, rounded down to the latent grid.

    The user's size comes first, then that of an edit's resized input, then the model's default. Raises InvalidRequest
    for a side that the latent position table does not cover.
    """
    default = config.default_image_size
    images = [part.image for part in request.prompt if isinstance(part, ImagePart)]
    if images:
        width, height = resized_size(*images[-1].size, config.vae_transform)  # the reference takes the last image
        default = (height, width)
    given = request.image
    return (
        check_side("height", default[0] if given.height is None else given.height, config),
        check_side("width", default[1] if given.width is None else given.width, config),
    )


def check_side(name: str, pixels: int, config: ModelConfig | PictureLimits) -> int:
    """Round a side down to the latent grid; raises InvalidRequest if the position table does not cover it."""
    stride, largest = config.latent_stride, config.max_image_size
    # Almost a stride above the largest is fine, since rounding down brings 1039 pixels to 1024.
    if not stride <= pixels < largest + stride:
        raise InvalidRequest(name, f"{name} is {pixels}; this model draws {stride} to {largest} pixels a side")
    return pixels // stride * stride


def check_stop_ids(ids: Iterable[int], vocabulary: int) -> None:
    """Raise InvalidRequest for a stop token outside the vocabulary, which the model could never write."""
    if outside := [token for token in ids if token >= vocabulary]:
        message = f"stop_token_ids has {outside[0]}; this model's tokens are 0 to {vocabulary - 1}"
        raise InvalidRequest("stop_token_ids", message)


def text_positions(request: Request) -> int:
    """Positions that the request's answer or think text may take; 0 if it writes neither."""
    return text_settings(request).max_tokens if request.think or not request.modality.makes_image else 0


def check_positions(prompt: int, text: int, limit: int) -> None:
    """Raise InvalidRequest, naming the remedy, if a prompt and the text after it take more positions than the limit."""
    if prompt + text <= limit:
        return
    raise InvalidRequest(
        "max_tokens" if prompt <= limit else "prompt",
        f"the prompt takes {prompt} positions and the text after it up to {text}; the limit is {limit} "
        "(max_model_len of the deploy file, at most the model's max_position_embeddings): "
        + ("lower max_tokens or max_think_tokens, or shorten the prompt" if prompt <= limit else "shorten the prompt"),
    )


def latent_bucket(tokens: int) -> int:
    """The number of latents that a row is padded to, so that few shapes have to be compiled or captured."""
    # Eight buckets per octave: a row grows by an eighth at most.
    granularity = max(SMALLEST_BUCKET, 1 << max(0, tokens.bit_length() - 4))
    return -(-tokens // granularity) * granularity


def padded_latents(tokens: int, device: str, ranks: int = 1) -> int:
    """Latents of a row on a device, padded only on a GPU: a CPU compiles and captures nothing.

    ranks: of context parallel, each of which computes as many latents of a row.
    """
    padded = latent_bucket(tokens) if device.startswith("cuda") else tokens
    return -(-padded // ranks) * ranks


def row_kv_tokens(context: int, padded: int) -> int:
    """Tokens of K/V that a picture's row takes: its context, its latents and their two delimiters."""
    return context + padded + 2


def check_kv_room(needed: int, there: int) -> None:
    """Raise InvalidRequest, naming the remedy, if a request can never fit a device's memory for K/V."""
    if needed > there:
        raise InvalidRequest(
            "prompt",
            f"the request takes {needed} tokens of K/V on the device, which holds {there} (kv_device_bytes): "
            "draw it smaller, shorten the prompt or the text, use fewer or smaller images, or raise kv_device_bytes",
        )


def position_limit(config: ModelConfig, max_model_len: int | None) -> int:
    """The most positions that a prompt and its text may take together."""
    positions = config.llm.max_position_embeddings
    return min(max_model_len or positions, positions)
