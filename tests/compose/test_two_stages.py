"""deploy/compose.yaml on a real engine: up, the same picture, few rights, and what is lost comes back."""

from __future__ import annotations

import json
import time
from base64 import b64decode
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from io import BytesIO
from threading import Event
from typing import Any
from urllib.request import Request, urlopen

import pytest
from PIL import Image

from bagel.errors import BagelError
from bagel.events import Result, StepDone
from tests.compose.stack import COMPOSE, GATEWAY_IMAGE, HERE, LIMIT_S, PICTURE, Stack, docker, drawn, until
from tests.helpers import agree

pytestmark = pytest.mark.compose

LONG: dict[str, Any] = {"prompt": "a large green triangle", "seed": 1, "steps": 300}
BRIEF = LONG | {"steps": 100}
"""Under way when a service is told to stop, and done before the drain timeout also on a machine that is busy."""
GATEWAY_MB = 300


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with Stack("bagel-test", [COMPOSE, HERE / "kv-network.yaml"]).up() as stack:
        yield stack


def test_the_picture_is_the_one_made_without_containers(stack: Stack, expected: Image.Image) -> None:
    assert drawn(stack, expected)


def test_rest_gives_the_same_picture_and_says_that_it_is_ready(stack: Stack, expected: Image.Image) -> None:
    url = f"http://{stack.compose('port', 'gateway', '8000')}"
    with urlopen(f"{url}/readyz", timeout=LIMIT_S) as ready:
        assert ready.status == 200
    asked = {"prompt": PICTURE["prompt"], "seed": PICTURE["seed"], "num_inference_steps": PICTURE["steps"]}
    headers = {"Content-Type": "application/json"}
    request = Request(f"{url}/v1/images/generations", json.dumps(asked).encode(), headers)
    with urlopen(request, timeout=LIMIT_S) as answer:
        encoded = json.load(answer)["data"][0]["b64_json"]
    assert agree(Image.open(BytesIO(b64decode(encoded))).convert("RGB"), expected)


def test_the_gateways_image_is_small_and_holds_no_torch() -> None:
    looked = (
        "import importlib.util as u, bagel_gateway; print([m for m in ('torch', 'transformers') if u.find_spec(m)])"
    )
    assert docker("run", "--rm", "--entrypoint", "python3", GATEWAY_IMAGE, "-c", looked) == "[]"
    assert int(docker("image", "inspect", "--format", "{{.Size}}", GATEWAY_IMAGE)) < GATEWAY_MB * 10**6


@pytest.mark.parametrize("service", ["thinker", "dit", "gateway"])
def test_a_container_has_few_rights_and_limits(stack: Stack, service: str) -> None:
    status = dict(
        line.split(":\t") for line in stack.run(service, "cat", "/proc/1/status").splitlines() if ":\t" in line
    )
    assert status["Uid"].split()[0] == "10001" and status["NoNewPrivs"] == "1"
    assert {int(status[name], 16) for name in ("CapPrm", "CapEff", "CapBnd")} == {0}
    write = "import sys\ntry: open(sys.argv[1], 'w')\nexcept OSError as error: print(error.strerror)"
    assert stack.run(service, "python3", "-c", write, "/opt/bagel/written") == "Read-only file system"
    assert stack.run(service, "python3", "-c", write, "/tmp/written") == ""
    limits = stack.inspect(service)["HostConfig"]
    assert all(limits[name] > 0 for name in ("Memory", "NanoCpus", "PidsLimit"))


@pytest.mark.parametrize("service", ["gateway", "dit", "thinker"])
def test_a_stopped_service_finishes_what_is_under_way(stack: Stack, service: str, expected: Image.Image) -> None:
    try:
        with under_way(stack, BRIEF) as running:
            stack.compose("stop", service)
            assert running.result(LIMIT_S).image is not None
        assert stack.inspect(service)["State"]["ExitCode"] == 0
    finally:
        stack.compose("start", service)
        stack.until_healthy("thinker", "dit", "gateway")
    assert drawn(stack, expected)


