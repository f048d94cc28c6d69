"""The whole network: decoder, ViT, connector, latent embedding and autoencoder, as far as a role needs them."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from bagel.checkpoint.config import ModelConfig
from bagel.checkpoint.roles import Role
from bagel.errors import NotSupported
from bagel.model.flow import TimestepEmbedder
from bagel.model.layers import Mlp, PositionTable, grid_position_ids, linear
from bagel.model.mot import MoTDecoder
from bagel.model.vae import Vae
from bagel.model.vit import Vit


class Bagel(nn.Module):
    """Modules named as in the checkpoint; one that the role does not need is None.

    The decoder's and ViT's matrix products, embeddings and K/V are of one type; norms, the time embedder, vae2llm,
    llm2vae and the autoencoder are always in float32.
    """

    def __init__(self, config: ModelConfig, role: Role = Role.FULL, delimiter_ids: tuple[int, int] = (0, 1)) -> None:
        """delimiter_ids: ids of the image delimiters, start and end."""
        super().__init__()
        parts, llm = role.parts, config.llm
        self.delimiter_ids = delimiter_ids
        self.config, self.role = config, role
        self.language_model = MoTDecoder(
            llm,
            embedding_rows=llm.vocab_size if parts.text else 2,
            generation=parts.generation,
            denoising=parts.denoising,
            text=parts.text,
        )
        self.vit_model = Vit(config.vit) if parts.vision else None
        self.connector = Mlp(config.vit.hidden_size, llm.hidden_size, llm.hidden_size) if parts.vision else None
        self.vit_pos_embed = PositionTable(config.vit_max_num_patch_per_side, llm.hidden_size) if parts.vision else None
        latent = parts.generation
        self.vae2llm = linear(config.latent_features, llm.hidden_size, bias=True) if latent else None
        self.time_embedder = TimestepEmbedder(llm.hidden_size) if latent else None
        self.latent_pos_embed = PositionTable(config.max_latent_size, llm.hidden_size) if latent else None
        self.llm2vae = linear(llm.hidden_size, config.latent_features, bias=True) if parts.denoising else None
        has_vae = parts.encoder or parts.denoising
        self.vae = Vae(config.vae, encoder=parts.encoder, decoder=parts.denoising) if has_vae else None

    @property
    def device(self) -> torch.device:
        return self.language_model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the decoder's matrix products, embeddings and K/V."""
        return self.language_model.embed_tokens.weight.dtype

    @property
    def delimiter_rows(self) -> tuple[int, int]:
        """The delimiters' rows of the embedding: their ids, or the only two rows that a role without text keeps."""
        return self.delimiter_ids if self.role.parts.text else (0, 1)

    def embed(self, token_ids: Tensor) -> Tensor:
        """token_ids [...] -> [..., hidden] float32."""
        if not self.role.parts.text:
            raise NotSupported(f"role {self.role} reads no text; load the model with role understand, context or full")
        return cast(Tensor, self.language_model.embed_tokens(token_ids)).float()

    def delimiter_embeddings(self) -> Tensor:
        """Embeddings of the image delimiters, start and end, [2, hidden] float32."""
        rows = torch.tensor(self.delimiter_rows, device=self.device)
        return cast(Tensor, self.language_model.embed_tokens(rows)).float()

    def embed_vit(self, pixel_tokens: Tensor, rows: int, columns: int) -> Tensor:
        """Patches [rows * columns, patch features] of one image -> LLM inputs [rows * columns, hidden] float32."""
        if self.vit_model is None or self.connector is None or self.vit_pos_embed is None:
            raise NotSupported(f"role {self.role} has no ViT; load the model with role understand, context or full")
        vit_ids = self._grid(rows, columns, self.config.vit.positions_per_side)
        features = self.connector(self.vit_model(pixel_tokens.to(self.device), vit_ids))
        table_ids = self._grid(rows, columns, self.vit_pos_embed.side)
        return cast(Tensor, features.float() + self.vit_pos_embed(table_ids))

    def embed_latents(self, tokens: Tensor, t: Tensor, position_ids: Tensor) -> Tensor:
        """Latent tokens [..., n, features] at times t [...] -> LLM inputs [..., n, hidden] float32.

        Clean latents of a context have t = 0, whose embedding is added too.
        """
        if self.vae2llm is None or self.time_embedder is None or self.latent_pos_embed is None:
            raise NotSupported(f"role {self.role} has no generation expert; use role context, denoise or full")
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

    def _grid(self, rows: int, columns: int, side: int) -> Tensor:
        return grid_position_ids(rows, columns, side).to(self.device)
