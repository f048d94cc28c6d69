"""The gateway as a service: cancelling, deadlines, limits, draining, its backends, and its process."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from random import Random
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from bagel.client import Client
from bagel.deployment.gateway_config import GatewayConfig
from bagel.errors import (
    BagelError,
    Busy,
    ConfigError,
    Draining,
    ForeignContext,
    KvTimeout,
    NoBackend,
    RemoteError,
    UnknownSegment,
)
from bagel.events import Result, ServiceEvent, TextDelta
from bagel.rpc.transport import channel, sync_channel
from bagel.v1 import common_pb2, gateway_pb2, gateway_pb2_grpc
from bagel_gateway.settings import tls_of
from tests.gateway_stages import Deployment, Dit, deployment

ROOT = Path(__file__).parents[2]
STAGES = ("--thinker", "thinker-0=127.0.0.1:1", "--dit", "dit-0=127.0.0.1:2")


def through(work: Callable[[Deployment], Coroutine[Any, Any, None]], topology: str = "bagel", **settings: Any) -> None:
    """Run work with a deployment."""

    async def run() -> None:
        async with asyncio.timeout(30), deployment(topology, **settings) as made:
            await work(made)

    asyncio.run(run())


def red_cube() -> gateway_pb2.GenerateRequest:
    part = common_pb2.Part(text=common_pb2.TextPart(text="a red cube"))
    return gateway_pb2.GenerateRequest(request=common_pb2.Request(modality=common_pb2.MODALITY_TEXT2IMG, prompt=[part]))


async def status_of(at: Deployment, request: gateway_pb2.GenerateRequest) -> tuple[grpc.StatusCode, list[Any]]:
    """The code and the details that a call ends with."""

    def call() -> tuple[grpc.StatusCode, list[Any]]:
        with sync_channel(at.target) as connection:
            try:
                list(gateway_pb2_grpc.GatewayServiceStub(connection).Generate(request))
            except grpc.RpcError as error:
                return error.code(), list(rpc_status.from_call(error).details)
        raise AssertionError("the call succeeded")

    return await asyncio.to_thread(call)


async def health(at: Deployment) -> int:
    async with channel(at.target) as connection:
        reply = await health_pb2_grpc.HealthStub(connection).Check(
            health_pb2.HealthCheckRequest(service="bagel.v1.GatewayService")
        )
    return int(reply.status)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


def gates(at: Deployment) -> list[asyncio.Event]:
    return [*(thinker.go for thinker in at.thinkers), *(dit.go for dit in at.dits)]


def hold(at: Deployment) -> None:
    """Let no stage finish."""
    for gate in gates(at):
        gate.clear()


def release(at: Deployment) -> None:
    for gate in gates(at):
        gate.set()


def test_a_wrong_field_is_a_field_violation() -> None:
    async def work(at: Deployment) -> None:
        request = red_cube()
        request.request.image.steps = 1
        code, details = await status_of(at, request)
        bad, info = error_details_pb2.BadRequest(), error_details_pb2.ErrorInfo()
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert any(detail.Unpack(bad) for detail in details) and any(detail.Unpack(info) for detail in details)
        [violation] = bad.field_violations
        assert violation.field == "steps" and "steps is 1" in violation.description
        assert (info.reason, info.domain) == ("InvalidRequest", "bagel-serving")

    through(work)


def test_bytes_that_are_no_message_are_the_callers_fault() -> None:
    async def work(at: Deployment) -> None:
        async with channel(at.target) as connection:
            for method in ("Generate", "DescribeModel"):
                call: Any = connection.unary_stream(f"/bagel.v1.GatewayService/{method}", None, None)
                with pytest.raises(grpc.aio.AioRpcError, match="the request cannot be read") as caught:
                    await call(b"\xff" * 20).read()
                assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT

    through(work)


def test_a_client_that_leaves_stops_every_stage() -> None:
    async def work(at: Deployment) -> None:
        hold(at)
        leaving = asyncio.create_task(at.client.generate("a red cube", cfg_text_scale=1.0))
        await at.dits[0].called.wait()
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        await at.settled()
        assert {"build is cancelled", "draw is cancelled"} <= set(at.journal.events)
        release(at)
        assert (await at.client.generate("a red cube")).image is not None

    through(work, max_requests=1)


def test_random_cancels_leave_nothing_behind() -> None:
    async def work(at: Deployment) -> None:
        random = Random(0)

        async def leave_early(number: int) -> None:
            drawn = asyncio.create_task(at.client.generate("a red cube", think=number % 2 == 0, seed=number))
            await asyncio.sleep(random.uniform(0, 0.05))
            drawn.cancel()
            await asyncio.gather(drawn, return_exceptions=True)

        async def stay(number: int) -> None:
            result = await at.client.generate("a red cube", seed=number)
            assert result.seed == number and result.image is not None

        await asyncio.gather(*(stay(n) if n % 5 == 0 else leave_early(n) for n in range(100)))
        await at.settled()
        assert not any(backend.under_way for backend in (*at.gateway.backends.thinkers, *at.gateway.backends.dits))

    through(work, max_requests=200, sampling_defaults={"height": 16, "width": 16})


def test_a_stream_that_is_closed_early_stops_every_stage() -> None:
    async def work(at: Deployment) -> None:
        hold(at)
        async for _ in at.client.stream("a red cube"):
            break
        await at.settled()
        assert "draw ends" not in at.journal.events

    through(work)


@pytest.mark.parametrize("topology", ["bagel", "bagel_think", "bagel_single_stage"])
def test_a_deadline_reaches_every_stage(topology: str) -> None:
    async def work(at: Deployment) -> None:
        hold(at)
        began = time.monotonic()
        with pytest.raises(RemoteError) as late:
            await at.client.generate("a red cube", timeout=0.6)
        assert late.value.grpc_status == "DEADLINE_EXCEEDED" and time.monotonic() - began < 3
        await at.settled()
        for thinker in at.thinkers:
            assert thinker.deadlines and all(0 < (seconds or 0) <= 0.6 for seconds in thinker.deadlines)

    through(work, topology)


def test_beyond_the_limit_it_is_busy() -> None:
    async def work(at: Deployment) -> None:
        hold(at)
        first = asyncio.create_task(at.client.generate("a red cube"))
        await at.dits[0].called.wait()
        with pytest.raises(Busy, match="--max-requests") as busy:
            await at.client.generate("another")
        assert busy.value.retry_after_s == 1.0
        code, details = await status_of(at, red_cube())
        retry = error_details_pb2.RetryInfo()
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED and any(detail.Unpack(retry) for detail in details)
        release(at)
        await first
        assert (await at.client.generate("another")).image is not None

    through(work, max_requests=1, batch_timeout_s=0)


def test_a_request_waits_its_turn_for_the_batch_timeout() -> None:
    async def work(at: Deployment) -> None:
        hold(at)
        first = asyncio.create_task(at.client.generate("a red cube"))
        await at.dits[0].called.wait()
        second = asyncio.create_task(at.client.generate("another"))
        third = asyncio.create_task(at.client.generate("one too many"))
        await asyncio.wait([second, third], return_when=asyncio.FIRST_COMPLETED)  # one place to wait in
        release(at)
        results = await asyncio.gather(first, second, third, return_exceptions=True)
        assert sorted(type(result).__name__ for result in results) == ["Busy", "Result", "Result"]
        (queued,) = [r.timings for r in results if isinstance(r, Result) and "queue" in r.timings]
        assert 0 < queued["queue"] < queued["total"]

    through(work, max_requests=1, batch_timeout_s=20)


def test_while_it_drains_it_finishes_what_is_under_way() -> None:
    async def work(at: Deployment) -> None:
        hold(at)
        first = asyncio.create_task(at.client.generate("a red cube"))
        await at.dits[0].called.wait()
        at.gateway.host.draining.set()
        with pytest.raises(Draining):
            await at.client.generate("another")
        closing = asyncio.create_task(at.gateway.close(10))
        await asyncio.sleep(0.1)
        with pytest.raises(BagelError) as refused:
            await at.client.generate("another", timeout=5)
        assert refused.value.grpc_status == "UNAVAILABLE"
        assert not first.done()
        release(at)
        assert (await first).image is not None
        await closing

    through(work)


def test_it_is_ready_while_each_stage_is() -> None:
    async def work(at: Deployment) -> None:
        serving, not_serving = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
        assert await health(at) == serving
        described = await at.client.describe()
        assert (described.pipeline, described.model.name) == ("bagel", "tiny") and described.version
        await at.hosts[0].not_ready()
        await until(lambda: not at.gateway.backends.ready)
        await asyncio.sleep(0.05)
        assert await health(at) == not_serving
        with pytest.raises(NoBackend, match=r"no Thinker is ready: thinker-0: "):
            await at.client.generate("a red cube")
        await at.hosts[0].ready()
        await until(lambda: at.gateway.backends.ready)
        assert (await at.client.generate("a red cube")).image is not None

    through(work, backend_timeout_s=0.2)


def test_without_backends_it_says_which() -> None:
    async def work(at: Deployment) -> None:
        await at.hosts[-1].drain(0)
        await until(lambda: not at.gateway.backends.ready)
        with pytest.raises(NoBackend, match="dit-0"):
            await at.client.describe()

    through(work, backend_timeout_s=0.2)


def test_a_request_waits_for_a_backend_that_is_started_again() -> None:
    async def work(at: Deployment) -> None:
        await at.hosts[0].not_ready()
        await until(lambda: not at.gateway.backends.ready)
        waiting = asyncio.create_task(at.client.generate("a red cube"))
        await asyncio.sleep(0.2)
        await at.hosts[0].ready()
        assert (await waiting).image is not None

    through(work, backend_timeout_s=20)


def test_the_least_busy_of_several_serves() -> None:
    async def work(at: Deployment) -> None:
        hold(at)
        drawn = [asyncio.create_task(at.client.generate("a red cube")) for _ in range(6)]
        await until(lambda: sum(len(dit.asked) for dit in at.dits) == 6)
        assert [len(thinker.asked) for thinker in at.thinkers] == [2, 2, 2]
        assert [len(dit.asked) for dit in at.dits] == [3, 3]
        await at.hosts[0].not_ready()
        await until(lambda: at.gateway.backends.thinkers[0].model is None)
        drawn += [asyncio.create_task(at.client.generate("a red cube")) for _ in range(2)]
        await until(lambda: sum(len(thinker.asked) for thinker in at.thinkers) == 8)
        assert [len(thinker.asked) for thinker in at.thinkers] == [2, 3, 3]
        release(at)
        await asyncio.gather(*drawn)

    through(work, thinkers=(b"k",) * 3, dits=(b"k",) * 2)


def test_all_branches_go_to_one_thinker() -> None:
    async def work(at: Deployment) -> None:
        await at.client.generate("a red cube", negative_prompt="blurred")
        assert sorted(len(thinker.asked) for thinker in at.thinkers) == [0, 2]

    through(work, thinkers=(b"k",) * 2)


def test_stages_of_different_models_are_not_mixed() -> None:
    async def refused(at: Deployment) -> None:
        with pytest.raises(ForeignContext, match=r"thinker-0 and dit-0 .*6b and 6c") as foreign:
            await at.client.generate("a red cube")
        assert foreign.value.grpc_status == "FAILED_PRECONDITION" and not at.journal.events

    async def chosen(at: Deployment) -> None:
        await at.client.generate("a red cube")
        assert [len(dit.asked) for dit in at.dits] == [0, 1]

    through(refused, dits=(b"l",))
    through(chosen, dits=(b"l", b"k"))


def test_stages_with_unlike_rules_for_pages_are_not_mixed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Dit, "page_version", 0)  # as of a release before the rule was told

    async def work(at: Deployment) -> None:
        with pytest.raises(ForeignContext, match=r"thinker-0 and dit-0 .* by rule 2 and 1; run the same release"):
            await at.client.generate("a red cube")
        assert not at.journal.events

    through(work)


def test_a_thinker_that_dies_is_told_as_such() -> None:
    async def work(at: Deployment) -> None:
        hold(at)
        drawn = asyncio.create_task(at.client.generate("a red cube"))
        await at.dits[0].called.wait()
        began = time.monotonic()
        await at.hosts[0].server.stop(0)
        with pytest.raises(RemoteError, match="thinker-0") as lost:
            await drawn
        assert time.monotonic() - began < 2 and lost.value.grpc_status in ("UNAVAILABLE", "CANCELLED")
        await at.settled()
        release(at)
        assert (await at.client.generate("a red cube")).image is not None

    through(work, thinkers=(b"k",) * 2)


async def thinking(at: Deployment) -> asyncio.Task[Result]:
    """A picture whose think text is being written."""
    at.thinkers[0].think_go.clear()
    heard: list[ServiceEvent] = []
    drawn = asyncio.create_task(at.client.generate("a red cube", think=True, on_event=heard.append))
    await until(lambda: any(isinstance(event, TextDelta) for event in heard))
    return drawn


def test_a_dit_that_leaves_while_a_think_text_is_written_is_not_missed() -> None:
    async def work(at: Deployment) -> None:
        drawn = await thinking(at)
        await at.hosts[1].drain(0)
        at.thinkers[0].think_go.set()
        assert (await drawn).image is not None
        assert [len(dit.asked) for dit in at.dits] == [0, 1]
        assert not any(backend.under_way for backend in (*at.gateway.backends.thinkers, *at.gateway.backends.dits))

    through(work, dits=(b"k",) * 2)


@pytest.mark.parametrize("topology", ["bagel", "bagel_think", "bagel_single_stage"])
def test_what_a_dit_refuses_as_it_shuts_down_another_gets(topology: str) -> None:
    async def work(at: Deployment) -> None:
        at.dits[0].failure = Draining("dit-0 is shutting down")
        assert (await at.client.generate("a red cube")).image is not None
        assert [len(dit.asked) for dit in at.dits] == [1, 1]

    through(work, topology, dits=(b"k",) * 2)


def test_the_only_dit_that_leaves_is_told_as_unavailable() -> None:
    async def work(at: Deployment) -> None:
        drawn = await thinking(at)
        await at.hosts[1].drain(0)
        at.thinkers[0].think_go.set()
        with pytest.raises(NoBackend, match=r"no DiT is ready: dit-0: ") as told:
            await drawn
        assert told.value.grpc_status == "UNAVAILABLE"
        await at.settled()
        asked = {request.lease_id for request in at.thinkers[0].asked}
        await until(lambda: asked <= at.thinkers[0].leases.released)

    through(work, backend_timeout_s=0.2)


def test_what_a_dit_has_begun_no_other_is_asked_for() -> None:
    async def work(at: Deployment) -> None:
        at.dits[0].go.clear()
        drawn = asyncio.create_task(at.client.generate("a red cube"))
        await at.dits[0].called.wait()
        await asyncio.sleep(0.2)  # its first events have come
        await at.hosts[1].server.stop(0)
        with pytest.raises(RemoteError, match="dit-0"):
            await drawn
        assert not at.dits[1].asked

    through(work, dits=(b"k",) * 2)


def test_a_build_that_fails_for_want_of_its_lease_hides_no_cause() -> None:
    async def work(at: Deployment) -> None:
        at.thinkers[0].go.clear()
        at.dits[0].failure, at.thinkers[0].failure = KvTimeout("nothing came"), UnknownSegment("given back")
        drawn = asyncio.create_task(at.client.generate("a red cube", cfg_text_scale=1.0))
        await until(lambda: "draw begins" in at.journal.events and at.journal.open_calls == 1)
        await asyncio.sleep(0.2)  # its status is on its way
        at.thinkers[0].go.set()
        with pytest.raises(KvTimeout, match="nothing came"):
            await drawn

    through(work)


def parse(*flags: str) -> GatewayConfig:
    return GatewayConfig.read(["--listen", "127.0.0.1:0", *STAGES, *flags])


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--pipeline", "bagle"), "bagle"),
        (("--thinker", "thinker-0=1"), "NAME=HOST:PORT"),
        (("--dit", "dit-0=127.0.0.1:2"), "two services"),
        (("--pipeline", "bagel_single_stage"), "--thinker"),
        (("--max-requests", "0"), "--max-requests"),
        (("--batch-timeout", "-1"), "--batch-timeout"),
        (("--sampling-defaults", "{"), "no JSON"),
        (("--sampling-defaults", "[]"), "an object"),
        (("--sampling-defaults", '{"steps": 1}'), "steps is 1"),
        (("--tls-key", "key.pem"), "tls_certificate"),
    ],
)
def test_a_wrong_flag_is_told(flags: tuple[str, ...], told: str) -> None:
    with pytest.raises(ConfigError, match=told) as wrong:
        tls_of(parse(*flags))
    assert "\n" not in str(wrong.value)


def test_the_flags_make_settings() -> None:
    made = parse("--thinker", "t=h:3", "--sampling-defaults", '{"steps": 9}')
    assert made.thinkers == ("thinker-0=127.0.0.1:1", "t=h:3")
    assert made.sampling_defaults == {"steps": 9}


def gateway_process(*flags: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "bagel_gateway", "--listen", "127.0.0.1:0", *flags]
    return subprocess.Popen(command, cwd=ROOT / "gateway", stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_the_process_listens_before_it_is_ready_and_ends_on_sigterm() -> None:
    process = gateway_process("--backend-timeout", "0.2", *STAGES)
    try:
        assert process.stdout is not None
        line = json.loads(process.stdout.readline())
        assert line["event"] == "listening"
        with Client(line["address"]) as client, pytest.raises(NoBackend, match="thinker-0"):
            client.generate("a red cube", timeout=20)
    finally:
        process.send_signal(signal.SIGTERM)
        _, logs = process.communicate(timeout=20)
    assert process.returncode == 0
    events = [json.loads(line) for line in logs.splitlines()]
    assert {"configuration", "draining"} <= {event["event"] for event in events}


def test_the_process_tells_a_wrong_setting_in_one_line() -> None:
    process = gateway_process("--dit", "dit-0=127.0.0.1:2")
    _, told = process.communicate(timeout=20)
    assert process.returncode == 2
    assert told.startswith("error: bagel needs a Thinker") and len(told.splitlines()) == 1
