"""One request, checked against the model and planned: its chains, branches and picture. Nothing is computed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from bagel.checkpoint.limits import check_positions, check_stop_ids, picture_size, text_positions
from bagel.engine.context import Context
from bagel.engine.noise import initial_noise
from bagel.engine.picture import Picture
from bagel.engine.segments import Chain, ChainPlanner, InputImage
from bagel.errors import InvalidRequest
from bagel.guidance import needed_branches
from bagel.prompts import (
    Branch,
    BranchName,
    collect_cfg_kv_caches,
    expand_cfg_prompts,
    expand_cfg_prompts_think,
    text_prompt,
)
from bagel.request import PosteriorMode, Request


@dataclass(frozen=True)
class RequestPlan:
    """What a request takes. branches and chains (of the branches it needs) are empty for a text answer.

    chain: what text is decoded after, or a picture's gen without its think text; size: (height, width) in pixels.
    """

    request: Request
    images: Mapping[int, InputImage]
    chain: Chain
    branches: tuple[Branch, ...] = ()
    chains: Mapping[BranchName, Chain] = field(default_factory=dict)
    size: tuple[int, int] = (0, 0)

    @property
    def draws(self) -> bool:
        return bool(self.branches)

    @property
    def writes(self) -> bool:
        """Whether text is decoded: an answer, or a think text."""
        return not self.draws or self.request.think


def plan_request(planner: ChainPlanner, request: Request, max_model_len: int) -> RequestPlan:
    """Plan a request; raises InvalidRequest or InvalidImage if the model cannot serve it."""
    check_stop_ids(request.text.stop_token_ids, planner.config.llm.vocab_size)
    # A part that stands twice in a prompt is two images, each with noise of its own.
    request = replace(request, prompt=tuple(replace(part) for part in request.prompt))
    images = planner.prepare_images(request.prompt, request.posterior, request.seed)
    if request.modality.reads_image and not images:
        raise InvalidRequest("image", f"{request.modality} needs an input image")
    if not request.modality.makes_image:
        plan = RequestPlan(request, images, planner.chain(text_prompt(request.prompt, think=request.think), images))
    else:
        branches, needed = _expand(request), needed_branches(request.image)
        chains = {branch.name: planner.chain(branch.parts, images) for branch in branches if branch.name in needed}
        size = picture_size(request, planner.config)
        plan = RequestPlan(request, images, chains[BranchName.GEN], branches, chains, size)
    for chain in (plan.chain, *plan.chains.values()):
        # Text is decoded after this chain alone.
        check_positions(chain.rope, text_positions(request) if chain is plan.chain else 0, max_model_len)
    return plan


def plan_picture(planner: ChainPlanner, plan: RequestPlan, contexts: Mapping[BranchName, Context]) -> Picture:
    """The picture of a plan whose contexts are built; IncompleteContext if one is missing."""
    request, config = plan.request, planner.config
    rows, columns = grid(planner, plan.size)
    shapes = [planner.latent_shape(image.prepared.vae) for image in plan.images.values() if image.prepared.vae]
    # In mode seed one generator draws the posteriors of all images, then this noise.
    drawn_first = shapes if request.posterior is PosteriorMode.SEED else []
    noise = initial_noise(request.seed, rows * columns, config.latent_features, drawn_first)
    needed = collect_cfg_kv_caches(plan.branches, contexts, needed_branches(request.image))
    return Picture(request.image, (rows, columns), noise, needed)


def grid(planner: ChainPlanner, size: tuple[int, int]) -> tuple[int, int]:
    """Latent (rows, columns) of a picture of (height, width) pixels."""
    stride = planner.config.latent_stride
    return size[0] // stride, size[1] // stride


def _expand(request: Request) -> tuple[Branch, ...]:
    if request.think:
        return expand_cfg_prompts_think(
            request.prompt, negative_prompt=request.negative_prompt, max_think_tokens=request.max_think_tokens
        )
    return expand_cfg_prompts(request.prompt, negative_prompt=request.negative_prompt)
