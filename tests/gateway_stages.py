"""A real gateway and fake stages on real sockets; the stages record their calls and compute nothing."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

from PIL import Image

from bagel.client import AsyncClient
from bagel.deployment.gateway_config import GatewayConfig
from bagel.errors import BagelError
from bagel.images import VAE_TRANSFORM, VIT_TRANSFORM
from bagel.kv.codec import PAGE_VERSION
from bagel.pipelines import pipeline
from bagel.rpc.admission import Admission
from bagel.rpc.errors import streaming, unary
from bagel.rpc.integrity import WIRE_VERSION
from bagel.rpc.security import Security
from bagel.rpc.transport import Host
from bagel.telemetry.logs import REQUEST_ID
from bagel.v1 import common_pb2, dit_pb2, dit_pb2_grpc, kv_pb2, kv_pb2_grpc, thinker_pb2, thinker_pb2_grpc
from bagel_gateway.server import Gateway


def model(kv_fingerprint: bytes = b"k") -> common_pb2.ModelInfo:
    """BAGEL-7B's limits."""
    vae, vit = (
        common_pb2.ImageTransform(max=t.max_size, min=t.min_size, stride=t.stride)
        for t in (VAE_TRANSFORM, VIT_TRANSFORM)
    )
    return common_pb2.ModelInfo(
        vocabulary=1000,
        name="tiny",
        kv_fingerprint=kv_fingerprint,
        latent_stride=16,
        max_image_size=1024,
        default_height=1024,
        default_width=512,
        vae_transform=vae,
        vit_transform=vit,
        latent_channels=16,
        vae_downsample=8,
    )


@dataclass
class Journal:
    """The events in the stages, in order, and the request ids of their calls."""

    events: list[str] = field(default_factory=list)
    request_ids: set[str] = field(default_factory=set)
    open_calls: int = 0

    def note(self, event: str) -> None:
        self.events.append(event)

    @asynccontextmanager
    async def call(self, name: str, context: Any) -> AsyncIterator[None]:
        self.request_ids.add(str(dict(context.invocation_metadata())[REQUEST_ID]))
        self.note(f"{name} begins")
        self.open_calls += 1
        try:
            yield
        except (asyncio.CancelledError, GeneratorExit):  # GeneratorExit between two answers
            self.note(f"{name} is cancelled")
            raise
        finally:
            self.open_calls -= 1
        self.note(f"{name} ends")


class Thinker(thinker_pb2_grpc.ThinkerServiceServicer):
    """A fake Thinker. Builds wait after their first ContextRef for `go`, and after their first text for `think_go`.

    failure: the error that a build raises then; places: what it says that it has, enough for all.
    """

    places = 1000

    def __init__(self, journal: Journal, kv_fingerprint: bytes = b"k") -> None:
        self.journal, self.info = journal, model(kv_fingerprint)
        self.asked: list[thinker_pb2.BuildContextRequest] = []
        self.deadlines: list[float | None] = []
        self.go = asyncio.Event()
        self.go.set()
        self.think_go = asyncio.Event()
        self.think_go.set()
        self.leases = Leases()
        self.failure: Exception | None = None

    @streaming
    async def BuildContext(
        self, request: thinker_pb2.BuildContextRequest, context: Any
    ) -> AsyncIterator[thinker_pb2.BuildContextResponse]:
        self.asked.append(request)
        self.deadlines.append(context.time_remaining())
        async with self.journal.call("build", context):
            ref = self._ref(request)
            yield thinker_pb2.BuildContextResponse(context=ref)
            await self.go.wait()
            if self.failure is not None:
                raise self.failure
            built = thinker_pb2.ContextBuilt(usage=common_pb2.Usage(prompt_tokens=3, computed_tokens=4))
            built.timings.append(common_pb2.StageTiming(stage="context", seconds=0.5))
            if request.HasField("decode"):
                built.text, built.token_ids[:] = "so be it", [5, 6]
                for text, tokens in (("so ", 3), ("be it", 8)):
                    delta = common_pb2.TextDelta(text=text, think=request.decode.append, tokens=tokens)
                    yield thinker_pb2.BuildContextResponse(text=delta)
                    await self.think_go.wait()
                if request.decode.append:
                    ref.segments.add(digest=b"think", length=7)
                    self.journal.note("think text appended")
                    yield thinker_pb2.BuildContextResponse(context=ref)
            yield thinker_pb2.BuildContextResponse(built=built)

    @unary
    async def Describe(
        self, request: thinker_pb2.ThinkerServiceDescribeRequest, context: Any
    ) -> thinker_pb2.ThinkerServiceDescribeResponse:
        return thinker_pb2.ThinkerServiceDescribeResponse(
            model=self.info,
            engine="torch",
            name="thinker-0",
            page_version=PAGE_VERSION,
            wire_version=WIRE_VERSION,
            max_num_seqs=self.places,
        )

    def _ref(self, request: thinker_pb2.BuildContextRequest) -> kv_pb2.ContextRef:
        ref = kv_pb2.ContextRef(source="thinker-0", fingerprint=b"k")
        if request.send_kv:
            ref.lease_id, ref.lease_seconds = request.lease_id, 0.1
        for part in request.parts:
            ref.segments.add(digest=hashlib.blake2b(part.SerializeToString(), digest_size=16).digest(), length=2)
        return ref


