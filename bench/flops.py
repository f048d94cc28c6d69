"""Count the floating-point operations of the network from its shape; a multiply-add counts as two.

It counts only matrix products and attention, and leaves out norms, rotary embedding and activations, as is usual.
"""

from __future__ import annotations

from collections.abc import Sequence

from bagel.checkpoint.config import LlmConfig, ModelConfig
from bagel.model.flow import SINUSOID_WIDTH


def linear(tokens: int, inputs: int, outputs: int) -> int:
    """A linear layer on `tokens` tokens."""
    return 2 * tokens * inputs * outputs


def expert(llm: LlmConfig, tokens: int) -> int:
    """One expert of one layer: q, k, v, o, gate, up and down."""
    kv = llm.num_key_value_heads * llm.head_dim
    projections = linear(tokens, llm.hidden_size, 2 * llm.hidden_size + 2 * kv)
    return projections + 3 * linear(tokens, llm.hidden_size, llm.intermediate_size)


def attention(heads: int, head_dim: int, pairs: int) -> int:
    """One layer's attention over `pairs` (query, key) pairs: scores and weighted sum."""
    return 4 * heads * head_dim * pairs


def decoder(llm: LlmConfig, und: int, gen: int, pairs: int) -> int:
    """All layers on `und` tokens of the understanding and `gen` of the generation expert."""
    one = expert(llm, und) + expert(llm, gen) + attention(llm.num_attention_heads, llm.head_dim, pairs)
    return llm.num_hidden_layers * one


def denoise_step(config: ModelConfig, contexts: Sequence[int], latents: int) -> int:
    """One step of a picture of `latents` tokens, with one row for each context length."""
    rows, block, hidden = len(contexts), latents + 2, config.llm.hidden_size
    pairs = sum(block * (context + block) for context in contexts)
    velocity = linear(rows * latents, hidden, config.latent_features)
    return decoder(config.llm, 2 * rows, rows * latents, pairs) + _embed_latents(config, rows, latents) + velocity


def text_segment(config: ModelConfig, past: int, tokens: int) -> int:
    """Prefill of a text of `tokens` tokens after `past` tokens of context."""
    # Causal: half of the text's own square.
    pairs = tokens * past + tokens * (tokens + 1) // 2
    return decoder(config.llm, tokens, 0, pairs)


def vae_block(config: ModelConfig, past: int, latents: int) -> int:
    """K/V of an image's clean latents after `past` tokens of context, without the autoencoder."""
    block = latents + 2
    return decoder(config.llm, 2, latents, block * (past + block)) + _embed_latents(config, 1, latents)


def vit_block(config: ModelConfig, past: int, patches: int) -> int:
    """K/V of an image's ViT tokens after `past` tokens of context, with the ViT and the connector."""
    vit, hidden, block = config.vit, config.llm.hidden_size, patches + 2
    layer = linear(patches, vit.hidden_size, 4 * vit.hidden_size + 2 * vit.intermediate_size)
    layer += attention(vit.num_attention_heads, vit.hidden_size // vit.num_attention_heads, patches**2)
    ends = linear(patches, vit.patch_features, vit.hidden_size) + linear(patches, vit.hidden_size + hidden, hidden)
    return vit.num_hidden_layers * layer + ends + decoder(config.llm, block, 0, block * (past + block))


def _embed_latents(config: ModelConfig, rows: int, latents: int) -> int:
    """vae2llm and the time embedding."""
    hidden = config.llm.hidden_size
    return linear(rows * latents, config.latent_features, hidden) + linear(rows, SINUSOID_WIDTH + hidden, hidden)
