"""Requests as messages of bagel.v1, and back. No torch here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bagel.checkpoint.config import ModelConfig
from bagel.checkpoint.limits import PictureLimits
from bagel.errors import InvalidRequest
from bagel.images import ImageTransform, InputImage, load_image
from bagel.images.output import OutputFormat
from bagel.prompts import BranchName, ImagePart, Part, Prompt, TextPart
from bagel.request import (
    MAX_FIELD,
    ImageSettings,
    Modality,
    PosteriorMode,
    RenormType,
    Request,
    TextSettings,
    check_option,
    check_prompt_size,
    check_stop_tokens,
)
from bagel.v1 import common_pb2, dit_pb2, gateway_pb2
from bagel.vocabulary import refuse_unknown_options

Timings = Mapping[str, float]
OutputMessage = gateway_pb2.GenerateRequest | dit_pb2.DitServiceGenerateRequest

_MODALITIES = {
    Modality.TEXT2IMG: common_pb2.MODALITY_TEXT2IMG,
    Modality.IMG2IMG: common_pb2.MODALITY_IMG2IMG,
    Modality.IMG2TEXT: common_pb2.MODALITY_IMG2TEXT,
    Modality.TEXT2TEXT: common_pb2.MODALITY_TEXT2TEXT,
}
_RENORMS = {
    RenormType.GLOBAL: common_pb2.RENORM_TYPE_GLOBAL,
    RenormType.TEXT_CHANNEL: common_pb2.RENORM_TYPE_TEXT_CHANNEL,
    RenormType.CHANNEL: common_pb2.RENORM_TYPE_CHANNEL,
}
_POSTERIORS = {
    PosteriorMode.CONTENT: common_pb2.POSTERIOR_MODE_CONTENT,
    PosteriorMode.SEED: common_pb2.POSTERIOR_MODE_SEED,
    PosteriorMode.MEAN: common_pb2.POSTERIOR_MODE_MEAN,
}
_BRANCHES = {
    BranchName.GEN: dit_pb2.BRANCH_NAME_GEN,
    BranchName.CFG_TEXT: dit_pb2.BRANCH_NAME_CFG_TEXT,
    BranchName.CFG_IMG: dit_pb2.BRANCH_NAME_CFG_IMG,
}
FORMATS = {
    "PNG": common_pb2.IMAGE_FORMAT_PNG,
    "JPEG": common_pb2.IMAGE_FORMAT_JPEG,
    "WEBP": common_pb2.IMAGE_FORMAT_WEBP,
}
"""Pillow's name of each format."""
_TEXT_FIELDS = ("do_sample", "temperature", "top_p", "top_k", "repetition_penalty", "max_tokens")
_IMAGE_FIELDS = ("steps", "timestep_shift", "cfg_text_scale", "cfg_img_scale", "cfg_renorm_min", "height", "width")
_OF_REQUEST = ("seed", "think", "max_think_tokens", "negative_prompt")
_OPTIONS = (
    *_TEXT_FIELDS,
    *_IMAGE_FIELDS,
    *_OF_REQUEST,
    "cfg_interval",
    "cfg_renorm_type",
    "posterior",
    "stop_token_ids",
)


def part_to_wire(part: Part) -> common_pb2.Part:
    """A part; an image is sent as a PNG."""
    if isinstance(part, TextPart):
        return common_pb2.Part(text=common_pb2.TextPart(text=part.text))
    image = common_pb2.ImagePart(
        data=OutputFormat().encode(part.pixels),
        for_generation=part.for_generation,
        for_understanding=part.for_understanding,
    )
    return common_pb2.Part(image=image)


def image_purposes(image: common_pb2.ImagePart, *, for_generation: bool = False) -> dict[str, bool]:
    """How an image enters. for_generation: of one whose message does not say."""
    return {
        "for_generation": image.for_generation if image.HasField("for_generation") else for_generation,
        "for_understanding": image.for_understanding if image.HasField("for_understanding") else True,
    }


def check_prompt(parts: Sequence[common_pb2.Part]) -> None:
    """Check a prompt before any of its images is read.

    Raises InvalidRequest for one that is empty or too large, and for a text that is empty: none is ever meant to be
    read.
    """
    if not parts or any(part.HasField("text") and not part.text.text for part in parts):
        raise InvalidRequest("prompt", "the prompt is empty, or one of its texts is; write one: 'a large red circle'")
    if any(part.WhichOneof("part") is None for part in parts):
        raise InvalidRequest("prompt", "a part of the prompt is neither text nor image; set one of them")
    check_prompt_size("prompt", len(parts), [part.text.text for part in parts])


