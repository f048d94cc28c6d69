"""The Mixture-of-Transformers decoder: every layer has an understanding and a generation expert.

Text, ViT tokens and all image delimiters take the understanding expert; VAE latents, clean or noisy, take the
generation expert. Attention is shared. Each expert's tokens lie contiguously, so that each expert is plain matrix
products over its own tokens.

Tensor-parallel ranks divide a layer by heads and by the MLP's columns (bagel.parallel.mesh), and the embedding and the
LM head by tokens. A fed DiT keeps two rows of the one, whole on every rank, and has no other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from bagel.checkpoint.config import LlmConfig
from bagel.checkpoint.roles import Parts
from bagel.model.attention import KvShape, KvSlab, Rows
from bagel.model.backend import LayerBackend
from bagel.model.kernels import Rope, rope_factors
from bagel.model.layers import AddedRMSNorm, GatedMlp, HeadNorms, RMSNorm, Rotary
from bagel.model.linear import LinearFactory
from bagel.model.offload import LayerStream
from bagel.model.vocabulary import LmHead, VocabularyEmbedding
from bagel.parallel.mesh import DecoderShare

OnLayer = Callable[[int], None]
GENERATION_SUFFIX = "_moe_gen"
"""What the checkpoint adds to the names of the generation expert's modules."""


class ExpertInput(nn.Module):
    """The first half of an expert's layer: norm, then queries, keys and values."""

    def __init__(self, linears: LinearFactory, name: str, suffix: str, config: LlmConfig, share: DecoderShare) -> None:
        super().__init__()
        attention, dim, eps = f"{name}.self_attn", config.head_dim, config.rms_norm_eps
        heads = {"q": share.heads, "k": share.kv_heads, "v": share.kv_heads}
        outputs = {f"{attention}.{which}_proj{suffix}": each.times(dim) for which, each in heads.items()}
        self.input_layernorm = RMSNorm(f"{name}.input_layernorm{suffix}", config.hidden_size, eps)
        self.qkv_proj = linears.column(outputs, config.hidden_size, bias=True)
        self.qk_norm = HeadNorms((f"{attention}.q_norm{suffix}", f"{attention}.k_norm{suffix}"), dim, eps)

    def forward(
        self, x: Tensor, rope: Rope, slots: Tensor, q: Tensor, kv: tuple[Tensor, Tensor], backend: LayerBackend
    ) -> None:
        """Fill q [rows * n, heads, head_dim], and kv at slots, from x [rows, n, hidden] float32."""
        qkv = self.qkv_proj(self.input_layernorm(x, backend.kernels, self.qkv_proj.weight.dtype))
        self.qk_norm(qkv, rope, slots, q, kv, backend.kernels)


class ExpertOutput(nn.Module):
    """The second half of an expert's layer: attention's output projection and the MLP, both added to the input."""

    def __init__(self, linears: LinearFactory, name: str, suffix: str, config: LlmConfig, share: DecoderShare) -> None:
        super().__init__()
        hidden, norm = config.hidden_size, f"{name}.post_attention_layernorm{suffix}"
        self.o_proj = linears.row(f"{name}.self_attn.o_proj{suffix}", share.heads.times(config.head_dim), hidden)
        self.post_attention_layernorm = AddedRMSNorm(norm, hidden, config.rms_norm_eps)
        self.mlp = GatedMlp(linears, f"{name}.mlp{suffix}", hidden, share.columns)

    def forward(self, x: Tensor, attended: Tensor, backend: LayerBackend) -> Tensor:
        """Add attention's output [rows * n, heads, head_dim] and the MLP to x [rows, n, hidden]."""
        taken = backend.kernels.cast(attended.flatten(-2), self.o_proj.weight.dtype)
        delta = backend.after_attention(self.o_proj(taken).view(x.shape))
        x, normed = self.post_attention_layernorm(x, delta, backend.kernels, self.mlp.takes)
        # In place, as this x is the sum that was just made, not the caller's tensor.
        return x.add_(backend.after_mlp(self.mlp(normed, backend.kernels)))


EXPERTS = (("und_input", "und_output"), ("gen_input", "gen_output"))
"""The modules of each expert in a layer."""


