"""Memory that runs out anywhere in an engine ends the request that needed it, and leaves no trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from io import BytesIO
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from bagel.engine import device_check
from bagel.engine.commands import StepPlan
from bagel.engine.device_check import DeviceCheck
from bagel.engine.diffusion import DiffusionEngine
from bagel.engine.events import Begun, Drawn, Event, Failed, Health, Stepped
from bagel.engine.text import TextBatch
from bagel.engine.vae_worker import VaeWorker
from tests.engine.driven import Driven, driven, failures, of
from tests.helpers import agree

STEPS = 3
BYSTANDER = 1_000_000


class Memory(TorchDispatchMode):
    """Counts the operators that run, any of which may allocate, and has one of them find no memory."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count, self.full_at = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        if self.count == self.full_at:
            raise torch.OutOfMemoryError
        return func(*args, **(kwargs or {}))

    def fail_at(self, operator: int) -> None:
        """From now on the operator of that number fails, the first is 1; 0: none."""
        self.count, self.full_at = 0, operator

    def within(self, work: Callable[..., Any]) -> Callable[..., Any]:
        """The function, with this memory."""

        def wrapped(*args: Any) -> Any:
            with self:
                return work(*args)

        return wrapped


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> list[Memory]:
    """That of a picture that joins, of a text that joins, of all steps, and of the VAE's thread."""
    memories = [Memory(), Memory(), Memory(), Memory()]
    owners = ((DiffusionEngine, "_place"), (TextBatch, "add"), (DiffusionEngine, "step"), (VaeWorker, "_image"))
    for each, (owner, name) in zip(memories, owners, strict=True):
        monkeypatch.setattr(owner, name, each.within(getattr(owner, name)))
    return memories


@pytest.fixture
def engine(memory: object) -> Iterator[Driven]:
    with driven() as engine:
        yield engine


def draw(engine: Driven, id_: int) -> list[Event]:
    """Draw a picture that is planned with a text first; what came of it."""
    engine.begin(id_, "text2img", steps=STEPS, think=True, max_think_tokens=3)
    events = engine.read()
    if of(events, Begun):
        return events + finish(engine, id_)
    return events


def finish(engine: Driven, id_: int) -> list[Event]:
    """Take a picture's steps, until it is there or has failed."""
    events: list[Event] = []
    for _ in range(STEPS - 1):
        engine.send(StepPlan((id_,), read=False))
        events += engine.until(Stepped)
    return events if of(events, Failed) + of(events, Drawn) else events + engine.until(Drawn, Failed)


def held(engine: Driven) -> int:
    """Tokens of K/V that pictures and texts hold."""
    return engine.engine.space.taken


def pixels(events: list[Event]) -> bytes:
    (drawn,) = [event for event in events if isinstance(event, Drawn)]
    assert isinstance(drawn.picture, bytes)
    return drawn.picture


@pytest.mark.slow
def test_memory_that_runs_out_at_any_point_ends_one_request_and_leaves_no_trace(
    engine: Driven, memory: list[Memory]
) -> None:
    engine.begin(BYSTANDER, "text2img", steps=STEPS)  # on the same canvas all the while
    assert of(engine.read(), Begun) == [BYSTANDER]
    wanted = pixels(draw(engine, 1))
    for each in memory:
        each.fail_at(0)
    assert pixels(draw(engine, 3)) == wanted  # its prompt is read already: the fewest operators
    before = held(engine)
    operators = [each.count for each in memory]
    assert all(count > 5 for count in operators)
    for at, (each, count) in enumerate(zip(memory, operators, strict=True)):
        for operator in range(1, count + 1, 1 if at < 2 else count // 10):  # each one of what joins
            id_ = 10_000 * at + 2 * operator
            each.fail_at(operator)
            assert "memory of the device is full" in failures(draw(engine, id_))[id_], operator
            each.fail_at(0)
            assert held(engine) == before, operator
            if operator % 3 == 1:
                assert pixels(draw(engine, id_ + 1)) == wanted, operator
    assert pixels(draw(engine, 2)) == wanted
    assert pixels(finish(engine, BYSTANDER))


def test_an_engine_whose_device_is_full_is_not_healthy_until_it_can_draw(
    engine: Driven, memory: list[Memory], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(check: DeviceCheck) -> bool:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    wanted = pixels(draw(engine, 1))
    monkeypatch.setattr(device_check, "LOOK_AGAIN_S", 0.1)
    with monkeypatch.context() as taken:
        taken.setattr(device_check, "decode_picture", full)
        memory[0].fail_at(1)
        assert failures(draw(engine, 2))
        assert engine.until(Health)[-1] == Health(healthy=False)
    assert engine.until(Health)[-1] == Health(healthy=True)
    assert pixels(draw(engine, 3)) == wanted


def test_a_trial_that_waits_for_work_under_way_is_made_later(engine: Driven) -> None:
    check = DeviceCheck(engine.engine.loaded.model, lambda event: None, lambda: None)
    check.ran_out()
    check.look(idle=False, grid=(2, 2))
    assert check.look_again_s is not None
    check.look(idle=True, grid=(2, 2))
    assert check.look_again_s is None


def fill() -> list[torch.Tensor]:
    """Take all memory of the GPU that is free, to the last block."""
    held: list[torch.Tensor] = []
    for size in (1 << 30, 1 << 26, 1 << 21, 1 << 16, 1 << 9):
        with suppress(torch.OutOfMemoryError):
            while True:
                held.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
    return held


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_full_gpu_fails_pictures_and_draws_them_as_before_once_it_has_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_check, "LOOK_AGAIN_S", 0.5)
    with driven(device="cuda", kv_device_bytes=1 << 24) as engine:
        wanted = pixels(draw(engine, 1))
        before = held(engine)
        torch.cuda.empty_cache()
        taken = fill()
        assert "memory of the device is full" in failures(draw(engine, 2))[2]
        assert engine.until(Health)[-1] == Health(healthy=False)
        assert "memory of the device is full" in failures(draw(engine, 3))[3]
        assert held(engine) == before == 0
        del taken
        torch.cuda.empty_cache()
        assert engine.until(Health)[-1] == Health(healthy=True)
        ours, theirs = (Image.open(BytesIO(data)) for data in (pixels(draw(engine, 4)), wanted))
        assert agree(ours, theirs)
