"""The runner process: carries out the server's commands on the model, one after the other."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bagel.checkpoint.files import Checkpoint
from bagel.checkpoint.limits import padded_latents
from bagel.checkpoint.roles import Role
from bagel.deployment.dit_config import DitConfig
from bagel.engine.clock import WindowClock
from bagel.engine.loading import LoadedModel, load_role
from bagel.engine.memory import is_out_of_memory, kv_space
from bagel.engine.noise import initial_noise
from bagel.engine.sampler import (
    Canvas,
    OnVelocity,
    Picture,
    StepGate,
    Velocities,
    clean_estimate,
    preview_steps,
)
from bagel.errors import BagelError, CheckpointError, OutOfMemory
from bagel.kv.arena import Arena
from bagel.model.attention import KvSlab
from bagel.model.bagel import Bagel
from bagel.model.device import DTYPES, choose_device, choose_dtype
from bagel.model.mot import MoTLayer
from bagel.model.vit import VitLayer
from bagel.rpc.convert import model_info
from bagel.rpc.errors import rpc_status_of
from bagel.rpc.heap import keep_loaded
from bagel.telemetry.logs import Log, set_up_logs
from bagel_dit.decoding import Decoder, EarlyLook, Last
from bagel_dit.device_check import DeviceCheck
from bagel_dit.line import Waiting, WaitingLine
from bagel_dit.messages import (
    AddPicture,
    Begin,
    Begun,
    Command,
    Failed,
    Land,
    LandedPage,
    LoadFailed,
    Output,
    PlacedContext,
    Read,
    Ready,
    Remove,
    Serve,
    Stepped,
    StepPlan,
    Stop,
    Timed,
)
from bagel_dit.pulse import Pulses
from bagel_dit.runner_process import Pipe
from bagel_dit.single_stage import WholeRequests

log = Log("bagel.dit.runner")
NICENESS = 5
"""Of a process that computes on a CPU: the services beside it need little of it, and that at once (bench/README.md)."""


def main(
    pipe: Pipe, pulses: Pulses, arena_fd: Any, arena_bytes: int, config: DitConfig, folder: Path, fingerprint: bytes
) -> None:
    """Load the model of a checkpoint folder, then serve commands until Stop or until the server is gone."""
    set_up_logs("dit-runner", config.log_level)
    try:
        arena = Arena.attach(arena_fd.detach(), arena_bytes) if arena_bytes else None
        if choose_device(config.device).type == "cpu":
            os.nice(NICENESS)
        loaded = load(config, Checkpoint(folder), fingerprint)
        keep_loaded()
        runner = Runner(pipe, pulses, arena, config, loaded)
    except Exception as error:
        if is_out_of_memory(error):
            error = OutOfMemory(f"the device has too little memory to load the model: {error}")
        if not isinstance(error, BagelError):
            raise
        pipe.send(LoadFailed(rpc_status_of(error).SerializeToString()))
        return
    runner.run()


@dataclass(frozen=True)
class _LateContext:
    """A context whose K/V are written to the slab page by page, after it has got its place."""

    placed: PlacedContext

    @property
    def digest(self) -> bytes:
        return self.placed.digest

    @property
    def length(self) -> int:
        return self.placed.length

    @property
    def rope(self) -> int:
        return self.placed.rope

    def copy_to(self, slab: KvSlab, start: int) -> None:
        """Nothing is there yet."""


@dataclass
class _Drawing:
    """A picture on a canvas."""

    canvas: Canvas
    number: int
    output: Output
    previews: tuple[int, ...] = ()
    """Steps that a preview is made in."""
    windows: WindowClock | None = None
    """Of a picture that is profiled."""


class Runner:
    """One rank's worker, on a model that is loaded."""

    def __init__(self, pipe: Pipe, pulses: Pulses, arena: Arena | None, config: DitConfig, loaded: LoadedModel) -> None:
        self._pipe, self._send, self._pulses = pipe, pipe.send, pulses
        self._loaded = loaded
        model = self._loaded.model
        self._model, self._device = model, model.device
        self._gate, self._profiles = StepGate(self._device), config.enable_diffusion_pipeline_profiler
        self._shared = None if arena is None else torch.frombuffer(arena.buffer, dtype=torch.uint8)
        self._space = kv_space(model, config.kv_device_bytes)
        self._line = WaitingLine(self._space)
        self._canvases: dict[int, Canvas] = {}
        self._drawings: dict[int, _Drawing] = {}
        self._decoder = Decoder(model, self._send, self._tell_failed, self._drawings.__contains__, pulses)
        self._whole = (
            WholeRequests(
                self._loaded,
                config.max_num_seqs,
                send=self._send,
                fail=self._fail,
                tell_failed=self._tell_failed,
                draw=self._draw_whole,
                pulses=pulses,
                space=self._space,
            )
            if config.single_stage
            else None
        )
        self._check = DeviceCheck(model, self._send, self._whole.drop_cache if self._whole else lambda: None)
        info = model_info(
            model.config,
            name=config.model,
            checkpoint_fingerprint=self._loaded.checkpoint.fingerprint,
            kv_fingerprint=self._loaded.kv_fingerprint,
            max_positions=self._loaded.max_model_len,
            dtype=self._loaded.dtype,
            device=str(self._device),
        )
        beat_in_layers(model, pulses)
        pulses.loading = False
        self._send(Ready(info.SerializeToString(), self._loaded.memory(), self._space.size))

    def run(self) -> None:
        """Carry out commands until Stop, or until the server is gone."""
        handlers: dict[type, Callable[[Any], None]] = {
            AddPicture: self._add,
            Land: self._land,
            Begin: self._begin,
            StepPlan: self._step,
            Remove: self._remove,
        }
        if self._whole is not None:
            handlers |= {Serve: self._whole.serve, Read: self._whole.read}
        while (command := self._next_command()) is not None:
            if isinstance(command, Stop):
                if self._whole is not None:
                    self._whole.close()
                self._decoder.close()
                return
            with self._pulses.work():
                try:
                    handlers[type(command)](command)
                except Exception as error:
                    self._fail(getattr(command, "id", None), error)
                self._admit()
                self._check.look(self._is_idle)

    def _next_command(self) -> Command | None:
        """The next command; None once the server is gone."""
        try:
            while (command := self._pipe.next(self._check.look_again_s)) is None:
                with self._pulses.work():
                    self._check.look(self._is_idle)
        except (EOFError, OSError):
            return None
        return command

    def _is_idle(self) -> bool:
        """Whether no work holds memory of the device."""
        return not self._space.taken and not self._decoder.busy and (self._whole is None or not self._whole.busy)

    # Pictures from contexts that are pulled

    def _add(self, command: AddPicture) -> None:
        rows, columns = command.grid
        features = self._model.config.latent_features
        noise = initial_noise(command.seed, rows * columns, features, command.posterior_shapes)
        contexts = {name: _LateContext(placed) for name, placed in command.contexts.items()}
        self._join(command.id, Picture(command.settings, command.grid, noise, contexts), command.output, begun=False)

    def _join(self, id_: int, picture: Picture, output: Output, *, begun: bool) -> None:
        """Have a picture wait for room for its K/V, which it may find at once."""
        self._line.join(id_, Waiting(picture, output, padded_latents(picture.tokens, self._device.type), begun))
        self._admit()

    def _admit(self) -> None:
        """Place the pictures that there is room for now."""
        while (turn := self._line.next()) is not None:
            id_, waiting = turn
            try:
                drawing = self._place(id_, waiting)
                self._copy(drawing, waiting.pages)
                if waiting.begun:
                    self._announce(id_, drawing)
            except Exception as error:
                self._fail(id_, error)

    def _land(self, command: Land) -> None:
        if (waiting := self._line.get(command.id)) is not None:
            waiting.pages += command.pages  # they stay in shared memory until it has begun
        elif (drawing := self._drawings.get(command.id)) is not None:  # else it has left
            self._copy(drawing, command.pages)

    @torch.inference_mode()
    def _copy(self, drawing: _Drawing, pages: Sequence[LandedPage]) -> None:
        for page in pages:
            start = drawing.canvas.place(drawing.number, page.branch) + page.row
            for slab, offset in ((drawing.canvas.slab.k, page.k_offset), (drawing.canvas.slab.v, page.v_offset)):
                slab[page.layer, start : start + page.rows] = self._rows(page, offset)

    def _rows(self, page: LandedPage, offset: int) -> Tensor:
        """Rows of K or V in shared memory, [rows, kv_heads, head_dim]."""
        assert self._shared is not None
        llm = self._model.config.llm
        shape = (page.rows, llm.num_key_value_heads, llm.head_dim)
        nbytes = page.rows * llm.num_key_value_heads * llm.head_dim * self._model.dtype.itemsize
        return self._shared[offset : offset + nbytes].view(self._model.dtype).view(shape)

    def _begin(self, command: Begin) -> None:
        if (waiting := self._line.get(command.id)) is not None:
            waiting.begun = True
        elif (drawing := self._drawings.get(command.id)) is not None:
            self._announce(command.id, drawing)

    def _place(self, id_: int, waiting: Waiting) -> _Drawing:
        """Give a picture a place on the canvas of its bucket."""
        picture, output, bucket = waiting.picture, waiting.output, waiting.padded
        self._check.grid = picture.grid
        previews = preview_steps(picture.steps, output.previews)
        windows = WindowClock(self._device, picture.steps) if self._profiles else None
        canvas = self._canvases.get(bucket) or Canvas(self._model, [], bucket, self._space)
        number = canvas.add(picture)  # fails as a whole if memory runs out, and a new canvas goes with it
        self._canvases[bucket] = canvas
        drawing = self._drawings[id_] = _Drawing(canvas, number, output, previews, windows)
        return drawing

    def _announce(self, id_: int, drawing: _Drawing) -> None:
        picture = drawing.canvas.pictures[drawing.number]
        rows = len({context.digest for context in picture.contexts.values()})
        self._send(Begun(id_, picture.steps, drawing.canvas.padded, rows))

    def _draw_whole(self, id_: int, picture: Picture, output: Output) -> None:
        """A picture of a whole request, whose contexts have been read here."""
        self._join(id_, picture, output, begun=True)

    # Steps

    def _step(self, plan: StepPlan) -> None:
        taken: dict[int, int] = {}
        timed: list[Timed] = []
        drawings = {id_: self._drawings[id_] for id_ in plan.pictures if id_ in self._drawings}
        if drawings:
            try:
                timed += self._launch(drawings)
            except Exception as error:  # one forward for all of them
                for id_ in drawings:
                    self._fail(id_, error)
                drawings = {}
        for id_, drawing in drawings.items():
            picture = drawing.canvas.pictures[drawing.number]
            taken[id_] = picture.step
            if picture.finished:
                try:
                    self._decode(id_, drawing, picture)
                except Exception as error:
                    self._fail(id_, error)
        try:
            if plan.read and self._whole is not None:
                timed += self._whole.work()
        finally:  # the server waits for this reply before it plans on
            self._send(Stepped(taken, self._whole is not None and self._whole.busy, tuple(timed)))

    def _launch(self, drawings: Mapping[int, _Drawing]) -> list[Timed]:
        """One step of pictures that are on one canvas; a step that is now known to be done."""
        canvas = next(iter(drawings.values())).canvas
        for drawing in drawings.values():
            if drawing.windows is not None:
                drawing.windows.reach(canvas.pictures[drawing.number].step)
        with self._gate.step(len(drawings)):
            canvas.step([drawing.number for drawing in drawings.values()], self._on_velocity(drawings))
        return [] if self._gate.done is None else [Timed("picture", *self._gate.done)]

    def _decode(self, id_: int, drawing: _Drawing, picture: Picture) -> None:
        """Hand a finished picture to the VAE's thread, so that the next step need not wait."""
        latents = drawing.canvas.latents(drawing.number)  # the canvas lets go of them
        if drawing.windows is not None:
            drawing.windows.reach(picture.step)
        done = self._decoder.launched()
        self._forget(id_)
        # Without the drawing: the canvas, which may be the largest thing there is, goes before the VAE works.
        self._decoder.finish(Last(id_, latents, picture.grid, drawing.output, drawing.windows, done))

    # Previews

    def _on_velocity(self, drawings: Mapping[int, _Drawing]) -> OnVelocity | None:
        """What hands previews on while a step is taken; None where it makes none."""
        wanted = {
            drawing.number: (id_, drawing)
            for id_, drawing in drawings.items()
            if drawing.canvas.pictures[drawing.number].step + 1 in drawing.previews
        }
        if not wanted:
            return None

        def on_velocity(number: int, step: int, velocities: Velocities, guided: Tensor) -> None:
            if number in wanted:
                id_, drawing = wanted[number]
                picture = drawing.canvas.pictures[number]
                estimate = clean_estimate(drawing.canvas.latents(number), guided, picture.times[step])
                index = drawing.previews.index(step + 1)
                done = self._decoder.launched()
                self._decoder.preview(EarlyLook(id_, index, step + 1, estimate, picture, drawing.output, done))

        return on_velocity

    def _remove(self, command: Remove) -> None:
        self._forget(command.id)

    def _forget(self, id_: int) -> None:
        if self._whole is not None:
            self._whole.forget(id_)
        self._line.leave(id_)
        if (drawing := self._drawings.pop(id_, None)) is not None:
            drawing.canvas.remove(drawing.number)
            if not drawing.canvas.pictures:
                self._canvases.pop(drawing.canvas.padded, None)

    # Replies

    def _fail(self, id_: int | None, error: Exception) -> None:
        if id_ is not None:
            self._forget(id_)
        self._tell_failed(id_, error)

    def _tell_failed(self, id_: int | None, error: Exception) -> None:
        """Tell of an error; the server answers with Remove. Also from other threads."""
        if not isinstance(error, BagelError):
            if is_out_of_memory(error):
                self._check.ran_out()
                error = OutOfMemory("the memory of the device is full; draw fewer or smaller pictures at once")
            else:
                log.error("internal error", exc_info=error)
                error = BagelError(f"internal error: {type(error).__name__}; the log of this service has the details")
        if id_ is not None:
            self._send(Failed(id_, rpc_status_of(error).SerializeToString()))


