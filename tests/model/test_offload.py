"""Layers whose weights are copied to the device as they are needed: the same numbers, in less memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from bagel.checkpoint.config import BAGEL_7B_MOT
from bagel.checkpoint.files import Checkpoint
from bagel.checkpoint.roles import Role
from bagel.engine.memory import DEFAULT_KV_TOKENS
from bagel.errors import NotSupported
from bagel.model.bagel import Bagel
from bagel.model.layer_stream import LayerStream
from bagel.model.linear import Quantization
from bagel.model.mot import MoTLayer
from bagel.model.offload import host_stream, kept_layers
from bagel.model.weights import empty_model, keep_layers_on_host, load_model, random_model
from bagel.parallel.groups import Group, Groups
from tests.model.forwards import FORWARDS

DELIMITERS = (929, 930)
GIB = 2**30
WORKING_GIB = 5.5
"""What a single stage takes for a picture of 1024 x 1024 beside its weights, its K/V included (bench/README.md)."""
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def stream_of(model: Bagel) -> LayerStream:
    stream = model.language_model.layers.stream
    assert stream is not None
    return stream


@pytest.fixture(scope="module")
def streamed(checkpoint: Checkpoint) -> Bagel:
    return load_model(checkpoint, delimiter_ids=DELIMITERS, offload=True)


@pytest.mark.parametrize("count", range(1, 60))
def test_the_layers_that_stay_are_few_and_spread(count: int) -> None:
    kept = kept_layers(count)
    assert len(set(kept)) == len(kept) and all(0 <= each < count for each in kept)
    assert (count - len(kept)) % 2 == 0
    assert len(kept) <= count / 7 + 1
    assert all(later - earlier > 1 for earlier, later in pairwise(kept))


def test_a_model_in_the_hosts_memory_computes_the_same_bits(checkpoint: Checkpoint, streamed: Bagel) -> None:
    """In any order of forwards: those that need one expert and those that need both follow one another."""
    resident = load_model(checkpoint, delimiter_ids=DELIMITERS)
    names = [*FORWARDS, *reversed(list(FORWARDS)), "text step"]
    with torch.inference_mode():
        for name in names:
            for ours, wanted in zip(FORWARDS[name](streamed), FORWARDS[name](resident), strict=True):
                assert torch.equal(ours, wanted), name


def test_a_forward_that_fails_leaves_the_next_one_right(checkpoint: Checkpoint, streamed: Bagel) -> None:
    resident = load_model(checkpoint, delimiter_ids=DELIMITERS)

    def fail(*_: object) -> None:
        raise RuntimeError

    layer = streamed.language_model.layers[2]
    with torch.inference_mode():
        hook = layer.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError):
            FORWARDS["denoise step"](streamed)
        hook.remove()
        for name in ("text step", "denoise step"):
            for ours, wanted in zip(FORWARDS[name](streamed), FORWARDS[name](resident), strict=True):
                assert torch.equal(ours, wanted), name


def test_fp8_weights_are_streamed_too(checkpoint: Checkpoint) -> None:
    models = [
        load_model(
            checkpoint,
            delimiter_ids=DELIMITERS,
            dtype=torch.bfloat16,
            quantization=Quantization.FP8,
            offload=offload,
        )
        for offload in (False, True)
    ]
    with torch.inference_mode():
        for forward in FORWARDS.values():
            assert all(map(torch.equal, forward(models[0]), forward(models[1])))


def recording(monkeypatch: pytest.MonkeyPatch, model: Bagel) -> list[str]:
    """What a model's forwards do from now on: copies "expert@layer" and computed "layer"."""
    log: list[str] = []
    stream = stream_of(model)
    for number, expert in enumerate(stream._experts):

        def copy(at: int, number: int = number, copy: Callable[[int], None] = expert.copy) -> None:
            log.append(f"{'ug'[number]}@{at}")
            copy(at)

        monkeypatch.setattr(expert, "copy", copy)
    for at, layer in enumerate(stream.moving):
        assert isinstance(layer, MoTLayer)
        layer.register_forward_hook(lambda *_, at=at: log.append(str(at)))
    return log


