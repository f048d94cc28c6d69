"""What a picture's file says of how it was made: everything that is needed to make it again. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

from bagel import __version__
from bagel.prompts import prompt_text
from bagel.request import Request

TEXTS = ("prompt", "negative_prompt", "think_text")
"""Settings that are texts of the user, or made from them."""


def picture_settings(request: Request, think_text: str, engine: Mapping[str, str]) -> dict[str, str]:
    """Everything that made a picture, by name. request: with its seed and its final size.

    think_text: the text before the picture, if there was one; engine: model, fingerprint and dtype.
    """
    image = request.image
    settings: dict[str, object] = {
        "prompt": prompt_text(request.prompt),
        "negative_prompt": request.negative_prompt,
        "modality": request.modality,
        "seed": request.seed,
        **asdict(image),
        "cfg_interval": " ".join(map(str, image.cfg_interval)),
        "think": request.think,
    }
    if request.modality.reads_image:
        settings["posterior"] = request.posterior
    if request.think:
        settings |= {"think_text": think_text, "max_think_tokens": request.max_think_tokens}
        settings |= {name: getattr(request.text, name) for name in ("do_sample", "temperature", "top_p", "top_k")}
        settings["repetition_penalty"] = request.text.repetition_penalty
    settings |= {**engine, "bagel_version": __version__}
    return {name: str(value).lower() if isinstance(value, bool) else str(value) for name, value in settings.items()}


def without_texts(settings: Mapping[str, str]) -> dict[str, str]:
    """The settings but for the prompt, the negative prompt and the think text."""
    return {name: value for name, value in settings.items() if name not in TEXTS}
