"""The forward pass of training: whole sequences at once, with the parameters of the serving model.

The modules of bagel.model work in place on a K/V slab. Here the same formulas run over padded batches, with a mask made
from the tokens' segments. A sequence is laid out by expert, not in reading order:
understanding [text | ViT block | VAE delimiters | latent delimiters], generation [clean latents | noisy latents].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bagel.model.bagel import Bagel
from bagel.model.layers import Mlp, grid_position_ids
from bagel.model.vit import Vit
from training.nano.batches import Batch

Weights = tuple[Tensor, ...]
Rope = tuple[Tensor, Tensor]
LayerFn = Callable[..., tuple[Tensor, Tensor]]
Size = tuple[int, int, int]
"""(sequences in a batch, understanding tokens per sequence, generation tokens per sequence)."""


@dataclass(frozen=True)
class Inputs:
    """The tensors of a batch beside its integers, as far as its group has them.

    ViT patches, clean and noisy latent tokens, each [b, n, features], and the noisy tokens' times [b].
    """

    patches: Tensor | None = None
    clean: Tensor | None = None
    noisy: Tensor | None = None
    times: Tensor | None = None


@dataclass(frozen=True)
class Outputs:
    """logits [b, text, vocabulary] if the group answers; velocity [b, n, features] of its noisy latents if it draws."""

    logits: Tensor | None
    velocity: Tensor | None


def expert_weights(first: Any, second: Any) -> Weights:
    """The parameters of an expert's two halves (bagel.model.mot), in the order in which `layer` takes them."""
    return (
        first.input_layernorm.weight,
        first.qkv_proj.weight,
        first.qkv_proj.bias,
        first.qk_norm.q_weight,
        first.qk_norm.k_weight,
        second.o_proj.weight,
        second.post_attention_layernorm.weight,
        second.mlp.gate_up_proj.weight,
        second.mlp.down_proj.weight,
    )


def _rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x.float(), weight.shape, weight, eps)


def _project(x: Tensor, w: Weights, rope: Rope, kv_heads: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """x [rows, hidden] -> q, k, v [rows, heads, head_dim]."""
    head_dim = w[3].shape[0]
    qkv = F.linear(_rms(x, w[0], eps), w[1], w[2]).unflatten(-1, (-1, head_dim))
    q, k, v = qkv.split((qkv.shape[-2] - 2 * kv_heads, kv_heads, kv_heads), dim=-2)
    q, k = (_rotate(_rms(y, norm, eps), rope).to(v.dtype) for y, norm in ((q, w[3]), (k, w[4])))
    return q, k, v


def _rotate(x: Tensor, rope: Rope) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * rope[0] + torch.cat((second, first), dim=-1) * rope[1]


def _finish(x: Tensor, attended: Tensor, w: Weights, eps: float) -> Tensor:
    x = x + F.linear(attended, w[5])
    gate, up = F.linear(_rms(x, w[6], eps), w[7]).chunk(2, dim=-1)
    return x + F.linear(F.silu(gate) * up, w[8])


def layer(
    und: Tensor,
    gen: Tensor,
    und_weights: Weights,
    gen_weights: Weights,
    ropes: tuple[Rope, Rope],
    masks: Sequence[Tensor],
    sizes: Sequence[Size],
    kv_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """One decoder layer over all batches at once.

    und, gen: [rows, hidden], to which each batch contributes b * u and b * g rows in turn; masks: one per batch,
    [b, 1, u + g, u + g], added to the scores. Only the attention runs batch by batch.
    """
    # One matrix product over the rows of all batches is faster than one per batch.
    und_heads = _project(und, und_weights, ropes[0], kv_heads, eps)
    gen_heads = _project(gen, gen_weights, ropes[1], kv_heads, eps)
    und_parts = [x.split([b * u for b, u, _ in sizes]) for x in und_heads]
    gen_parts = [x.split([b * g for b, _, g in sizes]) for x in gen_heads]
    und_out, gen_out = [], []
    for i, ((b, u, g), mask) in enumerate(zip(sizes, masks, strict=True)):
        q, k, v = (
            torch.cat((one[i].unflatten(0, (b, u)), other[i].unflatten(0, (b, g))), dim=1).transpose(1, 2)
            for one, other in zip(und_parts, gen_parts, strict=True)
        )
        if k.shape[1] != q.shape[1]:
            repeats = q.shape[1] // k.shape[1]
            k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
        shown = mask.to(q.dtype).expand(-1, q.shape[1], -1, -1)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=shown).transpose(1, 2).flatten(2)
        und_out.append(attended[:, :u].flatten(0, 1))
        gen_out.append(attended[:, u:].flatten(0, 1))
    return _finish(und, torch.cat(und_out), und_weights, eps), _finish(gen, torch.cat(gen_out), gen_weights, eps)


def visible(segments: Tensor, text: int) -> Tensor:
    """Mask [b, 1, n, n]: 0 where the first token sees the second, else minus infinity.

    A token sees all earlier segments and its own, of which the first `text` tokens are causal.
    """
    n = segments.shape[1]
    index = torch.arange(n, device=segments.device)
    order = (index[:, None] >= text) | (index[None, :] <= index[:, None])
    query, key = segments[:, :, None], segments[:, None, :]
    seen = (key < query) | ((key == query) & order)
    return torch.where(seen, 0.0, float("-inf"))[:, None]


def encode_vit(vit: Vit, connector: Mlp, patches: Tensor) -> Tensor:
    """patches [b, n, features] of square images -> [b, n, hidden] for the decoder, without the position table."""
    side = vit.embeddings.position_embedding.num_embeddings**0.5
    count = patches.shape[1]
    ids = _square_ids(count, int(side), patches.device)
    x = vit.embeddings.patch_embedding(patches).float() + vit.embeddings.position_embedding(ids)
    for block in vit.layers:
        x = vit_layer(block, x)
    out: Tensor = connector(vit.post_layernorm(x))
    return out


def vit_layer(block: Any, x: Tensor) -> Tensor:
    """One ViT layer on [b, n, hidden]."""
    attention = block.self_attn
    b, n, hidden = x.shape
    q, k, v = attention.qkv_proj(block.layer_norm1(x)).view(b, n, 3, attention.heads, -1).permute(2, 0, 3, 1, 4)
    y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, hidden)
    x = x + attention.out_proj(y)
    out: Tensor = x + block.mlp(block.layer_norm2(x))
    return out


