"""What a decoder computes its attention and elementwise work with; chosen once, when a model is loaded."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from bagel.model.attention_backends import (
    AUTO,
    BACKENDS,
    ON_DEVICE,
    READ_AHEAD,
    AttentionBackend,
    choose_attention,
    sdpa,
)
from bagel.model.kernels import TORCH, Kernels

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LayerBackend:
    """attend: attention over a layer's slab; kernels: what lies between its matrix products."""

    attend: AttentionBackend = sdpa
    kernels: Kernels = TORCH
    attention: str = "sdpa"
    """The name of `attend`."""

    @property
    def captures(self) -> bool:
        """Whether a forward can be captured as a CUDA graph: attention reads its lengths on the device."""
        return self.attention in ON_DEVICE and self.kernels is not TORCH

    @property
    def read_ahead(self) -> int:
        """Tokens of the slab that attention may read behind what a row sees.

        It weighs them by zero, and zero times what is not finite is not zero: they must be finite.
        """
        return READ_AHEAD.get(self.attention, 0)


def choose_backend(
    device: torch.device, dtype: torch.dtype, *, attention: str = AUTO, eager: bool = False
) -> LayerBackend:
    """The fastest for a model of this type on this device; eager: PyTorch's own operators between the products, and no
    CUDA graphs.

    Raises ConfigError for an attention backend that cannot run there.
    """
    name = choose_attention(device, dtype, attention)
    kernels = _fused_kernels(device, dtype) if device.type == "cuda" and not eager else TORCH
    return LayerBackend(BACKENDS[name], kernels, name)


def _fused_kernels(device: torch.device, dtype: torch.dtype) -> Kernels:
    """Triton's, where Triton can compile for this device: it comes with PyTorch for CUDA, and calls a C compiler."""
    try:
        from bagel.model.triton_kernels import TRITON

        TRITON.try_out(device, dtype)
    except Exception as error:
        fields = {
            "why": f"{type(error).__name__}: {error}",
            "remedy": "install a C compiler, like gcc, and start again",
        }
        logger.warning("no fused kernels: steps are slower", extra={"fields": fields})
        return TORCH
    return TRITON
