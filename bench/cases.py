"""Inputs of measurements: contexts, pictures and segments made by hand, with random K/V where it does not matter."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bagel.checkpoint.config import ModelConfig
from bagel.checkpoint.limits import latent_bucket
from bagel.engine.context import Context, ContextBuilder, SegmentCache, SegmentKv
from bagel.engine.memory import kv_space_of
from bagel.engine.noise import Posterior, initial_noise
from bagel.engine.picture import Picture
from bagel.engine.sampler import Canvas
from bagel.engine.segments import Chain, Segment
from bagel.engine.step_graphs import StepGraphs
from bagel.images import resize
from bagel.kv.digests import ROOT, SegmentKind, segment_digest
from bagel.model.bagel import Bagel
from bagel.model.vae import Vae
from bagel.parallel.groups import UNDIVIDED, Groups
from bagel.prompts import BranchName
from bagel.request import ImageSettings, PosteriorMode, RenormType

Contexts = Mapping[BranchName, Context]

UNGUIDED = ImageSettings(cfg_text_scale=1.0)
GUIDED = ImageSettings()
EDIT = ImageSettings(cfg_img_scale=1.5, cfg_interval=(0.0, 1.0), cfg_renorm_type=RenormType.TEXT_CHANNEL)

SETTINGS = {1: UNGUIDED, 2: GUIDED, 3: EDIT}
"""Settings by the number of branches that their first step runs."""

PROMPT = 30
"""Tokens of a prompt."""
FINGERPRINT = b"bench"


def random_segment(model: Bagel, name: str, tokens: int, parent: bytes = ROOT) -> tuple[Segment, SegmentKv]:
    """A segment of `tokens` tokens with random K/V; its digest is made from `name`.

    A tensor-parallel rank gets its heads of what a whole model gets.
    """
    llm, heads = model.config.llm, model.language_model.kv_heads
    shape = (llm.num_hidden_layers, tokens, llm.num_key_value_heads, llm.head_dim)
    k, v = (torch.randn(shape, dtype=model.dtype, device=model.device) for _ in range(2))
    digest = segment_digest(parent, SegmentKind.TEXT, name.encode(), FINGERPRINT)
    kv = SegmentKv(k[:, :, heads.start : heads.stop], v[:, :, heads.start : heads.stop])
    return Segment(SegmentKind.TEXT, parent, digest, tokens, 0, tokens), kv


def _context(*parts: tuple[Segment, SegmentKv]) -> Context:
    return Context(Chain(tuple(segment for segment, _ in parts)), tuple(kv for _, kv in parts))


def text_context(model: Bagel, tokens: int) -> Context:
    """A context of one segment."""
    return _context(random_segment(model, "text", tokens))


def branch_lengths(tokens: int, branches: int) -> list[int]:
    """Context lengths of the first branches of a picture whose gen has `tokens` tokens (see branch_contexts)."""
    return [tokens, tokens - PROMPT, PROMPT][:branches]


def branch_contexts(model: Bagel, tokens: int, branches: int) -> Contexts:
    """Contexts of one to three branches. gen has an image and a prompt with `tokens` tokens (PROMPT: no image).

    cfg_text has only the image, cfg_img only a prompt.
    """
    # cfg_img gets another prompt: equal branches would share a row, and the step would be smaller.
    image = [random_segment(model, "image", tokens - PROMPT)] if tokens > PROMPT else []
    prompt = random_segment(model, "prompt", PROMPT, image[0][0].digest if image else ROOT)
    contexts = (_context(*image, prompt), _context(*image), _context(random_segment(model, "other", PROMPT)))
    return dict(zip(BranchName, contexts[:branches], strict=False))


def draw(
    model: Bagel,
    side: int,
    contexts: Contexts,
    settings: ImageSettings | None = None,
    groups: Groups = UNDIVIDED,
) -> Canvas:
    """A canvas with one square picture of `side` pixels, guided by one branch per context.

    groups: the ranks that compute its steps together.
    """
    settings = settings or SETTINGS[len(contexts)]
    rows = side // model.config.latent_stride
    noise = initial_noise(0, rows * rows, model.config.latent_features)
    picture, ranks = Picture(settings, (rows, rows), noise, contexts), groups.context.size
    bucket = -(-latent_bucket(rows * rows) // ranks) * ranks  # each rank of context parallel computes as many
    space = kv_space_of(model, picture.kv_tokens(bucket))
    canvas = Canvas(model, bucket, space, StepGraphs.over(model, space.slab), groups)
    canvas.add(picture)
    return canvas


def first_step(canvas: Canvas) -> Callable[[], None]:
    """A function that runs the first step of a canvas's picture; it may be called repeatedly."""

    def work() -> None:
        canvas.drawings[0].step = 0  # a canvas counts its steps, and would end
        canvas.step(canvas.drawings)

    return work


def text_chain(tokens: int, after: Chain | None = None) -> Chain:
    """A text segment of `tokens` ids, appended to a chain if one is given."""
    chain = after or Chain()
    ids = tuple(2 + i % 500 for i in range(tokens))
    digest = segment_digest(chain.digest, SegmentKind.TEXT, repr(ids).encode(), FINGERPRINT)
    segment = Segment(SegmentKind.TEXT, chain.digest, digest, tokens, chain.rope, chain.rope + tokens, ids)
    return Chain((*chain.segments, segment))


def image_chain(config: ModelConfig, side: int, *kinds: SegmentKind) -> Chain:
    """Blocks of these kinds for one square picture of `side` pixels, each resized for its encoder."""
    image = noise_image(side)
    chain = Chain()
    for kind in kinds:
        vae = kind is SegmentKind.VAE
        resized = resize(image, config.vae_transform if vae else config.vit_transform)
        stride = config.latent_stride if vae else config.vit.patch_size
        grid = (resized.height // stride, resized.width // stride)
        posterior = Posterior(PosteriorMode.CONTENT) if vae else None
        digest = segment_digest(chain.digest, kind, str(side).encode(), FINGERPRINT)
        length, rope = grid[0] * grid[1] + 2, chain.rope
        block = Segment(kind, chain.digest, digest, length, rope, rope + 1, (), resized, grid, posterior)
        chain = Chain((*chain.segments, block))
    return chain


def noise_image(side: int) -> Image.Image:
    """A square picture of random pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def build(model: Bagel, chain: Chain) -> Callable[[], Context]:
    """A function that computes a chain, anew on each call."""
    builder = ContextBuilder(model, SegmentCache(max_bytes=0))
    return lambda: builder.build(chain)


class EncodedVae(Vae):
    """An autoencoder whose encoder has already run, to measure only the work after it."""

    def __init__(self, vae: Vae, pixels: Tensor) -> None:
        super().__init__(vae.config, encoder=False, decoder=False)
        with torch.inference_mode():
            self._moments = vae.encode(pixels)

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        return self._moments
