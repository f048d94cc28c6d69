"""The SigLIP vision encoder, as BAGEL runs it: linear patch embedding, no rotary, no pooling head.

Tensor-parallel ranks divide its layers by heads and columns, where these divide (bagel.parallel.mesh).
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bagel.checkpoint.config import VitConfig
from bagel.model.layers import Mlp
from bagel.model.linear import LinearFactory


class VitAttention(nn.Module):
    """Full attention within one image."""

    def __init__(self, linears: LinearFactory, name: str, config: VitConfig) -> None:
        super().__init__()
        heads, hidden = linears.rank.vit(config).heads, config.hidden_size
        self.heads, columns = heads.count, heads.times(hidden // config.num_attention_heads)
        self.qkv_proj = linears.plain_column({f"{name}.{which}_proj": columns for which in "qkv"}, hidden)
        self.out_proj = linears.summed_row(f"{name}.out_proj", columns, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """x [n, hidden] -> [n, hidden]."""
        n = len(x)
        q, k, v = self.qkv_proj(x).view(n, 3, self.heads, -1).permute(1, 2, 0, 3)
        y = F.scaled_dot_product_attention(q[None], k[None], v[None])[0]
        return cast(Tensor, self.out_proj(y.transpose(0, 1).reshape(n, -1)))


class VitLayer(nn.Module):
    """Pre-norm transformer layer with LayerNorm and a gelu-tanh MLP."""

    def __init__(self, linears: LinearFactory, name: str, config: VitConfig) -> None:
        super().__init__()
        # Norms are float32 in a model of any dtype.
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps, dtype=torch.float32)
        self.self_attn = VitAttention(linears, f"{name}.self_attn", config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps, dtype=torch.float32)
        columns = linears.rank.vit(config).columns
        self.mlp = Mlp(linears, f"{name}.mlp", config.hidden_size, columns, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return cast(Tensor, x + self.mlp(self.layer_norm2(x)))


class VitEmbeddings(nn.Module):
    """Patch embedding plus a learned position per place in the grid."""

    def __init__(self, linears: LinearFactory, name: str, config: VitConfig) -> None:
        super().__init__()
        patches, hidden = f"{name}.patch_embedding", config.hidden_size
        self.patch_embedding = linears.whole(patches, config.patch_features, hidden, bias=True)
        self.position_embedding = nn.Embedding(config.positions_per_side**2, hidden, dtype=linears.dtype)

    def forward(self, pixel_tokens: Tensor, position_ids: Tensor) -> Tensor:
        # The residual stream is float32 from here on.
        return cast(Tensor, self.patch_embedding(pixel_tokens).float() + self.position_embedding(position_ids))


class Vit(nn.Module):
    """pixel tokens [n, patch features] -> features [n, hidden]."""

    def __init__(self, linears: LinearFactory, name: str, config: VitConfig) -> None:
        super().__init__()
        self.embeddings = VitEmbeddings(linears, f"{name}.embeddings", config)
        layers = range(config.num_hidden_layers)
        self.layers = nn.ModuleList(VitLayer(linears, f"{name}.encoder.layers.{i}", config) for i in layers)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps, dtype=torch.float32)

    def forward(self, pixel_tokens: Tensor, position_ids: Tensor) -> Tensor:
        """position_ids [n]: row * positions per side + column, from the grid's corner."""
        x = self.embeddings(pixel_tokens, position_ids)
        for layer in self.layers:
            x = layer(x)
        return cast(Tensor, self.post_layernorm(x))


def vit_patchify(pixels: Tensor, patch_size: int) -> Tensor:
    """pixels [c, H, W] -> tokens [n, patch * patch * c], row-major, features ordered (row, column, colour)."""
    c, height, width = pixels.shape
    grid = pixels.view(c, height // patch_size, patch_size, width // patch_size, patch_size)
    return torch.einsum("chpwq->hwpqc", grid).reshape(-1, patch_size * patch_size * c)