def forward(model: Bagel, parts: Sequence[tuple[Batch, Inputs]], layer_fn: LayerFn = layer) -> list[Outputs]:
    """Logits and velocities of several batches, which share all matrix products but those of attention."""
    decoder, llm = model.language_model, model.config.llm
    laid = _lay_out(model, parts)
    sizes = tuple((len(each.und), each.und.shape[1], each.gen.shape[1]) for each in laid)
    und, gen = (torch.cat([x.flatten(0, 1) for x in xs]) for xs in ([e.und for e in laid], [e.gen for e in laid]))
    ropes = tuple(
        _flat_rope(decoder.rope, [positions[i] for positions in (each.ropes for each in laid)]) for i in range(2)
    )
    masks = [visible(each.segments, batch.group.text) for each, (batch, _) in zip(laid, parts, strict=True)]
    if torch.is_autocast_enabled(und.device.type):  # once here, not in each layer
        masks = [mask.to(torch.get_autocast_dtype(und.device.type)) for mask in masks]
    for each in decoder.layers:
        weights = (
            expert_weights(each.und_input, each.und_output),
            expert_weights(each.gen_input, each.gen_output),
        )
        und, gen = layer_fn(und, gen, *weights, ropes, masks, sizes, llm.num_key_value_heads, llm.rms_norm_eps)
    und_parts = _apart(und, [(b, u) for b, u, _ in sizes])
    gen_parts = _apart(gen, [(b, g) for b, _, g in sizes])
    return [_read(model, *each) for each in zip(parts, und_parts, gen_parts, strict=True)]