class Leases(kv_pb2_grpc.KvBlocksServiceServicer):
    """The part of a Thinker's store that a gateway calls; records renewed and released leases."""

    def __init__(self) -> None:
        self.renewed: set[str] = set()
        self.released: set[str] = set()

    async def Renew(self, request: kv_pb2.RenewRequest, context: Any) -> kv_pb2.RenewResponse:
        self.renewed.update(request.lease_ids)
        return kv_pb2.RenewResponse()

    async def Release(self, request: kv_pb2.ReleaseRequest, context: Any) -> kv_pb2.ReleaseResponse:
        self.released.update(request.lease_ids)
        return kv_pb2.ReleaseResponse()

    async def Pull(self, request: kv_pb2.PullRequest, context: Any) -> AsyncIterator[kv_pb2.PullResponse]:
        pages: list[kv_pb2.PullResponse] = []
        for page in pages:
            yield page

    async def GetStats(self, request: kv_pb2.GetStatsRequest, context: Any) -> kv_pb2.GetStatsResponse:
        return kv_pb2.GetStatsResponse()


class Dit(dit_pb2_grpc.DitServiceServicer):
    """A fake DiT, which waits after its first step for `go`. failure: the error that it raises instead of a picture.

    admission: its places, by default enough for all; seconds: the time that a picture takes; seconds_after_picture: the
    time until the call ends; size: the least bytes of a picture.
    """

    page_version = PAGE_VERSION
    places = 1000
    """What it says that it has."""

    def __init__(self, journal: Journal, *, single_stage: bool = False, kv_fingerprint: bytes = b"k") -> None:
        self.journal, self.info, self.single_stage = journal, model(kv_fingerprint), single_stage
        self.asked: list[dit_pb2.DitServiceGenerateRequest] = []
        self.go = asyncio.Event()
        self.go.set()
        self.called = asyncio.Event()
        self.failure: BagelError | None = None
        self.admission = Admission("dit-0", 1000, 5.0)
        self.seconds, self.seconds_after_picture, self.size = 0.0, 0.0, 0

    @streaming
    async def Generate(
        self, request: dit_pb2.DitServiceGenerateRequest, context: Any
    ) -> AsyncIterator[dit_pb2.DitServiceGenerateResponse]:
        self.asked.append(request)
        self.called.set()
        async with self.journal.call("draw", context), self.admission.admit(begun=request.begun):
            if self.failure is not None:
                raise self.failure
            yield dit_pb2.DitServiceGenerateResponse(admitted=dit_pb2.Admitted(waited_seconds=0.25))
            if request.HasField("request"):
                yield dit_pb2.DitServiceGenerateResponse(prefill=common_pb2.PrefillDone(tokens=3))
            settings = request.draw.image if request.HasField("draw") else request.request.image
            yield dit_pb2.DitServiceGenerateResponse(step=common_pb2.StepDone(step=1, steps=settings.steps - 1))
            await self.go.wait()
            await asyncio.sleep(self.seconds)
            drawn = picture(settings.width, settings.height)
            drawn.data += bytes(max(0, self.size - len(drawn.data)))
            for number in range(request.partial_images):
                preview = common_pb2.Preview(index=number, step=1, picture=drawn)
                yield dit_pb2.DitServiceGenerateResponse(preview=preview)
            yield dit_pb2.DitServiceGenerateResponse(picture=drawn)
            await asyncio.sleep(self.seconds_after_picture)
            usage = common_pb2.Usage(steps=settings.steps - 1, pulled_bytes=9)
            timings = [common_pb2.StageTiming(stage="denoise", seconds=2.0)]
            finished = dit_pb2.DitServiceGenerateFinished(usage=usage, timings=timings)
            yield dit_pb2.DitServiceGenerateResponse(finished=finished)

    @unary
    async def Describe(
        self, request: dit_pb2.DitServiceDescribeRequest, context: Any
    ) -> dit_pb2.DitServiceDescribeResponse:
        return dit_pb2.DitServiceDescribeResponse(
            model=self.info,
            single_stage=self.single_stage,
            name="dit-0",
            sources=["thinker-0"],
            page_version=self.page_version,
            wire_version=WIRE_VERSION,
            max_num_seqs=self.places,
        )


