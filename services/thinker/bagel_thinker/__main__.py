"""python -m bagel_thinker: the Thinker service."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from bagel.checkpoint.files import Checkpoint
from bagel.deployment import serving
from bagel.deployment.defaults import find_model, missing_install_named
from bagel.deployment.thinker_config import ThinkerConfig
from bagel.images.pool import ImagePool
from bagel.rpc import service
from bagel.rpc.admission import Admission
from bagel.rpc.heap import keep_loaded
from bagel.rpc.transport import Host
from bagel.telemetry.logs import Log
from bagel.telemetry.metrics import watch_queue, watch_store
from bagel.v1 import kv_pb2, thinker_pb2
from bagel.v1.thinker_pb2_grpc import add_ThinkerServiceServicer_to_server
from bagel_thinker.watchdog import watch

if TYPE_CHECKING:
    from bagel_thinker.engine import Engine
    from bagel_thinker.server import ThinkerServicer

log = Log("bagel.thinker")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the service until SIGTERM; the process's exit code."""
    return service.run(lambda: ThinkerConfig.read(argv), _serve, "thinker")


async def _serve(config: ThinkerConfig) -> None:
    service.check_temporary_folder()
    name = thinker_pb2.DESCRIPTOR.services_by_name["ThinkerService"].full_name
    kv_name = kv_pb2.DESCRIPTOR.services_by_name["KvBlocksService"].full_name
    _, checkpoint = find_model(config.model)
    checkpoint.config  # noqa: B018  read early, so that its errors show before anybody waits for this service
    secure, unread, limits = serving.security(config), serving.unread(config), serving.limits(config)
    host = Host(config.listen, [name, kv_name], secure, unread=unread, limits=limits)
    await host.start()
    service.announce(host, config.listen)
    log.info("configuration", **config.shown())
    images = serving.image_pool(config, config.batch_timeout_s)
    try:
        await images.start()
        # In a thread, so that the server answers health checks meanwhile.
        engine = await asyncio.to_thread(_load, config, checkpoint)
    except BaseException:
        await host.server.stop(None)
        await images.close()
        raise
    watching = asyncio.create_task(watch(engine, config.step_timeout_s))
    try:
        servicer = _add_servicers(host, engine, images, config)
        keep_loaded()
        await host.ready()
        log.info("ready", fingerprint=engine.info.checkpoint_fingerprint.hex(), device=engine.info.device)
        await service.serve(host, config.drain_timeout_s, asyncio.wrap_future(engine.failed), servicer.idle)
    finally:
        if not watching.done():  # else its thread never ends
            watching.cancel()
            engine.close()
        await images.close()


def _load(config: ThinkerConfig, checkpoint: Checkpoint) -> Engine:
    """The engine, ready. It is imported here, as torch takes seconds and the address is to be known at once."""
    with missing_install_named():
        from bagel_thinker.loading import load_engine

    engine = load_engine(config, checkpoint)
    if engine.info.device.startswith("cuda"):  # the engine, or its ranks in other processes, have pinned the arena
        engine.store.arena.map_now()
    return engine


def _add_servicers(host: Host, engine: Engine, images: ImagePool, config: ThinkerConfig) -> ThinkerServicer:
    from bagel.kv.service import KvBlocksServicer, add_kv_blocks
    from bagel_thinker.server import ThinkerServicer

    admission = Admission(config.name, config.max_num_seqs, config.batch_timeout_s)
    servicer = ThinkerServicer(
        engine,
        config.name,
        admission,
        images,
        lease_s=config.lease_seconds,
        room_wait_s=config.batch_timeout_s,
        draining=host.draining,
    )
    add_ThinkerServiceServicer_to_server(servicer, host.methods)
    add_kv_blocks(KvBlocksServicer(engine.store), host.methods)
    watch_queue(lambda: admission.waiting, lambda: admission.under_way)
    watch_store(lambda: engine.store.stats().as_dict())
    return servicer


def _leave(code: int) -> NoReturn:
    """End the process: at once if its engine hangs or vLLM is loaded, which Python takes seconds to tear down."""
    if "vllm" in sys.modules or any(thread.name.endswith("-engine") for thread in threading.enumerate()):
        service.leave_at_once(code)
    service.leave(code)


if __name__ == "__main__":
    _leave(main())
