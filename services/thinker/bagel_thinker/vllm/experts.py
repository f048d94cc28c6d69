"""Both experts of a decoder layer over one paged attention, for steps that hold latents of an image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear
from vllm.model_executor.models.qwen2 import Qwen2MLP

from bagel.model.config import LlmConfig


class GenerationLayer(nn.Module):
    """One layer of the generation expert: all but the attention, which is the understanding expert's."""

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
    """The weights that some rows of a step take, and which rows those are."""

    rows: Tensor
    layer: Any
    attention: Any

    def project(self, x: Tensor, positions: Tensor, rotary: Any) -> tuple[Tensor, Tensor, Tensor]:
        """x [all rows, hidden] -> q, k, v of this expert's rows, heads flattened."""
        qkv, _ = self.attention.qkv_proj(self.layer.input_layernorm(x[self.rows]))
        dim = self.attention.q_norm.weight.shape[0]
        sizes = [self.q_width(dim, qkv.shape[-1]), *[self._kv_width(dim)] * 2]
        q, k, v = qkv.split(sizes, dim=-1)
        q = self.attention.q_norm(q.reshape(-1, q.shape[-1] // dim, dim)).view(q.shape)
        k = self.attention.k_norm(k.reshape(-1, k.shape[-1] // dim, dim)).view(k.shape)
        q, k = rotary(positions[self.rows], q, k)
        return q, k, v

    def q_width(self, dim: int, total: int) -> int:
        return total - 2 * self._kv_width(dim)

    def _kv_width(self, dim: int) -> int:
        width: int = self.attention.qkv_proj.num_kv_heads * dim
        return width

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """This expert's rows of x [all rows, hidden] after attention [all rows, heads * dim] and MLP."""
        output, _ = self.attention.o_proj(attended[self.rows])
        y: Tensor = x[self.rows] + output
        y += self.layer.mlp(self.layer.post_attention_layernorm(y))
        return y


def run_both(understanding: Any, generation: nn.ModuleList, x: Tensor, positions: Tensor, latents: Tensor) -> Tensor:
    """All layers on x [rows, hidden], whose rows `latents` (int64) take the generation expert.

    understanding: vLLM's Qwen2Model. Returns hidden states after its last norm; a latent's are never used.
    """
    mask = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    mask[latents] = True
    others = (~mask).nonzero()[:, 0]
    for layer, gen_layer in zip(understanding.layers, generation, strict=True):
        attention = layer.self_attn
        experts = (_Expert(others, layer, attention), _Expert(latents, gen_layer, gen_layer))
        parts = [expert.project(x, positions, attention.rotary_emb) for expert in experts]
        q, k, v = (_merge(x, experts, pieces) for pieces in zip(*parts, strict=True))
        attended = attention.attn(q, k, v)
        x = _merge(x, experts, [expert.finish(x, attended) for expert in experts])
    hidden: Tensor = understanding.norm(x)
    return hidden


def _merge(x: Tensor, experts: tuple[_Expert, ...], pieces: Any) -> Tensor:
    """Rows of both experts at their places again."""
    out = x.new_empty(len(x), pieces[0].shape[-1])
    for expert, piece in zip(experts, pieces, strict=True):
        out[expert.rows] = piece
    return out
