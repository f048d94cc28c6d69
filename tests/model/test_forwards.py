"""All work of the network runs in `forward`s, which hooks and compilers see, and no place is read back by the host."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from bagel.checkpoint.files import Checkpoint
from bagel.checkpoint.roles import Role
from bagel.engine.layout import latent_rows_at, text_rows_at
from bagel.model.attention import KvSlab, Rows
from bagel.model.backend import LayerBackend
from bagel.model.bagel import Bagel
from bagel.model.weights import empty_model, load_model
from tests.model.forwards import FORWARDS


@pytest.fixture(scope="module")
def model(checkpoint: Checkpoint) -> Bagel:
    return load_model(checkpoint, delimiter_ids=(929, 930))


@pytest.mark.parametrize("name", FORWARDS)
@torch.inference_mode()
def test_a_hook_on_every_part_of_a_layer_is_called(model: Bagel, name: str) -> None:
    seen = set()
    parts = {path: part for path, part in model.language_model.layers.named_modules() if path}
    hooks = [part.register_forward_hook(lambda *_, path=path: seen.add(path)) for path, part in parts.items()]
    try:
        FORWARDS[name](model)
    finally:
        for hook in hooks:
            hook.remove()
    draws = name in ("latents read", "denoise step")
    assert seen == {path for path in parts if draws or ".gen_" not in path}


@contextmanager
def only_in_forward(model: nn.Module) -> Iterator[None]:
    """Every module's own parameters are there inside its forward alone, NaN otherwise, as a sharded model's are not."""
    handles = []
    kept: list[tuple[Tensor, Tensor]] = []
    for module in model.modules():
        own: list[tuple[Tensor, Tensor]] = [
            (parameter, parameter.clone()) for parameter in module.parameters(recurse=False)
        ]
        kept += own

        def gather(*_: object, own: list[tuple[Tensor, Tensor]] = own) -> None:
            for parameter, value in own:
                parameter.copy_(value)

        def drop(*_: object, own: list[tuple[Tensor, Tensor]] = own) -> None:
            for parameter, _value in own:
                parameter.fill_(torch.nan)

        if own:
            drop()
            handles += [module.register_forward_pre_hook(gather), module.register_forward_hook(drop)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter, value in kept:
            parameter.copy_(value)


@pytest.mark.parametrize("name", FORWARDS)
@torch.inference_mode()
def test_a_parameter_is_used_only_in_its_modules_forward(model: Bagel, name: str) -> None:
    wanted = FORWARDS[name](model)
    with only_in_forward(model):
        found = FORWARDS[name](model)
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.equal(ours, theirs)


def test_places_on_the_device_are_all_that_describes_rows(model: Bagel) -> None:
    """Two pictures in a bucket of four latents, then, in the same memory, two texts."""
    decoder = model.language_model
    places = torch.tensor([[0, 40], [26, 7], [3, 9], [4, 2]])
    rows = latent_rows_at(decoder, places, 4, 100)
    assert rows.und_slots.tolist() == [26, 31, 47, 50]
    assert rows.gen_kv is not None
    assert rows.gen_kv.slots.tolist() == [27, 28, 29, 30, 48, 49, 51, 52]  # padding lies behind the end delimiter
    wanted = [0, 2, 4, 8, 12], [0, 40, 0, 40, 51], [32, 11, 32, 11]
    assert tuple(each.tolist() for each in rows.on_device) == wanted
    assert torch.equal(rows.und_rope[0], decoder.rope(torch.tensor([[3], [9]]))[0])
    places.copy_(torch.tensor([[10, 70], [0, 12], [0, 2], [0, 0]]))
    rows = text_rows_at(decoder, places[:3], 3, 100)
    assert rows.und_slots.tolist() == [10, 11, 12, 82, 83, 84]
    assert tuple(each.tolist() for each in rows.on_device) == ([0, 3, 6], [10, 70, 85], [3, 15])
    assert torch.equal(rows.und_rope[1], decoder.rope(torch.tensor([[0, 1, 2], [2, 3, 4]]))[1])


@torch.inference_mode()
def test_a_decoder_never_asks_for_a_place_on_the_host(checkpoint: Checkpoint) -> None:
    """On the meta device there are no values: reading one back raises."""
    device = torch.device("meta")
    model = empty_model(checkpoint.config, Role.FULL, dtype=torch.float32, device=device)
    decoder, hidden = model.language_model, checkpoint.config.llm.hidden_size

    def attend(q: Tensor, k: Tensor, v: Tensor, rows: Rows) -> Tensor:
        assert all(extent.device == device for extent in rows.on_device)
        return torch.empty_like(q)

    decoder.backend = replace(LayerBackend(), attend=attend)
    slab = KvSlab(model.kv_shape, 100, dtype=torch.float32, device=device)
    und, gen = (torch.empty(2, n, hidden, device=device) for n in (2, 8))
    rows = latent_rows_at(decoder, torch.empty(4, 2, dtype=torch.int64, device=device), 8, 100)
    assert model.velocity(decoder(und, gen, rows, slab)[1]).shape == (2, 8, 64)
    rows = text_rows_at(decoder, torch.empty(3, 2, dtype=torch.int64, device=device), 2, 100)
    assert decoder.logits(decoder(und, None, rows, slab)[0]).shape == (2, 2, 1000)
