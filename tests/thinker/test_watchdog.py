"""A Thinker whose engine hangs without an error: its callers hear of it, and it ends."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from bagel.deployment.launcher import is_serving
from bagel.deployment.process import Service
from bagel.prompts import TextPart
from bagel.rpc.convert import part_to_wire
from bagel.rpc.transport import sync_channel
from bagel.v1 import thinker_pb2
from bagel.v1.thinker_pb2_grpc import ThinkerServiceStub
from tests.conftest import GOLDEN

pytestmark = pytest.mark.slow  # starts services

LIMIT_S = 60
HANGING = """
import os
import threading
from bagel.engine.text_scheduler import TextScheduler
work = TextScheduler.work
TextScheduler.work = lambda self: threading.Event().wait() if {when} else work(self)
"""


@contextmanager
def thinker(folder: Path, when: str, *flags: str) -> Iterator[tuple[Service, str]]:
    """The service, once it is ready, on the torch engine; its engine's step never ends where `when` holds."""
    (folder / "sitecustomize.py").write_text(HANGING.format(when=when))
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    arguments = ["--listen", "127.0.0.1:0", "--model", str(GOLDEN / "checkpoint"), "--device", "cpu"]
    arguments += ["--engine", "torch", *flags]
    service = Service(
        "thinker-0", "the Thinker", "bagel_thinker", arguments, {**os.environ, "PYTHONPATH": path}, folder
    )
    try:
        address, deadline = service.address(time.monotonic() + LIMIT_S), time.monotonic() + LIMIT_S
        while not is_serving(address):
            assert time.monotonic() < deadline
            service.check()
            time.sleep(0.1)
        yield service, address
    finally:
        service.process.kill()
        service.end(10)


def build(address: str) -> list[thinker_pb2.BuildContextResponse]:
    with sync_channel(address) as channel:
        request = thinker_pb2.BuildContextRequest(parts=[part_to_wire(TextPart("a"))])
        return list(ThinkerServiceStub(channel).BuildContext(request, timeout=LIMIT_S))


def test_only_an_engine_that_hangs_ends_the_service_and_is_told_to_its_callers(
    tmp_path: Path,
) -> None:
    switch = tmp_path / "hang"
    with thinker(tmp_path, f"os.path.exists({str(switch)!r})", "--step-timeout", "1") as (service, address):
        # Neither many short steps nor a time without work is a hang.
        deadline = time.monotonic() + 3
        while time.monotonic() < deadline:
            assert build(address)
        time.sleep(2)
        assert build(address)
        switch.touch()
        with pytest.raises(grpc.RpcError) as caught:
            build(address)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "the Thinker's engine has hung for 1 s, and the service ends" in str(caught.value.details())
        assert service.process.wait(LIMIT_S) == 1
    log = (tmp_path / "thinker-0.log").read_text()
    assert "the engine hangs" in log and "sitecustomize.py" in log, "its stack is told"


@pytest.mark.parametrize("seconds", ["0", "-1", "inf", "soon"])
def test_a_step_timeout_that_is_none_is_refused(seconds: str, capsys: pytest.CaptureFixture[str]) -> None:
    from bagel_thinker.__main__ import main

    assert main(["--model", "x", "--step-timeout", seconds]) == 2
    assert "is no number of seconds above 0" in capsys.readouterr().err