def test_copies_are_launched_two_layers_ahead_and_only_of_the_experts_needed(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(checkpoint, Role.DENOISE, delimiter_ids=DELIMITERS, offload=True)
    assert len(stream_of(model).moving) == 4
    log = recording(monkeypatch, model)
    with torch.inference_mode():
        FORWARDS["denoise step"](model)
        first = " ".join(log)
        log.clear()
        FORWARDS["denoise step"](model)
    begin = "u@0 g@0 u@1 g@1 "
    assert first == begin + "0 u@2 g@2 1 u@3 g@3 2 u@0 g@0 3 u@1 g@1"
    # The next forward finds its first layers there.
    assert " ".join(log) == first.removeprefix(begin)


def test_text_needs_the_understanding_expert_alone(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(checkpoint, delimiter_ids=DELIMITERS, offload=True)
    log = recording(monkeypatch, model)
    with torch.inference_mode():
        FORWARDS["text step"](model)
        assert log and not any(each.startswith("g") for each in log)
        log.clear()
        FORWARDS["denoise step"](model)
    # The first half is the step's short prompt; then both experts of the first layers are missing.
    assert "u@0 g@0 u@1 g@1" in " ".join(log)


def test_a_resident_model_can_be_moved_with_its_values(checkpoint: Checkpoint) -> None:
    model = random_model(checkpoint.config, Role.FULL, dtype=torch.float32, device="cpu", seed=3)
    with torch.inference_mode():
        wanted = FORWARDS["denoise step"](model)
    keep_layers_on_host(model, model.device).move()
    with torch.inference_mode():
        assert all(map(torch.equal, FORWARDS["denoise step"](model), wanted))


@pytest.mark.parametrize(("quantization", "most"), [(None, 22), (Quantization.FP8, 19)])
def test_the_public_model_fits_small_cards(quantization: Quantization | None, most: int) -> None:
    """A single stage with the default K/V, computed from its sizes: at most 22 GiB at the peak."""
    model = empty_model(BAGEL_7B_MOT, Role.FULL, dtype=torch.bfloat16, device="meta", quantization=quantization)
    whole = sum(each.nbytes for each in model.parameters())
    stream = keep_layers_on_host(model, torch.device("meta"))
    resident = whole - stream.kept_bytes + stream.device_bytes
    kv = DEFAULT_KV_TOKENS * model.kv_shape.token_bytes(model.dtype)
    assert resident + kv + WORKING_GIB * GIB <= most * GIB


def test_there_is_memory_for_two_layers_and_no_more(streamed: Bagel) -> None:
    """Parameters of layers that take turns are the same memory."""
    stream = stream_of(streamed)
    places = {each.data_ptr() for layer in stream.moving for each in layer.parameters()}
    assert len(places) == 2 * len(list(stream.moving[0].parameters()))
    assert stream.kept_bytes == len(stream.moving) // 2 * stream.device_bytes


# -- where it is refused


def test_ranks_that_divide_the_weights_are_refused(checkpoint: Checkpoint) -> None:
    with pytest.raises(NotSupported, match="HSDP divides the weights over GPUs, cpu_offload keeps them on the host"):
        load_model(checkpoint, delimiter_ids=DELIMITERS, groups=Groups(weights=Group(0, 2)), offload=True)


# -- on a GPU


class Layer(nn.Module):
    """A layer of one expert."""

    def __init__(self, width: int, device: torch.device) -> None:
        super().__init__()
        self.part = nn.Linear(width, width, device=device, dtype=torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.silu(self.part(x)) + x


@pytest.mark.gpu
@gpu
def test_a_gpu_computes_the_same_bits_and_the_host_never_waits() -> None:
    device = torch.device("cuda")
    layers = [Layer(4096, device) for _ in range(9)]
    x = torch.randn(512, 4096, device=device, dtype=torch.bfloat16)

    def forward(each: Iterable[nn.Module]) -> Tensor:
        y = x
        for layer in each:
            y = layer(y)
        return y

    with torch.inference_mode():
        wanted = forward(layers)
        stream = host_stream(layers, [("part",)], device)
        stream.move()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            results = [forward(stream.supply(every_expert=True)) for _ in range(20)]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert all(torch.equal(each, wanted) for each in results)
