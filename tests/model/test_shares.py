"""A rank's share of the network: what it reads of the checkpoint, and that all ranks together compute the whole."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from threading import Barrier

import pytest
import torch
from torch import Tensor

from bagel.checkpoint.config import ModelConfig
from bagel.checkpoint.files import Checkpoint
from bagel.checkpoint.roles import Role
from bagel.errors import ConfigError
from bagel.model.bagel import Bagel
from bagel.model.linear import Linear, Split
from bagel.model.naming import Slot, slots
from bagel.model.threads import settle_threads
from bagel.model.weights import empty_model, load_model, random_model
from bagel.parallel.groups import Group, Groups
from bagel.parallel.mesh import Mesh, Rank
from tests.model.forwards import FORWARDS, Outputs

DELIMITERS = (929, 930)
FULL_SPLITS = {
    "language_model.layers.0.und_input.qkv_proj": Split.COLUMN,
    "language_model.layers.0.gen_output.o_proj": Split.ROW,
    "language_model.layers.0.gen_output.mlp.gate_up_proj": Split.COLUMN,
    "language_model.layers.0.und_output.mlp.down_proj": Split.ROW,
    "language_model.lm_head": Split.NONE,
    "vit_model.layers.0.self_attn.out_proj": Split.NONE,
    "connector.fc1": Split.NONE,
    "vae2llm": Split.NONE,
    "time_embedder.mlp.2": Split.NONE,
}


@pytest.fixture(scope="module")
def whole(checkpoint: Checkpoint) -> Bagel:
    return load_model(checkpoint, delimiter_ids=DELIMITERS)


def ranks_of(tp: int) -> list[Rank]:
    return [Mesh(tp=tp).rank(index) for index in range(tp)]


def sliced(whole: Bagel, share: Bagel) -> Iterator[tuple[Slot, Tensor]]:
    """Every slot of a rank's share, and what it must hold, cut from the tensor of the whole model."""
    tensors = {(each.file, each.name): each.target.reshape(each.shape) for each in slots(whole)}
    for slot in slots(share):
        part = slot.part
        tensor = tensors[slot.file, slot.name].narrow(part.dimension, part.start, part.stop - part.start)
        yield slot, tensor.reshape(slot.target.shape)


def share_of(whole: Bagel, groups: Groups) -> Bagel:
    """A rank's share of a model in memory."""
    model = empty_model(whole.config, whole.role, dtype=whole.dtype, device="cpu", groups=groups)
    for slot, tensor in sliced(whole, model):
        slot.target.copy_(tensor)
    return model.eval()


class Threads:
    """Ranks that are threads of this process, which exchange tensors as a group of processes does."""

    def __init__(self, ranks: int) -> None:
        self.brought: list[Tensor] = [torch.empty(0)] * ranks
        self.barrier = Barrier(ranks, timeout=30)

    def groups(self, rank: Rank) -> Groups:
        return Groups(rank, tp=ThreadGroup(rank.tp, len(self.brought), threads=self))


@dataclass(frozen=True)
class ThreadGroup(Group):
    threads: Threads = field(default_factory=lambda: Threads(1))

    def gather(self, x: Tensor) -> Tensor:
        self.threads.brought[self.index] = x
        self.threads.barrier.wait()
        gathered = torch.stack(self.threads.brought)
        self.threads.barrier.wait()
        return gathered

    def add_up(self, x: Tensor) -> Tensor:
        return x.copy_(self.gather(x).sum(0))


def together(shares: Sequence[Bagel], forward: Callable[[Bagel], Outputs]) -> list[Outputs]:
    """A forward on every rank at once; their outputs in the order of ranks."""
    settle_threads(shares[0].config, "cpu")  # ranks that each compute with several threads get in each other's way

    def run(model: Bagel) -> Outputs:
        with torch.inference_mode():
            return forward(model)

    with ThreadPoolExecutor(len(shares)) as pool:
        return list(pool.map(run, shares))


