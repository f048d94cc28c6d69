"""Channels and servers: TLS on every hop, health while loading and draining, errors with their details."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2

from bagel import errors
from bagel.errors import BagelError, Busy, ConfigError, InvalidImage, InvalidRequest, Loading, RemoteError, StoreFull
from bagel.rpc.errors import from_rpc_error, from_status, rpc_status_of
from bagel.rpc.transport import PLAINTEXT, Host, Security, channel
from bagel.v1 import kv_pb2
from bagel.v1.kv_pb2_grpc import KvBlocksServiceStub

SERVICE = "bagel.v1.KvBlocksService"
SERVING = health_pb2.HealthCheckResponse.SERVING


class Stats:
    """Answers with a number, after a while."""

    def __init__(self, after_s: float) -> None:
        self._after_s = after_s

    async def GetStats(self, request: kv_pb2.GetStatsRequest, context: object) -> kv_pb2.GetStatsResponse:
        await asyncio.sleep(self._after_s)
        return kv_pb2.GetStatsResponse(leases=7)


def add_stats(host: Host, after_s: float = 0) -> None:
    handler = grpc.unary_unary_rpc_method_handler(
        Stats(after_s).GetStats,
        request_deserializer=kv_pb2.GetStatsRequest.FromString,
        response_serializer=kv_pb2.GetStatsResponse.SerializeToString,
    )
    host.methods.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"GetStats": handler}),))


def through(
    work: Callable[[Host], Awaitable[None]],
    security: Security = PLAINTEXT,
    *,
    ready: bool = True,
    answer_after_s: float = 0,
) -> None:
    """Run work beside a host."""

    async def main() -> None:
        host = Host("127.0.0.1:0", [SERVICE], security)
        await host.start()
        if ready:
            add_stats(host, answer_after_s)
            await host.ready()
        try:
            await work(host)
        finally:
            await host.drain(0)

    asyncio.run(main())


async def leases(host: Host, security: Security = PLAINTEXT) -> int:
    async with channel(f"localhost:{host.port}", security) as connection:
        return (await KvBlocksServiceStub(connection).GetStats(kv_pb2.GetStatsRequest(), timeout=9)).leases


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """A certificate for localhost, its key, its authority, and another authority."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    issued = authority.issue_cert("localhost")
    issued.cert_chain_pems[0].write_to_path(tmp_path / "certificate.pem")
    issued.private_key_pem.write_to_path(tmp_path / "key.pem")
    trustme.CA().cert_pem.write_to_path(tmp_path / "other.pem")
    return {path.stem: path for path in tmp_path.iterdir()}


def test_tls_serves_who_trusts_it_and_nobody_else(files: dict[str, Path]) -> None:
    async def work(host: Host) -> None:
        assert await leases(host, Security(ca=files["ca"])) == 7
        for stranger in (PLAINTEXT, Security(ca=files["other"])):
            with pytest.raises(grpc.RpcError) as caught:
                await leases(host, stranger)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE

    through(work, Security(files["certificate"], files["key"]))


def test_with_an_authority_the_client_shows_itself_too(files: dict[str, Path]) -> None:
    both = Security(files["certificate"], files["key"], files["ca"])

    async def work(host: Host) -> None:
        assert await leases(host, both) == 7
        with pytest.raises(grpc.RpcError):
            await leases(host, Security(ca=files["ca"]))

    through(work, both)


@pytest.mark.parametrize(("security", "told"), [({"certificate": "certificate"}, "tls_key"), ({"ca": "none"}, "none")])
def test_wrong_tls_files_are_told(files: dict[str, Path], security: dict[str, str], told: str) -> None:
    given: dict[str, Any] = {name: files.get(file, Path(file)) for name, file in security.items()}
    with pytest.raises(ConfigError, match=told):
        Security(**given).channel_credentials()


def test_an_address_that_is_taken_is_told() -> None:
    async def work(host: Host) -> None:
        with pytest.raises(ConfigError, match="--listen"):
            Host(f"127.0.0.1:{host.port}", [SERVICE])

    through(work)


