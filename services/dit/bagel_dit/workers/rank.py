"""One rank: loads the model, then carries out the server's commands one after the other."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from contextlib import suppress

import torch

from bagel.checkpoint.files import Checkpoint
from bagel.checkpoint.roles import Role
from bagel.engine.engine import Engine
from bagel.engine.events import Broken, Event
from bagel.engine.loading import LoadedModel, load_role
from bagel.engine.memory import is_out_of_memory
from bagel.engine.progress import Heartbeat
from bagel.errors import BagelError, CheckpointError, OutOfMemory
from bagel.kv.arena import Arena
from bagel.model.bagel import Bagel
from bagel.model.device import DTYPES, choose_device, choose_dtype
from bagel.model.mot import MoTLayer
from bagel.model.threads import share_threads
from bagel.model.vit import VitLayer
from bagel.parallel.groups import join, leave
from bagel.parallel.rendezvous import clear
from bagel.rpc.heap import keep_loaded
from bagel.telemetry.logs import set_up_logs
from bagel_dit.workers import Place, RankSettings
from bagel_dit.workers.agreement import AGREED
from bagel_dit.workers.messages import LoadFailed, Ready, Stop
from bagel_dit.workers.pipe import Pipe
from bagel_dit.workers.watch import Watch

FIRST = Place()
PR_SET_NAME = 15
"""Of Linux's prctl; a name has at most 15 bytes there."""
NICENESS = 5
"""Of a process that computes on a CPU: the services beside it need little of it, and that at once (bench/README.md)."""


def main(pipe: Pipe, heartbeat: Heartbeat, watch: Watch, settings: RankSettings, place: Place) -> None:
    """Load the model, then serve until Stop or until the server is gone."""
    name = f"dit-runner-{place.index}" if place.rendezvous else "dit-runner"
    set_up_logs(name, settings.config.log_level)
    name_process(name)
    try:
        loaded = load(settings, place)
        keep_loaded()
        engine = make_engine(pipe, heartbeat, settings, loaded)
        if loaded.model.device.type == "cuda" and not settings.config.enforce_eager:
            engine.warm_up()
    except Exception as error:
        if is_out_of_memory(error):
            error = OutOfMemory(f"the device has too little memory to load the model: {error}")
        if not isinstance(error, BagelError):
            raise
        pipe.send(LoadFailed(error))
        return
    # From now on only the beats of threads are progress.
    watch.loading = False
    if serve(pipe, engine, settings.config.model):
        del engine, loaded  # with the graphs that captured the groups' exchanges
        leave()
    else:
        clear(place.rendezvous)  # which the server cannot remove any more


def load(settings: RankSettings, place: Place = FIRST) -> LoadedModel:
    """The share of the model of a rank, on its device: of several, the GPU of its number among those visible."""
    config, checkpoint = settings.config, Checkpoint(settings.folder)
    device, parallel = choose_device(config.device, place.index if place.gpu is None else place.gpu), config.parallel
    if device.type == "cpu":
        os.nice(NICENESS)
        share_threads(parallel.world_size)
    else:
        # Streams and kernels go to the current device, which would be GPU 0.
        torch.cuda.set_device(device)
    _check_same(checkpoint, settings.fingerprint)
    groups = join(
        parallel.rank(place.index),
        device,
        place.rendezvous,
        timeout_s=config.step_timeout_s,
        vae_ranks=parallel.vae_patch_parallel_size,
        weight_ranks=parallel.shards,
    )
    return load_role(
        checkpoint,
        Role.FULL if config.single_stage else Role.DENOISE,
        dtype=DTYPES[choose_dtype(config.dtype, device)],
        device=device,
        max_model_len=config.max_model_len,
        vae_use_tiling=config.tiling,
        attention_backend=config.attention_backend,
        enforce_eager=bool(config.enforce_eager),
        quantization=config.quantization,
        groups=groups,
        cpu_offload=config.cpu_offload,
    )


def make_engine(pipe: Pipe, heartbeat: Heartbeat, settings: RankSettings, loaded: LoadedModel) -> Engine:
    """The rank's engine; its events go through the pipe."""
    config, memory = settings.config, settings.memory
    arena = None if memory is None else Arena.attach(memory.name, memory.nbytes)
    beat_in_layers(loaded.model, heartbeat)
    return Engine(
        loaded,
        pipe.send if loaded.groups.world.index == 0 else only_agreed(pipe),
        max_num_seqs=config.max_num_seqs,
        kv_device_bytes=config.kv_device_bytes,
        profile=config.enable_diffusion_pipeline_profiler,
        # The server's memory itself: a page is copied once, from there to the device.
        pages=None if arena is None else torch.frombuffer(arena.buffer, dtype=torch.uint8),
        page_heads=None if memory is None else memory.heads,
        heartbeat=heartbeat,
        early_steps=not config.enforce_eager,
    )


def serve(pipe: Pipe, engine: Engine, model_name: str) -> bool:
    """Report the model, then carry out commands until Stop; False if the server is gone before."""
    loaded = engine.loaded
    device = (str(loaded.model.device),)
    pipe.send(Ready(loaded.info(model_name).SerializeToString(), loaded.memory(), engine.space.size, device))
    try:
        while not isinstance(order := pipe.next(engine.look_again_s), Stop):
            if order is None:
                # No order came, but a device that was full may have memory again.
                engine.look()
            else:
                engine.execute(order)
    except (EOFError, OSError):
        return False
    engine.close()
    return True


def only_agreed(pipe: Pipe) -> Callable[[Event], None]:
    """What a rank that does not answer says: that it is as far as the others, or broken."""

    def emit(event: Event) -> None:
        if isinstance(event, (*AGREED, Broken)):
            pipe.send(event)

    return emit


def name_process(name: str) -> None:
    """Let tools like ps and top call this process so, on Linux."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_NAME, name.encode(), 0, 0, 0)


def beat_in_layers(model: Bagel, heartbeat: Heartbeat) -> None:
    """Let every layer that is done count as progress of its thread."""
    layers = [module for module in model.modules() if isinstance(module, MoTLayer | VitLayer)]
    parts = model.vae.modules() if model.vae is not None else ()
    for layer in (*layers, *(part for part in parts if not list(part.children()))):
        layer.register_forward_hook(lambda *_: heartbeat.beat())


def _check_same(checkpoint: Checkpoint, served: bytes) -> None:
    """Refuse another model than the one that the service has announced, and whose K/V it holds."""
    if served and checkpoint.fingerprint != served:
        raise CheckpointError(
            f"{checkpoint.folder} now holds another model, of fingerprint {checkpoint.fingerprint.hex()}; this service "
            f"serves {served.hex()}. Start it again, and the Thinker with it, to serve what is there now"
        )
