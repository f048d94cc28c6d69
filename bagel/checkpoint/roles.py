"""Roles of processes. Each role loads the parts of the model that it needs and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Role(StrEnum):
    """A process's share of the work.

    understand: read text and images, write text, build K/V for text-to-image;
    context: the same, and read images to edit (VAE encoder, generation expert);
    denoise: draw pictures from K/V that another process built; full: everything.
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
    """The parts of the network that a role loads.

    text: LM head, last norm and the whole embedding (without it, only the two rows of the image delimiters);
    vision: ViT and connector; generation: the generation expert and the embedding of latents;
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
