"""Services that are lost, told to stop, silent, full or of another model: what is told, and that the others go on."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

from bagel.checkpoint.files import EMA
from bagel.client import Client
from bagel.deployment.launcher import is_serving
from bagel.deployment.process import Service
from bagel.errors import BagelError, Draining, NoBackend, RunnerDied, SourceUnavailable
from bagel.events import Result, StepDone, TextDelta
from bagel.rpc.errors import from_rpc_error
from bagel.rpc.transport import sync_channel
from bagel.v1.dit_pb2 import DitServiceGenerateRequest
from bagel.v1.dit_pb2_grpc import DitServiceStub
from tests.helpers import sketch
from tests.services.test_services import EDIT, SMALL, same
from tests.shared import MODEL, released, until_serving

pytestmark = pytest.mark.slow  # each start of services takes seconds

DETECTED_WITHIN_S = 5.0


class Stage:
    """Services that a test may lose: a Thinker, a DiT and their gateway, each on an address of its own."""

    def __init__(self, logs: Path) -> None:
        self.logs, self.running = logs, list[Service]()

    def start(self, name: str, module: str, *arguments: str, listen: str = "127.0.0.1:0") -> Service:
        service = Service(name, name, module, ["--listen", listen, *arguments], os.environ, self.logs)
        self.running.append(service)
        service.address(time.monotonic() + 60)
        return service

    def thinker(self, listen: str = "127.0.0.1:0", *more: str, model: Path = MODEL) -> Service:
        return self.start("thinker-0", "bagel_thinker", "--model", str(model), *more, listen=listen)

    def dit(self, thinker: Service, *more: str, name: str = "dit-0") -> Service:
        source = f"thinker-0={thinker.address(0)}"
        return self.start(name, "bagel_dit", "--model", str(MODEL), "--name", name, "--source", source, *more)

    def gateway(self, thinker: Service, dit: Service, *more: str) -> Service:
        named = [f"thinker-0={thinker.address(0)}", f"dit-0={dit.address(0)}"]
        stages = ["--thinker", named[0], "--dit", named[1]]
        return self.start(
            "gateway", "bagel_gateway", "--pipeline", "bagel", *stages, *(more or ("--backend-timeout", "1"))
        )

    def pair(self, *flags: str, model: Path = MODEL, dit: Sequence[str] = ()) -> tuple[Service, Service]:
        """A Thinker and a DiT with these flags: those that were started last if they are so and still run, else new."""
        old = self.last("thinker-0")
        thinker = self.running_with("thinker-0", ["--model", str(model), *flags])
        if thinker is None:
            thinker = self.thinker(old.address(0) if old else "127.0.0.1:0", *flags, model=model)
        source = ["--source", f"thinker-0={thinker.address(0)}"]
        return thinker, self.running_with("dit-0", [*source, *dit]) or self.dit(thinker, *dit)

    def last(self, name: str) -> Service | None:
        """The one of that name that was started last."""
        return next((service for service in reversed(self.running) if service.name == name), None)

    def running_with(self, name: str, flags: list[str]) -> Service | None:
        """As `last`, if it still runs and its flags end with these; another one ends."""
        service = self.last(name)
        if service is None:
            return None
        command = list(map(str, service.process.args))  # type: ignore[arg-type]
        if service.process.poll() is None and command[-len(flags) :] == flags:
            return service
        self.end([service])
        return None

    def end(self, services: Sequence[Service]) -> None:
        """End these services, whatever a test did to them."""
        for service in reversed(services):
            with suppress(ProcessLookupError):
                service.process.send_signal(signal.SIGCONT)
            service.tell_to_stop()
        for service in reversed(services):
            service.end(10)


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    """Services of one test, for one that starts them with settings of its own."""
    stage = Stage(tmp_path)
    yield stage
    stage.end(stage.running)


@pytest.fixture(scope="module")
def all_of_lasting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    stage = Stage(tmp_path_factory.mktemp("lasting"))
    yield stage
    stage.end(stage.running)


@pytest.fixture
def lasting(all_of_lasting: Stage) -> Iterator[Stage]:
    """A Thinker and a DiT (`pair`) that the next test goes on with if this one leaves them alive; gateways end."""
    stage = all_of_lasting
    yield stage
    for service in stage.running:
        with suppress(ProcessLookupError):
            service.process.send_signal(signal.SIGCONT)
    stage.end([service for service in stage.running if service.name == "gateway"])
    stage.running = [service for service in stage.running if service.name != "gateway"]


@contextmanager
def fails_within(seconds: float, *kinds: type[BagelError]) -> Iterator[pytest.ExceptionInfo[BagelError]]:
    start = time.monotonic()
    with pytest.raises(kinds) as caught:
        yield caught
    assert time.monotonic() - start < seconds


def runner_pid(dit: Service) -> int:
    """The DiT's runner process, from its log."""
    assert dit.log is not None
    lines = [json.loads(line) for line in dit.log.read_text().splitlines() if '"runner_pid"' in line]
    return int(lines[-1]["runner_pid"])


