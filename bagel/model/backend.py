"""What a decoder computes attention and elementwise work with, and where ranks meet; chosen when a model is loaded."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

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
from bagel.model.products import Product, choose_product, whole_product
from bagel.model.streams import RunBoth, SideBySide, one_by_one
from bagel.parallel.groups import ALONE, UNDIVIDED, Group, Groups

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LayerBackend:
    """The functions that a layer computes with.

    attend: attention over a layer's slab, by the name `attention`; kernels: elementwise work.
    product: each expert's two row-split products: attention's output projection, and the MLP's down projection.
    tp: ranks that divide each layer. They add up the outputs of these two products.
    run_both: runs the two experts' halves of a layer. Ranks whose collectives must keep their order need one_by_one.
    captures: whether small forwards are captured as CUDA graphs; attention must read its lengths on the device.
    """

    attend: AttentionBackend = sdpa
    kernels: Kernels = TORCH
    product: Product = whole_product
    attention: str = "sdpa"
    tp: Group = ALONE
    run_both: RunBoth = one_by_one
    captures: bool = False

    @property
    def read_ahead(self) -> int:
        """Tokens of the slab that attention may read behind what a row sees.

        Attention weighs them by zero. They must be finite all the same, as zero times infinity is not zero.
        """
        return READ_AHEAD.get(self.attention, 0)


def choose_backend(
    device: torch.device, dtype: torch.dtype, *, attention: str = AUTO, eager: bool = False, groups: Groups = UNDIVIDED
) -> LayerBackend:
    """The fastest backend for a model of this type on this device.

    eager: use PyTorch's own operators between the products, one stream and no CUDA graphs; groups: the ranks that
    divide the model. Raises ConfigError for an attention backend that cannot run there.
    """
    name = choose_attention(device, dtype, attention)
    backend = LayerBackend(BACKENDS[name], attention=name, tp=groups.tp)
    if device.type != "cuda" or eager:
        return backend
    backend = replace(backend, kernels=_fused_kernels(device, dtype), product=choose_product(device))
    captures = name in ON_DEVICE and backend.kernels is not TORCH
    # On two streams, sums of tensor-parallel ranks could come in another order on each rank.
    run_both = SideBySide(device) if groups.tp.size == 1 else one_by_one
    return replace(backend, run_both=run_both, captures=captures)


def launched_in_order(backend: LayerBackend) -> LayerBackend:
    """A backend for ranks that gather weights by collectives: one stream, and no CUDA graphs.

    The gathered weights lie elsewhere each time, where a captured forward would not look for them.
    """
    logger.info("no CUDA graphs and no second stream: weights are gathered layer by layer (HSDP over several hosts)")
    return replace(backend, run_both=one_by_one, captures=False)


def launched_one_by_one(backend: LayerBackend) -> LayerBackend:
    """A backend for weights that are brought layer by layer: no CUDA graphs, as the copies are launched in between."""
    logger.info("no CUDA graphs: weights are copied layer by layer (cpu_offload, or HSDP on one host)")
    return replace(backend, captures=False)


def _fused_kernels(device: torch.device, dtype: torch.dtype) -> Kernels:
    """Triton's kernels where Triton can compile for this device. PyTorch for CUDA brings all but a C compiler."""
    try:
        # Imported here, as PyTorch's builds without CUDA bring no Triton.
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
