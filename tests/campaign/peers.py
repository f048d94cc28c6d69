"""Peers that are not what they should be, of other releases, with other certificates, or hostile: all are refused."""

from __future__ import annotations

import asyncio
import random
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from bagel.client import AsyncClient
from bagel.errors import BagelError
from bagel.kv.codec import PAGE_VERSION
from bagel.rpc.errors import from_rpc_error
from bagel.rpc.security import DIT, THINKER
from bagel.rpc.transport import PLAINTEXT, Host, Security, channel
from bagel.v1 import common_pb2, dit_pb2, gateway_pb2, kv_pb2, kv_pb2_grpc, thinker_pb2
from bagel.v1.dit_pb2_grpc import DitServiceServicer, DitServiceStub, add_DitServiceServicer_to_server
from bagel.v1.thinker_pb2_grpc import (
    ThinkerServiceServicer,
    ThinkerServiceStub,
    add_ThinkerServiceServicer_to_server,
)
from tests.campaign.faults import Fault
from tests.campaign.fleet import THINKERS, Fleet
from tests.campaign.watch import fleet_role, front_of
from tests.campaign.workload import picture

RELEASED = Path(__file__).parents[2] / "protos" / "released.binpb"
HERE_S = 1.2
"""How long a gateway is led to a peer that it must refuse: longer than it takes between two checks."""
DISPLACED = {"older-thinker": ("gateway", THINKERS[1]), "newer-dit": ("gateway", "dit-1")}
"""Whose place a peer takes, before which gateway."""


class Trusted(AssertionError):
    """A peer was taken for what it is not."""


async def happen(fault: Fault, fleet: Fleet) -> bool:
    """Be such a peer; raises Trusted if it is let in. Whether there was anyone to try."""
    match fault.kind:
        case "stale-lease" | "foreign-fingerprint" | "other-page-rule":
            return await _pull(fault, fleet)
        case "unknown-field" | "unknown-enum":
            return await _odd_request(fault, fleet)
        case "older-client":
            return await _older_client(fault, fleet)
        case "garbage-bytes":
            return await _garbage(fault, fleet)
        case "expired-client" | "foreign-client" | "wrong-client":
            return await _client(fault, fleet)
        case "expired-service" | "wrong-service":
            who = (
                fleet.certificates.expired(DIT) if fault.kind == "expired-service" else fleet.certificates.of("client")
            )
            return await _impostor(fault, fleet, who)
        case "older-thinker" | "newer-dit":
            return await _impostor(fault, fleet, fleet.certificates.of(DIT if "dit" in fault.kind else THINKER))
        case _:
            raise AssertionError(fault.kind)


async def _pull(fault: Fault, fleet: Fleet) -> bool:
    """Ask a Thinker for K/V under a lease that never was, for another model, or by another rule for pages."""
    name = THINKERS[fault.number % 2]
    security = fleet.certificates.of(DIT) if fleet.tls else fleet.security(name)
    async with channel(fleet.direct(name), security, THINKER if fleet.tls else None) as connection:
        described = (
            await ThinkerServiceStub(connection).Describe(_describe_thinker(), timeout=9) if not fleet.tls else None
        )
        request = kv_pb2.PullRequest(page_version=PAGE_VERSION, lease_id=f"{fault.number:016x}")
        request.fingerprint = described.model.kv_fingerprint if described else b"?"
        wanted = "LeaseLapsed" if described else "ForeignContext"
        if fault.kind == "foreign-fingerprint":
            request.fingerprint, wanted = random.Random(fault.number).randbytes(16), "ForeignContext"
        elif fault.kind == "other-page-rule":
            request.page_version, wanted = fault.number % 2 * 7, "ForeignContext"
        call = kv_pb2_grpc.KvBlocksServiceStub(connection).Pull(request, timeout=9)
        try:
            async for _ in call:
                raise Trusted(f"{name} sends K/V to a puller with {fault.kind}")
        except grpc.RpcError as error:
            _expect(error, wanted, name)
            return True
        raise Trusted(f"{name} takes a pull with {fault.kind}")


