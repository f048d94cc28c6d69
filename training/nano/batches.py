"""Examples as integers, one array per group: worker processes make them, and the GPU makes the pictures from them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from bagel.model.tokenizer import BagelTokenizer
from training.nano.examples import Example
from training.nano.render import encode_scenes
from training.nano.tasks import GROUPS, drop
from training.nano.world import Scene

Array = NDArray[np.int16]
Packed = dict[str, Array]
ABSENT = 99
"""The segment number of padding and of absent blocks, larger than any other, so that no token attends to it."""
IGNORED = -100
CODE = 21
"""Integers per encoded scene."""
EMPTY = Scene(())


@dataclass(frozen=True)
class Group:
    """Sequences of one shape: room for `text` tokens, the blocks they may have, and whether they learn an answer."""

    name: str
    text: int
    vit: bool = False
    vae: bool = False
    draws: bool = False
    answers: bool = False

    @property
    def width(self) -> int:
        """Integers per example: four for each text token, two for each of the three blocks, and two scenes."""
        return 4 * self.text + 6 + 2 * CODE


# These lengths make whole sequences a multiple of 16 tokens, which suits the attention kernels.
LAYOUTS = {
    "draw": Group("draw", 46, draws=True),
    "plan": Group("plan", 142, draws=True, answers=True),
    "edit": Group("edit", 26, vit=True, vae=True, draws=True),
    "see": Group("see", 46, vit=True, answers=True),
    "reason": Group("reason", 110, vit=True, answers=True),
}


@dataclass(frozen=True)
class Batch:
    """A group's sequences: ids, segments, rope positions and labels [b, text]; each block's segment and position [b].

    A label is the next token, or IGNORED where nothing is learned. source and target are encoded scenes.
    """

    group: Group
    ids: Tensor
    segments: Tensor
    ropes: Tensor
    labels: Tensor
    vit: tuple[Tensor, Tensor]
    vae: tuple[Tensor, Tensor]
    latents: tuple[Tensor, Tensor]
    source: Tensor
    target: Tensor


def unpack(group: Group, packed: Tensor, device: torch.device | str) -> Batch:
    """Make a batch on a device from an array [b, group.width] int16."""
    moved = packed.to(device).long()
    n = group.text
    ids, segments, ropes, labels, blocks, source, target = moved.split((n, n, n, n, 6, CODE, CODE), dim=1)
    vit_segment, vit_rope, vae_segment, vae_rope, segment, rope = blocks.unbind(1)
    return Batch(
        group,
        ids,
        segments,
        ropes,
        labels,
        (vit_segment, vit_rope),
        (vae_segment, vae_rope),
        (segment, rope),
        source,
        target,
    )


def encode_example(tokenizer: BagelTokenizer, group: Group, example: Example) -> list[int] | None:
    """Encode one example as integers, without its scenes; None if its texts are too long.

    The order: the system prompt of a think run (all texts but the last), the image blocks, the last text, the answer,
    the latents.
    """
    ids: list[int] = []
    segments: list[int] = []
    ropes: list[int] = []
    labels: list[int] = []
    blocks = {"vit": (ABSENT, 0), "vae": (ABSENT, 0), "latents": (ABSENT, 0)}
    rope = segment = 0

    def text(content: str, *, learned: bool) -> None:
        nonlocal rope, segment
        tokens = tokenizer.segment(content)
        ids.extend(tokens)
        segments.extend([segment] * len(tokens))
        ropes.extend(range(rope, rope + len(tokens)))
        labels.extend([*(tokens[1:] if learned else [IGNORED] * (len(tokens) - 1)), IGNORED])
        rope, segment = rope + len(tokens), segment + 1

    def block(name: str) -> None:
        nonlocal rope, segment
        blocks[name] = (segment, rope)
        rope, segment = rope + 1, segment + 1  # a whole block shares one position

    system = example.texts[:-1] if group.name in ("plan", "reason") and len(example.texts) > 1 else ()
    for each in system:
        text(each, learned=False)
    if example.vae:
        block("vae")
    if example.vit:
        block("vit")
    for each in example.texts[len(system) :]:
        text(each, learned=False)
    if example.answer is not None:
        text(example.answer, learned=True)
    if example.target is not None:
        block("latents")
    pad = group.text - len(ids)
    if pad < 0:
        return None
    filler = ((ids, 0), (segments, ABSENT), (ropes, 0), (labels, IGNORED))
    row = [number for values, fill in filler for number in (*values, *[fill] * pad)]
    return [*row, *blocks["vit"], *blocks["vae"], *blocks["latents"]]


def pack(tokenizer: BagelTokenizer, group: Group, examples: list[Example]) -> Tensor:
    """Encode those examples whose texts fit -> [n, group.width] int16."""
    rows, sources, targets = [], [], []
    for example in examples:
        row = encode_example(tokenizer, group, example)
        if row is not None:
            rows.append(row)
            sources.append(example.source or EMPTY)
            targets.append(example.target or EMPTY)
    return torch.cat((torch.tensor(rows, dtype=torch.int16), encode_scenes(sources), encode_scenes(targets)), dim=1)


class Stream(IterableDataset[Packed]):
    """An endless stream of batches of all groups, with conditions dropped at random. Each worker has its own seed."""

    def __init__(self, folder: Path, counts: dict[str, int], seed: int) -> None:
        self.folder, self.counts, self.seed = folder, counts, seed

    def __iter__(self) -> Iterator[Packed]:
        torch.set_num_threads(1)  # the workers together already use the cores
        worker = get_worker_info()
        rng = Random(f"{self.seed}-{worker.id if worker else 0}")
        tokenizer = BagelTokenizer(self.folder)
        while True:
            yield {name: self._batch(tokenizer, rng, name, count) for name, count in self.counts.items()}

    def _batch(self, tokenizer: BagelTokenizer, rng: Random, name: str, count: int) -> Array:
        group = LAYOUTS[name]
        packed: list[Array] = []
        # pack leaves out examples that are too long, so it may take several rounds.
        while (wanted := count - sum(len(each) for each in packed)) > 0:
            examples = [drop(rng, GROUPS[name](rng)) for _ in range(wanted)]
            packed.append(pack(tokenizer, group, examples).numpy())
        return np.concatenate(packed)


def batches(folder: Path, counts: dict[str, int], seed: int, workers: int) -> Iterator[dict[str, Tensor]]:
    """Batches by group name, made by `workers` processes, which start at once; 0: made in this process."""
    # As numpy arrays, which travel through pipes: tensors would take shared memory and open files, both often limited.
    stream = Stream(folder, counts, seed)
    loader: DataLoader[Packed] = DataLoader(
        stream, batch_size=None, num_workers=workers, collate_fn=_same, prefetch_factor=6 if workers else None
    )
    arrays = iter(loader)
    return ({name: torch.from_numpy(each) for name, each in packed.items()} for packed in arrays)


def _same(packed: Any) -> Any:
    return packed
