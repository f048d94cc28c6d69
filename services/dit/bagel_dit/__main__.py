"""python -m bagel_dit: the DiT service."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence

from bagel.checkpoint.files import Checkpoint, find_checkpoint
from bagel.images.pool import ImagePool
from bagel.kv.arena import Arena
from bagel.kv.pages import KvLayout
from bagel.kv.puller import KvPuller
from bagel.kv.service import KvBlocksServicer, add_kv_blocks
from bagel.kv.store import KvStore
from bagel.rpc import service
from bagel.rpc.heap import keep_loaded
from bagel.rpc.security import GATEWAY, THINKER
from bagel.rpc.transport import Host, channel
from bagel.telemetry.logs import Log
from bagel.telemetry.metrics import watch_store
from bagel.v1 import common_pb2, dit_pb2, kv_pb2
from bagel.v1.dit_pb2_grpc import add_DitServiceServicer_to_server
from bagel_dit.messages import STEP_TIMEOUT_S, RunnerSettings
from bagel_dit.runner_client import Driver
from bagel_dit.server import DitServicer

PAGE_TIMEOUT_S = 30.0
"""A source that waits says so; a connection that is dead is noticed sooner, by keepalive."""

log = Log("bagel.dit")


def parser() -> argparse.ArgumentParser:
    """The DiT's flags."""
    about = "Draws pictures from K/V, or serves whole requests."
    flags = service.parser("bagel_dit", about, "127.0.0.1:50053", (GATEWAY,))
    service.add_server_names(flags)
    service.add_model_flags(flags, "dit-0")
    service.add_image_flags(flags)
    flags.add_argument("--single-stage", action="store_true", help="load the whole model and serve whole requests")
    flags.add_argument(
        "--source", type=service.named_address, action="append", default=[], metavar="NAME=HOST:PORT",
        help="a peer that K/V may be pulled from; may be given again",
    )  # fmt: skip
    flags.add_argument("--vae-use-tiling", action="store_true", help="decode large pictures in tiles: less memory")
    flags.add_argument("--kv-cache-bytes", type=int, default=service.DEFAULT_KV_BYTES, help="shared memory for K/V")
    flags.add_argument(
        "--kv-page-timeout", type=float, default=PAGE_TIMEOUT_S, metavar="S", help="without a word of a source"
    )
    flags.add_argument(
        "--kv-device-bytes",
        type=service.count,
        metavar="N",
        help="memory of the device for K/V of pictures under way (default: 131,072 tokens, at most half of what the "
        "model leaves free on a GPU, a quarter of the memory for a CPU)",
    )
    flags.add_argument(
        "--step-timeout",
        type=service.seconds,
        default=STEP_TIMEOUT_S,
        metavar="S",
        help="a step that gets on with no layer for so long has hung: the runner is killed and started again "
        f"(default: {STEP_TIMEOUT_S:g})",
    )
    flags.add_argument(
        "--enable-diffusion-pipeline-profiler",
        action="store_true",
        help="log the durations of each picture's diffusion stages, and tell the caller",
    )
    return flags


def main(argv: Sequence[str] | None = None) -> int:
    """Run the service until SIGTERM; the process's exit code."""
    return service.run(parser(), argv, _serve, "dit")


async def _serve(args: argparse.Namespace) -> None:
    # A name on the hub is looked up this once: a runner that is started again is to load the same.
    checkpoint = find_checkpoint(args.model)
    checkpoint.config  # noqa: B018  what is wrong with it is told before anybody waits for this service
    names = [dit_pb2.DESCRIPTOR.services_by_name["DitService"].full_name]
    if not args.single_stage:
        names.append(kv_pb2.DESCRIPTOR.services_by_name["KvBlocksService"].full_name)
    secure = service.security(args)
    service.server_names(args, dict(args.source), tls=secure.encrypted)
    host = Host(args.listen, names, secure, unread=service.unread(args), limits=service.limits(args))
    await host.start()
    service.announce(host, args.listen)
    log.info("configuration", **vars(args))
    arena = None if args.single_stage else Arena(args.kv_cache_bytes)

    async def on_health(healthy: bool) -> None:
        await (host.ready() if healthy and added else host.not_ready())

    added = False
    driver = Driver(_runner_settings(args, checkpoint), arena, on_health)
    puller, images = None, service.image_pool(args)
    try:
        await driver.loaded()
        checkpoint.check_unchanged()
        if arena is not None:
            puller = _puller(args, arena, checkpoint, driver.info)
            watch_store(puller.store.stats)
            add_kv_blocks(KvBlocksServicer(puller.store), host.methods)
        servicer = _servicer(args, driver, puller, images, host.draining)
        add_DitServiceServicer_to_server(servicer, host.methods)
        added = True
        keep_loaded()
        await host.ready()
        log.info("ready", fingerprint=driver.info.checkpoint_fingerprint.hex(), device=driver.info.device)
        await service.serve(host, args.drain_timeout, driver.failed, servicer.idle)
    finally:
        await host.server.stop(None)
        if puller is not None:
            await puller.close()
        await images.close()
        await driver.stop()


def _servicer(
    args: argparse.Namespace, driver: Driver, puller: KvPuller | None, images: ImagePool, draining: asyncio.Event
) -> DitServicer:
    return DitServicer(
        args.name,
        driver,
        puller,
        images,
        sources=tuple(dict(args.source)),
        max_num_seqs=args.max_num_seqs,
        batch_timeout_s=args.batch_timeout,
        draining=draining,
    )


def _puller(args: argparse.Namespace, arena: Arena, checkpoint: Checkpoint, info: common_pb2.ModelInfo) -> KvPuller:
    llm = checkpoint.config.llm
    layout = KvLayout(llm.num_hidden_layers, llm.num_key_value_heads, llm.head_dim, info.dtype)
    store = KvStore(layout, info.kv_fingerprint, args.kv_cache_bytes, arena=arena, flag="--kv-cache-bytes")
    secure = service.security(args)
    names = service.server_names(args, dict(args.source), tls=secure.encrypted)
    sources = {name: channel(address, secure, names.get(name, THINKER)) for name, address in args.source}
    return KvPuller(store, sources, page_timeout_s=args.kv_page_timeout, room_wait_s=args.batch_timeout)


def _runner_settings(args: argparse.Namespace, checkpoint: Checkpoint) -> RunnerSettings:
    return RunnerSettings(
        model=str(checkpoint.folder),
        model_name=args.model,
        single_stage=args.single_stage,
        device=args.device,
        dtype=args.dtype,
        max_num_seqs=args.max_num_seqs,
        max_model_len=args.max_model_len,
        vae_use_tiling=args.vae_use_tiling,
        log_level=args.log_level,
        profile=args.enable_diffusion_pipeline_profiler,
        step_timeout_s=args.step_timeout,
        kv_device_bytes=args.kv_device_bytes,
    )


if __name__ == "__main__":
    sys.exit(main())
