"""Attention over a slab by several libraries. One is chosen when a model is loaded, and the log names it.

Every backend takes q [queries, heads, head_dim], laid out as `Rows.blocks` says, and one layer's k and v
[tokens, kv_heads, head_dim]; it returns a tensor of q's shape. It attends in full within a row, or causally, aligned
at the end (rows.causal).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bagel.errors import ConfigError
from bagel.model.attention import Rows

AttentionBackend = Callable[[Tensor, Tensor, Tensor, Rows], Tensor]

AUTO = "auto"

MANY_QUERIES = 1024
"""From which on FlashAttention 3 puts no query heads of one K/V head into one tile. It would choose to for any number,
which helps a few queries, but costs a step of thousands 1% (bench/README.md). The results are the same."""


def sdpa(q: Tensor, k: Tensor, v: Tensor, rows: Rows) -> Tensor:
    """PyTorch's scaled_dot_product_attention, a block of queries at a time: any device, any type."""
    out = torch.empty_like(q)
    for block in rows.blocks:
        queries = slice(block.begin, block.begin + block.count)
        seen = slice(block.start, block.start + block.length)
        out[queries] = _sdpa_block(q[queries], k[seen], v[seen], causal=rows.causal)
    return out


def _sdpa_block(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    """q [queries, heads, head_dim], k and v [length, kv_heads, head_dim]."""
    queries, length = len(q), len(k)
    first = causal and queries == length  # without context, PyTorch's own causal order is ours
    mask = None
    # Aligned at the end. A single query sees everything and needs no mask.
    if causal and 1 < queries < length:
        mask = torch.ones(queries, length, dtype=torch.bool, device=q.device).tril(length - queries)
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=first, enable_gqa=q.shape[1] != k.shape[1])
    return out[0].transpose(0, 1)


def fa2(q: Tensor, k: Tensor, v: Tensor, rows: Rows) -> Tensor:
    """FlashAttention 2 as PyTorch brings it: one launch for all blocks, with their lengths on the device.

    This is the operator behind torch.nn.attention.varlen, which passes on grouped heads and used lengths only from
    torch 2.13.
    """
    query_starts, starts, lengths = rows.on_device
    out: Tensor = torch.ops.aten._flash_attention_forward(
        q, k, v, query_starts, starts, rows.max_queries, rows.longest, 0.0, rows.causal, False, seqused_k=lengths
    )[0]
    return out


def fa3(q: Tensor, k: Tensor, v: Tensor, rows: Rows) -> Tensor:
    """FlashAttention 3 for Hopper, from the package fa3-fwd; called as fa2 is."""
    # Imported here, as the extra fa3 may be missing.
    from fa3_fwd_interface import flash_attn_varlen_func

    query_starts, starts, lengths = rows.on_device
    out: Tensor | tuple[Tensor, ...] = flash_attn_varlen_func(
        q,
        k,
        v,
        query_starts,
        starts,
        rows.max_queries,
        rows.longest,
        seqused_k=lengths,
        causal=rows.causal,
        pack_gqa=False if rows.max_queries >= MANY_QUERIES else None,
    )
    return out if isinstance(out, Tensor) else out[0]


BACKENDS: dict[str, AttentionBackend] = {"sdpa": sdpa, "fa2": fa2, "fa3": fa3}
ON_DEVICE = frozenset({"fa2", "fa3"})
"""Backends that read the rows' places on the device, so that the host need not know them."""
READ_AHEAD = {"fa3": 256}
"""FlashAttention 3 loads K/V in whole tiles (up to 176 tokens) and masks their weights, not their values."""


def choose_attention(device: torch.device, dtype: torch.dtype, asked: str = AUTO) -> str:
    """The name of the backend for K/V of this type on this device: the one asked for, or the fastest that runs.

    Raises ConfigError for one that cannot run there, naming what is missing.
    """
    missing = {name: why for name in BACKENDS if (why := _missing(name, device, dtype))}
    if asked == AUTO:
        return next(name for name in ("fa3", "fa2", "sdpa") if name not in missing)
    if asked not in BACKENDS:
        *others, last = (AUTO, *BACKENDS)
        raise ConfigError(f"attention_backend is {asked!r}; it must be {', '.join(others)} or {last}")
    if asked in missing:
        raise ConfigError(f"attention_backend {asked} {missing[asked]}; choose another, or {AUTO}")
    return asked


def _missing(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """What a backend lacks here; an empty text if it can run."""
    if name == "sdpa":
        return ""
    if device.type != "cuda":
        return f"runs on CUDA devices, not on {device.type}"
    if name == "fa2":
        return "" if dtype in (torch.float16, torch.bfloat16) else f"computes in float16 or bfloat16, not in {dtype}"
    if torch.cuda.get_device_capability(device) != (9, 0):
        return "needs a Hopper GPU (compute capability 9.0)"
    if dtype is not torch.bfloat16:
        return f"computes in bfloat16, not in {dtype}"
    try:
        importlib.import_module("fa3_fwd_interface")
    except ImportError as error:  # not installed, or built for another PyTorch or CUDA
        return f"needs the package fa3-fwd, the extra fa3 of bagel-serving ({error})"
    return ""
