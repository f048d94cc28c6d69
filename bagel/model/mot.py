"""The Mixture-of-Transformers decoder: every layer has an understanding and a generation expert.

Text, ViT tokens and all image delimiters take the understanding expert; VAE latents, clean or noisy, take the
generation expert. Attention is shared. Each expert's tokens lie contiguously, so that each expert is plain matrix
products over its own tokens.

Tensor-parallel ranks divide a layer by heads and by the MLP's columns (bagel.parallel.mesh), and the embedding and the
LM head by tokens. A fed DiT keeps two rows of the one, whole on every rank, and has no other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from bagel.checkpoint.config import LlmConfig
from bagel.checkpoint.roles import Parts
from bagel.model.attention import KvShape, KvSlab, Rows
from bagel.model.backend import LayerBackend
from bagel.model.kernels import Activations, Rope, rope_factors
from bagel.model.layer_stream import LayerStream
from bagel.model.layers import AddedRMSNorm, GatedMlp, HeadNorms, Hidden, RMSNorm, Rotary
from bagel.model.linear import LinearFactory
from bagel.model.vocabulary import LmHead, VocabularyEmbedding
from bagel.parallel.mesh import DecoderShare

OnLayer = Callable[[int, int], None]
OVERLAPPED_TOKENS = 2048
"""Tokens from which on tensor-parallel ranks add up one half while they compute the other: of fewer, two launches cost
more than the sum."""
GENERATION_SUFFIX = "_moe_gen"
"""What the checkpoint adds to the names of the generation expert's modules."""


class ExpertInput(nn.Module):
    """The first half of an expert's layer: the layer before it summed up, norm, then queries, keys and values."""

    def __init__(self, linears: LinearFactory, name: str, suffix: str, config: LlmConfig, share: DecoderShare) -> None:
        super().__init__()
        attention, dim, eps = f"{name}.self_attn", config.head_dim, config.rms_norm_eps
        heads = {"q": share.heads, "k": share.kv_heads, "v": share.kv_heads}
        outputs = {f"{attention}.{which}_proj{suffix}": each.times(dim) for which, each in heads.items()}
        self.head_dim, self.queries_end = dim, heads["q"].times(dim).count
        self.input_layernorm = AddedRMSNorm(f"{name}.input_layernorm{suffix}", config.hidden_size, eps)
        self.qkv_proj = linears.column(outputs, config.hidden_size, bias=True)
        self.qk_norm = HeadNorms((f"{attention}.q_norm{suffix}", f"{attention}.k_norm{suffix}"), dim, eps)

    def forward(
        self, hidden: Hidden, rope: Rope, slots: Tensor, q: Tensor, kv: tuple[Tensor, Tensor], backend: LayerBackend
    ) -> Tensor:
        """Fill q [rows * n, heads, head_dim], and kv at slots, from [rows, n, hidden]; returns the sum of those."""
        x, normed = self.normed(hidden, backend)
        self.qk_norm(self.qkv_proj(normed), rope, slots, q, kv, backend.kernels)
        return x

    def normed(self, hidden: Hidden, backend: LayerBackend) -> tuple[Tensor, Activations]:
        """The sum, and what `keys_values` and `queries` take, which together do what forward does."""
        summed: tuple[Tensor, Activations] = self.input_layernorm(hidden, backend.kernels, self.qkv_proj.weight.dtype)
        return summed

    def keys_values(
        self, normed: Activations, rope: Rope, slots: Tensor, kv: tuple[Tensor, Tensor], backend: LayerBackend
    ) -> None:
        """Fill kv at slots."""
        projected = self.qkv_proj.some(normed, slice(self.queries_end, None))
        no_queries = kv[0].new_empty(len(slots), 0, self.head_dim)
        self.qk_norm(projected, rope, slots, no_queries, kv, backend.kernels)

    def queries(self, normed: Activations, rope: Rope, slots: Tensor, q: Tensor, backend: LayerBackend) -> None:
        """Fill q."""
        projected = self.qkv_proj.some(normed, slice(self.queries_end))
        none = q.new_empty(len(slots), 0, self.head_dim)
        self.qk_norm(projected, rope, slots, q, (none, none), backend.kernels)


