"""Prompts as chains of segments: what is to be computed, in which order, and under which digests."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from PIL.Image import Image

from bagel.checkpoint.config import ModelConfig
from bagel.engine.noise import Posterior, Shape
from bagel.errors import InvalidImage
from bagel.images import PreparedImage, ResizedImage, prepare
from bagel.kv.digests import ROOT, SegmentKind, segment_digest
from bagel.model.tokenizer import BagelTokenizer
from bagel.prompts import ImagePart, Prompt, TextPart
from bagel.request import PosteriorMode


@dataclass(frozen=True)
class Segment:
    """One unit of a context.

    length: its K/V rows; rope: its first position; next_rope: the position after it (an image takes one).
    token_ids of a text, delimiters included; image and posterior of an image block, grid its (rows, columns).
    """

    kind: SegmentKind
    parent: bytes
    digest: bytes
    length: int
    rope: int
    next_rope: int
    token_ids: tuple[int, ...] = ()
    image: Image | None = field(default=None, repr=False, compare=False)
    grid: tuple[int, int] = (0, 0)
    posterior: Posterior | None = None


@dataclass(frozen=True)
class Chain:
    """Segments of a context in order. length: all its K/V rows; rope: the next position; digest: its name."""

    segments: tuple[Segment, ...] = ()

    @property
    def length(self) -> int:
        return sum(segment.length for segment in self.segments)

    @property
    def lengths(self) -> list[tuple[bytes, int]]:
        """Its segments as a store leases them: digest and K/V rows of each."""
        return [(segment.digest, segment.length) for segment in self.segments]

    @property
    def rope(self) -> int:
        return self.segments[-1].next_rope if self.segments else 0

    @property
    def digest(self) -> bytes:
        return self.segments[-1].digest if self.segments else ROOT


@dataclass(frozen=True)
class InputImage:
    """An input image of a request, resized once for all its branches."""

    prepared: PreparedImage
    posterior: Posterior


class ChainPlanner:
    """Turns the parts of a prompt into chains, for one model."""

    def __init__(self, config: ModelConfig, tokenizer: BagelTokenizer, fingerprint: bytes) -> None:
        self.config, self.tokenizer, self.fingerprint = config, tokenizer, fingerprint

    def prepare_images(self, prompt: Prompt, mode: PosteriorMode, seed: int) -> dict[int, InputImage]:
        """The images of a prompt by id of their part, in order; raises InvalidImage if one cannot be used."""
        images: dict[int, InputImage] = {}
        earlier: tuple[Shape, ...] = ()
        for part in prompt:
            if not isinstance(part, ImagePart):
                continue
            prepared = self._prepared(part)
            # By identity: an image that stands twice in a prompt has noise of its own each time.
            images[id(part)] = InputImage(prepared, Posterior(mode, seed, earlier))
            if prepared.vae is not None:
                earlier = (*earlier, self.latent_shape(prepared.vae))
        return images

    def _prepared(self, part: ImagePart) -> PreparedImage:
        """A part's image, resized here unless another process has done it."""
        if isinstance(part.image, ResizedImage):
            return part.image.prepared
        return prepare(
            part.pixels,
            self.config.vae_transform,
            self.config.vit_transform,
            for_generation=part.for_generation,
            for_understanding=part.for_understanding,
        )

    def latent_shape(self, image: Image) -> Shape:
        """Shape of the VAE's latent of a resized image, [1, z, H/8, W/8]."""
        down = self.config.vae.downsample
        return (1, self.config.vae.z_channels, image.height // down, image.width // down)

    def chain(self, parts: Prompt, images: dict[int, InputImage]) -> Chain:
        """The chain of a branch's parts."""
        chain = Chain()
        for part in parts:
            if isinstance(part, TextPart):
                chain = self.append_text(chain, part.text)
            else:
                chain = self._append_image(chain, images[id(part)])
        return chain

    def append_text(self, chain: Chain, text: str) -> Chain:
        """The chain with one more text segment."""
        return self.append_ids(chain, self.tokenizer.segment(text))

    def append_ids(self, chain: Chain, token_ids: Sequence[int]) -> Chain:
        """As append_text, from the ids of a whole segment."""
        # Little-endian on every machine, as services compare digests with each other.
        content = struct.pack(f"<{len(token_ids)}I", *token_ids)
        segment = self._segment(chain, SegmentKind.TEXT, content, len(token_ids), len(token_ids))
        return _append(chain, replace(segment, token_ids=tuple(token_ids)))

    def _append_image(self, chain: Chain, image: InputImage) -> Chain:
        """VAE block, then ViT block, as far as the part wants them."""
        prepared = image.prepared
        if prepared.vae is not None:
            chain = self._append_block(chain, SegmentKind.VAE, prepared.vae, prepared.vae_digest, image.posterior)
        if prepared.vit is not None:
            chain = self._append_block(chain, SegmentKind.VIT, prepared.vit, prepared.vit_digest, None)
        return chain

    def _append_block(
        self, chain: Chain, kind: SegmentKind, image: Image, pixels: bytes, posterior: Posterior | None
    ) -> Chain:
        config = self.config
        vae = kind is SegmentKind.VAE
        stride = config.latent_stride if vae else config.vit.patch_size
        # A ViT block needs positions in two tables, the ViT's own and the decoder's.
        limit = config.max_latent_size if vae else min(config.vit_max_num_patch_per_side, config.vit.positions_per_side)
        grid = (image.height // stride, image.width // stride)
        if max(grid) > limit:
            raise InvalidImage(
                "image",
                f"the image is {image.width}x{image.height} pixels after resizing; the model has positions "
                f"for {limit * stride} a side",
            )
        # Other noise makes other K/V of the same pixels.
        content = pixels + (posterior.identity if posterior else b"")
        # Two delimiters more than patches, and one position for all of them.
        segment = self._segment(chain, kind, content, grid[0] * grid[1] + 2, 1)
        return _append(chain, replace(segment, image=image, grid=grid, posterior=posterior))

    def _segment(self, chain: Chain, kind: SegmentKind, content: bytes, length: int, positions: int) -> Segment:
        return Segment(
            kind=kind,
            parent=chain.digest,
            digest=segment_digest(chain.digest, kind, content, self.fingerprint),
            length=length,
            rope=chain.rope,
            next_rope=chain.rope + positions,
        )


def _append(chain: Chain, segment: Segment) -> Chain:
    return Chain((*chain.segments, segment))
