"""Flow matching as pure functions: schedule, guidance, and the token layout of latents.

Formulas: the reference's `Bagel.generate_image` and `_forward_flow` (ByteDance-Seed/Bagel).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from bagel.model.linear import LinearFactory
from bagel.prompts import BranchName
from bagel.request import ImageSettings, RenormType

SINUSOID_WIDTH = 256
MAX_PERIOD = 10_000.0


def timesteps(num_timesteps: int, shift: float) -> Tensor:
    """Start times of the steps, then their end, [num_timesteps] float32 from 1 to 0: t = s u / (1 + (s - 1) u)."""
    u = torch.linspace(1, 0, num_timesteps, dtype=torch.float32)
    return shift * u / (1 + (shift - 1) * u)


def guided_steps(t: Tensor, interval: tuple[float, float]) -> list[bool]:
    """Whether guidance is on in the step that starts at each t: lo < t <= hi, compared in float32."""
    # In float64 a time at the interval's end might fall on its other side.
    lo, hi = torch.tensor(interval, dtype=torch.float32)
    return [bool(on) for on in (t > lo) & (t <= hi)]


def guiding_branches(settings: ImageSettings) -> frozenset[BranchName]:
    """Branches that a guided step needs beside gen.

    None with cfg_text_scale <= 1: the reference then drops the image branch's velocity too.
    """
    if settings.cfg_text_scale <= 1:
        return frozenset()
    if settings.cfg_img_scale <= 1:
        return frozenset({BranchName.CFG_TEXT})
    return frozenset({BranchName.CFG_TEXT, BranchName.CFG_IMG})


def guide(velocities: Mapping[BranchName, Tensor], settings: ImageSettings) -> Tensor:
    """Guided velocity of one picture from its branches' velocities, each [tokens, features] float32.

    Where guidance is off at this step, cfg_text is not there, and gen's velocity is returned as it is.
    """
    c = velocities[BranchName.GEN]
    if BranchName.CFG_TEXT not in velocities:
        return c
    text = velocities[BranchName.CFG_TEXT]
    image = velocities.get(BranchName.CFG_IMG)
    g = text + settings.cfg_text_scale * (c - text)
    # Only this type rescales before the image branch comes in, as in the reference.
    if settings.cfg_renorm_type is RenormType.TEXT_CHANNEL:
        return _guide_image(_renorm(c, g, settings.cfg_renorm_min, per_token=True), image, settings)
    h = _guide_image(g, image, settings)
    return _renorm(c, h, settings.cfg_renorm_min, per_token=settings.cfg_renorm_type is RenormType.CHANNEL)


def _guide_image(g: Tensor, image: Tensor | None, settings: ImageSettings) -> Tensor:
    """image + scale (g - image); g itself without an image branch."""
    return g if image is None else image + settings.cfg_img_scale * (g - image)


def _renorm(c: Tensor, v: Tensor, smallest: float, *, per_token: bool) -> Tensor:
    """v * min(1, max(smallest, |c| / (|v| + 1e-8))), norms per token or over everything."""
    dim = (-1,) if per_token else (-2, -1)
    ratio: Tensor = torch.linalg.vector_norm(c, dim=dim, keepdim=True) / (
        torch.linalg.vector_norm(v, dim=dim, keepdim=True) + 1e-8
    )
    # At most 1: guidance may be scaled back to gen's norm, never up to it.
    return v * ratio.clamp(min=smallest, max=1.0)


class TimestepEmbedder(nn.Module):
    """t in [0, 1] -> [hidden]: sinusoid (cosines first), linear, SiLU, linear (as in DiT, Peebles & Xie 2022)."""

    def __init__(self, linears: LinearFactory, name: str, hidden: int) -> None:
        super().__init__()
        first = linears.whole(f"{name}.mlp.0", SINUSOID_WIDTH, hidden, bias=True, exact=True)
        second = linears.whole(f"{name}.mlp.2", hidden, hidden, bias=True, exact=True)
        self.mlp = nn.Sequential(first, nn.SiLU(), second)

    def forward(self, t: Tensor) -> Tensor:
        """t [b] float32 -> [b, hidden]."""
        return cast(Tensor, self.mlp(sinusoid(t)))


def sinusoid(t: Tensor) -> Tensor:
    """t [b] float32 -> [b, 256] float32, of t itself (not of t * 1000)."""
    half = SINUSOID_WIDTH // 2
    k = torch.arange(half, dtype=torch.float32, device=t.device)
    angles = t[:, None].float() * torch.exp(-math.log(MAX_PERIOD) * k / half)
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def latent_patchify(latent: Tensor, patch: int) -> Tensor:
    """latent [c, h, w] -> tokens [n, patch * patch * c], row-major, features ordered (row, column, channel)."""
    c, h, w = latent.shape
    grid = latent.view(c, h // patch, patch, w // patch, patch)
    return torch.einsum("chpwq->hwpqc", grid).reshape(-1, patch * patch * c)


def latent_unpatchify(tokens: Tensor, rows: int, columns: int, patch: int) -> Tensor:
    """Inverse of latent_patchify: tokens [rows * columns, patch * patch * c] -> latent [c, h, w]."""
    grid = tokens.view(rows, columns, patch, patch, -1)
    return torch.einsum("hwpqc->chpwq", grid).reshape(-1, rows * patch, columns * patch)
