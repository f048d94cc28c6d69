"""Both experts of a decoder layer over one paged attention, for steps that include an image's latents.

Types are those of the torch engine (bagel.model.layers): matrix products in the model's type; norms, rotation and the
residual stream in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear
from vllm.model_executor.models.qwen2 import Qwen2MLP

from bagel.checkpoint.config import LlmConfig
from bagel.model.kernels import Rope, norm_and_rotate, rope_factors


class GenerationLayer(nn.Module):
    """One layer of the generation expert, without the attention: that is the understanding expert's."""

    def __init__(self, config: LlmConfig, quant_config: Any, prefix: str) -> None:
        super().__init__()
        hidden, dim, eps = config.hidden_size, config.head_dim, config.rms_norm_eps
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.input_layernorm = RMSNorm(hidden, eps=eps)
        self.qkv_proj = QKVParallelLinear(
            hidden, dim, heads, kv_heads, bias=True, quant_config=quant_config, prefix=f"{prefix}.qkv_proj"
        )
        self.q_norm = RMSNorm(dim, eps=eps)
        self.k_norm = RMSNorm(dim, eps=eps)
        self.o_proj = RowParallelLinear(
            heads * dim, hidden, bias=False, quant_config=quant_config, prefix=f"{prefix}.o_proj"
        )
        self.post_attention_layernorm = RMSNorm(hidden, eps=eps)
        self.mlp = Qwen2MLP(hidden, config.intermediate_size, "silu", quant_config=quant_config, prefix=f"{prefix}.mlp")


@dataclass(frozen=True)
class _Expert:
    """One expert's weights in a layer, and the rows of a step that take them."""

    rows: Tensor
    layer: Any
    attention: Any

    def project(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """x [all rows, hidden] float32, their rotary factors -> q, k, v of this expert's rows, heads flattened."""
        qkv, _ = self.attention.qkv_proj(_normed(x[self.rows], self.layer.input_layernorm, self.dtype))
        of_q, of_k = self.attention.q_norm, self.attention.k_norm
        dim = of_q.weight.shape[0]
        kv_heads: int = self.attention.qkv_proj.num_kv_heads
        heads = qkv.shape[-1] // dim - 2 * kv_heads
        qk, v = qkv.split(((heads + kv_heads) * dim, kv_heads * dim), dim=-1)
        weight = torch.cat((of_q.weight.expand(heads, -1), of_k.weight.expand(kv_heads, -1))).float()
        # Queries and keys share one kernel: each head brings the norm's weight of its kind.
        mine = rope[0][self.rows], rope[1][self.rows]
        qk = norm_and_rotate(qk.unflatten(-1, (-1, dim)).float(), weight, of_q.variance_epsilon, mine)
        q, k = qk.to(v.dtype).split((heads, kv_heads), dim=-2)
        return q.flatten(-2), k.flatten(-2), v

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """This expert's rows of x [all rows, hidden] after attention [all rows, heads * dim] and MLP, float32."""
        output, _ = self.attention.o_proj(attended[self.rows])
        y: Tensor = x[self.rows] + output
        y += self.layer.mlp(_normed(y, self.layer.post_attention_layernorm, self.dtype))
        return y

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.layer.input_layernorm.weight.dtype
        return dtype


def run_both(
    understanding: Any, generation: nn.ModuleList, x: Tensor, rope: tuple[Tensor, Tensor], latents: Tensor
) -> Tensor:
    """Run all layers on x [rows, hidden]; the rows `latents` (int64) take the generation expert.

    understanding: vLLM's Qwen2Model; rope: cos and sin of the rows' positions, each [rows, head_dim] float32. Returns
    the hidden states after its last norm, in x's type; nothing uses those of latents.
    """
    mask = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    mask[latents] = True
    others = (~mask).nonzero()[:, 0]
    direct, swapped = rope_factors(*rope)
    factors = direct[:, None], swapped[:, None]
    added = x.float()
    for layer, gen_layer in zip(understanding.layers, generation, strict=True):
        attention = layer.self_attn
        experts = (_Expert(others, layer, attention), _Expert(latents, gen_layer, gen_layer))
        parts = [expert.project(added, factors) for expert in experts]
        q, k, v = (_merge(experts, pieces) for pieces in zip(*parts, strict=True))
        attended = attention.attn(q, k, v)  # writes K/V of all rows to the paged cache first
        added = _merge(experts, [expert.finish(added, attended) for expert in experts])
    return _normed(added, understanding.norm, x.dtype)


def _normed(x: Tensor, norm: RMSNorm, dtype: torch.dtype) -> Tensor:
    """RMS norm of float32 values, computed in float32, then rounded to dtype."""
    return F.rms_norm(x, norm.weight.shape, norm.weight.float(), norm.variance_epsilon).to(dtype)


def _merge(experts: tuple[_Expert, ...], pieces: Sequence[Tensor]) -> Tensor:
    """Put the rows of both experts back at their places."""
    rows = sum(len(expert.rows) for expert in experts)
    out = pieces[0].new_empty(rows, pieces[0].shape[-1])
    for expert, piece in zip(experts, pieces, strict=True):
        out[expert.rows] = piece
    return out