@pytest.mark.parametrize("service", ["gateway", "dit"])
def test_a_crash_fails_what_is_under_way_and_the_service_comes_back(
    stack: Stack, service: str, expected: Image.Image
) -> None:
    before = stack.inspect(service)["RestartCount"]
    with under_way(stack) as running:
        stack.crash(service)
        with pytest.raises(BagelError) as caught:
            running.result(LIMIT_S)
    assert caught.value.grpc_status == "UNAVAILABLE"
    until(lambda: stack.inspect(service)["RestartCount"] > before)
    stack.until_healthy("thinker", "dit", "gateway")
    assert drawn(stack, expected)


def test_a_thinker_that_crashes_while_it_reads_fails_the_request_and_comes_back(
    stack: Stack, expected: Image.Image
) -> None:
    before = stack.inspect("thinker")["RestartCount"]
    with slow_reading(stack) as running:
        stack.crash("thinker")
        with pytest.raises(BagelError) as caught:
            running.result(LIMIT_S)
    assert caught.value.grpc_status == "UNAVAILABLE"
    until(lambda: stack.inspect("thinker")["RestartCount"] > before)
    stack.until_healthy("thinker", "dit", "gateway")
    assert drawn(stack, expected)


def test_a_network_that_is_cut_while_kv_streams_fails_the_request_and_heals(
    stack: Stack, expected: Image.Image
) -> None:
    with slow_reading(stack) as running:
        docker("network", "disconnect", "bagel-test_kv", stack.container("dit"))
        try:
            with pytest.raises(BagelError) as caught:
                running.result(LIMIT_S)
        finally:
            docker("network", "connect", "bagel-test_kv", stack.container("dit"))
    assert caught.value.grpc_status in ("UNAVAILABLE", "DEADLINE_EXCEEDED")
    assert "thinker-0" in str(caught.value)
    assert drawn(stack, expected)


class under_way:
    """A picture that has begun to be drawn, as its Result to come."""

    def __init__(self, stack: Stack, request: dict[str, Any] = LONG) -> None:
        self.stack, self.request = stack, request
        self.begun, self.pool = Event(), ThreadPoolExecutor(1)

    def __enter__(self) -> Future[Result]:
        self.running = self.pool.submit(self.run)
        until(lambda: self.begun.is_set() or self.running.done(), LIMIT_S)
        assert self.begun.is_set(), self.running.result()
        return self.running

    def __exit__(self, *error: object) -> None:
        self.running.cancel()
        self.pool.shutdown()

    def run(self) -> Result:
        with self.stack.client() as client:
            return client.generate(**self.request, on_event=self.heard, timeout=LIMIT_S)

    def heard(self, event: object) -> None:
        if isinstance(event, StepDone):
            self.begun.set()


class slow_reading(under_way):
    """A prompt of 3000 tokens that the Thinker reads with a tenth of a CPU: its 37 MB of K/V are on their way."""

    def __init__(self, stack: Stack) -> None:
        words = "a large red circle to the left of a small blue square " * 250
        super().__init__(stack, {"prompt": f"{time.time_ns()} {words}", "seed": 1, "steps": 3})  # read never before

    def __enter__(self) -> Future[Result]:
        self.stack.set_cpus("thinker", "0.1")
        before = received(self.stack)
        self.running = self.pool.submit(self.run)
        until(lambda: received(self.stack) > before + 2**20 or self.running.done(), LIMIT_S)
        assert not self.running.done(), self.running.result()
        return self.running

    def __exit__(self, *error: object) -> None:
        self.stack.set_cpus("thinker", "2")
        super().__exit__(*error)


def received(stack: Stack) -> int:
    """Bytes that the DiT has received on all of its networks."""
    lines = stack.run("dit", "cat", "/proc/net/dev").splitlines()[2:]
    return sum(int(line.split(":")[1].split()[0]) for line in lines if not line.strip().startswith("lo"))