def _apart(x: Tensor, shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Split the rows of all batches into one [b, n, hidden] each."""
    parts = x.split([b * n for b, n in shapes])
    return [part.unflatten(0, shape) for part, shape in zip(parts, shapes, strict=True)]


def _read(model: Bagel, part: tuple[Batch, Inputs], und: Tensor, gen: Tensor) -> Outputs:
    """Apply the heads: logits if the group answers, velocities if it draws."""
    (batch, inputs), decoder = part, model.language_model
    logits = velocity = None
    if batch.group.answers:
        assert decoder.norm is not None and decoder.lm_head is not None
        logits = decoder.lm_head(_rms(und[:, : batch.group.text], decoder.norm.weight, decoder.norm.eps))
    if batch.group.draws:
        norm = decoder.norm_moe_gen
        assert norm is not None and inputs.noisy is not None and model.llm2vae is not None
        velocity = model.llm2vae(_rms(gen[:, -inputs.noisy.shape[1] :], norm.weight, norm.eps)).float()
    return Outputs(logits, velocity)


@dataclass(frozen=True)
class _Laid:
    """The decoder's inputs of a batch: [b, u, hidden] and [b, g, hidden], their positions, and segments [b, u + g]."""

    und: Tensor
    gen: Tensor
    ropes: tuple[Tensor, Tensor]
    segments: Tensor


def _lay_out(model: Bagel, parts: Sequence[tuple[Batch, Inputs]]) -> list[_Laid]:
    """Make the decoder's inputs; the images and latents of all batches are embedded together."""
    embed = model.language_model.embed_tokens
    device = parts[0][0].ids.device
    delimiters = embed(_constant(tuple(model.delimiter_rows), device)).float()
    patches, tokens, times = [], [], []
    for _, inputs in parts:
        if inputs.patches is not None:
            patches.append(inputs.patches)
        if inputs.clean is not None:
            tokens.append(inputs.clean)
            times.append(torch.zeros(len(inputs.clean), device=device))  # an image to edit enters at time 0
        if inputs.noisy is not None and inputs.times is not None:
            tokens.append(inputs.noisy)
            times.append(inputs.times)
    # Iterators: each batch takes its part of the shared embeddings in turn.
    features = iter(_embed_vit(model, torch.cat(patches)).split([len(x) for x in patches]) if patches else ())
    latents = iter(
        _embed_latents(model, torch.cat(tokens), torch.cat(times)).split([len(x) for x in tokens]) if tokens else ()
    )
    return [_lay_out_one(batch, embed(batch.ids).float(), delimiters, features, latents) for batch, _ in parts]


def _lay_out_one(
    batch: Batch, text: Tensor, delimiters: Tensor, features: Iterator[Tensor], latents: Iterator[Tensor]
) -> _Laid:
    b, hidden = len(text), text.shape[-1]
    und, gen = [text], [text.new_zeros(b, 0, hidden)]
    und_at, gen_at = [(batch.segments, batch.ropes)], [(batch.segments[:, :0], batch.ropes[:, :0])]
    start, end = (each.expand(b, 1, -1) for each in delimiters)

    def at(block: tuple[Tensor, Tensor], count: int) -> tuple[Tensor, Tensor]:
        return block[0][:, None].expand(b, count), block[1][:, None].expand(b, count)

    if batch.group.vit:
        und.append(torch.cat((start, next(features), end), dim=1))
        und_at.append(at(batch.vit, und[-1].shape[1]))
    for present, block in ((batch.group.vae, batch.vae), (batch.group.draws, batch.latents)):
        if present:
            und += [start, end]
            und_at.append(at(block, 2))
            gen.append(next(latents))
            gen_at.append(at(block, gen[-1].shape[1]))
    segments = torch.cat([each[0] for each in (*und_at, *gen_at)], dim=1)
    ropes = tuple(torch.cat([each[1] for each in ats], dim=1) for ats in (und_at, gen_at))
    return _Laid(torch.cat(und, dim=1), torch.cat(gen, dim=1), (ropes[0], ropes[1]), segments)


def _embed_vit(model: Bagel, patches: Tensor) -> Tensor:
    assert model.vit_model is not None and model.connector is not None and model.vit_pos_embed is not None
    features = encode_vit(model.vit_model, model.connector, patches).float()
    table: Tensor = model.vit_pos_embed(_square_ids(features.shape[1], model.vit_pos_embed.side, patches.device))
    return features + table


def _embed_latents(model: Bagel, tokens: Tensor, times: Tensor) -> Tensor:
    assert model.latent_pos_embed is not None
    return model.embed_latents(tokens, times, _square_ids(tokens.shape[1], model.latent_pos_embed.side, tokens.device))


def _flat_rope(rope: Callable[[Tensor], Rope], positions: Sequence[Tensor]) -> Rope:
    """Rotary factors [rows, 1, head_dim] for the positions of all batches."""
    direct, swapped = rope(torch.cat([each.flatten() for each in positions])[None])
    return direct[0], swapped[0]


@cache
def _square_ids(count: int, side: int, device: torch.device) -> Tensor:
    length = int(count**0.5)
    return grid_position_ids(length, length, side, device)


@cache
def _constant(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(numbers, device=device)
