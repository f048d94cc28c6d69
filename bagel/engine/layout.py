"""Where the tokens of a forward lie in a slab and at which positions: text rows and image rows.

A row is described by a few integers, its places, which lie on the device. All that `Rows` holds is computed from them
there, so that a captured forward that begins with `text_rows_at` or `latent_rows_at` is replayed with other places
once its tensor of places is overwritten.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bagel.model.attention import Rows, upload
from bagel.model.mot import MoTDecoder
from bagel.parallel.context import LatentKv
from bagel.parallel.groups import ALONE, Group

Intervals = Sequence[tuple[int, int]]
"""Start and length of what each row sees, where the host knows them."""


def text_rows(decoder: MoTDecoder, starts: Sequence[int], pasts: Sequence[int], ropes: Sequence[int], n: int) -> Rows:
    """n text tokens a row, causal, after pasts[i] tokens of context at starts[i], at positions ropes[i] onwards."""
    places = upload([list(starts), list(pasts), list(ropes)], torch.int64, decoder.device)
    intervals = [(start, past + n) for start, past in zip(starts, pasts, strict=True)]
    return text_rows_at(decoder, places, n, _longest(intervals), intervals)


def text_rows_at(decoder: MoTDecoder, places: Tensor, n: int, longest: int, intervals: Intervals | None = None) -> Rows:
    """As text_rows, from places [3, rows] int64 on the device: starts, pasts and ropes. longest: see Rows."""
    starts, pasts, ropes = places
    offsets = torch.arange(n, device=places.device)
    return Rows(
        starts=starts,
        lengths=pasts + n,
        longest=longest,
        und=n,
        und_slots=((starts + pasts)[:, None] + offsets).flatten(),
        und_rope=decoder.rope(ropes[:, None] + offsets),
        causal=True,
        intervals=intervals,
    )


def vit_rows(decoder: MoTDecoder, past: int, rope: int, n: int) -> Rows:
    """One image of n ViT tokens between its delimiters, all at one position, full attention."""
    length = past + n + 2
    starts, lengths, ropes = upload([[0], [length], [rope]], torch.int64, decoder.device)
    return Rows(
        starts=starts,
        lengths=lengths,
        longest=length,
        und=n + 2,
        und_slots=torch.arange(past, length, device=decoder.device),
        und_rope=decoder.rope(ropes[:, None]),
        intervals=[(0, length)],
    )


def latent_rows(
    decoder: MoTDecoder,
    starts: Sequence[int],
    pasts: Sequence[int],
    ropes: Sequence[int],
    counts: Sequence[int],
    padded: int,
    context: Group = ALONE,
) -> Rows:
    """counts[i] latents a row between two delimiters, all of a row at one position ropes[i], full attention.

    Rows are padded to `padded` latents; the padding's K/V lie behind what is visible. In the slab a row is
    [context | start, latents, end | padding]; the delimiters are the understanding expert's two tokens. context: ranks
    that divide the padded latents of each row.
    """
    places = upload([list(starts), list(pasts), list(ropes), list(counts)], torch.int64, decoder.device)
    # The host knows the places here, so attention that loops over rows need not read them back.
    intervals = [(start, past + count + 2) for start, past, count in zip(starts, pasts, counts, strict=True)]
    return latent_rows_at(decoder, places, padded, _longest(intervals), intervals, context)


def latent_rows_at(
    decoder: MoTDecoder,
    places: Tensor,
    padded: int,
    longest: int,
    intervals: Intervals | None = None,
    context: Group = ALONE,
) -> Rows:
    """As latent_rows, from places [4, rows] int64 on the device: starts, pasts, ropes and counts. longest: see Rows."""
    starts, pasts, ropes, counts = places
    first, count = (starts + pasts)[:, None], counts[:, None]
    index = torch.arange(padded, device=places.device)
    rope = decoder.rope(ropes[:, None])
    return Rows(
        starts=starts,
        # Without the padding, so that nothing attends to it.
        lengths=pasts + counts + 2,
        longest=longest,
        und=2,
        und_slots=torch.cat((first, first + 1 + count), dim=1).flatten(),
        und_rope=rope,
        gen=padded // context.size,
        # latent j lies behind the start delimiter; padding skips the end delimiter too
        gen_kv=LatentKv.divided(first + 1 + index + (index >= count), context),
        gen_rope=rope,
        intervals=intervals,
    )


def _longest(intervals: Intervals) -> int:
    return max(length for _, length in intervals)
