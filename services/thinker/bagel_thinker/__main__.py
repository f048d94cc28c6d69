"""python -m bagel_thinker: the Thinker service."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from bagel.checkpoint.files import Checkpoint, find_checkpoint
from bagel.images.pool import ImagePool
from bagel.rpc import service
from bagel.rpc.admission import Admission
from bagel.rpc.heap import keep_loaded
from bagel.rpc.security import DIT, GATEWAY
from bagel.rpc.transport import Host
from bagel.telemetry.logs import Log
from bagel.telemetry.metrics import watch_queue, watch_store
from bagel.v1 import kv_pb2, thinker_pb2
from bagel.v1.thinker_pb2_grpc import add_ThinkerServiceServicer_to_server
from bagel_thinker.flags import add_engine_flags
from bagel_thinker.watchdog import STEP_TIMEOUT_S, watch

if TYPE_CHECKING:
    from bagel_thinker.engine import Engine
    from bagel_thinker.server import ThinkerServicer

log = Log("bagel.thinker")


def parser() -> argparse.ArgumentParser:
    """The Thinker's flags."""
    clients = (GATEWAY, DIT)
    flags = service.parser("bagel_thinker", "Reads prompts, writes text, gives out K/V.", "127.0.0.1:50052", clients)
    service.add_model_flags(flags, "thinker-0")
    add_engine_flags(flags)
    service.add_image_flags(flags)
    flags.add_argument("--kv-store-bytes", type=int, default=service.DEFAULT_KV_BYTES, help="shared memory for K/V")
    flags.add_argument("--lease-seconds", type=float, default=service.LEASE_S, help="how long unrenewed K/V are kept")
    flags.add_argument(
        "--step-timeout",
        type=service.seconds,
        default=STEP_TIMEOUT_S,
        metavar="S",
        help=f"a step of the engine that takes longer has hung, and the service ends (default: {STEP_TIMEOUT_S:g})",
    )
    return flags


def main(argv: Sequence[str] | None = None) -> int:
    """Run the service until SIGTERM; the process's exit code."""
    return service.run(lambda: parser().parse_args(argv), _serve, "thinker")


async def _serve(args: argparse.Namespace) -> None:
    name = thinker_pb2.DESCRIPTOR.services_by_name["ThinkerService"].full_name
    kv_name = kv_pb2.DESCRIPTOR.services_by_name["KvBlocksService"].full_name
    checkpoint = find_checkpoint(args.model)
    checkpoint.config  # noqa: B018  what is wrong with it is told before anybody waits for this service
    secure, unread, limits = service.security(args), service.unread(args), service.limits(args)
    host = Host(args.listen, [name, kv_name], secure, unread=unread, limits=limits)
    await host.start()
    service.announce(host, args.listen)
    log.info("configuration", **vars(args))
    try:
        engine = await asyncio.to_thread(_load, args, checkpoint)
    except BaseException:
        await host.server.stop(None)
        raise
    watching = asyncio.create_task(watch(engine, args.step_timeout))
    images = service.image_pool(args)
    try:
        servicer = _add_servicers(host, engine, images, args)
        keep_loaded()
        await host.ready()
        log.info("ready", fingerprint=engine.info.checkpoint_fingerprint.hex(), device=engine.info.device)
        await service.serve(host, args.drain_timeout, asyncio.wrap_future(engine.failed), servicer.idle)
    finally:
        if not watching.done():  # else its thread never ends
            watching.cancel()
            engine.close()
        await images.close()


def _load(args: argparse.Namespace, checkpoint: Checkpoint) -> Engine:
    """The engine, ready. It is imported here, as torch takes seconds and the address is to be known at once."""
    from bagel_thinker.loading import load_engine

    return load_engine(args, checkpoint)


def _add_servicers(host: Host, engine: Engine, images: ImagePool, args: argparse.Namespace) -> ThinkerServicer:
    from bagel.kv.service import KvBlocksServicer, add_kv_blocks
    from bagel_thinker.server import ThinkerServicer

    admission = Admission(args.name, args.max_num_seqs, args.batch_timeout)
    servicer = ThinkerServicer(
        engine,
        args.name,
        admission,
        images,
        lease_s=args.lease_seconds,
        room_wait_s=args.batch_timeout,
        draining=host.draining,
    )
    add_ThinkerServiceServicer_to_server(servicer, host.methods)
    add_kv_blocks(KvBlocksServicer(engine.store), host.methods)
    watch_queue(lambda: admission.waiting, lambda: admission.under_way)
    watch_store(lambda: engine.store.stats().as_dict())
    return servicer


def _leave(code: int) -> NoReturn:
    """End the process; at once if its engine hangs, or vLLM was there, which Python takes seconds to take apart."""
    if "vllm" in sys.modules or any(thread.name.endswith("-engine") for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    _leave(main())