def picture(width: int, height: int) -> common_pb2.Picture:
    """A grey PNG."""
    stream = BytesIO()
    Image.new("RGB", (width, height), "grey").save(stream, "PNG")
    return common_pb2.Picture(format=common_pb2.IMAGE_FORMAT_PNG, data=stream.getvalue(), width=width, height=height)


@dataclass
class Deployment:
    """A running gateway, its stages and a client."""

    journal: Journal
    thinkers: list[Thinker]
    dits: list[Dit]
    hosts: list[Host]
    gateway: Gateway
    client: AsyncClient

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.gateway.host.port}"

    async def settled(self) -> None:
        """Wait until no stage has an open call."""
        async with asyncio.timeout(10):
            while self.journal.open_calls or self.gateway.admission.under_way:
                await asyncio.sleep(0.01)


def front(security: Security) -> dict[str, Any]:
    """The gateway's settings that have it speak such TLS to its callers alone."""
    files = {"tls_certificate": security.certificate, "tls_key": security.key, "tls_ca": security.ca}
    return {**files, "tls_allow_clients": security.clients, "plaintext_services": True}


@asynccontextmanager
async def deployment(
    topology: str = "bagel",
    *,
    thinkers: Sequence[bytes] = (b"k",),
    dits: Sequence[bytes] = (b"k",),
    ready: bool = True,
    thinkers_at: Sequence[str] = (),
    dits_at: Sequence[str] = (),
    **settings: Any,
) -> AsyncIterator[Deployment]:
    """Run a gateway with fake stages. thinkers, dits: the K/V fingerprint of each; ready: wait until it is ready.

    thinkers_at, dits_at: where the gateway is to call its Thinkers and DiTs instead.
    """
    journal, single = Journal(), len(pipeline(topology).stages) == 1
    served_thinkers = [] if single else [Thinker(journal, fingerprint) for fingerprint in thinkers]
    served_dits = [Dit(journal, single_stage=single, kv_fingerprint=fingerprint) for fingerprint in dits]
    async with AsyncExitStack() as stack:
        hosts = []
        for thinker in served_thinkers:
            host = Host("127.0.0.1:0", ())
            thinker_pb2_grpc.add_ThinkerServiceServicer_to_server(thinker, host.methods)
            kv_pb2_grpc.add_KvBlocksServiceServicer_to_server(thinker.leases, host.methods)
            hosts.append(host)
        for dit in served_dits:
            host = Host("127.0.0.1:0", ())
            dit_pb2_grpc.add_DitServiceServicer_to_server(dit, host.methods)
            hosts.append(host)
        for host in hosts:
            await host.start()
            await host.ready()
            stack.push_async_callback(host.drain, 0)
        targets = [f"127.0.0.1:{host.port}" for host in hosts]
        names = [f"thinker-{i}" for i in range(len(served_thinkers))] + [f"dit-{i}" for i in range(len(served_dits))]
        addresses = [f"{name}={target}" for name, target in zip(names, targets, strict=True)]
        gateway = Gateway(
            GatewayConfig(
                listen="127.0.0.1:0",
                pipeline=topology,
                thinkers=tuple(thinkers_at or addresses[: len(served_thinkers)]),
                dits=tuple(dits_at or addresses[len(served_thinkers) :]),
                **settings,
            ),
            check_every_s=0.05,
        )
        await gateway.start()
        stack.push_async_callback(gateway.close, 0)
        client = await stack.enter_async_context(AsyncClient(f"127.0.0.1:{gateway.host.port}"))
        made = Deployment(journal, served_thinkers, served_dits, hosts, gateway, client)
        async with asyncio.timeout(10):
            backends = (*gateway.backends.thinkers, *gateway.backends.dits)
            while ready and not all(backend.model for backend in backends):
                await asyncio.sleep(0.01)
        yield made
