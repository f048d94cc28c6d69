"""One engine for pictures and text on one model: carries out commands, and says what happens in events."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

from torch import Tensor

from bagel.checkpoint.roles import Role
from bagel.engine.commands import AddPicture, AddRequest, Advance, Begin, Command, LoadPages, Remove, StepPlan
from bagel.engine.device_check import DeviceCheck
from bagel.engine.diffusion import DiffusionEngine
from bagel.engine.events import Broken, Event, Failed, Stepped, StepTimed
from bagel.engine.loading import LoadedModel
from bagel.engine.memory import is_out_of_memory, kv_space
from bagel.engine.noise import initial_noise
from bagel.engine.picture import ArrivingContext, Picture
from bagel.engine.progress import Heartbeat
from bagel.engine.single_stage import SingleStage
from bagel.engine.warm_up import warm_up
from bagel.errors import BagelError, OutOfMemory

DEFAULT_MAX_NUM_SEQS = 16

logger = logging.getLogger(__name__)


class Engine:
    """Everything that one process computes on one model.

    A model of role full serves whole requests (`AddRequest`), any that draws pictures of K/V that arrive
    (`AddPicture`). Commands come from one thread; events are emitted from several.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        emit: Callable[[Event], None],
        *,
        max_num_seqs: int = DEFAULT_MAX_NUM_SEQS,
        kv_device_bytes: int | None = None,
        profile: bool = False,
        pages: Tensor | None = None,
        page_heads: tuple[int, int] | None = None,
        heartbeat: Heartbeat | None = None,
        early_steps: bool = True,
    ) -> None:
        """max_num_seqs: texts decoded at once; kv_device_bytes, profile: as DitConfig has them.

        pages: shared memory that K/V arrive in, uint8; page_heads, early_steps: as of DiffusionEngine. The ranks of
        the model's groups compute together, and all get the same commands in the same order.
        """
        self.loaded, self._emit, self.heartbeat = loaded, emit, heartbeat or Heartbeat()
        model, self._world = loaded.model, loaded.groups.world
        self._broken = False
        self.space = kv_space(model, kv_device_bytes)
        self._diffusion = DiffusionEngine(
            model,
            self.space,
            self.heartbeat,
            emit=emit,
            fail=self._report,
            pages=pages,
            page_heads=page_heads,
            profile=profile,
            early_steps=early_steps,
        )
        self.single_stage: SingleStage | None = None
        if loaded.role is Role.FULL:
            self.single_stage = SingleStage(
                loaded,
                self.space,
                self.heartbeat,
                max_num_seqs=max_num_seqs,
                emit=emit,
                fail=self._report,
                # Its contexts were computed here, so no K/V are still to come.
                draw=lambda id_, picture, output: self._diffusion.add(id_, picture, output, begun=True),
                bucket=self._diffusion.bucket,
                profile=profile,
            )
        self._check = DeviceCheck(model, emit, self._drop_caches)
        self._handlers: dict[type, Callable[[Any], None]] = {
            AddPicture: self._add_picture,
            LoadPages: lambda command: self._diffusion.load_pages(command.id, command.pages),
            Begin: lambda command: self._diffusion.begin(command.id),
            Advance: lambda command: self._diffusion.advance(command.id),
            AddRequest: self._add_request,
            StepPlan: self._step,
            Remove: lambda command: self._remove(command.id),
        }

    @property
    def look_again_s(self) -> float | None:
        """Seconds after which `look` wants to be called although no command came; None if there is no need."""
        return self._check.look_again_s

    def warm_up(self) -> None:
        """Do the work that the first request would otherwise wait for. Raises OutOfMemory."""
        with self.heartbeat.work():
            texts = None if self.single_stage is None else self.single_stage.texts
            warm_up(self.loaded, self.space, self._diffusion, texts)

    def execute(self, command: Command) -> None:
        """Carry out a command. An error ends the request that it is about, and is an event.

        Of several ranks each gets the same commands and does the same. An error that the others may not have, like
        memory that runs out, is the end of all: the event Broken, after which nothing is carried out.
        """
        if self._broken:
            return
        with self.heartbeat.work():
            try:
                self._handlers[type(command)](command)
            except Exception as error:
                # A StepPlan has none: its error belongs to no single request.
                id_ = getattr(command, "id", None)
                if id_ is not None:
                    self._remove(id_)
                self._report(id_, error)
            # The command may have given back the room that a picture waits for.
            self._diffusion.admit()
            self._look()

    def look(self) -> None:
        """Between two commands: see whether a device that was full has memory again."""
        with self.heartbeat.work():
            self._look()

    def close(self) -> None:
        """Wait for the pictures that are being decoded, and end."""
        if self.single_stage is not None:
            self.single_stage.close()
        self._diffusion.close()

    def _look(self) -> None:
        reading = self.single_stage is not None and self.single_stage.busy
        idle = not (self.space.taken or reading or self._diffusion.busy)
        self._check.look(idle=idle, grid=self._diffusion.latest_grid)

    def _add_picture(self, command: AddPicture) -> None:
        rows, columns = command.grid
        features = self.loaded.model.config.latent_features
        noise = initial_noise(command.seed, rows * columns, features, command.posterior_shapes)
        contexts = {name: ArrivingContext(placed) for name, placed in command.contexts.items()}
        picture = Picture(command.settings, command.grid, noise, contexts)
        self._diffusion.add(command.id, picture, command.output, begun=False)

    def _add_request(self, command: AddRequest) -> None:
        assert self.single_stage is not None, f"a model of role {self.loaded.role} serves no whole requests"
        self.single_stage.submit(command)

    def _step(self, plan: StepPlan) -> None:
        timed: list[StepTimed] = []
        try:
            timed += self._diffusion.step(plan.pictures)
            if plan.read and self.single_stage is not None:
                timed += self.single_stage.work(plan.begin)
        finally:  # the scheduler waits for this event before it plans on
            reading = self.single_stage is not None and self.single_stage.busy
            self._emit(Stepped(reading, tuple(timed)))

    def _remove(self, id_: int) -> None:
        if self.single_stage is not None:
            self.single_stage.remove(id_)
        self._diffusion.remove(id_)

    def _drop_caches(self) -> None:
        if self.single_stage is not None:
            self.single_stage.drop_cache()

    def _report(self, id_: int | None, error: Exception) -> None:
        """Emit a request's error; the receiver answers with Remove. From any thread."""
        if not isinstance(error, BagelError):
            if self._world.size > 1:
                self._break(error)
                return
            if is_out_of_memory(error):
                # Only noted, as this may be any thread: `_look` frees memory and tries.
                self._check.ran_out()
                error = OutOfMemory("the memory of the device is full; draw fewer or smaller pictures at once")
            else:
                logger.error("internal error", exc_info=error)
                error = _internal(error)
        if id_ is not None:
            self._emit(Failed(id_, error))

    def _break(self, error: Exception) -> None:
        """Say that this rank can go on no longer: the others wait for it, or have gone another way.

        Where memory has run out, even that may fail. Then the process ends, which is seen too.
        """
        if self._broken:
            return
        self._broken = True
        try:
            what = "out of memory" if is_out_of_memory(error) else type(error).__name__
            self._emit(Broken(f"{what}: {next(iter(str(error).splitlines()), '')}"))
        except OSError:  # nobody is there to be told
            raise
        except Exception:
            os._exit(1)
        # Only now, as this may fail in the same way.
        logger.error("this rank cannot go on", exc_info=error)


def _internal(cause: Exception) -> BagelError:
    """An error without details, for a service's callers. A caller in the same process finds its cause."""
    error = BagelError(f"internal error: {type(cause).__name__}; the log of this service has the details")
    error.__cause__ = cause
    return error