def prompt_from_wire(
    parts: Iterable[common_pb2.Part], images: Iterable[InputImage] | None = None, *, for_generation: bool = False
) -> Prompt:
    """A prompt. images: those of its parts in order, where they have been read elsewhere; else they are decoded here.

    for_generation: how an image enters whose message does not say. Raises InvalidRequest as `check_prompt`.
    """
    parts = list(parts)
    # Checked before any image is decoded.
    check_prompt(parts)
    read = None if images is None else iter(images)
    prompt: list[Part] = []
    for part in parts:
        if part.HasField("text"):
            prompt.append(TextPart(part.text.text))
        else:
            image = load_image(part.image.data) if read is None else next(read)
            prompt.append(ImagePart(image, **image_purposes(part.image, for_generation=for_generation)))
    return tuple(prompt)


def modality_from_wire(value: common_pb2.Modality.ValueType) -> Modality:
    """The modality; InvalidRequest if none is set."""
    for modality, number in _MODALITIES.items():
        if number == value:
            return modality
    raise InvalidRequest("modality", f"modality is {value}; it must be one of {', '.join(Modality)}")


def options_from_wire(message: common_pb2.Request) -> dict[str, Any]:
    """What a user set, as `bagel.request.resolve` takes it."""
    options: dict[str, Any] = _set_fields(message, _OF_REQUEST)
    options |= _set_fields(message.text, _TEXT_FIELDS) | _image_fields(message.image)
    check_stop_tokens(len(message.text.stop_token_ids))
    if message.text.stop_token_ids:
        options["stop_token_ids"] = tuple(message.text.stop_token_ids)
    # 0 of an enumeration means that none is set.
    if message.posterior:
        options["posterior"] = _named("posterior", message.posterior, _POSTERIORS)
    return options


def options_to_wire(
    modality: Modality, parts: Iterable[common_pb2.Part], options: Mapping[str, Any]
) -> common_pb2.Request:
    """A user's options as a message; None means not given. InvalidRequest for what no field can hold."""
    message = common_pb2.Request(modality=_MODALITIES[modality], prompt=parts)
    given = {name: value for name, value in options.items() if value is not None}
    refuse_unknown_options(given, _OPTIONS)
    for name, value in given.items():
        try:
            _set_option(message, name, value)
        except (TypeError, ValueError):
            check_option(name, value)  # says which values may be; what is left is only larger than its field
            raise InvalidRequest(name, f"{name} is {value!r:.80}; the largest number it takes is {MAX_FIELD}") from None
    return message


def request_to_wire(request: Request, parts: Iterable[common_pb2.Part]) -> common_pb2.Request:
    """A resolved request, every field set but a size that is the model's default."""
    return common_pb2.Request(
        modality=_MODALITIES[request.modality],
        prompt=parts,
        seed=request.seed,
        think=request.think,
        max_think_tokens=request.max_think_tokens,
        negative_prompt=request.negative_prompt,
        posterior=_POSTERIORS[request.posterior],
        text=text_settings_to_wire(request.text),
        image=image_settings_to_wire(request.image),
    )


def request_from_wire(message: common_pb2.Request, images: Iterable[InputImage] | None = None) -> Request:
    """A resolved request, as `request_to_wire` makes it; images as of `prompt_from_wire`."""
    modality = modality_from_wire(message.modality)
    return Request(
        modality=modality,
        prompt=prompt_from_wire(message.prompt, images, for_generation=modality is Modality.IMG2IMG),
        seed=message.seed,
        think=message.think,
        max_think_tokens=message.max_think_tokens,
        negative_prompt=message.negative_prompt,
        posterior=posterior_from_wire(message.posterior),
        text=text_settings_from_wire(message.text),
        image=image_settings_from_wire(message.image),
    )


def text_settings_to_wire(settings: TextSettings) -> common_pb2.TextSettings:
    """Every field set."""
    fields = {name: getattr(settings, name) for name in _TEXT_FIELDS}
    return common_pb2.TextSettings(**fields, stop_token_ids=settings.stop_token_ids)


def text_settings_from_wire(message: common_pb2.TextSettings) -> TextSettings:
    """What is not set takes its default."""
    return TextSettings(**_set_fields(message, _TEXT_FIELDS), stop_token_ids=tuple(message.stop_token_ids))


def image_settings_to_wire(settings: ImageSettings) -> common_pb2.ImageSettings:
    """Every field set but a size that is the default."""
    lo, hi = settings.cfg_interval
    fields = {name: value for name in _IMAGE_FIELDS if (value := getattr(settings, name)) is not None}
    return common_pb2.ImageSettings(
        **fields,
        cfg_interval=common_pb2.CfgInterval(lo=lo, hi=hi),
        cfg_renorm_type=_RENORMS[settings.cfg_renorm_type],
    )


def image_settings_from_wire(message: common_pb2.ImageSettings) -> ImageSettings:
    """What is not set takes text-to-image's default."""
    return ImageSettings(**_image_fields(message))


def posterior_to_wire(mode: PosteriorMode) -> common_pb2.PosteriorMode.ValueType:
    """The mode's number."""
    return _POSTERIORS[mode]


def posterior_from_wire(value: common_pb2.PosteriorMode.ValueType) -> PosteriorMode:
    """The mode of a number; content where none is set."""
    return _named("posterior", value, _POSTERIORS) if value else PosteriorMode.CONTENT