def test_every_linear_layer_knows_its_name_and_its_split(whole: Bagel) -> None:
    layers = {name: module for name, module in whole.named_modules() if isinstance(module, torch.nn.Linear)}
    ours = {name: layer for name, layer in layers.items() if not name.startswith("vae.")}
    assert all(isinstance(layer, Linear) for layer in ours.values())
    assert {name: ours[name].split for name in FULL_SPLITS} == FULL_SPLITS
    layer = ours["language_model.layers.1.gen_input.qkv_proj"]
    assert isinstance(layer, Linear)
    assert list(layer.outputs) == [f"language_model.model.layers.1.self_attn.{which}_proj_moe_gen" for which in "qkv"]


@pytest.mark.parametrize("role", [Role.FULL, Role.DENOISE])
def test_a_rank_reads_its_slices_and_no_other_byte(
    checkpoint: Checkpoint, whole: Bagel, role: Role, monkeypatch: pytest.MonkeyPatch
) -> None:
    _ = checkpoint.config  # headers are read before
    read, preadv = 0, os.preadv

    def counted(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        nonlocal read
        read += (count := preadv(descriptor, buffers, offset))
        return count

    monkeypatch.setattr(os, "preadv", counted)
    for rank in ranks_of(2):
        read = 0
        model = load_model(checkpoint, role, delimiter_ids=DELIMITERS, groups=Groups(rank))
        for slot, tensor in sliced(whole, model):
            assert torch.equal(slot.target, tensor), slot.part
        stored = {"ema.safetensors": 2, "ae.safetensors": 4}  # bytes a number
        assert read == sum(slot.target.numel() * stored[slot.file] for slot in slots(model))


@pytest.mark.parametrize("name", FORWARDS)
def test_two_ranks_compute_what_one_does(checkpoint: Checkpoint, whole: Bagel, name: str) -> None:
    """Six heads and two K/V heads: each rank has one K/V head and its three queries' heads."""
    threads = Threads(2)
    shares = [load_model(checkpoint, delimiter_ids=DELIMITERS, groups=threads.groups(rank)) for rank in ranks_of(2)]
    assert [each.kv_shape.heads for each in shares] == [1, 1]
    with torch.inference_mode():
        wanted = FORWARDS[name](whole)
    for outputs in together(shares, FORWARDS[name]):
        for ours, theirs in zip(outputs, wanted, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * max(1.0, float(theirs.abs().max())))


@pytest.mark.parametrize(("kv_heads", "tp"), [(1, 2), (2, 4)])
def test_more_ranks_than_kv_heads_keep_copies_of_them(checkpoint: Checkpoint, kv_heads: int, tp: int) -> None:
    llm = replace(checkpoint.config.llm, num_attention_heads=8, num_key_value_heads=kv_heads, num_hidden_layers=2)
    config: ModelConfig = replace(checkpoint.config, llm=replace(llm, hidden_size=64))
    whole = random_model(config, Role.FULL, dtype=torch.float32, device="cpu", seed=1)
    threads = Threads(tp)
    shares = [share_of(whole, threads.groups(rank)) for rank in ranks_of(tp)]
    assert {each.kv_shape.heads for each in shares} == {max(1, kv_heads // tp)}
    for name in ("text step", "denoise step"):
        with torch.inference_mode():
            wanted = FORWARDS[name](whole)[0]
        for outputs in together(shares, FORWARDS[name]):
            torch.testing.assert_close(outputs[0], wanted, rtol=0, atol=1e-5)


def test_a_model_that_does_not_divide_is_refused_before_anything_is_allocated(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Bagel, "to_empty", lambda *_, **__: pytest.fail("memory was taken"))
    with pytest.raises(ConfigError, match="do not divide among 4 tensor-parallel ranks; choose a size of 1, 2"):
        load_model(checkpoint, delimiter_ids=DELIMITERS, groups=Groups(Mesh(tp=4).rank(0)))