class MoTLayer(nn.Module):
    """One decoder layer: two halves of each expert around one attention."""

    def __init__(
        self, linears: LinearFactory, name: str, config: LlmConfig, share: DecoderShare, *, generation: bool
    ) -> None:
        super().__init__()
        self.heads, self.head_dim = share.heads.count, config.head_dim
        self.und_input = ExpertInput(linears, name, "", config, share)
        self.und_output = ExpertOutput(linears, name, "", config, share)
        self.gen_input = ExpertInput(linears, name, GENERATION_SUFFIX, config, share) if generation else None
        self.gen_output = ExpertOutput(linears, name, GENERATION_SUFFIX, config, share) if generation else None

    def forward(
        self, und: Tensor, gen: Tensor | None, rows: Rows, kv: tuple[Tensor, Tensor], backend: LayerBackend
    ) -> tuple[Tensor, Tensor | None]:
        """und [rows, und, hidden], gen [rows, gen, hidden] or None; writes their K/V to the layer's slab."""
        # One tensor, of which each expert fills its part, so that attention takes it without a copy.
        q = kv[0].new_empty(rows.queries, self.heads, self.head_dim)
        split = rows.count * rows.und
        # Text and ViT tokens are the understanding expert's alone.
        if gen is None:
            self.und_input(und, rows.und_rope, rows.und_slots, q, kv, backend)
            return self.und_output(und, backend.attend(q, *kv, rows), backend), None
        gen_input, gen_output, gen_kv = self.gen_input, self.gen_output, rows.gen_kv
        assert gen_input is not None and gen_output is not None and gen_kv is not None
        # Of an image the understanding expert has only the two delimiters, a fraction of the generation expert's work.
        _, finish = backend.run_both(
            lambda: self.und_input(und, rows.und_rope, rows.und_slots, q[:split], kv, backend),
            lambda: gen_kv.write(kv, lambda kv, slots: gen_input(gen, rows.gen_rope, slots, q[split:], kv, backend)),
        )
        finish()
        # After both experts and all ranks, as each attends to the K/V that the others have written.
        attended = backend.attend(q, *kv, rows)
        both: tuple[Tensor, Tensor] = backend.run_both(
            lambda: self.und_output(und, attended[:split], backend),
            lambda: gen_output(gen, attended[split:], backend),
        )
        return both


class Layers(nn.ModuleList):
    """The layers of a decoder, in their order.

    A module of its own: ranks that divide the weights gather them around its forward and that of each layer
    (bagel.parallel.hsdp). stream: brings the weights where they lie in the host's memory.
    """

    stream: LayerStream | None = None

    def forward(
        self,
        und: Tensor,
        gen: Tensor | None,
        rows: Rows,
        slab: KvSlab,
        backend: LayerBackend,
        on_layer: OnLayer | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """As MoTDecoder's."""
        layers = self if self.stream is None else self.stream.supply(every_expert=gen is not None)
        for i, layer in enumerate(layers):
            und, gen = layer(und, gen, rows, slab.layer(i), backend)
            # Now, so that this layer's K/V are sent while the next ones are computed.
            if on_layer is not None:
                on_layer(i)
        return und, gen


class MoTDecoder(nn.Module):
    """The language model of one rank, with the parts that its role needs.

    A role without text keeps two rows of the embedding, the image delimiters', and cannot write.
    """

    def __init__(self, linears: LinearFactory, name: str, config: LlmConfig, parts: Parts) -> None:
        super().__init__()
        hidden, eps, stem = config.hidden_size, config.rms_norm_eps, f"{name}.model"
        share = linears.rank.decoder(config)
        self.kv_heads = share.kv_heads
        self.kv_shape = KvShape(config.num_hidden_layers, share.kv_heads.count, config.head_dim)
        # Replaced when the model gets its memory, as the choice depends on the device.
        self.backend = LayerBackend()
        self.rotary = Rotary(config.head_dim, config.rope_theta)
        self.embed_tokens: nn.Embedding = (
            VocabularyEmbedding(linears, config.vocab_size, hidden)
            if parts.text
            else nn.Embedding(2, hidden, dtype=linears.dtype)
        )
        self.layers = Layers(
            MoTLayer(linears, f"{stem}.layers.{i}", config, share, generation=parts.generation)
            for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(f"{stem}.norm", hidden, eps) if parts.text else None
        self.norm_moe_gen = RMSNorm(f"{stem}.norm{GENERATION_SUFFIX}", hidden, eps) if parts.denoising else None
        self.lm_head = LmHead(linears, f"{name}.lm_head", hidden, config.vocab_size) if parts.text else None

    @property
    def device(self) -> torch.device:
        return self.embed_tokens.weight.device

    def forward(
        self, und: Tensor, gen: Tensor | None, rows: Rows, slab: KvSlab, on_layer: OnLayer | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Run all layers on embedded tokens (float32); hidden states before the last norm, in und's and gen's shapes.

        on_layer(i) is called as soon as layer i's K/V are in the slab and its output is computed.
        """
        hidden: tuple[Tensor, Tensor | None] = self.layers(und, gen, rows, slab, self.backend, on_layer)
        return hidden

    def rope(self, position_ids: Tensor) -> Rope:
        """position_ids [rows, n] -> rotary factors, each [rows, n, 1, head_dim] float32."""
        direct, swapped = rope_factors(*self.rotary(position_ids))
        return direct[..., None, :], swapped[..., None, :]

    def logits(self, hidden: Tensor) -> Tensor:
        """Last norm and LM head: hidden [..., hidden] -> [..., vocab]."""
        assert self.norm is not None and self.lm_head is not None
        return cast(Tensor, self.lm_head(self.norm(hidden)))
