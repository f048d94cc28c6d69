"""The four kinds of forward that serving runs, each on a model of its own K/V: text, ViT, latents, a denoise step."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from bagel.engine.layout import latent_rows, text_rows, vit_rows
from bagel.model.attention import KvSlab
from bagel.model.bagel import Bagel

Outputs = list[Tensor]


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


def slab_of(model: Bagel) -> KvSlab:
    return KvSlab(model.kv_shape, 64, dtype=model.dtype, device=model.device)


def text_step(model: Bagel) -> Outputs:
    """A prompt of five tokens, then one more token: logits after both."""
    decoder, slab = model.language_model, slab_of(model)
    logits = []
    for past, ids in ((0, [3, 1, 4, 1, 5]), (5, [9])):
        rows = text_rows(decoder, [2], [past], [past], len(ids))
        hidden, _ = decoder(model.embed(torch.tensor([ids])), None, rows, slab)
        logits.append(decoder.logits(hidden))
    return logits


def vit_read(model: Bagel) -> Outputs:
    """An image of 2 x 3 patches."""
    start, end = model.delimiter_embeddings()[:, None]
    patches = model.embed_vit(random(6, model.config.vit.patch_features), 2, 3)
    rows = vit_rows(model.language_model, 0, 0, 6)
    hidden, _ = model.language_model(torch.cat((start, patches, end))[None], None, rows, slab_of(model))
    return [hidden]


def latents_read(model: Bagel) -> Outputs:
    """Four clean latents of an encoded image."""
    mean, _ = model.autoencoder().encode(random(1, 3, 32, 32))
    tokens = mean.flatten().view(1, 4, model.config.latent_features)
    latents = model.embed_latents(tokens, torch.zeros(1), torch.arange(4))
    rows = latent_rows(model.language_model, [0], [0], [0], [4], 4)
    return list(model.language_model(model.delimiter_embeddings()[None], latents, rows, slab_of(model)))


def denoise_step(model: Bagel) -> Outputs:
    """Two branches of one picture, one without context: their velocities, and the picture decoded."""
    decoder, slab = model.language_model, slab_of(model)
    if model.role.parts.text:
        decoder(model.embed(torch.tensor([[3, 1, 4]])), None, text_rows(decoder, [0], [0], [0], 3), slab)
    x = random(4, model.config.latent_features).expand(2, -1, -1)
    latents = model.embed_latents(x, torch.tensor([0.7, 0.7]), torch.arange(4))
    rows = latent_rows(decoder, [0, 20], [3, 0], [3, 0], [4, 4], 6)
    padded = torch.cat((latents, torch.zeros(2, 2, latents.shape[-1])), dim=1)
    _, hidden = decoder(model.delimiter_embeddings().expand(2, -1, -1), padded, rows, slab)
    velocity = model.velocity(hidden[:, :4])
    return [velocity, model.autoencoder().decode(velocity[:1].reshape(1, -1, 4, 4))]


FORWARDS: Mapping[str, Callable[[Bagel], Outputs]] = {
    "text step": text_step,
    "ViT read": vit_read,
    "latents read": latents_read,
    "denoise step": denoise_step,
}