def test_lost_services_are_told_and_missed_and_the_next_request_works(lasting: Stage) -> None:
    thinker, dit = lasting.pair()
    gateway = lasting.gateway(thinker, dit)
    until_serving(thinker, dit, gateway)
    with Client(gateway.address(0)) as client:
        lose_the_runner(client, dit)
        until_serving(dit, gateway)
        assert client.generate("after the runner", **SMALL).image is not None
        assert released(thinker.address(0), dit.address(0))
        lose_the_thinker(client, thinker)
        assert released(dit.address(0))
        again = lasting.thinker(thinker.address(0))
        until_serving(again, gateway)
        assert client.generate("after the Thinker", **SMALL).image is not None
        assert released(again.address(0), dit.address(0))


def lose_the_runner(client: Client, dit: Service) -> None:
    events = client.stream("cut short", seed=1, steps=500, height=64, width=64)
    while not isinstance(next(events), StepDone):
        pass
    os.kill(runner_pid(dit), signal.SIGKILL)
    with fails_within(DETECTED_WITHIN_S, RunnerDied):
        list(events)


def lose_the_thinker(client: Client, thinker: Service) -> None:
    events = client.stream("hello", modality="text2text", seed=1, max_tokens=5000)
    while "text" not in type(next(events)).__name__.lower():
        pass
    thinker.process.kill()
    with fails_within(DETECTED_WITHIN_S, SourceUnavailable, BagelError) as caught:
        list(events)
    assert caught.value.grpc_status == "UNAVAILABLE"
    deadline = time.monotonic() + DETECTED_WITHIN_S
    while time.monotonic() < deadline:
        with pytest.raises(BagelError) as caught:
            client.generate("nobody reads this", **SMALL)
        if isinstance(caught.value, NoBackend):
            return
    pytest.fail(f"the gateway goes on choosing a Thinker that is gone: {caught.value}")


def test_what_the_dit_knows_already_is_no_loss_to_a_thinker_that_reads_it_anew(lasting: Stage) -> None:
    """It gives its lease back at once, while the Thinker, started again, still computes what it was for."""
    thinker, dit = lasting.pair()
    gateway = lasting.gateway(thinker, dit)
    until_serving(thinker, dit, gateway)
    long = "a large red circle to the left of a small blue square " * 60
    with Client(gateway.address(0)) as client:
        before = client.generate(long, **SMALL)
        thinker.process.kill()
        thinker.process.wait(DETECTED_WITHIN_S)
        again = lasting.thinker(thinker.address(0))
        until_serving(again, gateway)
        after = client.generate(long, **SMALL)
    assert same(after, before)
    assert (after.usage["computed_tokens"], after.usage["pulled_bytes"]) == (before.usage["computed_tokens"], 0)
    assert released(again.address(0), dit.address(0))


def test_a_thinker_that_is_told_to_stop_ends_the_pictures_under_way_first(lasting: Stage) -> None:
    thinker, dit = lasting.pair()
    gateway = lasting.gateway(thinker, dit)
    until_serving(thinker, dit, gateway)
    asked: dict[str, Any] = SMALL | {"think": True, "max_think_tokens": 200}
    with Client(gateway.address(0)) as client:
        whole = client.generate("a fox", **asked)
        events = client.stream("a fox", **asked)
        while "text" not in type(next(events)).__name__.lower():
            pass
        thinker.process.send_signal(signal.SIGTERM)
        last = list(events)[-1]
        assert isinstance(last, Result)
        assert same(last, whole)
        assert thinker.process.wait(DETECTED_WITHIN_S) == 0
        with pytest.raises(BagelError) as caught:
            client.generate("too late", **SMALL)
        assert caught.value.grpc_status == "UNAVAILABLE"


def test_a_dit_that_is_told_to_stop_answers_until_its_pictures_are_done(lasting: Stage) -> None:
    """It takes nothing new, but one that answers no checks would be taken for silent, and its pictures given up."""
    thinker, dit = lasting.pair()
    gateway = lasting.gateway(thinker, dit)
    until_serving(thinker, dit, gateway)
    with Client(gateway.address(0)) as client, sync_channel(dit.address(0)) as channel:
        events = client.stream("a fox", **SMALL | {"steps": 500})
        while not isinstance(next(events), StepDone):
            pass
        dit.process.send_signal(signal.SIGTERM)
        while is_serving(dit.address(0)):
            time.sleep(0.05)
        health = HealthStub(channel).Check(HealthCheckRequest(), timeout=10)
        assert health.status == HealthCheckResponse.NOT_SERVING
        with pytest.raises(grpc.RpcError) as caught:
            list(DitServiceStub(channel).Generate(DitServiceGenerateRequest(), timeout=10))
        assert isinstance(from_rpc_error(caught.value, "dit-0"), Draining)
        assert isinstance(list(events)[-1], Result)
        assert dit.process.wait(DETECTED_WITHIN_S) == 0


