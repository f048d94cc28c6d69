"""The three services as real processes: what moves between them, and what happens when one of them is lost."""

from __future__ import annotations

import asyncio
import json
import os
import random
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
from PIL import Image

from bagel.checkpoint.files import EMA
from bagel.client import AsyncClient, Client
from bagel.deployment.deploy_file import load_deploy_config, shipped_deploy_config
from bagel.deployment.launcher import Deployment, is_serving
from bagel.deployment.process import Service
from bagel.errors import BagelError, Draining, NoBackend, RunnerDied, SourceUnavailable
from bagel.events import Result, StepDone, TextDelta
from bagel.rpc.errors import from_rpc_error
from bagel.rpc.transport import sync_channel
from bagel.v1 import kv_pb2
from bagel.v1.dit_pb2 import DitServiceGenerateRequest
from bagel.v1.dit_pb2_grpc import DitServiceStub
from bagel.v1.kv_pb2_grpc import KvBlocksServiceStub
from tests.conftest import GOLDEN
from tests.helpers import agree, sketch

pytestmark = pytest.mark.slow  # each start of services takes seconds

MODEL = GOLDEN / "checkpoint"
DETECTED_WITHIN_S = 5.0
CANCELS = 200
EDIT: dict[str, Any] = {"modality": "img2img", "steps": 3, "cfg_img_scale": 2.0, "height": 64, "width": 64}
SMALL: dict[str, Any] = {"steps": 4, "height": 64, "width": 64, "seed": 3}


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """Thinker, DiT and gateway, started once."""
    config = load_deploy_config(shipped_deploy_config("bagel"))
    with Deployment(config, MODEL, device="cpu", init_timeout_s=120, logs=tmp_path_factory.mktemp("logs")) as running:
        yield running


@pytest.fixture
def client(services: Deployment) -> Iterator[Client]:
    with Client(services.address) as client:
        yield client


def stats(address: str) -> kv_pb2.GetStatsResponse:
    with sync_channel(address) as channel:
        return KvBlocksServiceStub(channel).GetStats(kv_pb2.GetStatsRequest(), timeout=10)


def address(services: Deployment, name: str) -> str:
    return next(service.address(0) for service in services.services if service.name == name)


def logged(services: Deployment, name: str, event: str) -> list[dict[str, Any]]:
    """The log lines of that event."""
    assert isinstance(services._logs, Path)
    lines = (services._logs / f"{name}.log").read_text().splitlines()
    found = [json.loads(line) for line in lines if line.startswith("{")]
    return [line for line in found if line.get("event") == event]


def released(*addresses: str) -> bool:
    """Whether nothing is held and nothing under way, at once or soon."""
    deadline = time.monotonic() + DETECTED_WITHIN_S
    while time.monotonic() < deadline:
        now = [stats(address) for address in addresses]
        if all((each.held_bytes, each.leases, each.pulls) == (0, 0, 0) for each in now):
            return True
        time.sleep(0.1)
    return False


