"""What a request asks of the stages, as messages, before any stage is called. Pure but for the look at its images."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from bagel.checkpoint.limits import check_stop_ids, picture_size
from bagel.effect import Facts, check_effect
from bagel.errors import InvalidRequest
from bagel.guidance import needed_branches
from bagel.images import resized_size
from bagel.pipelines import BAGEL_SINGLE_STAGE, PipelineConfig, pipeline_for_request, prompt_expander
from bagel.prompts import Branch, BranchName, ImagePart, Prompt, TextPart, text_prompt
from bagel.request import Modality, PosteriorMode, Request, resolve, text_settings
from bagel.rpc import convert
from bagel.v1 import common_pb2, dit_pb2, gateway_pb2, thinker_pb2
from bagel_gateway.images import InputImages

WireParts = list[common_pb2.Part]


@dataclass(frozen=True)
class Output:
    """How a picture is given out. quality: of a JPEG or WebP; None is the default; previews: how many of it."""

    format: common_pb2.ImageFormat.ValueType = common_pb2.IMAGE_FORMAT_UNSPECIFIED
    quality: int | None = None
    previews: int = 0


@dataclass(frozen=True)
class Asked:
    """A request that is valid for itself: its settings, its prompt as it came, and the pipeline that serves it."""

    request: Request
    parts: WireParts
    pipeline: PipelineConfig
    output: Output


@dataclass(frozen=True)
class Build:
    """One context to build, for every branch whose parts are the same.

    settings: all of the Thinker's request but its parts, which may be large and are put in when it is sent.
    """

    branches: tuple[BranchName, ...]
    settings: thinker_pb2.BuildContextRequest
    parts: WireParts

    @property
    def thinks(self) -> bool:
        """Whether a think text is decoded and appended."""
        return self.settings.HasField("decode") and self.settings.decode.append


@dataclass(frozen=True)
class Plan:
    """What is asked of the stages.

    resolved: every setting as it is used, without the images' data; whole: the work of a single stage, and parts its
    prompt, which is put in when it is sent; builds: the contexts of two stages; draw: the picture, its contexts not
    filled in yet; branches, needed and empty: what is collected, and which of it has no parts.
    """

    pipeline: PipelineConfig
    makes_image: bool
    resolved: common_pb2.Request
    output: Output
    whole: common_pb2.Request | None = None
    parts: WireParts = field(default_factory=list)
    builds: tuple[Build, ...] = ()
    draw: dit_pb2.DrawPicture | None = None
    branches: tuple[Branch, ...] = ()
    needed: frozenset[BranchName] = frozenset()
    empty: frozenset[BranchName] = frozenset()


async def read_request(
    whole: gateway_pb2.GenerateRequest,
    deployed: PipelineConfig,
    defaults: Mapping[str, Any],
    images: InputImages,
) -> Asked:
    """Check a request as far as it goes without the model; raises InvalidRequest or InvalidImage."""
    message, output = whole.request, _output(whole)
    modality = convert.modality_from_wire(message.modality)
    _check_parts(modality, message.prompt)
    parts = [_explicit(part, modality) for part in message.prompt]
    options = convert.options_from_wire(message)
    think = options.get("think", defaults.get("think"))
    pipeline = pipeline_for_request(deployed, think=think)
    options["think"] = bool(pipeline.thinks) if think is None else think
    convert.check_prompt(parts)
    if modality.reads_image:
        # Without its images first: a wrong setting need not wait for them to be looked at.
        resolve(modality, (TextPart("checked below"),), options, defaults)
    prompt = convert.prompt_from_wire(parts, await images.sizes(parts))
    request = resolve(modality, prompt, options, defaults)
    _check_output(request, whole)
    return Asked(request, parts, pipeline, output)


def plan(asked: Asked, model: common_pb2.ModelInfo) -> Plan:
    """What the stages are to do with a request; raises InvalidRequest for a size or token that the model has not."""
    request = asked.request
    if model.vocabulary:
        check_stop_ids(request.text.stop_token_ids, model.vocabulary)
    if request.modality.makes_image:
        height, width = picture_size(request, convert.picture_limits(model))
        request = replace(request, image=replace(request.image, height=height, width=width))
    made = Plan(
        pipeline=asked.pipeline,
        makes_image=request.modality.makes_image,
        resolved=convert.request_to_wire(request, (_without_data(part) for part in asked.parts)),
        output=asked.output,
    )
    if asked.pipeline is BAGEL_SINGLE_STAGE:
        return replace(made, whole=convert.request_to_wire(request, ()), parts=asked.parts)
    sent = {id(part): message for part, message in zip(request.prompt, asked.parts, strict=True)}
    if not request.modality.makes_image:
        return replace(made, builds=(_answer(request, sent),))
    return _picture(made, request, sent, model)


def _answer(request: Request, sent: Mapping[int, common_pb2.Part]) -> Build:
    """The context that an answer is decoded after."""
    decode = thinker_pb2.DecodeText(settings=convert.text_settings_to_wire(text_settings(request)), append=False)
    settings = _build_settings(request)
    settings.decode.CopyFrom(decode)
    return Build((BranchName.GEN,), settings, _sent(text_prompt(request.prompt, think=request.think), sent))


def _picture(made: Plan, request: Request, sent: Mapping[int, common_pb2.Part], model: common_pb2.ModelInfo) -> Plan:
    """The contexts that a picture needs, each once, and the picture."""
    thinker = made.pipeline.stages[0]
    thinks = bool(made.pipeline.thinks)
    limits = {"max_think_tokens": request.max_think_tokens} if thinks else {}
    branches = prompt_expander(thinker)(request.prompt, negative_prompt=request.negative_prompt, **limits)
    needed = needed_branches(request.image)
    alike: dict[tuple[object, ...], list[Branch]] = {}
    for branch in branches:
        if branch.name in needed and branch.parts:
            alike.setdefault(_identity(branch, thinks), []).append(branch)
    shapes = _posterior_shapes(request, model) if request.posterior is PosteriorMode.SEED else []
    draw = dit_pb2.DrawPicture(
        image=convert.image_settings_to_wire(request.image), seed=request.seed, posterior_shapes=shapes
    )
    return replace(
        made,
        builds=tuple(_branch_build(request, same, sent, thinks) for same in alike.values()),
        draw=draw,
        branches=tuple(replace(branch, parts=()) for branch in branches),  # the images have gone into the messages
        needed=needed,
        empty=frozenset(branch.name for branch in branches if not branch.parts),
    )


def _branch_build(request: Request, same: Sequence[Branch], sent: Mapping[int, common_pb2.Part], thinks: bool) -> Build:
    settings = _build_settings(request)
    settings.send_kv = True
    names = tuple(branch.name for branch in same)
    if thinks and BranchName.GEN in names:
        written = convert.text_settings_to_wire(text_settings(request))
        settings.decode.CopyFrom(thinker_pb2.DecodeText(settings=written, append=True))
    return Build(names, settings, _sent(same[0].parts, sent))


def _build_settings(request: Request) -> thinker_pb2.BuildContextRequest:
    posterior = convert.posterior_to_wire(request.posterior)
    return thinker_pb2.BuildContextRequest(seed=request.seed, posterior=posterior)


def _sent(prompt: Prompt, sent: Mapping[int, common_pb2.Part]) -> WireParts:
    """An image goes on as the bytes that the user sent; a text is written anew, as branches have texts of their own."""
    return [sent[id(part)] if id(part) in sent else convert.part_to_wire(part) for part in prompt]


def _identity(branch: Branch, thinks: bool) -> tuple[object, ...]:
    """Equal for branches with equal K/V: gen alone gets a think text. Images by object: no pixels are compared."""
    parts = (part.text if isinstance(part, TextPart) else id(part) for part in branch.parts)
    return (thinks and branch.name is BranchName.GEN, *parts)


def _posterior_shapes(request: Request, model: common_pb2.ModelInfo) -> list[dit_pb2.LatentShape]:
    """Latents of the input images, whose noise the request's generator gives first."""
    images = [part.image for part in request.prompt if isinstance(part, ImagePart) and part.for_generation]
    transform = convert.picture_limits(model).vae_transform
    shapes = []
    for image in images:
        # The reference resizes twice before it encodes.
        width, height = resized_size(*resized_size(*image.size, transform), transform)
        scale = model.vae_downsample
        shapes.append(dit_pb2.LatentShape(channels=model.latent_channels, height=height // scale, width=width // scale))
    return shapes


def _output(message: gateway_pb2.GenerateRequest) -> Output:
    quality = message.output_compression if message.HasField("output_compression") else None
    convert.check_output(message.output_format, quality, message.partial_images)
    return Output(message.output_format, quality, message.partial_images)


def _check_output(request: Request, message: gateway_pb2.GenerateRequest) -> None:
    """Refuse what would have no effect on how the request's picture is given out, or has none to be given out."""
    name = convert.format_name(message.output_format)
    output = {"output_format": name, "partial_images": message.partial_images}
    if message.HasField("output_compression"):
        output["output_compression"] = message.output_compression
    check_effect(Facts(request, output_format=name), output)


def _check_parts(modality: Modality, parts: Iterable[common_pb2.Part]) -> None:
    """A text there must be; an image exactly where the modality reads one."""
    kinds = [part.WhichOneof("part") for part in parts]
    if None in kinds:
        raise InvalidRequest("prompt", "a part of the prompt is neither text nor image; set one of them")
    if "text" not in kinds or any(part.HasField("text") and not part.text.text.strip() for part in parts):
        raise InvalidRequest("prompt", "the prompt has no text, or an empty one; write what is wanted, as 'a red cube'")
    if modality.reads_image and "image" not in kinds:
        raise InvalidRequest("image", f"{modality} needs an input image; add an image part to the prompt")
    if not modality.reads_image and "image" in kinds:
        raise InvalidRequest("image", f"{modality} reads no image; leave it out, or ask for img2img or img2text")


def _explicit(part: common_pb2.Part, modality: Modality) -> common_pb2.Part:
    """The part with what it enters as filled in, where the user left it open."""
    if part.WhichOneof("part") != "image":
        return part
    image = part.image
    if not image.HasField("for_generation"):
        image.for_generation = modality is Modality.IMG2IMG
    if not image.HasField("for_understanding"):
        image.for_understanding = True
    return part


def _without_data(part: common_pb2.Part) -> common_pb2.Part:
    """The part without an image's bytes, for telling."""
    if part.WhichOneof("part") != "image":
        return part
    image = common_pb2.ImagePart(
        for_generation=part.image.for_generation, for_understanding=part.image.for_understanding
    )
    return common_pb2.Part(image=image)