def test_a_dit_that_is_told_to_stop_under_a_think_text_leaves_the_picture_to_another(lasting: Stage) -> None:
    thinker, dit = lasting.pair()
    dits = [dit, lasting.dit(thinker, name="dit-1")]
    gateway = lasting.gateway(thinker, dits[0], "--dit", f"dit-1={dits[1].address(0)}", "--backend-timeout", "1")
    until_serving(thinker, *dits, gateway)
    asked: dict[str, Any] = SMALL | {"think": True, "max_think_tokens": 200}
    with Client(gateway.address(0)) as client:
        whole = client.generate("a fox", **asked)
        for dit in dits:
            events = client.stream("a fox", **asked)
            while not isinstance(next(events), TextDelta):
                pass
            dit.process.send_signal(signal.SIGTERM)
            if dit is dits[0]:
                last = list(events)[-1]
                assert isinstance(last, Result) and same(last, whole)
            else:
                with pytest.raises(NoBackend, match="no DiT is ready"):
                    list(events)
            assert dit.process.wait(DETECTED_WITHIN_S) == 0
    assert released(thinker.address(0))


def test_a_service_that_falls_silent_is_given_up_in_its_time(lasting: Stage) -> None:
    thinker, dit = lasting.pair()
    gateway = lasting.gateway(thinker, dit, "--silence-timeout", "2", "--backend-timeout", "30")
    until_serving(thinker, dit, gateway)
    with Client(gateway.address(0)) as client:
        for service, request in (
            (thinker, {"modality": "text2text", "max_tokens": 20_000}),
            (dit, {"steps": 900, "height": 64, "width": 64}),
        ):
            events = client.stream("on and on", seed=1, **request)
            while not isinstance(next(events), StepDone | TextDelta):
                pass
            service.process.send_signal(signal.SIGSTOP)
            with fails_within(2 + DETECTED_WITHIN_S, BagelError) as caught:
                list(events)
            assert caught.value.grpc_status == "UNAVAILABLE"
            assert "has not answered" in str(caught.value)
            service.process.send_signal(signal.SIGCONT)
            assert client.generate("and on", **SMALL).image is not None
    assert released(thinker.address(0), dit.address(0))


def test_a_full_store_makes_requests_wait(lasting: Stage) -> None:
    thinker, dit = lasting.pair("--kv-store-bytes", "3000000", "--batch-timeout", "30")
    gateway = lasting.gateway(thinker, dit)
    until_serving(thinker, dit, gateway)
    colours = ("red", "green", "blue", "navy", "gold")
    edits = [EDIT | {"prompt": f"make it {each}", "image": sketch(80, 80, each)} for each in colours]
    with Client(gateway.address(0)) as client:
        assert all(result.image is not None for result in client.generate_many(edits))
    assert released(thinker.address(0), dit.address(0))


def test_services_of_different_models_never_share_kv(lasting: Stage, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for file in MODEL.iterdir():
        if file.name != "config.json":
            (other / file.name).symlink_to(file)
    config = json.loads((MODEL / "config.json").read_text())
    config["image_transforms"] = {"vae": [512, 256, 16], "vit": [490, 224, 14]}
    (other / "config.json").write_text(json.dumps(config))
    thinker, dit = lasting.pair(model=other)
    gateway = lasting.gateway(thinker, dit)
    until_serving(thinker, dit, gateway)
    with Client(gateway.address(0)) as client, pytest.raises(BagelError) as caught:
        client.generate("a chimera", **SMALL)
    assert caught.value.grpc_status == "FAILED_PRECONDITION"
    assert "fingerprint" in str(caught.value)


def test_a_queue_longer_than_the_page_timeout_fails_no_picture(lasting: Stage) -> None:
    thinker, dit = lasting.pair(dit=["--kv-page-timeout", "1.5"])
    gateway = lasting.gateway(thinker, dit)
    until_serving(thinker, dit, gateway)
    edits = [EDIT | {"prompt": f"more light, {i}", "image": sketch(640, 640 - 16 * i)} for i in range(3)]
    with Client(gateway.address(0)) as client:
        assert all(result.image is not None for result in client.generate_many(edits))
    assert released(thinker.address(0), dit.address(0))


def test_a_dit_whose_runner_cannot_be_loaded_again_ends_with_exit_code_1(stage: Stage, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for file in MODEL.iterdir():
        (model / file.name).symlink_to(file)
    dit = stage.start("dit-0", "bagel_dit", "--model", str(model))
    until_serving(dit)
    (model / EMA).unlink()
    os.kill(runner_pid(dit), signal.SIGKILL)
    assert dit.process.wait(60) == 1
    with pytest.raises(BagelError, match=f"the runner died and could not be loaded again: .*{EMA}"):
        dit.check()
    log = (tmp_path / "dit-0.log").read_text()
    assert '"event": "the service has failed and ends"' in log and "Traceback" not in log


def test_a_wrong_setting_ends_the_process_with_one_line(stage: Stage) -> None:
    with pytest.raises(BagelError, match="--model"):
        stage.start("thinker-0", "bagel_thinker")
    with pytest.raises(BagelError, match="/nowhere/at/all"):
        stage.thinker(model=Path("/nowhere/at/all"))
