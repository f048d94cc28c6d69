"""python -m bagel_dit: the DiT service."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from bagel.checkpoint.files import Checkpoint
from bagel.deployment import serving
from bagel.deployment.defaults import find_model
from bagel.deployment.dit_config import DitConfig
from bagel.deployment.gpus import gpu_count
from bagel.freed_memory import reuse_freed_memory
from bagel.images.pool import ImagePool
from bagel.kv.arena import Arena
from bagel.kv.pages import KvLayout
from bagel.kv.puller import KvPuller
from bagel.kv.service import KvBlocksServicer, add_kv_blocks
from bagel.kv.store import KvStore
from bagel.rpc import service
from bagel.rpc.heap import keep_loaded
from bagel.rpc.security import THINKER
from bagel.rpc.transport import Host, channel
from bagel.telemetry.logs import Log
from bagel.telemetry.metrics import watch_store
from bagel.v1 import common_pb2, dit_pb2, kv_pb2
from bagel.v1.dit_pb2_grpc import add_DitServiceServicer_to_server
from bagel_dit.runner_client import RunnerClient
from bagel_dit.server import DitServicer
from bagel_dit.workers import RankSettings, SharedMemory

log = Log("bagel.dit")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the service until SIGTERM; the process's exit code."""
    return service.run(lambda: DitConfig.read(argv), _serve, "dit")


async def _serve(config: DitConfig) -> None:
    service.check_temporary_folder()
    # Before the first file: images come and pictures go in messages of mebibytes, each of which is copied.
    reuse_freed_memory()
    # A name on the hub is looked up this once: a runner that is started again is to load the same.
    _, checkpoint = find_model(config.model)
    # Read early, so that errors show before anybody waits for this service.
    check_ranks(config, checkpoint)
    names = [dit_pb2.DESCRIPTOR.services_by_name["DitService"].full_name]
    if not config.single_stage:
        names.append(kv_pb2.DESCRIPTOR.services_by_name["KvBlocksService"].full_name)
    secure = serving.security(config)
    # Only to check the names before a model is loaded; `_puller` uses them.
    serving.server_names(config, config.source_addresses, tls=secure.encrypted)
    host = Host(config.listen, names, secure, unread=serving.unread(config), limits=serving.limits(config))
    await host.start()
    service.announce(host, config.listen)
    log.info("configuration", **config.shown())
    log.info("parallel", sizes=config.parallel.described(), vae_use_tiling=config.tiling)
    # Shared memory, so that ranks read what is pulled here without a copy through a pipe.
    arena = None if config.single_stage else Arena(config.kv_cache_bytes)

    async def on_health(healthy: bool) -> None:
        await (host.ready() if healthy and added else host.not_ready())

    # Ranks may be ready before the services are added, and are not announced until then.
    added = False
    memory = None if arena is None else SharedMemory(arena.name, arena.nbytes)
    runner = RunnerClient(RankSettings(config, checkpoint.folder, memory=memory), on_health)
    puller, images = None, serving.image_pool(config, config.batch_timeout_s)
    try:
        if config.single_stage:
            await images.start()
        await runner.loaded()
        checkpoint.check_unchanged()
        if arena is not None:
            if runner.info.device.startswith("cuda"):  # its ranks have pinned the arena
                await asyncio.to_thread(arena.map_now)
            puller = _puller(config, arena, checkpoint, runner.info)
            watch_store(lambda: puller.store.stats().as_dict())
            add_kv_blocks(KvBlocksServicer(puller.store), host.methods)
        servicer = _servicer(config, runner, puller, images, host.draining)
        add_DitServiceServicer_to_server(servicer, host.methods)
        added = True
        keep_loaded()
        await host.ready()
        log.info("ready", fingerprint=runner.info.checkpoint_fingerprint.hex(), device=runner.info.device)
        await service.serve(host, config.drain_timeout_s, runner.failed, servicer.idle)
    finally:
        # Calls end first: they use the puller and the ranks.
        await host.server.stop(None)
        if puller is not None:
            await puller.close()
        await images.close()
        await runner.stop()


def check_ranks(config: DitConfig, checkpoint: Checkpoint) -> None:
    """Raise ConfigError for a model that the sizes do not divide, or for GPUs that are not there."""
    config.parallel.check_model(checkpoint.config.llm)
    own = config.worker_backend == "process"  # a Ray cluster knows its GPUs itself
    gpus = gpu_count() if own and config.parallel.world_size > 1 and config.device != "cpu" else 0
    if gpus:
        config.parallel.check_devices(gpus, "the driver shows")


def _servicer(
    config: DitConfig, runner: RunnerClient, puller: KvPuller | None, images: ImagePool, draining: asyncio.Event
) -> DitServicer:
    return DitServicer(
        config.name,
        runner,
        puller,
        images,
        sources=tuple(config.source_addresses),
        max_num_seqs=config.max_num_seqs,
        batch_timeout_s=config.batch_timeout_s,
        draining=draining,
    )


def _puller(config: DitConfig, arena: Arena, checkpoint: Checkpoint, info: common_pb2.ModelInfo) -> KvPuller:
    llm = checkpoint.config.llm
    layout = KvLayout(llm.num_hidden_layers, llm.num_key_value_heads, llm.head_dim, info.dtype)
    store = KvStore(layout, info.kv_fingerprint, config.kv_cache_bytes, arena=arena, flag="--kv-cache-bytes")
    secure, addresses = serving.security(config), config.source_addresses
    names = serving.server_names(config, addresses, tls=secure.encrypted)
    sources = {name: channel(address, secure, names.get(name, THINKER)) for name, address in addresses.items()}
    return KvPuller(store, sources, page_timeout_s=config.kv_page_timeout_s, room_wait_s=config.batch_timeout_s)


if __name__ == "__main__":
    service.leave(main())
