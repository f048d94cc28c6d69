"""What a process needs of the model. Each role loads its parts and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Role(StrEnum):
    """A process's share of the work.

    understand: reads text and images, writes text, builds K/V for text-to-image;
    context: also images to edit (VAE encoder, generation expert);
    denoise: draws pictures from K/V built elsewhere; full: everything.
    """

    UNDERSTAND = "understand"
    CONTEXT = "context"
    DENOISE = "denoise"
    FULL = "full"

    @property
    def parts(self) -> Parts:
        return _PARTS[self]


@dataclass(frozen=True)
class Parts:
    """Which parts of the network exist.

    text: LM head, last norm and the whole embedding (else its two rows of the image delimiters);
    vision: ViT and connector; generation: the generation expert and what embeds latents;
    encoder: the VAE's encoder; denoising: the generation expert's last norm, llm2vae and the VAE's decoder.
    """

    text: bool = False
    vision: bool = False
    generation: bool = False
    encoder: bool = False
    denoising: bool = False


_PARTS = {
    Role.UNDERSTAND: Parts(text=True, vision=True),
    Role.CONTEXT: Parts(text=True, vision=True, generation=True, encoder=True),
    Role.DENOISE: Parts(generation=True, denoising=True),
    Role.FULL: Parts(text=True, vision=True, generation=True, encoder=True, denoising=True),
}
