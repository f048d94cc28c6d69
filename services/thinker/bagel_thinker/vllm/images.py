"""Images inside vLLM: the tensors that a request carries, and the embeddings that the model computes from them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from bagel.checkpoint.config import ModelConfig
from bagel.checkpoint.files import AE, EMA, Checkpoint
from bagel.checkpoint.roles import Role
from bagel.engine.segments import Segment
from bagel.images import pixel_digest
from bagel.kv.digests import SegmentKind
from bagel.model.bagel import Bagel
from bagel.model.flow import latent_patchify
from bagel.model.layers import grid_position_ids
from bagel.model.linear import LinearFactory
from bagel.model.naming import slots
from bagel.model.pixels import to_pixels
from bagel.model.vit import vit_patchify
from bagel.model.weights import check_tensors, fill, shapes

VIT, VAE = SegmentKind.VIT.value, SegmentKind.VAE.value
"""vLLM's modalities, one for each kind of image block."""

Item = dict[str, Tensor]


def image_item(segment: Segment, config: ModelConfig) -> Item:
    """The tensors of an image block: its grid, and the patches (ViT) or the pixels and the posterior noise (VAE)."""
    assert segment.image is not None
    grid = torch.tensor(segment.grid)
    pixels = to_pixels(segment.image)
    if segment.kind is SegmentKind.VIT:
        return {"vit_grid": grid, "vit_patches": vit_patchify(pixels, config.vit.patch_size)}
    assert segment.posterior is not None
    down = config.vae.downsample
    shape = (1, config.vae.z_channels, segment.image.height // down, segment.image.width // down)
    # Drawn here on the CPU, as in the torch engine: the noise depends on the request, not on the device.
    noise = segment.posterior.draw(shape, pixel_digest(segment.image))
    return {"vae_grid": grid, "vae_pixels": pixels, "vae_noise": noise}


class ImageEncoder(Bagel):
    """The parts of BAGEL that turn images into the decoder's inputs; the decoder itself is vLLM's."""

    def __init__(self, config: ModelConfig, role: Role, linears: LinearFactory) -> None:
        super().__init__(config, role, linears=linears)
        del self.language_model  # never allocated: the encoder is built on the meta device

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def vit_block(self, grid: Tensor, patches: Tensor) -> Tensor:
        """Patches [n, features] of one image, grid (rows, columns) -> [n, hidden] float32."""
        rows, columns = grid.tolist()
        return self.embed_vit(patches.to(self.device), rows, columns)

    def vae_block(self, grid: Tensor, pixels: Tensor, noise: Tensor) -> Tensor:
        """Pixels [3, H, W], posterior noise [1, z, h, w] -> one image's latents as inputs [n, hidden] float32."""
        vae, device = self.autoencoder(), self.device
        # Both before anything is computed, as such a copy waits for what is under way.
        pixels, noise = pixels.to(device), noise.to(device)
        mean, logvar = vae.encode(pixels[None])
        latent = vae.sample(mean, logvar, noise)[0]
        tokens = latent_patchify(latent, self.config.latent_patch_size)
        rows, columns = grid.tolist()
        ids = grid_position_ids(rows, columns, self.config.max_latent_size, device)
        return self.embed_latents(tokens[None], torch.zeros(1, device=device), ids)[0]


def empty_encoder(config: ModelConfig, role: Role, *, dtype: torch.dtype, device: torch.device) -> ImageEncoder:
    """An encoder without values. Types are the torch engine's: products in dtype, norms and latents in float32."""
    with torch.device("meta"):
        encoder = ImageEncoder(config, role, LinearFactory(dtype))
    return encoder.requires_grad_(False).to_empty(device=device).eval()


def load_encoder(encoder: ImageEncoder, checkpoint: Checkpoint) -> None:
    """Fill an encoder from the checkpoint; raises CheckpointError, naming the tensors, if any are missing."""
    needed = list(slots(encoder))
    check_tensors({file: shapes(checkpoint, file) for file in (EMA, AE)}, needed, str(checkpoint.folder))
    fill(checkpoint, needed)


def embed_all(
    encoder: ImageEncoder, delimiters: Tensor, dtype: torch.dtype, **fields: Sequence[Tensor]
) -> list[Tensor]:
    """Embed image blocks of one kind with the delimiters [2, hidden] around each: [n + 2, hidden] in dtype."""
    start, end = delimiters.to(dtype)[:, None]
    blocks: Iterable[Tensor]
    if "vit_patches" in fields:
        blocks = map(encoder.vit_block, fields["vit_grid"], fields["vit_patches"])
    else:
        blocks = map(encoder.vae_block, fields["vae_grid"], fields["vae_pixels"], fields["vae_noise"])
    return [torch.cat((start, block.to(dtype), end)) for block in blocks]