class ExpertOutput(nn.Module):
    """The second half of an expert's layer: attention's output projection and the MLP, each added to its input."""

    def __init__(self, linears: LinearFactory, name: str, suffix: str, config: LlmConfig, share: DecoderShare) -> None:
        super().__init__()
        hidden, norm = config.hidden_size, f"{name}.post_attention_layernorm{suffix}"
        self.o_proj = linears.row(f"{name}.self_attn.o_proj{suffix}", share.heads.times(config.head_dim), hidden)
        self.post_attention_layernorm = AddedRMSNorm(norm, hidden, config.rms_norm_eps)
        self.mlp = GatedMlp(linears, f"{name}.mlp{suffix}", hidden, share.columns)

    def forward(self, x: Tensor, attended: Tensor, backend: LayerBackend) -> Hidden:
        """x [rows, n, hidden] float32 with attention's output [rows * n, heads, head_dim] and the MLP."""
        tokens, tp = x.flatten(0, 1), backend.tp
        if tp.size > 1 and len(tokens) >= OVERLAPPED_TOKENS:
            return Hidden(self._in_halves(tokens, attended, backend).view(x.shape))
        delta = tp.add_up(self._projected(attended, backend))
        added, normed = self.post_attention_layernorm(Hidden(tokens, delta), backend.kernels, self.mlp.takes)
        return Hidden(added.view(x.shape), tp.add_up(self.mlp(normed, backend)).view(x.shape))

    def _in_halves(self, x: Tensor, attended: Tensor, backend: LayerBackend) -> Tensor:
        """As forward, of tokens x [n, hidden]: ranks add up one half's results while they compute the other half."""
        halves = list(zip(x.chunk(2), attended.chunk(2), strict=True))
        deltas = [backend.tp.begin_add_up(self._projected(each, backend)) for _, each in halves]
        added, mlps = list[Tensor](), list[Callable[[], Tensor]]()
        for (half, _), delta in zip(halves, deltas, strict=True):
            sum_, normed = self.post_attention_layernorm(Hidden(half, delta()), backend.kernels, self.mlp.takes)
            added.append(sum_)
            mlps.append(backend.tp.begin_add_up(self.mlp(normed, backend)))
        result = torch.empty_like(x)
        for part, half, mlp in zip(result.chunk(2), added, mlps, strict=True):
            torch.add(half, mlp(), out=part)
        return result

    def _projected(self, attended: Tensor, backend: LayerBackend) -> Tensor:
        """This rank's part of attention's output projection, [n, hidden]."""
        return backend.product(self.o_proj, backend.kernels.cast(attended.flatten(-2), self.o_proj.weight.dtype))


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
        self, und: Hidden, gen: Hidden | None, rows: Rows, kv: tuple[Tensor, Tensor], backend: LayerBackend
    ) -> tuple[Hidden, Hidden | None]:
        """und [rows, und, hidden], gen [rows, gen, hidden] or None; writes their K/V to the layer's slab."""
        # One tensor, of which each expert fills its part, so that attention takes it without a copy.
        q = kv[0].new_empty(rows.queries, self.heads, self.head_dim)
        split = rows.count * rows.und
        # Text and ViT tokens are the understanding expert's alone.
        if gen is None:
            x = self.und_input(und, rows.und_rope, rows.und_slots, q, kv, backend)
            return self.und_output(x, backend.attend(q, *kv, rows), backend), None
        gen_output = self.gen_output
        assert gen_output is not None
        # Of an image the understanding expert has only the two delimiters, a fraction of the generation expert's work.
        und_x, (gen_x, finish) = backend.run_both(
            lambda: self.und_input(und, rows.und_rope, rows.und_slots, q[:split], kv, backend),
            lambda: self._latents(gen, rows, q[split:], kv, backend),
        )
        finish()
        # After both experts and all ranks, as each attends to the K/V that the others have written.
        attended = backend.attend(q, *kv, rows)
        both: tuple[Hidden, Hidden] = backend.run_both(
            lambda: self.und_output(und_x, attended[:split], backend),
            lambda: gen_output(gen_x, attended[split:], backend),
        )
        return both

    def _latents(
        self, gen: Hidden, rows: Rows, q: Tensor, slab: tuple[Tensor, Tensor], backend: LayerBackend
    ) -> tuple[Tensor, Callable[[], None]]:
        """Fill q of the latents and write their K/V: their sum, and a function that waits for those of other ranks."""
        expert, gen_kv, rope = self.gen_input, rows.gen_kv, rows.gen_rope
        assert expert is not None and gen_kv is not None and rope is not None
        if gen_kv.group.size == 1:
            return expert(gen, rope, gen_kv.slots, q, slab, backend), lambda: None
        # K/V first, so that they are on their way while the queries are computed.
        x, normed = expert.normed(gen, backend)
        finish = gen_kv.write(slab, lambda kv, at: expert.keys_values(normed, rope, at, kv, backend))
        expert.queries(normed, rope, gen_kv.own_slots, q, backend)
        return x, finish


