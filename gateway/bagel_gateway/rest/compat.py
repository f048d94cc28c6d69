"""What vllm-omni's clients send, and what becomes of it with `--compat vllm-omni`: one table, a row each.

The tests walk the rows, docs/migrate.md prints them. What no row names is taken or refused as it is without the mode.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from bagel.errors import InvalidRequest
from bagel.vocabulary import CONTROL_MARKS

Body = dict[str, Any]
"""A request's body, or what becomes of it."""

WITHOUT_EFFECT: Mapping[str, str] = {
    "guidance_scale": "BAGEL is guided by cfg_text_scale and cfg_img_scale, in vllm-omni too",
    "guidance_scale_2": "BAGEL is guided by cfg_text_scale and cfg_img_scale, in vllm-omni too",
    "true_cfg_scale": "BAGEL is guided by cfg_text_scale and cfg_img_scale, in vllm-omni too",
    "cfg_scale": "BAGEL is guided by cfg_text_scale and cfg_img_scale, in vllm-omni too",
    "bot_task": "it is HunyuanImage's; think: true lets BAGEL think first",
    "sys_type": "it is HunyuanImage's",
    "infer_align_image_size": "it is HunyuanImage's",
    "vae_use_slicing": "the service's deploy file says how the VAE decodes",
    "vae_use_tiling": "the service's deploy file says how the VAE decodes",
    "generator_device": "noise is drawn on the CPU, whatever the device",
    "mm_processor_kwargs": "every image is read alike",
    "return_stage_metrics": "/metrics and --log-stats say where time goes",
    "type": "it is ComfyUI's own",
}
"""Parameters that change nothing in vllm-omni's BAGEL either, with what to say of them."""
_UNPACKED = ("extra_body", "extra_args", "extra_params")
_HEADS = (*(f"<|im_start|>{role}\n" for role in ("user", "system", "assistant")), *CONTROL_MARKS)
_TAILS = ("<|im_start|>assistant", *CONTROL_MARKS)
_MOST_MARKS = 16
"""Most marks that are taken off one end. Whatever is left is refused, as marks are without the mode."""


@dataclass(frozen=True)
class Row:
    """One habit of vllm-omni's clients.

    sent and here say in words what comes and what becomes of it. apply changes a body in place, and returns what the
    answer's notes say, if anything. becomes: what is left of the example. A row without apply is about something else
    than a body: the answer, a route, a default.
    """

    sent: str
    here: str
    apply: Callable[[Body], str | None] | None = None
    example: Body | None = None
    becomes: Body | None = None


def translate(body: Body) -> list[str]:
    """Apply every row to a body, in place; what the answer notes. Raises InvalidRequest for what contradicts itself."""
    return [note for row in ROWS if row.apply is not None and (note := row.apply(body))]


def row_list() -> str:
    """The rows as docs/migrate.md prints them."""
    return "\n".join(
        textwrap.fill(
            line, 118, initial_indent=mark, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
        )
        for row in ROWS
        for mark, line in (("- ", f"{row.sent} → {row.here}."), ("  ", _shown(row.example)))
        if line
    )


def _shown(example: Body | None) -> str:
    return "" if example is None else f"Example: `{json.dumps(example, ensure_ascii=False)}`"


def _unpack(body: Body) -> str | None:
    """extra_body and the like: what they hold stands at the top."""
    for name in _UNPACKED:
        inner = body.pop(name, None)
        if isinstance(inner, str):  # of a form
            inner = _parsed(name, inner)
        if inner is not None and not isinstance(inner, dict):
            raise InvalidRequest(name, f"{name} is {inner!r:.80}; it must be an object")
        for key, value in (inner or {}).items():
            if body.get(key, value) != value:
                raise InvalidRequest(key, f"{key:.80} is given twice, in {name} and beside it; send it once")
            body[key] = value
    return None