async def _odd_request(fault: Fault, fleet: Fleet) -> bool:
    """A request with a field, or an enumeration's value, of a release to come: it would change the result."""
    request = gateway_pb2.GenerateRequest(
        request=common_pb2.Request(modality=common_pb2.MODALITY_TEXT2IMG, seed=fault.number % 1000)
    )
    request.request.prompt.add().text.text = "a cup"
    request.request.image.steps, request.request.image.height, request.request.image.width = 3, 64, 64
    data = request.SerializeToString()
    if fault.kind == "unknown-enum":
        request.request.posterior = 900  # type: ignore[assignment]
        data = request.SerializeToString()
    else:
        nested = request.request
        nested.MergeFromString(b"\xf8\x3e\x07")  # number 1007, a varint
        data = request.SerializeToString()
    name = ("gateway", "gateway-single")[fault.number % 2]
    front = front_of(fleet, name, direct=True)
    async with channel(front.grpc, front.security) as connection:
        call = _generate(connection, data)
        try:
            async for _ in call:
                raise Trusted(f"{name} serves a request with {fault.kind}")
        except grpc.RpcError as error:
            _expect(error, "InvalidRequest", name)
            return True
    raise Trusted(f"{name} ends a request with {fault.kind} without an error")


async def _older_client(fault: Fault, fleet: Fleet) -> bool:
    """A client from the protos that were released, without what is optional: its request is served."""
    kinds = older_messages()
    request = kinds["GenerateRequest"]()
    request.request.modality = common_pb2.MODALITY_TEXT2TEXT
    request.request.prompt.add().text.text = f"a cup {fault.number % 50}"
    request.request.seed = 3
    request.request.text.max_tokens = 3
    front = front_of(fleet, "gateway", direct=True)
    async with channel(front.grpc, front.security) as connection:
        call = _generate(connection, request.SerializeToString())
        try:
            last = [kinds["GenerateResponse"].FromString(data) async for data in call][-1]
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNAVAILABLE:  # of a peer that another fault displaces
                return True
            raise
    if last.WhichOneof("event") != "finished":
        raise Trusted("a client of the released protos gets no result")
    return True


def _generate(connection: grpc.aio.Channel, data: bytes) -> Any:
    """The gateway's method, which takes and gives bytes."""
    method: Any = connection.unary_stream("/bagel.v1.GatewayService/Generate", None, None)
    return method(data, timeout=14)


def older_messages() -> dict[str, Any]:
    """The gateway's messages as the released protos have them, in a pool of their own."""
    files = descriptor_pb2.FileDescriptorSet.FromString(RELEASED.read_bytes())
    pool = descriptor_pool.DescriptorPool()
    for file in files.file:
        pool.Add(file)
    names = ("GenerateRequest", "GenerateResponse")
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"bagel.v1.{name}")) for name in names}


async def _garbage(fault: Fault, fleet: Fleet) -> bool:
    """Bytes that are no HTTP/2 at all, to any service."""
    names = sorted(name for name in fleet.services if "twin" not in name)
    host, _, port = fleet.direct(names[fault.number % len(names)]).rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    with suppress(OSError, TimeoutError):
        writer.write(random.Random(fault.number).randbytes(3000))
        await writer.drain()
        async with asyncio.timeout(1):
            await reader.read()
    writer.transport.abort()
    return True


async def _client(fault: Fault, fleet: Fleet) -> bool:
    """A client whose certificate is over, of another CA, or of a name that may not call a stage."""
    certificates, gateway = fleet.certificates, "gateway" if fleet.tls else "gateway-single"
    security, address, name = certificates.expired("client"), front_of(fleet, gateway, direct=True).grpc, None
    if fault.kind == "foreign-client":
        security = certificates.foreign("client")
    elif fault.kind == "wrong-client":
        stage = ("thinker-0", "dit-0")[fault.number % 2] if fleet.tls else "single"
        security, address, name = certificates.of("client"), fleet.direct(stage), fleet_role(stage)
    try:
        if fault.kind == "wrong-client":
            async with channel(address, security, name) as connection:
                if name == THINKER:
                    await ThinkerServiceStub(connection).Describe(_describe_thinker(), timeout=3)
                else:
                    await DitServiceStub(connection).Describe(dit_pb2.DitServiceDescribeRequest(), timeout=3)
        else:
            async with AsyncClient(address, security) as client:
                await client.describe(timeout=3)
    except (grpc.RpcError, BagelError):
        return True
    raise Trusted(f"{address} lets in {fault.kind}")