def test_an_edit_moves_each_page_once_and_a_second_one_of_its_image_next_to_nothing(
    services: Deployment, client: Client
) -> None:
    thinker, dit = address(services, "thinker-0"), address(services, "dit-0")
    before, sent = stats(thinker), stats(dit)
    first = client.generate("make it snow", image=sketch(512, 512), seed=1, **EDIT)
    once, received = stats(thinker), stats(dit)
    unique = once.computed_bytes - before.computed_bytes
    pulled = received.received_bytes - sent.received_bytes
    assert once.computed_segments - before.computed_segments == 4  # VAE, ViT, and the text with and without them
    assert unique <= pulled <= 1.05 * unique
    assert first.usage["pulled_bytes"] == pulled
    assert first.usage["computed_tokens"] * (unique // first.usage["computed_tokens"]) == unique
    client.generate("paint it as a watercolour", image=sketch(512, 512), seed=2, **EDIT)
    assert stats(dit).received_bytes - received.received_bytes <= 0.02 * pulled
    assert released(thinker, dit)


def test_the_dit_loads_before_the_thinker_has_finished(services: Deployment, client: Client) -> None:
    result = client.generate("more light", image=sketch(1024, 1024, "navy"), seed=3, request_id="overlap", **EDIT)
    assert result.image is not None
    (landed,) = [line for line in logged(services, "dit-0", "contexts landed") if line["request_id"] == "overlap"]
    built = [line for line in logged(services, "thinker-0", "context built") if line["request_id"] == "overlap"]
    assert landed["first_page_at"] < max(line["last_layer_at"] for line in built if line["last_layer_at"])


def mixed(count: int = 8) -> list[dict[str, Any]]:
    """Requests of all kinds and several sizes."""
    sizes = [(64, 64), (96, 64), (64, 96)]
    requests: list[dict[str, Any]] = []
    for i in range(count):
        height, width = sizes[i % 3]
        picture = {"steps": 3 + i % 3, "height": height, "width": width}
        prompt: dict[str, Any] = {"prompt": f"thing number {i}", "seed": i}
        match i % 4:
            case 0:
                requests.append(prompt | picture | ({"think": True, "max_think_tokens": 6} if i % 8 == 0 else {}))
            case 1:
                requests.append(prompt | picture | {"modality": "img2img", "image": sketch(64 + 16 * i, 80)})
            case 2:
                requests.append(prompt | {"modality": "text2text", "max_tokens": 5, "think": i == 2})
            case 3:
                requests.append(prompt | {"modality": "img2text", "max_tokens": 5, "image": sketch(80, 64 + 16 * i)})
    return requests


def same(one: Result, other: Result) -> bool:
    pictures = one.image is None and other.image is None
    if one.image is not None and other.image is not None:
        pictures = agree(one.image, other.image)
    return pictures and (one.text, one.token_ids) == (other.text, other.token_ids)


def test_concurrent_requests_agree_with_one_by_one_and_cancels_change_nothing(
    services: Deployment, client: Client
) -> None:
    requests = mixed()
    alone = [client.generate(**request) for request in requests]
    together = client.generate_many(requests)
    assert [same(*pair) for pair in zip(alone, together, strict=True)] == [True] * len(requests)
    survivors = asyncio.run(amid_cancels(services.address, requests, CANCELS))
    assert [same(*pair) for pair in zip(alone, survivors, strict=True)] == [True] * len(requests)
    assert released(address(services, "thinker-0"), address(services, "dit-0"))


async def amid_cancels(gateway: str, requests: Sequence[dict[str, Any]], cancels: int) -> list[Result]:
    """The requests' results, while others are begun and left at random moments."""
    chance = random.Random(4)

    async def leave(client: AsyncClient, request: dict[str, Any]) -> None:
        await asyncio.sleep(chance.random() * 10)
        with suppress(TimeoutError, BagelError):
            async with asyncio.timeout(chance.random() * 0.5):
                await client.generate(**(request | {"seed": chance.randrange(99)}))

    async with AsyncClient(gateway) as client:
        leaving = [asyncio.create_task(leave(client, chance.choice(requests))) for _ in range(cancels)]
        results = await asyncio.gather(*(client.generate(**request) for request in requests))
        await asyncio.gather(*leaving)
    return list(results)


def test_a_client_that_leaves_stops_the_picture_within_a_step(services: Deployment, client: Client) -> None:
    steps = 0
    for event in client.stream("a long one", seed=1, steps=500, height=64, width=64):
        steps += isinstance(event, StepDone)
        if steps == 3:
            break
    assert client.generate("the next", **SMALL).image is not None
    assert released(address(services, "thinker-0"), address(services, "dit-0"))


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

    def pair(self) -> tuple[Service, Service]:
        """The Thinker and the DiT that were started last, if they still run, else new ones."""
        found = {service.name: service for service in self.running}  # the last of each name
        thinker, dit = found.get("thinker-0"), found.get("dit-0")
        if thinker is None or thinker.process.poll() is not None:
            thinker = self.thinker(thinker.address(0) if thinker else "127.0.0.1:0")
        if dit is None or dit.process.poll() is not None:
            dit = self.dit(thinker)
        return thinker, dit

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


def until_serving(*services: Service, limit_s: float = 180) -> None:
    deadline = time.monotonic() + limit_s
    for service in services:
        while not is_serving(service.address(0)):
            assert time.monotonic() < deadline, f"{service.name} is not ready"
            time.sleep(0.1)


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


def test_a_dit_that_is_told_to_stop_under_a_think_text_leaves_the_picture_to_another(stage: Stage) -> None:
    thinker = stage.thinker()
    dits = [stage.dit(thinker, name=name) for name in ("dit-0", "dit-1")]
    gateway = stage.gateway(thinker, dits[0], "--dit", f"dit-1={dits[1].address(0)}", "--backend-timeout", "1")
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


def test_a_full_store_makes_requests_wait(stage: Stage) -> None:
    thinker = stage.thinker("127.0.0.1:0", "--kv-store-bytes", "3000000", "--batch-timeout", "30")
    dit = stage.dit(thinker)
    gateway = stage.gateway(thinker, dit)
    until_serving(thinker, dit, gateway)
    colours = ("red", "green", "blue", "navy", "gold")
    edits = [EDIT | {"prompt": f"make it {each}", "image": sketch(80, 80, each)} for each in colours]
    with Client(gateway.address(0)) as client:
        assert all(result.image is not None for result in client.generate_many(edits))
    assert released(thinker.address(0), dit.address(0))


def test_a_queue_longer_than_the_page_timeout_fails_no_picture(stage: Stage) -> None:
    thinker = stage.thinker()
    dit = stage.dit(thinker, "--kv-page-timeout", "2")
    gateway = stage.gateway(thinker, dit)
    until_serving(thinker, dit, gateway)
    edits = [EDIT | {"prompt": f"more light, {i}", "image": sketch(1024, 1024 - 16 * i)} for i in range(3)]
    with Client(gateway.address(0)) as client:
        assert all(result.image is not None for result in client.generate_many(edits))
    assert released(thinker.address(0), dit.address(0))


def test_a_service_that_falls_silent_is_given_up_in_its_time(stage: Stage) -> None:
    thinker = stage.thinker()
    dit = stage.dit(thinker)
    gateway = stage.gateway(thinker, dit, "--silence-timeout", "2", "--backend-timeout", "30")
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


def test_services_of_different_models_never_share_kv(stage: Stage, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for file in MODEL.iterdir():
        if file.name != "config.json":
            (other / file.name).symlink_to(file)
    config = json.loads((MODEL / "config.json").read_text())
    config["image_transforms"] = {"vae": [512, 256, 16], "vit": [490, 224, 14]}
    (other / "config.json").write_text(json.dumps(config))
    thinker = stage.thinker(model=other)
    dit = stage.dit(thinker)
    gateway = stage.gateway(thinker, dit)
    until_serving(thinker, dit, gateway)
    with Client(gateway.address(0)) as client, pytest.raises(BagelError) as caught:
        client.generate("a chimera", **SMALL)
    assert caught.value.grpc_status == "FAILED_PRECONDITION"
    assert "fingerprint" in str(caught.value)


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


def test_a_picture_is_what_was_asked_for(client: Client) -> None:
    result = client.generate("in another format", output_format="JPEG", **SMALL)
    assert isinstance(result.image, Image.Image)
    assert result.image.size == (64, 64)
    assert result.usage["steps"] == 3
    assert {"context", "denoise", "decode", "total"} <= result.timings.keys()


def test_reflection_and_health_name_the_services(services: Deployment) -> None:
    from grpc_health.v1 import health_pb2, health_pb2_grpc
    from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

    with sync_channel(address(services, "thinker-0")) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        (answer,) = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
        names = {service.name for service in answer.list_services_response.service}
        assert {"bagel.v1.ThinkerService", "bagel.v1.KvBlocksService"} <= names
        health = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service="bagel.v1.ThinkerService")
        assert health.Check(request).status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError):
            health.Check(health_pb2.HealthCheckRequest(service="bagel.v1.DitService"))
