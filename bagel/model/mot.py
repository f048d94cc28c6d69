"""The Mixture-of-Transformers decoder: every layer has an understanding and a generation expert.

Text, ViT tokens and all image delimiters take the understanding expert; VAE latents, clean or noisy, take the
generation expert. Attention is shared. Each expert's tokens lie contiguously, so that each runs as plain matrix
products over its own tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from torch import Tensor, nn

from bagel.checkpoint.config import LlmConfig
from bagel.model.attention import KvSlab, Rows
from bagel.model.backend import LayerBackend
from bagel.model.kernels import Rope, rope_factors
from bagel.model.layers import GatedMlp, RMSNorm, Rotary, linear

OnLayer = Callable[[int], None]


class Expert(nn.Module):
    """One full set of a layer's weights."""

    def __init__(self, config: LlmConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        hidden = config.hidden_size
        self.input_layernorm = RMSNorm(hidden, config.rms_norm_eps)
        self.qkv_proj = linear(hidden, (self.heads + 2 * self.kv_heads) * self.head_dim, bias=True)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.o_proj = linear(self.heads * self.head_dim, hidden, bias=False)
        self.post_attention_layernorm = RMSNorm(hidden, config.rms_norm_eps)
        self.mlp = GatedMlp(hidden, config.intermediate_size)

    def project(
        self, x: Tensor, rope: Rope, slots: Tensor, q: Tensor, kv: tuple[Tensor, Tensor], backend: LayerBackend
    ) -> None:
        """Queries and K/V of x [rows, n, hidden] float32: q [rows * n, heads, head_dim] is filled, kv at slots."""
        norm = self.input_layernorm
        qkv = self.qkv_proj(backend.kernels.norm(x, norm.weight, norm.eps, q.dtype))
        backend.kernels.rotate(qkv, (self.q_norm.weight, self.k_norm.weight), self.q_norm.eps, rope, q, kv, slots)

    def finish(self, x: Tensor, attended: Tensor, backend: LayerBackend) -> Tensor:
        """Add attention's output [rows * n, heads, head_dim] and the MLP to x [rows, n, hidden]."""
        norm, delta = self.post_attention_layernorm, self.o_proj(attended.flatten(-2)).view(x.shape)
        x, normed = backend.kernels.add_norm(x, delta, norm.weight, norm.eps, attended.dtype)
        return x.add_(self.mlp(normed, backend.kernels))


class MoTLayer(nn.Module):
    """One decoder layer: both experts around one attention."""

    def __init__(self, config: LlmConfig, *, generation: bool) -> None:
        super().__init__()
        self.und = Expert(config)
        self.gen = Expert(config) if generation else None

    def forward(
        self, und: Tensor, gen: Tensor | None, rows: Rows, kv: tuple[Tensor, Tensor], backend: LayerBackend
    ) -> tuple[Tensor, Tensor | None]:
        """und [rows, und, hidden], gen [rows, gen, hidden] or None; writes their K/V to the layer's slab."""
        q = kv[0].new_empty(rows.queries, self.und.heads, self.und.head_dim)
        split = len(rows.starts) * rows.und
        self.und.project(und, rows.und_rope, rows.und_slots, q[:split], kv, backend)
        if gen is None:
            return self.und.finish(und, backend.attend(q, *kv, rows), backend), None
        assert self.gen is not None and rows.gen_slots is not None and rows.gen_rope is not None
        self.gen.project(gen, rows.gen_rope, rows.gen_slots, q[split:], kv, backend)
        attended = backend.attend(q, *kv, rows)
        return self.und.finish(und, attended[:split], backend), self.gen.finish(gen, attended[split:], backend)


class MoTDecoder(nn.Module):
    """The language model.

    embedding_rows: rows of the embedding that are kept (a fed DiT keeps the two image delimiters');
    generation: whether the generation expert is there; text: whether the parts that write text are.
    """

    def __init__(self, config: LlmConfig, *, embedding_rows: int, generation: bool, denoising: bool, text: bool):
        super().__init__()
        self.config, self.backend = config, LayerBackend()
        self.rotary = Rotary(config.head_dim, config.rope_theta)
        self.embed_tokens = nn.Embedding(embedding_rows, config.hidden_size)
        self.layers = nn.ModuleList(MoTLayer(config, generation=generation) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps) if text else None
        self.norm_moe_gen = RMSNorm(config.hidden_size, config.rms_norm_eps) if denoising else None
        self.lm_head = linear(config.hidden_size, config.vocab_size, bias=False) if text else None

    def forward(
        self, und: Tensor, gen: Tensor | None, rows: Rows, slab: KvSlab, on_layer: OnLayer | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Run all layers on embedded tokens (float32); hidden states before the last norm, in und's and gen's shapes.

        on_layer(i) is called as soon as layer i's K/V are in the slab and its output is computed.
        """
        for i, layer in enumerate(self.layers):
            und, gen = layer(und, gen, rows, slab.layer(i), self.backend)
            if on_layer is not None:
                on_layer(i)
        return und, gen

    def rope(self, position_ids: Tensor) -> Rope:
        """position_ids [rows, n] -> rotary factors, each [rows, n, 1, head_dim] float32."""
        direct, swapped = rope_factors(*self.rotary(position_ids))
        return direct[..., None, :], swapped[..., None, :]

    def logits(self, hidden: Tensor) -> Tensor:
        """Last norm and LM head: hidden [..., hidden] -> [..., vocab]."""
        assert self.norm is not None and self.lm_head is not None
        return cast(Tensor, self.lm_head(self.norm(hidden)))