def test_while_it_loads_calls_are_told_so() -> None:
    async def work(host: Host) -> None:
        async with channel(f"127.0.0.1:{host.port}") as connection:
            health = health_pb2_grpc.HealthStub(connection)
            request = health_pb2.HealthCheckRequest(service=SERVICE)
            assert (await health.Check(request)).status != SERVING
            with pytest.raises(grpc.RpcError) as caught:
                await leases(host)
            assert isinstance(from_rpc_error(caught.value, "it"), Loading)
            add_stats(host)
            await host.ready()
            assert (await health.Check(request)).status == SERVING
            told = (await health.List(health_pb2.HealthListRequest())).statuses
            assert {name: each.status for name, each in told.items()} == {"": SERVING, SERVICE: SERVING}
            assert await leases(host) == 7

    through(work, ready=False)


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
def test_reflection_answers_both_versions_of_its_protocol(version: str) -> None:
    async def work(host: Host) -> None:
        ask = reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICE)
        async with channel(f"127.0.0.1:{host.port}") as one:
            name = f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo"
            answer = reflection_pb2.ServerReflectionResponse.FromString
            call: Any = one.stream_stream(name, reflection_pb2.ServerReflectionRequest.SerializeToString, answer)
            [told] = [each async for each in call(iter([ask]))]
            assert told.file_descriptor_response.file_descriptor_proto

    through(work)


def test_a_call_that_the_peer_cancels_is_told_as_its_going_and_our_own_as_cancelled() -> None:
    async def cancel(request: kv_pb2.GetStatsRequest, context: Any) -> None:
        await context.abort(grpc.StatusCode.CANCELLED)

    async def work(host: Host) -> None:
        handler: Any = grpc.unary_unary_rpc_method_handler(cancel, kv_pb2.GetStatsRequest.FromString)
        host.methods.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"GetStats": handler}),))
        await host.ready()
        with pytest.raises(grpc.RpcError) as theirs:
            await leases(host)
        assert from_rpc_error(theirs.value, "it").grpc_status == "UNAVAILABLE"
        with grpc.insecure_channel(f"127.0.0.1:{host.port}") as connection:
            call: Any = KvBlocksServiceStub(connection).GetStats.future(kv_pb2.GetStatsRequest())
            call.cancel()
            assert from_rpc_error(call, "it").grpc_status == "CANCELLED"

    through(work, ready=False)


def test_while_it_drains_it_serves_until_it_is_idle() -> None:
    async def work(host: Host) -> None:
        idle = asyncio.Event()
        draining = asyncio.create_task(host.drain(30, idle.is_set))
        await asyncio.sleep(0.1)
        assert host.draining.is_set() and await leases(host) == 7
        async with channel(f"127.0.0.1:{host.port}") as connection:
            reply = await health_pb2_grpc.HealthStub(connection).Check(health_pb2.HealthCheckRequest(service=SERVICE))
            assert reply.status == health_pb2.HealthCheckResponse.NOT_SERVING
        idle.set()
        async with asyncio.timeout(5):
            await draining
        with pytest.raises(grpc.RpcError):
            await leases(host)

    through(work)


@pytest.mark.parametrize("idle", [None, lambda: False])
def test_a_second_signal_ends_it_at_once(idle: Callable[[], bool] | None) -> None:
    async def work(host: Host) -> None:
        stopped = asyncio.create_task(host.until_stopped(60, idle))
        call = asyncio.create_task(leases(host))
        await asyncio.sleep(0.2)
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.sleep(0.2)
        assert host.draining.is_set() and not stopped.done()
        os.kill(os.getpid(), signal.SIGTERM)
        async with asyncio.timeout(2):
            await stopped
        with pytest.raises(grpc.RpcError):
            await call

    through(work, answer_after_s=60)


EVERY = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, BagelError) and kind not in (InvalidRequest, InvalidImage, Busy)
]


@pytest.mark.parametrize("kind", EVERY)
def test_every_error_comes_back_as_itself(kind: type[BagelError]) -> None:
    error = RemoteError("it broke", "ABORTED") if kind is RemoteError else kind("it broke")
    again = from_status(rpc_status_of(error), "a peer")
    assert (type(again), str(again), again.grpc_status) == (kind, "it broke", error.grpc_status)


def test_errors_keep_their_fields() -> None:
    wrong = from_status(rpc_status_of(InvalidImage("image", "no picture")), "a peer")
    assert isinstance(wrong, InvalidImage) and wrong.field == "image"
    for kind in (Busy, StoreFull):
        busy = from_status(rpc_status_of(kind("full", 2.5)), "a peer")
        assert isinstance(busy, kind) and busy.retry_after_s == 2.5


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    assert errors.__doc__ is not None
    drawn = [line.split("──")[-1].split()[0] for line in errors.__doc__.splitlines() if "──" in line]
    assert sorted(drawn) == sorted(
        kind.__name__ for kind in [*EVERY, InvalidRequest, InvalidImage, Busy][0:] if kind is not BagelError
    )
