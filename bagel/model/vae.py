"""The FLUX autoencoder: diffusers' AutoencoderKL, filled from the checkpoint's own names, its weights in float32."""

from __future__ import annotations

import re
import threading
from typing import Any, cast

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from bagel.checkpoint.config import NORM_GROUPS, VaeConfig
from bagel.parallel.groups import ALONE, Group
from bagel.parallel.vae_patch import Tiling

TILE_SIZE = 512
"""Pixels a side of a tile. With tiling on, a picture up to that size is still decoded and encoded whole."""

_LAUNCHING = threading.Lock()

# The checkpoint's (BFL) names on the left, diffusers' on the right.
_RENAMES = (
    (r"\.mid\.block_(\d)\.", lambda m: f".mid_block.resnets.{int(m[1]) - 1}."),
    (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."),
    (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
    (r"\.mid\.attn_1\.proj_out\.", ".mid_block.attentions.0.to_out.0."),
    (r"\.down\.(\d+)\.block\.", r".down_blocks.\1.resnets."),
    (r"\.down\.(\d+)\.downsample\.", r".down_blocks.\1.downsamplers.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.norm_out\.", ".conv_norm_out."),
)


class Vae(nn.Module):
    """Pixels to latents and back; holds the encoder, the decoder or both.

    Latents are the model's: scale * (z - shift). tf32: a GPU decodes with inputs of convolutions rounded to TF32's ten
    bits, PyTorch's default, in a third of the time; for models whose steps are rounded further. It encodes in float32,
    as the reference's bfloat16 does.
    """

    # Unless it is fused, weights and inputs keep PyTorch's default layout (channels first). With channels last a CPU
    # convolves a little faster, but its group norm then adds each group up in float32 one value after the other: the
    # error grows with the picture, to 1e-4 at 512 x 512 (bench/README.md).

    def __init__(self, config: VaeConfig, *, encoder: bool, decoder: bool, tf32: bool = False) -> None:
        super().__init__()
        self.config, self._tf32 = config, tf32
        widths = [config.ch * mult for mult in config.ch_mult]
        self.autoencoder: Any = AutoencoderKL(
            in_channels=config.in_channels,
            out_channels=config.out_ch,
            down_block_types=("DownEncoderBlock2D",) * len(widths),
            up_block_types=("UpDecoderBlock2D",) * len(widths),
            block_out_channels=tuple(widths),
            layers_per_block=config.num_res_blocks,
            latent_channels=config.z_channels,
            norm_num_groups=NORM_GROUPS,
            sample_size=TILE_SIZE,
            # The checkpoint's autoencoder has no such convolutions.
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
        # Also where another default type is set, as vLLM does. Not by diffusers' own `to`, which warns of it.
        nn.Module.to(self.autoencoder, torch.float32)
        self._layout = torch.contiguous_format
        self._decoding: tuple[Tiling, Group] | None = None
        self._encoding: tuple[Tiling, Group] | None = None
        # Dropped while the model has no memory yet, so that a role pays for its half alone.
        if not encoder:
            self.autoencoder.encoder = None
        if not decoder:
            self.autoencoder.decoder = None

    def fuse(self) -> None:
        """Compute each group norm and its SiLU in one kernel, and keep channels last; for a GPU with Triton."""
        # Imported here, as PyTorch's builds without CUDA bring no Triton.
        from bagel.model.vae_kernels import fuse

        for network in (self.autoencoder.encoder, self.autoencoder.decoder):
            if network is not None:
                fuse(network)
                network.to(memory_format=torch.channels_last)
        self._layout = torch.channels_last

    def use_tiling(self, decoding: Group = ALONE, encoding: Group = ALONE) -> None:
        """Decode and encode what is above TILE_SIZE in overlapping, blended tiles.

        That takes less memory, and gives not quite the same picture. decoding, encoding: ranks that divide the tiles;
        all of a group decode and encode the same in the same order.
        """
        tiled, config = self.autoencoder, self.config
        pixels, latents, overlap = tiled.tile_sample_min_size, tiled.tile_latent_min_size, tiled.tile_overlap_factor
        self._decoding = Tiling(latents, pixels, config.out_ch, overlap), decoding
        self._encoding = Tiling(pixels, latents, 2 * config.z_channels, overlap), encoding

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """pixels [1, 3, H, W] in [-1, 1] -> posterior mean and log variance, each [1, z, H/8, W/8]."""
        if self._encoding is not None and self._encoding[0].cuts(pixels):
            tiling, group = self._encoding
            moments = tiling.blend(pixels, group.gather(tiling.share(pixels, self._encoded, group)), group)
        else:
            moments = self._encoded(pixels)
        mean, logvar = moments.chunk(2, dim=1)
        return mean, logvar

    def sample(self, mean: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
        """Latent of a posterior sample: scale * (mean + exp(logvar / 2) * noise - shift)."""
        z = mean + torch.exp(0.5 * logvar) * noise
        return self.config.scale_factor * (z - self.config.shift_factor)

    def decode(self, latent: Tensor) -> Tensor:
        """latent [1, z, h, w] -> pixels [1, 3, 8 h, 8 w], about [-1, 1], not clamped.

        Of ranks that divide the tiles the first one calls this, and the others `help_decode`.
        """
        z = self._unscaled(latent)
        if self._decoding is None or not self._decoding[0].cuts(z):
            return self._decoded(z)
        tiling, group = self._decoding
        shares = group.collect(tiling.share(z, self._decoded, group))
        assert shares is not None, "this rank helps others to decode"
        return tiling.blend(z, shares, group)

    def help_decode(self, latent: Tensor) -> None:
        """Compute this rank's tiles of a latent that the first rank decodes; nothing if that is not cut into tiles."""
        z = self._unscaled(latent)
        if self._decoding is not None and self._decoding[0].cuts(z):
            tiling, group = self._decoding
            group.collect(tiling.share(z, self._decoded, group))

    def _encoded(self, pixels: Tensor) -> Tensor:
        """Moments of pixels or of a tile of them."""
        return self._convolve(self.autoencoder.encoder, pixels, tf32=False)

    def _decoded(self, z: Tensor) -> Tensor:
        """Pixels of latents or of a tile of them."""
        return self._convolve(self.autoencoder.decoder, z, tf32=self._tf32)

    def _unscaled(self, latent: Tensor) -> Tensor:
        """The latent as the decoder takes it."""
        return latent / self.config.scale_factor + self.config.shift_factor

    def _convolve(self, network: nn.Module, x: Tensor, *, tf32: bool) -> Tensor:
        """Run a network with convolutions of float32 whose inputs are rounded to TF32 or not.

        PyTorch reads that from a flag of the process when it launches a convolution, so on a GPU one thread launches
        at a time. No ranks meet meanwhile.
        """
        x = x.contiguous(memory_format=self._layout)
        if not x.is_cuda:
            return cast(Tensor, network(x))
        with _LAUNCHING, torch.backends.cudnn.flags(enabled=True, allow_tf32=tf32):
            return cast(Tensor, network(x)).contiguous()


def diffusers_name(name: str, levels: int) -> str:
    """diffusers' name of a tensor of ae.safetensors; levels is len(ch_mult)."""

    def up_block(match: re.Match[str]) -> str:
        kind = {"block": "resnets", "upsample": "upsamplers.0"}[match[2]]
        return f".up_blocks.{levels - 1 - int(match[1])}.{kind}."  # the checkpoint counts levels from the pixels

    for pattern, replacement in _RENAMES:
        name = re.sub(pattern, replacement, name)
    return re.sub(r"\.up\.(\d+)\.(block|upsample)\.", up_block, name)
