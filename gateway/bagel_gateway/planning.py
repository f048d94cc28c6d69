"""What a request asks for, before any stage is called: its message becomes a Request, then a Plan for the model served.

Reading looks at the headers of images; everything else is pure. Each route makes its stages' messages from the plan.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bagel.checkpoint.limits import check_stop_ids, picture_size
from bagel.effect import Facts, check_effect
from bagel.errors import InvalidRequest
from bagel.images.output import OutputFormat
from bagel.pipelines import PipelineConfig, StageConfig, pipeline_for_request
from bagel.prompts import ImagePart, Part, TextPart
from bagel.request import Modality, Request, check_prompt_size, resolve
from bagel.rpc import convert
from bagel.v1 import common_pb2, gateway_pb2
from bagel_gateway.images import ImageFile, InputImages


@dataclass(frozen=True)
class Asked:
    """A request that is valid whatever the model is, and the pipeline that serves it."""

    request: Request
    pipeline: PipelineConfig
    output: OutputFormat

    @property
    def path(self) -> tuple[StageConfig, ...]:
        """The stages that it goes through."""
        return self.pipeline.path("image" if self.request.modality.makes_image else "text")


@dataclass(frozen=True)
class Plan(Asked):
    """A request with its final settings, a picture's size included.

    model: what the stages serve; settings: the request as a message, without its prompt.
    """

    model: common_pb2.ModelInfo
    settings: common_pb2.Request


async def read_request(
    message: gateway_pb2.GenerateRequest,
    deployed: PipelineConfig,
    defaults: Mapping[str, Any],
    images: InputImages,
) -> Asked:
    """Check a request as far as it goes without the model; raises InvalidRequest or InvalidImage."""
    asked, output = message.request, convert.output_from_wire(message)
    modality = convert.modality_from_wire(asked.modality)
    _check_parts(modality, asked.prompt)
    options = convert.options_from_wire(asked)
    think = options.get("think", defaults.get("think"))
    pipeline = pipeline_for_request(deployed, think=think)
    options["think"] = bool(pipeline.thinks) if think is None else think
    prompt = tuple(_part(part, modality) for part in asked.prompt)
    request = resolve(modality, prompt, options, defaults)
    # Refuses an output setting that has no effect on this request.
    check_effect(Facts(request, output_format=output.format), output.settings())
    # Last, as it takes time: a request with a wrong setting is refused without a look at its images.
    return Asked(replace(request, prompt=await images.measured(prompt)), pipeline, output)


def plan(asked: Asked, model: common_pb2.ModelInfo) -> Plan:
    """What the stages are to do with a request; raises InvalidRequest for a size or token that the model has not."""
    request = asked.request
    if model.vocabulary:
        check_stop_ids(request.text.stop_token_ids, model.vocabulary)
    if request.modality.makes_image:
        height, width = picture_size(request, convert.picture_limits(model))
        request = replace(request, image=replace(request.image, height=height, width=width))
    return Plan(request, asked.pipeline, asked.output, model, convert.request_to_wire(request, ()))


def _part(part: common_pb2.Part, modality: Modality) -> Part:
    """One part of a prompt. An image that does not say how it enters does so as its modality has it."""
    if part.HasField("text"):
        return TextPart(part.text.text)
    purposes = convert.image_purposes(part.image, for_generation=modality is Modality.IMG2IMG)
    return ImagePart(ImageFile((0, 0), part.image), **purposes)


def _check_parts(modality: Modality, parts: Sequence[common_pb2.Part]) -> None:
    """Require a text, and images exactly where the modality reads them."""
    kinds = [part.WhichOneof("part") for part in parts]
    if None in kinds:
        raise InvalidRequest("prompt", "a part of the prompt is neither text nor image; set one of them")
    texts = [part.text.text for part in parts if part.HasField("text")]
    if not texts or not all(text.strip() for text in texts):
        raise InvalidRequest("prompt", "the prompt has no text, or an empty one; write one, as 'a large red circle'")
    if modality.reads_image and "image" not in kinds:
        raise InvalidRequest("image", f"{modality} needs an input image; add an image part to the prompt")
    if not modality.reads_image and "image" in kinds:
        raise InvalidRequest("image", f"{modality} reads no image; leave it out, or ask for img2img or img2text")
    check_prompt_size("prompt", len(kinds), texts)
