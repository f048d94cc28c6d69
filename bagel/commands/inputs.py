"""What the user asks for: the prompts, the input image, the requests, and which flags have no effect on them."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bagel.commands.flags import PICTURE_FLAGS, REQUEST_FLAGS, SAMPLING_FLAGS, flag_name, request_option
from bagel.errors import InvalidRequest
from bagel.images import load_image
from bagel.prompts import ImagePart, TextPart
from bagel.request import Modality, Request, resolve

MAX_PROMPT_FILE_BYTES = 16 * 2**20


def make_requests(args: argparse.Namespace, deploy_defaults: Mapping[str, Any]) -> list[Request]:
    """One request a prompt, in the order given; all see the same input image.

    Raises InvalidRequest or InvalidImage for whatever can be seen to be wrong without the model.
    """
    modality = Modality(args.modality or Modality.TEXT2IMG)
    prompts = read_prompts(args.prompts, args.txt_prompts)
    if args.negative_prompt is not None:
        _check_text("--negative-prompt", args.negative_prompt)
    options = {request_option(flag): getattr(args, flag) for flag in REQUEST_FLAGS}
    image = _image_parts(modality, args.image_path)
    return [resolve(modality, (*image, TextPart(prompt)), options, deploy_defaults) for prompt in prompts]


def prompt_text(request: Request) -> str:
    """The text of a request's prompt."""
    return " ".join(part.text for part in request.prompt if isinstance(part, TextPart))


def read_prompts(prompts: Sequence[str] | None, file: str | None) -> list[str]:
    """The prompts of the command line, then those of the file; InvalidRequest if there is none or one is empty."""
    for prompt in prompts or ():
        _check_text("--prompts", prompt)
    found = [*(prompts or ()), *(_prompts_of(file) if file is not None else ())]
    if not found:
        raise InvalidRequest("prompt", "there is no prompt; give --prompts 'a red cube', or --txt-prompts FILE")
    return found


def notes_on_flags(
    args: argparse.Namespace, request: Request, deploy_defaults: Mapping[str, Any], *, in_process: bool
) -> list[str]:
    """One line for each reason why flags that the user gave have no effect on this request."""
    picture, think = request.modality.makes_image, request.think
    notes = []

    def note(reason: str, flags: Iterable[str]) -> None:
        given = [flag_name(flag) for flag in flags if getattr(args, flag) is not None]
        if given:
            notes.append(f"no effect {reason}: {', '.join(given)}")

    elsewhere = () if picture else (*PICTURE_FLAGS, "output", "enable_diffusion_pipeline_profiler")
    posterior = () if request.modality is Modality.IMG2IMG else ("posterior",)
    note(f"on {request.modality}", (*elsewhere, *posterior, *(("max_tokens",) if picture else ())))
    if picture and not think:
        note("on a picture without --think", ("max_think_tokens", *SAMPLING_FLAGS))
    elif not request.text.do_sample:
        note("without --do-sample", ("text_temperature", "top_p", "top_k"))
        if unused := sorted(_SAMPLED & deploy_defaults.keys()):
            notes.append(f"no effect without --do-sample: {', '.join(unused)} of the deploy file")
    by_file = args.max_think_tokens is None and deploy_defaults.get("max_tokens") is not None
    limited = args.max_tokens is not None or by_file
    if not picture and not think and limited:
        note("without --think, as max_tokens limits the answer", ("max_think_tokens",))
    if picture and request.image.cfg_text_scale <= 1:
        note("when cfg_text_scale is at most 1, no guidance", _GUIDANCE_FLAGS)
    if in_process:
        note("in one process, where no request is queued", ("batch_timeout",))
    return notes


_SAMPLED = {"temperature", "top_p", "top_k"}
_GUIDANCE_FLAGS = ("negative_prompt", "cfg_img_scale", "cfg_interval", "cfg_renorm_type", "cfg_renorm_min")


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


def _prompts_of(file: str) -> list[str]:
    """The lines of a prompt file that are not blank, without the space around them."""
    try:
        with Path(file).open("rb") as stream:  # not only of regular files: <(...) of a shell is a pipe
            data = stream.read(MAX_PROMPT_FILE_BYTES + 1)
    except OSError as error:
        raise InvalidRequest("prompt", f"--txt-prompts {file!r} cannot be read: {error.strerror}") from None
    if len(data) > MAX_PROMPT_FILE_BYTES:
        raise InvalidRequest("prompt", f"--txt-prompts {file!r} has more than {MAX_PROMPT_FILE_BYTES} bytes; split it")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InvalidRequest("prompt", f"--txt-prompts {file!r} is not UTF-8 in line {line}; convert it") from None
    lines = text.replace("\r", "\n").split("\n")  # not splitlines, which also splits at U+2028 and the like
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise InvalidRequest("prompt", f"--txt-prompts {file!r} has no prompt; write one a line")
    return prompts


def _check_text(flag: str, text: str) -> None:
    if not text.strip():
        raise InvalidRequest("prompt", f"{flag} has an empty text; write what is wanted, like 'a red cube'")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise InvalidRequest("prompt", f"{flag} {text!a:.80} is not UTF-8; convert it") from None
