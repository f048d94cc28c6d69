"""The whole network: decoder, ViT, connector, latent embedding and autoencoder, those that a role needs."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from bagel.checkpoint.config import ModelConfig
from bagel.checkpoint.roles import Role
from bagel.errors import NotSupported
from bagel.model.attention import KvShape
from bagel.model.flow import TimestepEmbedder
from bagel.model.layers import Mlp, PositionTable, grid_position_ids
from bagel.model.linear import LinearFactory
from bagel.model.mot import MoTDecoder
from bagel.model.vae import Vae
from bagel.model.vit import Vit
from bagel.parallel.mesh import Share


class Bagel(nn.Module):
    """The network of one rank. A part that the role does not need is None.

    The decoder's and ViT's matrix products, embeddings and K/V are of one type; norms, the time embedder, vae2llm,
    llm2vae and the autoencoder are always in float32. Ranks divide the layers of decoder and ViT, the embedding and the
    LM head; everything else is whole on every rank.
    """

    def __init__(
        self,
        config: ModelConfig,
        role: Role = Role.FULL,
        delimiter_ids: tuple[int, int] = (0, 1),
        *,
        linears: LinearFactory,
    ) -> None:
        """delimiter_ids: ids of the image delimiters, start and end; linears: of the rank that this model is for."""
        super().__init__()
        parts, hidden, dtype = role.parts, config.llm.hidden_size, linears.dtype
        self.config, self.role, self.delimiter_ids = config, role, delimiter_ids
        self.quantization = linears.quantization
        self.groups = linears.groups
        """The ranks that this model is divided among."""
        self.language_model = MoTDecoder(linears, "language_model", config.llm, parts)
        self.vit_model = self.connector = self.vit_pos_embed = None
        if parts.vision:
            self.vit_model = Vit(linears, "vit_model.vision_model", config.vit)
            self.connector = Mlp(linears, "connector", config.vit.hidden_size, Share.all(hidden), hidden)
            self.vit_pos_embed = PositionTable(config.vit_max_num_patch_per_side, hidden, dtype)
        self.vae2llm = self.time_embedder = self.latent_pos_embed = self.llm2vae = None
        if parts.generation:
            self.vae2llm = linears.whole("vae2llm", config.latent_features, hidden, bias=True, exact=True)
            self.time_embedder = TimestepEmbedder(linears, "time_embedder", hidden)
            self.latent_pos_embed = PositionTable(config.max_latent_size, hidden, dtype)
        if parts.denoising:
            self.llm2vae = linears.whole("llm2vae", hidden, config.latent_features, bias=True, exact=True)
        has_vae = parts.encoder or parts.denoising
        quick = dtype is not torch.float32
        self.vae = Vae(config.vae, encoder=parts.encoder, decoder=parts.denoising, tf32=quick) if has_vae else None

    @property
    def device(self) -> torch.device:
        return self.language_model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the decoder's matrix products, embeddings and K/V."""
        return self.language_model.embed_tokens.weight.dtype

    @property
    def kv_shape(self) -> KvShape:
        """The K/V of one token as this rank keeps them."""
        return self.language_model.kv_shape

    @property
    def delimiter_rows(self) -> tuple[int, int]:
        """The delimiters' rows of the embedding: their ids. A role without text keeps these two rows alone."""
        return self.delimiter_ids if self.role.parts.text else (0, 1)

    def embed(self, token_ids: Tensor) -> Tensor:
        """token_ids [...] -> [..., hidden] float32."""
        if not self.role.parts.text:
            raise NotSupported(f"role {self.role} reads no text; load the model with role understand, context or full")
        # The residual stream is float32, whatever the weights are.
        return cast(Tensor, self.language_model.embed_tokens(token_ids)).float()

    def delimiter_embeddings(self) -> Tensor:
        """Embeddings of the image delimiters, start and end, [2, hidden] float32."""
        rows = torch.tensor(self.delimiter_rows, device=self.device)
        return cast(Tensor, self.language_model.embed_tokens(rows)).float()

    def embed_vit(self, pixel_tokens: Tensor, rows: int, columns: int) -> Tensor:
        """Patches [rows * columns, patch features] of one image -> LLM inputs [rows * columns, hidden] float32."""
        if self.vit_model is None or self.connector is None or self.vit_pos_embed is None:
            raise NotSupported(f"role {self.role} has no ViT; load the model with role understand, context or full")
        vit_ids = grid_position_ids(rows, columns, self.config.vit.positions_per_side, self.device)
        features = self.connector(self.vit_model(pixel_tokens, vit_ids))
        # Each table has a side of its own, so a place may have another id in each.
        table_ids = grid_position_ids(rows, columns, self.vit_pos_embed.side, self.device)
        return cast(Tensor, features.float() + self.vit_pos_embed(table_ids))

    def embed_latents(self, tokens: Tensor, t: Tensor, position_ids: Tensor) -> Tensor:
        """Latent tokens [..., n, features] at times t [...] -> LLM inputs [..., n, hidden] float32.

        Clean latents of a context are at t = 0, and the embedding of 0 is added too.
        """
        if self.vae2llm is None or self.time_embedder is None or self.latent_pos_embed is None:
            raise NotSupported(f"role {self.role} has no generation expert; use role context, denoise or full")
        # All latents of a row have one time.
        time = self.time_embedder(t.flatten()).view(*t.shape, 1, -1)
        return cast(Tensor, self.vae2llm(tokens).float() + time + self.latent_pos_embed(position_ids))

    def velocity(self, hidden: Tensor) -> Tensor:
        """Hidden states of latent rows, before the last norm [..., hidden] -> velocity [..., features] float32."""
        norm = self.language_model.norm_moe_gen
        if self.llm2vae is None or norm is None:
            raise NotSupported(f"role {self.role} draws no pictures; load the model with role denoise or full")
        return cast(Tensor, self.llm2vae(norm(hidden))).float()

    def autoencoder(self) -> Vae:
        """The VAE; raises NotSupported if the role has none."""
        if self.vae is None:
            raise NotSupported(f"role {self.role} has no autoencoder; use role context, denoise or full")
        return self.vae
