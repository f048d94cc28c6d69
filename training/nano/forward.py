"""The forward pass of training: whole sequences at once, on the parameters of the model that serves.

The modules of bagel.model work in place on a K/V slab; here the same formulas run over padded batches, with one mask
from every token's segment. A sequence is laid out as its expert's tokens, not in reading order:
understanding [text | ViT block | VAE delimiters | latent delimiters], generation [clean latents | noisy latents].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
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
LayerFn = Callable[..., tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Inputs:
    """What a batch needs beside its integers: ViT patches [b, n, features]; clean and noisy latent tokens
    [b, n, features] with their times [b], where the group has them.
    """

    patches: Tensor | None = None
    clean: Tensor | None = None
    noisy: Tensor | None = None
    times: Tensor | None = None


@dataclass(frozen=True)
class Outputs:
    """logits [b, text, vocabulary]; velocity of the noisy latents [b, n, features], None if there are none."""

    logits: Tensor
    velocity: Tensor | None


def expert_weights(expert: Any) -> Weights:
    """Parameters of a bagel.model.mot.Expert as the layer takes them."""
    return (
        expert.input_layernorm.weight,
        expert.qkv_proj.weight,
        expert.qkv_proj.bias,
        expert.q_norm.weight,
        expert.k_norm.weight,
        expert.o_proj.weight,
        expert.post_attention_layernorm.weight,
        expert.mlp.gate_up_proj.weight,
        expert.mlp.down_proj.weight,
    )


def _rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x.float(), weight.shape, weight, eps)


def _project(x: Tensor, w: Weights, rope: Rope, kv_heads: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """x [b, n, hidden] -> q, k, v [b, heads, n, head_dim]."""
    head_dim = w[3].shape[0]
    qkv = F.linear(_rms(x, w[0], eps), w[1], w[2]).unflatten(-1, (-1, head_dim))
    q, k, v = qkv.split((qkv.shape[-2] - 2 * kv_heads, kv_heads, kv_heads), dim=-2)
    q, k = (_rotate(_rms(y, norm, eps), rope).to(v.dtype) for y, norm in ((q, w[3]), (k, w[4])))
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def _rotate(x: Tensor, rope: Rope) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * rope[0] + torch.cat((second, first), dim=-1) * rope[1]


def _finish(x: Tensor, attended: Tensor, w: Weights, eps: float) -> Tensor:
    x = x + F.linear(attended, w[5])
    gate, up = F.linear(_rms(x, w[6], eps), w[7]).chunk(2, dim=-1)
    return x + F.linear(F.silu(gate) * up, w[8])


def layer(
    und: Tensor,
    gen: Tensor | None,
    und_weights: Weights,
    gen_weights: Weights,
    und_rope: Rope,
    gen_rope: Rope | None,
    mask: Tensor,
    kv_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor | None]:
    """One decoder layer: und [b, u, hidden], gen [b, g, hidden] or None, mask [b, 1, u + g, u + g]."""
    count = und.shape[1]
    q, k, v = _project(und, und_weights, und_rope, kv_heads, eps)
    if gen is not None and gen_rope is not None:
        more = _project(gen, gen_weights, gen_rope, kv_heads, eps)
        q, k, v = (torch.cat(pair, dim=2) for pair in zip((q, k, v), more, strict=True))
    if k.shape[1] != q.shape[1]:
        repeats = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(-2)
    und = _finish(und, attended[:, :count], und_weights, eps)
    return und, None if gen is None else _finish(gen, attended[:, count:], gen_weights, eps)


def visible(segments: Tensor, text: int) -> Tensor:
    """Mask [b, 1, n, n], true where the second token is seen by the first; the first `text` tokens are causal."""
    n = segments.shape[1]
    index = torch.arange(n, device=segments.device)
    order = (index[:, None] >= text) | (index[None, :] <= index[:, None])
    query, key = segments[:, :, None], segments[:, None, :]
    return ((key < query) | ((key == query) & order))[:, None]


def encode_vit(vit: Vit, connector: Mlp, patches: Tensor) -> Tensor:
    """patches [b, n, features] of square images -> [b, n, hidden] of the decoder, without the position table."""
    side = vit.embeddings.position_embedding.num_embeddings**0.5
    count = patches.shape[1]
    ids = grid_position_ids(int(count**0.5), int(count**0.5), int(side)).to(patches.device)
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


def forward(model: Bagel, batch: Batch, inputs: Inputs, layer_fn: LayerFn = layer) -> Outputs:
    """Logits and velocities of a batch."""
    decoder, llm = model.language_model, model.config.llm
    start, end = model.delimiter_embeddings()
    b, device = len(batch.ids), batch.ids.device
    und, gen = [decoder.embed_tokens(batch.ids).float()], []
    und_at, gen_at = [(batch.segments, batch.ropes)], []

    def at(block: tuple[Tensor, Tensor], count: int) -> tuple[Tensor, Tensor]:
        return block[0][:, None].expand(b, count), block[1][:, None].expand(b, count)

    delimiters = torch.stack((start, end)).expand(b, 2, -1)
    if batch.group.vit:
        assert inputs.patches is not None and model.vit_model is not None
        assert model.connector is not None and model.vit_pos_embed is not None
        features = encode_vit(model.vit_model, model.connector, inputs.patches).float()
        ids = _square_ids(features.shape[1], model.vit_pos_embed.side, device)
        features = features + model.vit_pos_embed(ids)
        und.append(torch.cat((delimiters[:, :1], features, delimiters[:, 1:]), dim=1))
        und_at.append(at(batch.vit, und[-1].shape[1]))
    for present, block, tokens, times in (
        (batch.group.vae, batch.vae, inputs.clean, torch.zeros(b, device=device)),
        (batch.group.draws, batch.latents, inputs.noisy, inputs.times),
    ):
        if present:
            assert tokens is not None and times is not None and model.latent_pos_embed is not None
            und.append(delimiters)
            und_at.append(at(block, 2))
            gen.append(
                model.embed_latents(tokens, times, _square_ids(tokens.shape[1], model.latent_pos_embed.side, device))
            )
            gen_at.append(at(block, tokens.shape[1]))
    segments = torch.cat([each[0] for each in (*und_at, *gen_at)], dim=1)
    mask = visible(segments, batch.group.text)
    und_x, und_rope = torch.cat(und, dim=1), decoder.rope(torch.cat([each[1] for each in und_at], dim=1))
    gen_x = torch.cat(gen, dim=1) if gen else None
    gen_rope = decoder.rope(torch.cat([each[1] for each in gen_at], dim=1)) if gen else None
    for each in decoder.layers:
        und_x, gen_x = layer_fn(
            und_x,
            gen_x,
            expert_weights(each.und),
            expert_weights(each.gen),
            und_rope,
            gen_rope,
            mask,
            llm.num_key_value_heads,
            llm.rms_norm_eps,
        )
    assert decoder.norm is not None and decoder.lm_head is not None and decoder.norm_moe_gen is not None
    logits = decoder.lm_head(_rms(und_x[:, : batch.group.text], decoder.norm.weight, decoder.norm.eps))
    if gen_x is None or not batch.group.draws:
        return Outputs(logits, None)
    assert inputs.noisy is not None and model.llm2vae is not None
    last = gen_x[:, -inputs.noisy.shape[1] :]
    velocity = model.llm2vae(_rms(last, decoder.norm_moe_gen.weight, decoder.norm_moe_gen.eps))
    return Outputs(logits, velocity.float())


def _square_ids(count: int, side: int, device: torch.device) -> Tensor:
    length = int(count**0.5)
    return grid_position_ids(length, length, side).to(device)