def beat_in_layers(model: Bagel, pulses: Pulses) -> None:
    """Let every layer that is done count as progress of its thread."""
    layers = [module for module in model.modules() if isinstance(module, MoTLayer | VitLayer)]
    parts = model.vae.modules() if model.vae is not None else ()
    for layer in (*layers, *(part for part in parts if not list(part.children()))):
        layer.register_forward_hook(lambda *_: pulses.beat())


def load(config: DitConfig, checkpoint: Checkpoint, fingerprint: bytes = b"") -> LoadedModel:
    """The model of a runner, on its device. fingerprint: what it must have, if anything."""
    device = choose_device(config.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    role = Role.FULL if config.single_stage else Role.DENOISE
    _check_same(checkpoint, fingerprint)
    loaded = load_role(
        checkpoint,
        role,
        dtype=DTYPES[choose_dtype(config.dtype, device)],
        device=device,
        max_model_len=config.max_model_len,
    )
    if config.vae_use_tiling:
        loaded.model.autoencoder().use_tiling()
    return loaded


def _check_same(checkpoint: Checkpoint, served: bytes) -> None:
    """Refuse another model than the one that the service has told its callers of, and whose K/V it holds."""
    if served and checkpoint.fingerprint != served:
        raise CheckpointError(
            f"{checkpoint.folder} now holds another model, of fingerprint {checkpoint.fingerprint.hex()}; this service "
            f"serves {served.hex()}. Start it again, and the Thinker with it, to serve what is there now"
        )