@dataclass(frozen=True)
class Block:
    """Embedded tokens of one forward: und [rows, n, hidden] and gen [rows, n, hidden] or None, both float32."""

    und: Tensor
    gen: Tensor | None
    rows: Rows


class Layers(nn.Module):
    """The layers of a decoder, in their order.

    A module of its own: ranks that divide the weights gather them around its forward and that of each layer
    (bagel.parallel.hsdp; PyTorch 2.11 takes no ModuleList there). stream: brings the weights where they lie in the
    host's memory.
    """

    stream: LayerStream | None = None

    def __init__(self, layers: Iterable[MoTLayer]) -> None:
        super().__init__()
        for i, layer in enumerate(layers):
            self.add_module(str(i), layer)

    def __iter__(self) -> Iterator[MoTLayer]:
        return cast(Iterator[MoTLayer], self.children())

    def __len__(self) -> int:
        return len(self._modules)

    def __getitem__(self, index: int) -> MoTLayer:
        return cast(MoTLayer, self._modules[str(index)])

    def forward(
        self, blocks: Sequence[Block], slab: KvSlab, backend: LayerBackend, on_layer: OnLayer
    ) -> list[tuple[Tensor, Tensor | None]]:
        """As MoTDecoder.together."""
        every_expert = any(block.gen is not None for block in blocks)
        layers = self if self.stream is None else self.stream.supply(every_expert=every_expert)
        hidden = [(Hidden(block.und), None if block.gen is None else Hidden(block.gen)) for block in blocks]
        for i, layer in enumerate(layers):
            for at, block in enumerate(blocks):
                hidden[at] = layer(*hidden[at], block.rows, slab.layer(i), backend)
                # Now, so that this layer's K/V are sent while the next ones are computed.
                on_layer(i, at)
        return [(und.sum(), None if gen is None else gen.sum()) for und, gen in hidden]


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

    def forward(self, und: Tensor, gen: Tensor | None, rows: Rows, slab: KvSlab) -> tuple[Tensor, Tensor | None]:
        """Run all layers on embedded tokens (float32); hidden states before the last norm, in und's and gen's shapes.

        The K/V of the tokens are in the slab then.
        """
        return self.together([Block(und, gen, rows)], slab)[0]

    def together(
        self, blocks: Sequence[Block], slab: KvSlab, on_layer: OnLayer = lambda layer, block: None
    ) -> list[tuple[Tensor, Tensor | None]]:
        """As `forward` of each block in turn, but a layer of all of them before the next layer.

        So a block may attend to those before it. on_layer(layer, block), with the block's number, is called as soon as
        its K/V of that layer are in the slab and its output is computed.
        """
        hidden: list[tuple[Tensor, Tensor | None]] = self.layers(blocks, slab, self.backend, on_layer)
        return hidden

    def some_layers(
        self, layers: range, und: Hidden, gen: Hidden | None, rows: Rows, slab: KvSlab
    ) -> tuple[Hidden, Hidden | None]:
        """The part of `forward` that is these layers, of a decoder whose weights are all here. Nothing is summed up."""
        for i in layers:
            und, gen = self.layers[i](und, gen, rows, slab.layer(i), self.backend)
        return und, gen

    def rope(self, position_ids: Tensor) -> Rope:
        """position_ids [rows, n] -> rotary factors, each [rows, n, 1, head_dim] float32."""
        direct, swapped = rope_factors(*self.rotary(position_ids))
        return direct[..., None, :], swapped[..., None, :]

    def logits(self, hidden: Tensor) -> Tensor:
        """Last norm and LM head: hidden [..., hidden] -> [..., vocab]."""
        assert self.norm is not None and self.lm_head is not None
        return cast(Tensor, self.lm_head(self.norm(hidden)))
