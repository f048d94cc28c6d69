"""What the user asks for: the prompts, the input image, the requests, and which flags have no effect on them."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from bagel.cli.flags import REQUEST_FLAGS, flag_name, request_option
from bagel.cli.prompts import GivenPrompt, check_text, read_prompts
from bagel.effect import effective
from bagel.errors import InvalidRequest
from bagel.images import load_image
from bagel.prompts import ImagePart, TextPart
from bagel.request import Modality, Request, resolve

_FLAGS = {request_option(flag): flag_name(flag) for flag in REQUEST_FLAGS}
"""Flags by the options of bagel.request that they set."""
_IN_WORDS = re.compile(rf"\b({'|'.join(option for option in _FLAGS if '_' in option)})\b")
"""Options that are no words of English, wherever a message names them."""


def make_requests(
    args: argparse.Namespace, prompts: Sequence[GivenPrompt], deploy_defaults: Mapping[str, Any]
) -> list[Request]:
    """One request a prompt, in the order given; all see the same input image.

    Raises InvalidRequest or InvalidImage for whatever can be seen to be wrong without the model.
    """
    modality = Modality(args.modality or Modality.TEXT2IMG)
    if args.output is not None and not modality.makes_image:
        raise InvalidRequest("output", "--output has no effect on a text answer, which goes to stdout; leave it out")
    if args.negative_prompt:
        check_text("--negative-prompt", args.negative_prompt)
    options = {request_option(flag): getattr(args, flag) for flag in REQUEST_FLAGS}
    # Read once, as all requests share it.
    image = _image_parts(modality, args.image_path)
    requests = []
    for number, prompt in enumerate(prompts):
        with located(prompts, number), flags_named():
            requests.append(resolve(modality, (*image, TextPart(prompt.text)), options, deploy_defaults))
    return requests


def prompts_of(args: argparse.Namespace) -> list[GivenPrompt]:
    """The prompts that the flags give."""
    return read_prompts(args.prompts, args.txt_prompts)


@contextmanager
def flags_named() -> Iterator[None]:
    """An InvalidRequest names its settings as flags."""
    try:
        yield
    except InvalidRequest as error:
        message = _IN_WORDS.sub(lambda match: _FLAGS[match[0]], str(error.named(_FLAGS)))
        raise type(error)(error.field, message, error.index) from None


@contextmanager
def located(prompts: Sequence[GivenPrompt], number: int | None = None) -> Iterator[None]:
    """An InvalidRequest about one of several prompts says which: number, else the error's own index."""
    try:
        yield
    except InvalidRequest as error:
        which = error.index if number is None else number
        # Other settings are the same for all prompts, so that no single one is at fault.
        if which is None or len(prompts) == 1 or error.field not in ("prompt", "max_tokens"):
            raise
        raise type(error)(error.field, f"{prompts[which].where}: {error}", which) from None


def notes_on_flags(
    args: argparse.Namespace, request: Request, deploy_defaults: Mapping[str, Any], *, in_process: bool
) -> list[str]:
    """One line for each thing that was set for the command or the deployment, and has no effect on this request."""
    picture, notes = request.modality.makes_image, []
    if args.enable_diffusion_pipeline_profiler and not picture:
        notes.append("no effect on a text answer: --enable-diffusion-pipeline-profiler")
    if request.think or not picture:
        used = effective(request, deploy_defaults)
        if unused := sorted(name for name in deploy_defaults if name not in used):
            notes.append(f"no effect on this request: {', '.join(unused)} of the deploy file")
    if in_process and args.batch_timeout is not None:
        notes.append("no effect in one process, where no request is queued: --batch-timeout")
    return notes


def _image_parts(modality: Modality, path: str | None) -> tuple[ImagePart, ...]:
    """The input image as the modality reads it: an edit's goes in as VAE and ViT tokens, one to describe as ViT's."""
    if not modality.reads_image:
        if path is not None:
            raise InvalidRequest(
                "image", f"{modality} reads no image; leave --image-path out, or give --modality img2img or img2text"
            )
        return ()
    if path is None:
        raise InvalidRequest("image", f"{modality} needs an input image; give --image-path FILE")
    return (ImagePart(load_image(path), for_generation=modality is Modality.IMG2IMG),)
