"""Where the tokens of a forward lie in a slab and at which positions: text rows and image rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bagel.model.attention import Rows, upload
from bagel.model.mot import MoTDecoder


def text_rows(decoder: MoTDecoder, starts: Sequence[int], pasts: Sequence[int], ropes: Sequence[int], n: int) -> Rows:
    """n text tokens a row, causal, after pasts[i] tokens of context at starts[i], at positions ropes[i] onwards."""
    device = _device(decoder)
    offsets = torch.arange(n, device=device)
    first = upload([start + past for start, past in zip(starts, pasts, strict=True)], torch.int64, device)
    positions = upload(list(ropes), torch.int64, device)[:, None] + offsets
    return Rows(
        starts=tuple(starts),
        lengths=tuple(past + n for past in pasts),
        und=n,
        und_slots=(first[:, None] + offsets).flatten(),
        und_rope=decoder.rope(positions),
        causal=True,
    )


def vit_rows(decoder: MoTDecoder, past: int, rope: int, n: int) -> Rows:
    """One image of n ViT tokens between its delimiters, all at one position, full attention."""
    device = _device(decoder)
    return Rows(
        starts=(0,),
        lengths=(past + n + 2,),
        und=n + 2,
        und_slots=torch.arange(past, past + n + 2, device=device),
        und_rope=decoder.rope(upload([[rope]], torch.int64, device)),
    )


def latent_rows(
    decoder: MoTDecoder,
    starts: Sequence[int],
    pasts: Sequence[int],
    ropes: Sequence[int],
    counts: Sequence[int],
    padded: int,
) -> Rows:
    """counts[i] latents a row between two delimiters, all of a row at one position ropes[i], full attention.

    Rows are padded to `padded` latents; the padding's K/V lie behind what is visible. In the slab a row is
    [context | start, latents, end | padding]; the delimiters are the understanding expert's two tokens.
    """
    device = _device(decoder)
    first = torch.tensor([start + past for start, past in zip(starts, pasts, strict=True)])[:, None]
    count = torch.tensor(counts)[:, None]
    index = torch.arange(padded)[None]
    # latent j lies behind the start delimiter; padding skips the end delimiter too
    gen_slots = first + 1 + index + (index >= count).long()
    und_slots = torch.cat((first, first + 1 + count), dim=1)
    rope = decoder.rope(upload([[rope] for rope in ropes], torch.int64, device))
    return Rows(
        starts=tuple(starts),
        lengths=tuple(past + count + 2 for past, count in zip(pasts, counts, strict=True)),
        und=2,
        und_slots=upload(und_slots.flatten(), torch.int64, device),
        und_rope=rope,
        gen=padded,
        gen_slots=upload(gen_slots.flatten(), torch.int64, device),
        gen_rope=rope,
    )


def _device(decoder: MoTDecoder) -> torch.device:
    return decoder.embed_tokens.weight.device