def _parsed(name: str, text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise InvalidRequest(name, f"{name} is {text!r:.80}; it must be a JSON object") from None


def _drop_nulls(body: Body) -> str | None:
    # A list first, since the body changes on the way.
    for name in [name for name, value in body.items() if value is None]:
        del body[name]
    return None


def _drop_without_effect(body: Body) -> str | None:
    found = {name: body.pop(name) for name in WITHOUT_EFFECT if name in body}
    dropped = [name for name, value in found.items() if str(value).lower() != "false"]  # a form has texts alone
    return "; ".join(f"{name} has no effect: {WITHOUT_EFFECT[name]}" for name in dropped) or None


def _sides_to_size(body: Body) -> str | None:
    """height and width are size; one alone makes a square, as vllm-omni's own client does."""
    sides = {name: _whole(name, body.pop(name)) for name in ("width", "height") if name in body}
    if not sides:
        return None
    size = "x".join(str(sides.get(name, next(iter(sides.values())))) for name in ("width", "height"))
    if body.setdefault("size", size) not in (size, "auto"):
        raise InvalidRequest(
            "size", f"size is {body['size']!r:.80}, and width and height make {size}; send one of them"
        )
    body["size"] = size
    return None


def _whole(name: str, value: object) -> int:
    try:
        number = float(value) if isinstance(value, str) else value
        if not isinstance(number, int | float) or isinstance(number, bool) or number != int(number):
            raise ValueError
    except (ValueError, OverflowError):
        raise InvalidRequest(name, f"{name} is {value!r:.80}; it must be a whole number of pixels") from None
    return int(number)


def _outputs_to_n(body: Body) -> str | None:
    if "num_outputs_per_prompt" in body:
        outputs = body.pop("num_outputs_per_prompt")
        if body.setdefault("n", outputs) != outputs:
            raise InvalidRequest("n", "n and num_outputs_per_prompt are one count; send one of them")
    return None


def _one_step(body: Body) -> str | None:
    """vllm-omni counts a single step as 1; here n timesteps are n - 1 steps."""
    if body.get("num_inference_steps") in (1, "1"):
        body["num_inference_steps"] = type(body["num_inference_steps"])(2)
        return "num_inference_steps 1 is one step: 2 timesteps here"
    return None


def _jpg(body: Body) -> str | None:
    if body.get("output_format") == "jpg":
        body["output_format"] = "jpeg"
    return None


def _modalities(body: Body) -> str | None:
    """A chat draws unless it says otherwise; sound is not given beside a text."""
    if "messages" not in body:
        return None
    asked = body.setdefault("modalities", ["image"])
    if isinstance(asked, list) and "audio" in asked and len(asked) > 1:
        body["modalities"] = [each for each in asked if each != "audio"]
        return "modalities: no audio is given"
    return None


def _without_a_stream(body: Body) -> str | None:
    if body.get("stream") in (True, "true", "True", "1"):
        return None
    dropped = [name for name in ("partial_images", "progress") if body.pop(name, None) not in (None, 0, "0", False)]
    return "; ".join(f"{name} has no effect without a stream" for name in dropped) or None


def _stop_of_a_picture(body: Body) -> str | None:
    if "image" in (body.get("modalities") or ()) and body.pop("stop", None):
        return "stop has no effect on a picture"
    return None


def _typed_parts(body: Body) -> str | None:
    """Parts without a type, and images in base64, in OpenAI's form."""
    for message in _messages(body):
        if isinstance(message.get("content"), list):
            message["content"] = [_typed(part) if isinstance(part, dict) else part for part in message["content"]]
    return None


def _typed(part: Mapping[str, Any]) -> Mapping[str, Any]:
    match part:
        case {"image": str(image)} if part.get("type", "image") == "image":
            # A URL has its scheme at the beginning; anything else is taken for base64.
            return _image_part(image if ":" in image[:10] else f"data:image/png;base64,{image}")
        case {"image_url": str(url)}:
            return _image_part(url)
        case {"image_url": dict()} if "type" not in part:
            return {"type": "image_url", **part}
        case {"text": str()} if "type" not in part:
            return {"type": "text", **part}
    return part


def _image_part(url: str) -> Mapping[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def _take_marks_off(body: Body) -> str | None:
    """Control marks at the ends of a text, where vllm-omni's clients write them. Inside of one they stay."""
    for name in ("prompt", "negative_prompt"):
        if isinstance(body.get(name), str):
            body[name] = without_marks(body[name])
    for message in _messages(body):
        content = message.get("content")
        if isinstance(content, str):
            message["content"] = without_marks(content)
        for part in content if isinstance(content, list) else ():
            if isinstance(part, dict) and isinstance(part.get("text"), str):
                part["text"] = without_marks(part["text"])
    return None


def without_marks(text: str) -> str:
    """A text without the control marks at its ends, and the role words that belong to them."""
    found = text
    for _ in range(_MOST_MARKS):
        found = found.strip()
        head = next((each for each in _HEADS if found.startswith(each)), "")
        found = found.removeprefix(head).lstrip()
        tail = next((each for each in _TAILS if found.endswith(each)), "")
        found = found.removesuffix(tail)
        if not head and not tail:
            break
    # A text without marks keeps its white space.
    return found if found != text.strip() else text


def _messages(body: Body) -> list[dict[str, Any]]:
    messages = body.get("messages")
    return [each for each in messages if isinstance(each, dict)] if isinstance(messages, list) else []


def _said(content: Any) -> Body:
    return {"messages": [{"role": "user", "content": content}]}


_DRAWN: Body = {"modalities": ["image"]}

ROWS: tuple[Row, ...] = (
    Row(
        "`extra_body`, `extra_args` or `extra_params` in the JSON",
        "its keys count as parameters of the request",
        _unpack,
        {"extra_body": {"seed": 42}},
        {"seed": 42},
    ),
    Row("`null`", "counts as left out, also for an unknown parameter", _drop_nulls, {"lora": None}, {}),
    Row(
        ", ".join(f"`{name}`" for name in WITHOUT_EFFECT),
        "noted: they change nothing in vllm-omni's BAGEL either",
        _drop_without_effect,
        {"guidance_scale": 7.5, "vae_use_tiling": False},
        {},
    ),
    Row(
        "`height`, `width`", "`size`; one alone makes a square", _sides_to_size,
        {"height": 512, "width": 768}, {"size": "768x512"},
    ),
    Row("`num_outputs_per_prompt`", "`n`", _outputs_to_n, {"num_outputs_per_prompt": 2}, {"n": 2}),
    Row(
        "`num_inference_steps` 1", "2, which is one step here; noted", _one_step,
        {"num_inference_steps": 1}, {"num_inference_steps": 2},
    ),
    Row("`output_format` `jpg`", "`jpeg`", _jpg, {"output_format": "jpg"}, {"output_format": "jpeg"}),
    Row(
        "a chat without `modalities`, or with `audio` beside others",
        "a picture is drawn; no sound is made, and `audio` is noted",
        _modalities,
        {**_said("a cat"), "modalities": ["text", "audio"]},
        {**_said("a cat"), "modalities": ["text"]},
    ),
    Row("`stop` of a picture", "noted", _stop_of_a_picture, {**_DRAWN, "stop": ["."]}, _DRAWN),
    Row(
        "parts without `type`, an `image` in base64, an `image_url` that is a string",
        "OpenAI's parts",
        _typed_parts,
        {**_said([{"text": "make it red"}, {"image": "iVBOR..."}]), **_DRAWN},
        {**_said([{"type": "text", "text": "make it red"}, _image_part("data:image/png;base64,iVBOR...")]), **_DRAWN},
    ),
    Row(
        "control marks and role words at the ends of a text",
        "removed; inside a text they are refused",
        _take_marks_off,
        {**_said("<|im_start|>user\n<|image_pad|>\nWhat is it?<|im_end|>\n<|im_start|>assistant\n"), **_DRAWN},
        {**_said("What is it?"), **_DRAWN},
    ),
    Row("`partial_images`, `progress` without `stream`", "noted", _without_a_stream, {"partial_images": 2}, {}),
    Row("a setting without effect, such as steps for a text answer", "noted"),
    Row("a size above the model's largest", "the largest size of that shape is used; noted"),
    Row("no `cfg_img_scale`, `cfg_interval` or `cfg_renorm_type`", "vllm-omni's: 1.5, [0.4, 1.0] and global"),
    Row("`url` of an edit, once or more", "an image, as a data URL or from a host of `--allow-image-host`"),
    Row("`response_format` `file`", "the answer is the file of the picture; only one picture can be asked for"),
    Row("a chat that draws", "its pictures are parts of `message.content`; one choice holds all results"),
    Row("`GET /health`", "200 once requests can be served, else 503"),
)  # fmt: skip
"""In the order in which they apply."""
