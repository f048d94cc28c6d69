"""Every random draw: CPU generators in float32, one per purpose, so that no device, batch or topology changes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import torch
from torch import Tensor

from bagel.request import PosteriorMode

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Posterior:
    """Where the posterior noise of one input image comes from.

    earlier: in mode seed, the shapes drawn before it from the request's generator (the earlier images').
    """

    mode: PosteriorMode
    seed: int = 0
    earlier: tuple[Shape, ...] = ()

    @property
    def identity(self) -> bytes:
        """What a digest must cover, beside the pixels, for two noises to be the same."""
        # Noise of the other modes follows from the pixels, which the digest covers.
        if self.mode is not PosteriorMode.SEED:
            return self.mode.encode()
        return f"{self.mode}:{self.seed}:{self.earlier}".encode()

    def draw(self, shape: Shape, pixel_digest: bytes) -> Tensor:
        """Noise of the given shape, float32 on the CPU."""
        if self.mode is PosteriorMode.MEAN:
            return torch.zeros(shape)
        if self.mode is PosteriorMode.CONTENT:
            return torch.randn(shape, generator=_generator(int.from_bytes(pixel_digest[:8], "little") >> 1))
        return _draw_after(self.earlier, shape, self.seed)


def initial_noise(seed: int, tokens: int, features: int, posterior_shapes: Sequence[Shape] = ()) -> Tensor:
    """The noise a picture starts from, [tokens, features] in token layout.

    posterior_shapes: in posterior mode seed, the shapes that the reference draws first from the same generator.
    """
    return _draw_after(posterior_shapes, (tokens, features), seed)


def text_uniforms(seed: int, count: int) -> Tensor:
    """Numbers in [0, 1) for sampling text, one a token, [count]; from a generator of their own."""
    # A seed of its own, so that text and the initial noise share no random numbers.
    derived = blake2b(seed.to_bytes(8, "little"), digest_size=8, person=b"bagel-text").digest()
    return torch.rand(count, generator=_generator(int.from_bytes(derived, "little") >> 1))


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _draw_after(earlier: Sequence[Shape], shape: Shape, seed: int) -> Tensor:
    generator = _generator(seed)
    for skipped in earlier:
        # Drawn and dropped: the generator must stand where the reference's does.
        torch.randn(skipped, generator=generator)
    return torch.randn(shape, generator=generator)
