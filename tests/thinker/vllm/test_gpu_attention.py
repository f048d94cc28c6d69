"""How the Thinker's GPU attention splits a step into calls; the kernel is stood in for by plain products."""

from __future__ import annotations

from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: make test-vllm"),
    pytest.mark.filterwarnings("ignore"),
]

BLOCK, HEADS, DIM = 4, 2, 8


def kernel(self: Any, layer: Any, q: Tensor, k: Any, v: Any, cache: Tensor, meta: Any, out: Tensor, *_: Any) -> Tensor:
    """What vLLM's FlashAttention promises: queries of each sequence are its last rows, causal or all of them."""
    starts = meta.query_start_loc.tolist()
    for i, visible in enumerate(meta.seq_lens.tolist()):
        queries = q[starts[i] : starts[i + 1]].transpose(0, 1)
        keys, values = cache[:, meta.block_table[i]].flatten(1, 2)[:, :visible].transpose(1, 2)
        count = queries.shape[1]
        mask = torch.ones(count, visible, dtype=torch.bool).tril(visible - count) if meta.causal else None
        out[starts[i] : starts[i + 1]] = F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask
        ).transpose(0, 1)
    return out


def test_images_are_seen_in_full_and_texts_causally(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl, FlashAttentionMetadata

    from bagel_thinker.vllm.gpu_attention import SpanFlashAttention, step_of

    monkeypatch.setattr(FlashAttentionImpl, "forward", kernel)
    begins, ends = [0, 6, 9, 3], [15, 14, 10, 7]
    ranges = {0: [(2, 6), (9, 12)], 1: [(0, 3), (6, 11)], 2: [(1, 4)]}
    lengths = torch.tensor(ends) - torch.tensor(begins)
    starts = torch.cat((torch.zeros(1), lengths.cumsum(0))).int()
    tokens = int(starts[-1])
    torch.manual_seed(1)
    cache = torch.randn(2, 40, BLOCK, HEADS, DIM)
    table = torch.randperm(40)[:16].view(4, 4).int()
    meta: Any = FlashAttentionMetadata(
        num_actual_tokens=tokens,
        max_query_len=int(lengths.max()),
        query_start_loc=starts,
        max_seq_len=max(ends),
        seq_lens=torch.tensor(ends).int(),
        block_table=table,
        slot_mapping=torch.zeros(tokens).long(),
        use_cascade=False,
        common_prefix_len=0,
        cu_prefix_query_lens=None,
        prefix_kv_lens=None,
        suffix_kv_lens=None,
    )
    common = SimpleNamespace(query_start_loc_cpu=starts, seq_lens_cpu_upper_bound=torch.tensor(ends))
    meta.step = step_of(common, ranges)
    query = torch.randn(tokens, HEADS, DIM)
    attention = SpanFlashAttention.__new__(SpanFlashAttention)
    came = attention.forward(None, query, query, query, cache, meta, torch.empty_like(query))

    for i, (begin, end) in enumerate(zip(begins, ends, strict=True)):
        for row in range(begin, end):
            visible = next((last + 1 for first, last in ranges.get(i, []) if first <= row <= last), row + 1)
            k, v = cache[:, table[i].long()].flatten(1, 2)[:, :visible].transpose(1, 2)
            at = int(starts[i]) + row - begin
            right = F.scaled_dot_product_attention(query[at][:, None], k, v)[:, 0]
            assert torch.allclose(came[at], right, atol=1e-5), (i, row)
