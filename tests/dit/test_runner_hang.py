"""A runner one of whose threads hangs says so; one that is only slow does not."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from bagel.engine.sampler import Canvas
from bagel.engine.text_scheduler import Reader
from bagel.model.mot import MoTLayer
from bagel_dit import single_stage as whole
from bagel_dit.decoding import Decoder
from bagel_dit.messages import Begun, Drawn, Hung, Output, Serve, Stepped, StepPlan
from tests.dit.runner_server import READ, of, serving

LIMIT_S = 1.0


@pytest.mark.parametrize(
    ("owner", "name"), [(Canvas, "step"), (Reader, "work"), (Decoder, "_image"), (whole, "request_from_wire")]
)
def test_work_that_hangs_is_told_with_where_it_is(owner: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()
    work = getattr(owner, name)

    def hang_here(*args: Any, **options: Any) -> Any:
        over.wait()
        return work(*args, **options)

    with serving(step_timeout_s=LIMIT_S) as server:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, hang_here)
            if owner is whole:
                server.send(Serve(1, b"", Output()))
            else:
                server.begin(1, "text2img", steps=2)
                if owner is Reader:
                    server.send(READ)
                else:
                    assert of(server.read(), Begun)
                    server.send(StepPlan((1,), read=False))
            try:
                hung = server.until(Hung)[-1]
            finally:
                over.set()
        assert isinstance(hung, Hung) and not hung.loading
        assert "hang_here" in hung.stack


def test_a_step_that_takes_long_but_gets_on_is_not_hung(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = MoTLayer.forward

    def slowly(*args: Any) -> Any:
        time.sleep(LIMIT_S / 2)
        return forward(*args)

    with serving(step_timeout_s=LIMIT_S) as server:
        server.begin(1, "text2img", steps=2)
        assert of(server.read(), Begun)
        time.sleep(1.5 * LIMIT_S)  # without work
        with monkeypatch.context() as patch:
            patch.setattr(MoTLayer, "forward", slowly)
            began = time.monotonic()
            server.send(StepPlan((1,), read=False))
            replies = server.until(Stepped)
        assert time.monotonic() - began > 1.5 * LIMIT_S
        assert not [reply for reply in replies if isinstance(reply, Hung)]
        assert of(replies + server.until(Drawn), Drawn) == [1]