async def _impostor(fault: Fault, fleet: Fleet, security: Security) -> bool:
    """Stand in the place of a service for a while. Without TLS a gateway may send it a request before it next asks
    what it is; then what it answers must not be taken, which the verdict on that request tells."""
    in_tls = ("gateway", "dit-1") if fleet.tls else ("gateway-single", "single")
    gateway, name = DISPLACED.get(fault.kind, in_tls)
    link = fleet.links[f"{gateway}>{name}"]
    peer = _Peer(fault.kind)
    host = Host("127.0.0.1:0", (), security if fault.kind in DISPLACED and fleet.encrypted(name) else PLAINTEXT)
    add_ThinkerServiceServicer_to_server(peer, host.server)
    add_DitServiceServicer_to_server(peer, host.server)
    port = host.port
    if fault.group == "certificates":  # of which our own services would not start
        assert security.certificate and security.key and security.ca
        pair = (Path(security.key).read_bytes(), Path(security.certificate).read_bytes())
        credentials = grpc.ssl_server_credentials([pair], Path(security.ca).read_bytes(), require_client_auth=True)
        port = host.server.add_secure_port("127.0.0.1:0", credentials)
    await host.start()
    await host.ready()
    real, link.target = link.target, f"127.0.0.1:{port}"
    link.break_all()
    try:
        await asyncio.sleep(HERE_S)
    finally:
        if link.target == f"127.0.0.1:{port}":
            link.target = real
        link.break_all()
        await host.drain(0)
    if peer.called and fault.group == "certificates":
        raise Trusted(f"the gateway sends a request to {fault.kind} in the place of {name}")
    return True


class _Peer(ThinkerServiceServicer, DitServiceServicer):
    """Says that it is a Thinker or a DiT of another release, and takes no request."""

    def __init__(self, kind: str) -> None:
        self.called, self._kind = False, kind

    async def Describe(self, request: Any, context: Any) -> Any:
        if self._kind == "older-thinker":
            return thinker_pb2.ThinkerServiceDescribeResponse(model=_model(), engine="torch", name="thinker-1")
        return dit_pb2.DitServiceDescribeResponse(
            model=_model(), name="dit-1", sources=THINKERS, page_version=PAGE_VERSION + 5
        )

    async def BuildContext(self, request: Any, context: Any) -> Any:
        self.called = True
        yield thinker_pb2.BuildContextResponse(context=kv_pb2.ContextRef(source="thinker-1", page_version=PAGE_VERSION))
        yield thinker_pb2.BuildContextResponse(built=thinker_pb2.ContextBuilt(text="trust me", token_ids=[5]))

    async def Generate(self, request: Any, context: Any) -> Any:
        self.called = True
        yield dit_pb2.DitServiceGenerateResponse(admitted=dit_pb2.Admitted())
        drawn = common_pb2.Picture(format=common_pb2.IMAGE_FORMAT_PNG, data=picture(1), width=64, height=64)
        yield dit_pb2.DitServiceGenerateResponse(picture=drawn)
        yield dit_pb2.DitServiceGenerateResponse(finished=dit_pb2.DitServiceGenerateFinished())


def _model() -> common_pb2.ModelInfo:
    return common_pb2.ModelInfo(name="tiny", kv_fingerprint=b"another", checkpoint_fingerprint=b"another")


def _describe_thinker() -> thinker_pb2.ThinkerServiceDescribeRequest:
    return thinker_pb2.ThinkerServiceDescribeRequest()


def _expect(error: grpc.RpcError, kind: str, peer: str) -> None:
    found = from_rpc_error(error, peer)
    if type(found).__name__ != kind:
        raise Trusted(f"{peer} refuses with {type(found).__name__} ({found}), not {kind}")
