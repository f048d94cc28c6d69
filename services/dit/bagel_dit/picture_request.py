"""A request to draw from contexts: checked before anything is pulled, and as the engine's command."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from bagel.checkpoint.limits import check_side, padded_latents, row_kv_tokens
from bagel.engine.commands import AddPicture, PlacedContext
from bagel.errors import IncompleteContext, InvalidRequest
from bagel.guidance import needed_branches
from bagel.prompts import BranchName
from bagel.request import MAX_PARTS, MAX_SEED
from bagel.rpc.convert import image_settings_from_wire, output_from_wire, picture_limits
from bagel.v1 import common_pb2, dit_pb2, kv_pb2


def add_picture(
    request: dit_pb2.DitServiceGenerateRequest,
    refs: Mapping[BranchName, kv_pb2.ContextRef],
    id_: int,
    info: common_pb2.ModelInfo,
) -> AddPicture:
    """The picture that a request wants; InvalidRequest or IncompleteContext if it cannot be drawn."""
    settings = image_settings_from_wire(request.draw.image)
    missing = needed_branches(settings) - refs.keys()
    if missing:
        raise IncompleteContext(f"no context for the branch {', '.join(sorted(missing))}; the picture was not drawn")
    stride, limits = info.latent_stride, picture_limits(info)
    for name, side in (("height", settings.height), ("width", settings.width)):
        if side is None:
            raise InvalidRequest(name, f"the picture has no {name}; a DiT that draws from contexts needs it set")
        check_side(name, side, limits)
    assert settings.height is not None and settings.width is not None
    _check_draw(request, refs.values(), info)
    return AddPicture(
        id_,
        settings,
        (settings.height // stride, settings.width // stride),
        request.draw.seed,
        tuple((1, shape.channels, shape.height, shape.width) for shape in request.draw.posterior_shapes),
        {
            branch: PlacedContext(
                ref.segments[-1].digest if ref.segments else b"",
                sum(segment.length for segment in ref.segments),
                ref.next_rope,
            )
            for branch, ref in refs.items()
        },
        output_from_wire(request),
    )


def kv_tokens(picture: AddPicture, info: common_pb2.ModelInfo, context_ranks: int) -> int:
    """Tokens of K/V that a picture takes on the device."""
    padded = padded_latents(picture.grid[0] * picture.grid[1], info.device, context_ranks)
    # Branches with equal contexts share a row.
    lengths = {context.digest: context.length for context in picture.contexts.values()}
    return sum(row_kv_tokens(length, padded) for length in lengths.values())


def _check_draw(
    request: dit_pb2.DitServiceGenerateRequest, refs: Iterable[kv_pb2.ContextRef], info: common_pb2.ModelInfo
) -> None:
    """Raise InvalidRequest for what our gateway never sends."""
    if request.draw.seed > MAX_SEED:
        raise InvalidRequest("seed", f"seed is {request.draw.seed}; it must be at most {MAX_SEED}")
    if any(ref.next_rope > info.max_positions for ref in refs):
        raise InvalidRequest("contexts", f"a context goes past the last of the model's {info.max_positions} positions")
    side = info.max_image_size // max(1, info.vae_downsample)
    for shape in request.draw.posterior_shapes:
        right = shape.channels == info.latent_channels and 0 < shape.height <= side and 0 < shape.width <= side
        if not right or len(request.draw.posterior_shapes) > MAX_PARTS:
            raise InvalidRequest("posterior_shapes", f"[{shape}] is no latent of this model; sides are at most {side}")