def branch_to_wire(branch: BranchName) -> dit_pb2.BranchName.ValueType:
    """The branch's number."""
    return _BRANCHES[branch]


def branch_from_wire(value: dit_pb2.BranchName.ValueType) -> BranchName:
    """The branch of a number."""
    branch: BranchName = _named("branch", value, _BRANCHES)
    return branch


def timings_to_wire(timings: Timings) -> list[common_pb2.StageTiming]:
    """Seconds by stage."""
    return [common_pb2.StageTiming(stage=stage, seconds=seconds) for stage, seconds in timings.items()]


def timings_from_wire(timings: Iterable[common_pb2.StageTiming]) -> dict[str, float]:
    """Seconds by stage."""
    return {timing.stage: timing.seconds for timing in timings}


def output_to_wire(
    output: OutputFormat, message: gateway_pb2.GenerateRequest | dit_pb2.DitServiceGenerateRequest
) -> None:
    """Set a request's fields for how its picture is given out."""
    message.output_format, message.partial_images = FORMATS[output.format], output.previews
    if output.compression is not None:
        message.output_compression = output.compression


def output_from_wire(message: OutputMessage) -> OutputFormat:
    """How a request's picture is given out: as PNG where no format is set. InvalidRequest for what there is not."""
    format_ = "PNG" if not message.output_format else _named("output_format", message.output_format, FORMATS)
    quality = message.output_compression if message.HasField("output_compression") else None
    return OutputFormat(format_, quality, message.partial_images)


def picture_format(data: bytes) -> common_pb2.ImageFormat.ValueType:
    """The format of a file that `OutputFormat.encode` made."""
    if data.startswith(b"\xff\xd8"):
        return common_pb2.IMAGE_FORMAT_JPEG
    return common_pb2.IMAGE_FORMAT_WEBP if data.startswith(b"RIFF") else common_pb2.IMAGE_FORMAT_PNG


def model_info(config: ModelConfig, **more: Any) -> common_pb2.ModelInfo:
    """What requests are checked against; more: the other fields of ModelInfo."""
    height, width = config.default_image_size
    return common_pb2.ModelInfo(
        latent_stride=config.latent_stride,
        max_image_size=config.max_image_size,
        default_height=height,
        default_width=width,
        vae_transform=_transform_to_wire(config.vae_transform),
        vit_transform=_transform_to_wire(config.vit_transform),
        latent_channels=config.vae.z_channels,
        vae_downsample=config.vae.downsample,
        vocabulary=config.llm.vocab_size,
        **more,
    )


def picture_limits(info: common_pb2.ModelInfo) -> PictureLimits:
    """The sizes of pictures that a served model draws."""
    transform = info.vae_transform
    return PictureLimits(
        default_image_size=(info.default_height, info.default_width),
        max_image_size=info.max_image_size,
        latent_stride=info.latent_stride,
        vae_transform=ImageTransform(transform.max, transform.min, transform.stride),
    )


def _transform_to_wire(transform: ImageTransform) -> common_pb2.ImageTransform:
    return common_pb2.ImageTransform(max=transform.max_size, min=transform.min_size, stride=transform.stride)


def _set_option(message: common_pb2.Request, name: str, value: Any) -> None:
    if name == "cfg_interval":
        lo, hi = value
        message.image.cfg_interval.CopyFrom(common_pb2.CfgInterval(lo=lo, hi=hi))
    elif name == "cfg_renorm_type":
        message.image.cfg_renorm_type = _RENORMS[RenormType(value)]
    elif name == "posterior":
        message.posterior = _POSTERIORS[PosteriorMode(value)]
    elif name == "stop_token_ids":
        message.text.stop_token_ids.extend(value)
    elif name in _TEXT_FIELDS:
        setattr(message.text, name, value)
    elif name in _IMAGE_FIELDS:
        setattr(message.image, name, value)
    else:
        setattr(message, name, value)


def _image_fields(message: common_pb2.ImageSettings) -> dict[str, Any]:
    """The settings of a picture that are set, by their names in bagel.request."""
    fields = _set_fields(message, _IMAGE_FIELDS)
    if message.HasField("cfg_interval"):
        fields["cfg_interval"] = (message.cfg_interval.lo, message.cfg_interval.hi)
    if message.cfg_renorm_type:
        fields["cfg_renorm_type"] = _named("cfg_renorm_type", message.cfg_renorm_type, _RENORMS)
    return fields


def _set_fields(message: Any, names: Iterable[str]) -> dict[str, Any]:
    # By presence, not by value: a user may have set 0 or False.
    return {name: getattr(message, name) for name in names if message.HasField(name)}


def _named(field: str, value: int, numbers: Mapping[Any, int]) -> Any:
    for name, number in numbers.items():
        if number == value:
            return name
    raise InvalidRequest(field, f"{field} is {value}; it must be one of {', '.join(numbers)}")
