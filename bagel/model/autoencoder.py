"""The two networks of the FLUX autoencoder, with the checkpoint's own names for their tensors.

diffusers has them too. Its AutoencoderKL is not used because importing it loads most of diffusers, transformers and
scipy: that took each service longer than all else it does before it is ready (bench/README.md).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from bagel.model.config import NORM_GROUPS, VaeConfig

EPS = 1e-6


class Autoencoder(nn.Module):
    """An encoder, a decoder or both."""

    encoder: Encoder | None
    decoder: Decoder | None

    def __init__(self, config: VaeConfig, *, encoder: bool, decoder: bool) -> None:
        super().__init__()
        self.encoder = Encoder(config) if encoder else None
        self.decoder = Decoder(config) if decoder else None


class Encoder(nn.Module):
    """Pixels [B, in_channels, H, W] to the posterior's mean and log variance, [B, 2 z, H/8, W/8] with four levels."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        widths = _widths(config)
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        before = [widths[0], *widths]
        self.down = nn.ModuleList(
            DownLevel(before[level], width, config.num_res_blocks, halves=level < len(widths) - 1)
            for level, width in enumerate(widths)
        )
        self.mid = Middle(widths[-1])
        self.norm_out = _norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        out: Tensor = self.conv_out(F.silu(self.norm_out(self.mid(x))))
        return out


class Decoder(nn.Module):
    """Latents [B, z, h, w] to pixels [B, out_ch, 8 h, 8 w] with four levels."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        widths = _widths(config)
        self.conv_in = nn.Conv2d(config.z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1])
        before = [*widths[1:], widths[-1]]
        self.up = nn.ModuleList(  # counted from the pixels, so run in the opposite order
            UpLevel(before[level], width, config.num_res_blocks + 1, doubles=level > 0)
            for level, width in enumerate(widths)
        )
        self.norm_out = _norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], config.out_ch, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for level in reversed(list(self.up)):
            x = level(x)
        out: Tensor = self.conv_out(F.silu(self.norm_out(x)))
        return out


class DownLevel(nn.Module):
    """Residual blocks of one resolution, then half of it."""

    def __init__(self, channels: int, width: int, blocks: int, *, halves: bool) -> None:
        super().__init__()
        self.block = _blocks(channels, width, blocks)
        self.downsample = Downsample(width) if halves else None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        return x if self.downsample is None else self.downsample(x)


class UpLevel(nn.Module):
    """Residual blocks of one resolution, then twice as much."""

    def __init__(self, channels: int, width: int, blocks: int, *, doubles: bool) -> None:
        super().__init__()
        self.block = _blocks(channels, width, blocks)
        self.upsample = Upsample(width) if doubles else None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        return x if self.upsample is None else self.upsample(x)


class Middle(nn.Module):
    """The lowest resolution: attention between two residual blocks."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(width, width)
        self.attn_1 = Attention(width)
        self.block_2 = ResidualBlock(width, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.block_2(self.attn_1(self.block_1(x)))
        return out


class ResidualBlock(nn.Module):
    """x, through a 1 x 1 convolution if its width changes, plus two convolutions of it."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.norm1 = _norm(channels)
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1)
        self.norm2 = _norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(channels, width, 1) if channels != width else None

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.conv1(F.silu(self.norm1(x)))
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        return (x if self.nin_shortcut is None else self.nin_shortcut(x)) + hidden


class Attention(nn.Module):
    """Attention of one head among all places. The file keeps the projections as 1 x 1 convolutions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = _norm(width)
        self.q, self.k, self.v, self.proj_out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(x.flatten(2)).transpose(1, 2)  # [B, H W, C]
        q, k, v = (project(tokens)[:, None] for project in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v)[:, 0]
        out: Tensor = self.proj_out(mixed).transpose(1, 2).reshape(x.shape)
        return out + x


class Downsample(nn.Module):
    """Half the height and width, by a convolution that is padded on the right and below alone."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return out


class Upsample(nn.Module):
    """Twice the height and width: each place four times, then a convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out


def _widths(config: VaeConfig) -> Sequence[int]:
    return [config.ch * mult for mult in config.ch_mult]


def _norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(NORM_GROUPS, width, eps=EPS)


def _blocks(channels: int, width: int, count: int) -> nn.ModuleList:
    return nn.ModuleList(ResidualBlock(channels if i == 0 else width, width) for i in range(count))
