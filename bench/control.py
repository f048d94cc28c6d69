"""The bare control of some work: its matrix products and attentions in a plain loop, and nothing else.

Same weights, same shapes, one scaled_dot_product_attention a layer and row with all heads at once. No norm, rotary
embedding, activation, residual, K/V write or embedding. Inputs are random, contiguous and shared by all layers, so
that the control is as fast as plain PyTorch calls can be.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bagel.model.bagel import Bagel
from bagel.model.mot import ExpertInput, ExpertOutput, MoTLayer
from bagel.model.vit import VitLayer


class Control:
    """A list of products; calling it runs them in turn."""

    def __init__(self, model: Bagel) -> None:
        self.model = model
        self.products: list[Callable[[], Tensor]] = []
        self._inputs: dict[tuple[int, ...], Tensor] = {}

    @torch.inference_mode()
    def __call__(self) -> None:
        for product in self.products:
            product()

    def linear(self, layer: nn.Module, *tokens: int) -> None:
        """A linear layer on inputs [*tokens, in_features]."""
        assert isinstance(layer, nn.Linear)
        self.products.append(partial(F.linear, self._input(*tokens, layer.in_features), layer.weight, layer.bias))

    def attention(self, queries: int, keys: int, heads: int, kv_heads: int, dim: int, *, causal: bool = False) -> None:
        """One attention of `queries` over `keys` tokens; causal only without a past."""
        q, kv = self._input(1, heads, queries, dim), self._input(1, kv_heads, keys, dim)
        attend = partial(F.scaled_dot_product_attention, is_causal=causal, enable_gqa=heads != kv_heads)
        self.products.append(partial(attend, q, kv, kv.clone()))  # K and V in memory of their own

    def expert(self, first: ExpertInput, second: ExpertOutput, rows: int, tokens: int) -> None:
        """The projections and the MLP of one expert's two halves on [rows, tokens, hidden]."""
        for layer in (first.qkv_proj, second.o_proj, second.mlp.gate_up_proj, second.mlp.down_proj):
            self.linear(layer, rows, tokens)

    def decoder(self, und: int, gen: int, pasts: Sequence[int], *, causal: bool = False) -> None:
        """All layers on a row of und + gen tokens after each of `pasts` tokens of context."""
        llm = self.model.config.llm
        for layer in self.model.language_model.layers:
            assert isinstance(layer, MoTLayer)
            self.expert(layer.und_input, layer.und_output, len(pasts), und)
            if gen:
                assert layer.gen_input is not None and layer.gen_output is not None
                self.expert(layer.gen_input, layer.gen_output, len(pasts), gen)
            for past in pasts:
                keys = past + und + gen
                heads = (llm.num_attention_heads, llm.num_key_value_heads, llm.head_dim)
                self.attention(und + gen, keys, *heads, causal=causal)

    def embed_latents(self, rows: int, latents: int) -> None:
        """vae2llm and the time embedding."""
        assert self.model.vae2llm is not None and self.model.time_embedder is not None
        first, _, second = self.model.time_embedder.mlp
        self.linear(self.model.vae2llm, rows, latents)
        self.linear(first, rows)
        self.linear(second, rows)

    def _input(self, *shape: int) -> Tensor:
        if shape not in self._inputs:
            self._inputs[shape] = torch.randn(shape, dtype=self.model.dtype, device=self.model.device)
        return self._inputs[shape]


def denoise_step(model: Bagel, contexts: Sequence[int], latents: int) -> Control:
    """Control of one step of a picture with `latents` tokens, one row for each context of that many tokens."""
    assert model.llm2vae is not None
    control = Control(model)
    control.embed_latents(len(contexts), latents)
    control.decoder(2, latents, contexts)
    control.linear(model.llm2vae, len(contexts), latents)
    return control


def text_segment(model: Bagel, tokens: int) -> Control:
    """Control of the first text segment of a context."""
    control = Control(model)
    control.decoder(tokens, 0, [0], causal=True)
    return control


def vae_block(model: Bagel, latents: int) -> Control:
    """Control of an image's clean latents as the first block of a context, without the autoencoder."""
    control = Control(model)
    control.embed_latents(1, latents)
    control.decoder(2, latents, [0])
    return control


def vit_block(model: Bagel, patches: int) -> Control:
    """Control of an image's ViT tokens as the first block of a context, with the ViT and the connector."""
    assert model.vit_model is not None and model.connector is not None
    control, vit = Control(model), model.config.vit
    control.linear(model.vit_model.embeddings.patch_embedding, patches)
    for layer in model.vit_model.layers:
        assert isinstance(layer, VitLayer)
        control.linear(layer.self_attn.qkv_proj, patches)
        heads = vit.num_attention_heads
        control.attention(patches, patches, heads, heads, vit.hidden_size // heads)
        for product in (layer.self_attn.out_proj, layer.mlp.fc1, layer.mlp.fc2):
            control.linear(product, patches)
    control.linear(model.connector.fc1, patches)
    control.linear(model.connector.fc2, patches)
    control.decoder(patches + 2, 0, [0])
    return control
