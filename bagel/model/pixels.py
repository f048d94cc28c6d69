"""Pictures to tensors and back."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bagel.model.attention import upload

_CPU = torch.device("cpu")


def to_pixels(image: Image.Image, device: torch.device = _CPU) -> Tensor:
    """RGB image -> [3, H, W] float32 in [-1, 1] on the device: (u8 / 255 - 0.5) / 0.5, for ViT and VAE alike."""
    # np.array copies: torch needs memory that it may write to, which an image does not give.
    u8 = upload(torch.from_numpy(np.array(image, dtype=np.uint8)), torch.uint8, device)
    # By a tensor: a GPU would multiply by the reciprocal of a number, which rounds otherwise than a CPU's division.
    most = torch.full((), 255.0, device=device)
    return (u8.permute(2, 0, 1).float() / most - 0.5) / 0.5


def to_image(decoded: Tensor) -> Image.Image:
    """Decoder output [3, H, W] -> RGB image: clamp(x / 2 + 0.5) * 255, truncated as the reference does."""
    u8 = ((decoded * 0.5 + 0.5).clamp(0, 1) * 255).to(torch.uint8)
    # In the image's order before the copy: Pillow takes 15 ms to reorder 1024 x 1024 pixels, a GPU none.
    return Image.fromarray(u8.permute(1, 2, 0).contiguous().cpu().numpy())
