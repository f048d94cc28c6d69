"""The diffusion engine: pictures wait for room, take steps in batches, and are decoded beside the steps of others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from bagel.checkpoint.limits import padded_latents
from bagel.engine.arrivals import Arrival, Arrivals
from bagel.engine.clock import WindowClock
from bagel.engine.commands import LandedPage
from bagel.engine.events import Begun, Event, LayersLanded, StepTaken, StepTimed
from bagel.engine.line import Waiting, WaitingLine
from bagel.engine.picture import Picture
from bagel.engine.progress import Heartbeat
from bagel.engine.sampler import Canvas, Drawing, OnVelocity, StepGate, Velocities, clean_estimate, preview_steps
from bagel.engine.slab import SharedSlab
from bagel.engine.step_graphs import StepGraphs
from bagel.engine.vae_worker import EarlyPicture, FinishedPicture, VaeWorker
from bagel.images.output import OutputFormat
from bagel.model.bagel import Bagel
from bagel.parallel.mesh import Share


@dataclass
class _Active:
    """A picture on a canvas. previews: steps that one is made in; windows: times it, if it is profiled.

    arrival: its K/V on their way; None if they were there from the beginning.
    """

    canvas: Canvas
    drawing: Drawing
    output: OutputFormat | None
    previews: tuple[int, ...]
    windows: WindowClock | None
    arrival: Arrival | None = None


class DiffusionEngine:
    """Draws pictures on one model. Each is known by its request's id from `add` to Drawn, an error or `remove`."""

    def __init__(
        self,
        model: Bagel,
        space: SharedSlab,
        heartbeat: Heartbeat,
        *,
        emit: Callable[[Event], None],
        fail: Callable[[int, Exception], None],
        pages: Tensor | None = None,
        page_heads: tuple[int, int] | None = None,
        profile: bool = False,
        early_steps: bool = True,
    ) -> None:
        """space: holds the pictures' K/V; emit: receives LayersLanded, Begun, StepTaken, Previewed and Drawn.

        fail: receives the error of a picture, on any thread; pages: shared memory that K/V arrive in, uint8;
        page_heads: the model's K/V heads whose rows it has, begin and end (None: all); profile: pictures come with the
        durations of their stages; early_steps: unless profile is set, first steps may begin before all K/V are there.
        The ranks of the model's groups draw together.
        """
        self._model, self._device, self._profile = model, model.device, profile
        # A profile tells the stages apart, so none of them overlap.
        self._early_steps = early_steps and not profile
        self._emit, self._fail = emit, fail
        self._gate, self._line = StepGate(model.device), WaitingLine(space)
        self._groups = model.groups
        self._space, self._graphs = space, StepGraphs.over(model, space.slab)
        self._arrivals: Arrivals | None = None
        if pages is not None:
            kept = model.language_model.kv_heads
            begin, end = page_heads or (0, kept.whole)
            heads = Share(kept.start - begin, kept.stop - begin, end - begin)
            self._arrivals = Arrivals(space.slab, pages, heads, heartbeat, fail, self._on_layers)
        self._canvases: dict[int, Canvas] = {}
        self._active: dict[int, _Active] = {}
        self.vae = VaeWorker(model, heartbeat, emit=emit, fail=fail, is_drawing=self._active.__contains__)
        self.latest_grid = (1, 1)
        """Latent rows and columns of the picture that was placed last."""

    @property
    def busy(self) -> bool:
        """Whether any picture is under way."""
        return bool(self._active) or self.vae.busy

    def close(self) -> None:
        """Wait for the pictures that are being decoded, and end."""
        if self._arrivals is not None:
            self._arrivals.close()
        self.vae.close()

    def bucket(self, tokens: int) -> int:
        """The number of latents that a picture's rows are padded to."""
        return padded_latents(tokens, self._device.type, self._groups.context.size)

    def canvas(self, bucket: int) -> Canvas:
        """An empty canvas for pictures of one bucket."""
        return Canvas(self._model, bucket, self._space, self._graphs, self._groups)

    def add(self, id_: int, picture: Picture, output: OutputFormat | None, *, begun: bool) -> None:
        """Let a picture wait for room for its K/V; emits Begun once it has room and its K/V are there.

        begun: they are there already. Raises InvalidRequest for a picture that will never have room.
        """
        self._line.join(id_, Waiting(picture, output, self.bucket(picture.tokens), begun))
        self.admit()

    def load_pages(self, id_: int, pages: Sequence[LandedPage]) -> None:
        """Copy pages of K/V from shared memory into a picture's rows; nothing if the picture has left."""
        if (waiting := self._line.get(id_)) is not None:
            waiting.pages += pages  # they stay in shared memory until it has begun
        elif (active := self._active.get(id_)) is not None:
            self._copy(active, pages)

    def advance(self, id_: int) -> None:
        """Compute a picture's first step as far as its K/V are in the slab; nothing if it has begun or is over.

        Nothing either while another picture's is half done, so that no more than one has hidden states.
        """
        active = self._active.get(id_)
        if self._arrivals is None or active is None or active.arrival is None or active.drawing.step:
            return
        if any(each.canvas.layers_ahead(each.drawing)[0] for each in self._active.values() if each is not active):
            return
        try:
            active.canvas.advance(active.drawing, self._arrivals.reach(active.arrival))
        except Exception as error:
            self._end(id_, error)

    def begin(self, id_: int) -> None:
        """All K/V of a picture have arrived; nothing if it has left."""
        if (waiting := self._line.get(id_)) is not None:
            waiting.begun = True
        elif (active := self._active.get(id_)) is not None:
            self._begin(id_, active)

    def admit(self) -> None:
        """Place the pictures that there is room for now."""
        while (turn := self._line.next()) is not None:
            id_, waiting = turn
            try:
                active = self._place(id_, waiting)
                self._copy(active, waiting.pages)
                if waiting.begun:
                    self._begin(id_, active)
            except Exception as error:
                self._end(id_, error)

    def step(self, ids: Sequence[int]) -> list[StepTimed]:
        """One Euler step of pictures of one bucket; emits StepTaken. Returns a step that is known to be done.

        Pictures that have left are skipped. An error ends all of them, as they share one forward.
        """
        active = {id_: self._active[id_] for id_ in ids if id_ in self._active}
        if not active:
            return []
        try:
            timed = self._launch(active)
        except Exception as error:
            for id_ in active:
                self._end(id_, error)
            return []
        for id_, each in active.items():
            self._emit(StepTaken(id_, each.drawing.step))
            if each.drawing.finished:
                try:
                    # Its error is its own: the others have taken their step.
                    self._decode(id_, each)
                except Exception as error:
                    self._end(id_, error)
        return timed

    def remove(self, id_: int) -> None:
        """Let a picture leave; nothing if it has."""
        self._line.leave(id_)
        if (active := self._active.pop(id_, None)) is not None:
            if self._arrivals is not None and active.arrival is not None:
                self._arrivals.drop(active.arrival)
            active.canvas.remove(active.drawing)
            if not active.canvas.drawings:
                # On a CPU every number of latents is a bucket, so empty canvases would pile up.
                self._canvases.pop(active.canvas.padded, None)

    def _end(self, id_: int, error: Exception) -> None:
        self.remove(id_)
        self._fail(id_, error)

    def _place(self, id_: int, waiting: Waiting) -> _Active:
        """Give a picture a place on the canvas of its bucket."""
        picture, bucket = waiting.picture, waiting.padded
        self.latest_grid = picture.grid
        previews = preview_steps(picture.steps, waiting.output.previews if waiting.output else 0)
        windows = WindowClock(self._device, picture.steps) if self._profile else None
        canvas = self._canvases.get(bucket) or self.canvas(bucket)
        drawing = canvas.add(picture)  # fails as a whole if memory runs out, and a new canvas goes with it
        self._canvases[bucket] = canvas
        arrival = None
        if self._arrivals is not None:
            rows = sum(context.length for context in picture.distinct().values())
            arrival = self._arrivals.open(id_, drawing.place, rows)
        active = self._active[id_] = _Active(canvas, drawing, waiting.output, previews, windows, arrival)
        return active

    def _on_layers(self, id_: int) -> None:
        """On the thread of arrivals: a picture has more of its first layers."""
        active = self._active.get(id_)
        if not self._early_steps or active is None or active.arrival is None:
            return
        if active.canvas.takes_early_step(active.drawing, active.arrival.layers):
            self._emit(LayersLanded(id_))

    def _begin(self, id_: int, active: _Active) -> None:
        """Emit Begun, as soon as the K/V that have arrived are in the slab."""
        if self._arrivals is None or active.arrival is None:
            self._announce(id_, active)
        else:
            self._arrivals.finish(active.arrival, lambda: self._announce(id_, active))

    def _announce(self, id_: int, active: _Active) -> None:
        picture, canvas = active.drawing.picture, active.canvas
        ahead = canvas.layers_ahead(active.drawing)
        self._emit(Begun(id_, picture.steps, canvas.padded, len(picture.distinct()), *ahead))

    def _copy(self, active: _Active, pages: Sequence[LandedPage]) -> None:
        if self._arrivals is not None and active.arrival is not None and pages:
            self._arrivals.copy(active.arrival, pages)

    def _launch(self, active: Mapping[int, _Active]) -> list[StepTimed]:
        """One step of pictures that are on one canvas; a step that is now known to be done."""
        canvas = next(iter(active.values())).canvas
        for each in active.values():
            if each.windows is not None:
                each.windows.reach(each.drawing.step)
        ahead = [piece for each in active.values() for piece in canvas.pieces_ahead(each.drawing)]
        with self._gate.step(len(active), ahead):
            canvas.step([each.drawing for each in active.values()], self._previews(active))
        return [] if self._gate.done is None else [StepTimed("picture", *self._gate.done)]

    def _decode(self, id_: int, active: _Active) -> None:
        """Hand a finished picture to the VAE's thread, so that the next step need not wait."""
        drawing = active.drawing
        latents, grid, step = drawing.latents, drawing.picture.grid, drawing.step
        if active.windows is not None:
            active.windows.reach(step)
        # Recorded now, so that the VAE does not wait for steps of others that follow.
        launched = self.vae.launched()
        self.remove(id_)
        # Without the drawing: the canvas, which may be the largest thing there is, goes before the VAE works.
        self.vae.finish(FinishedPicture(id_, latents, grid, active.output, active.windows, launched))

    def _previews(self, active: Mapping[int, _Active]) -> OnVelocity | None:
        """A callback that hands over the previews of a step; None if it makes none."""
        wanted = {each.drawing: id_ for id_, each in active.items() if each.drawing.step + 1 in each.previews}
        if not wanted:
            return None

        def on_velocity(drawing: Drawing, velocities: Velocities, guided: Tensor) -> None:
            if (id_ := wanted.get(drawing)) is None:
                return
            # The drawing counts this step only after the call.
            each, step = active[id_], drawing.step + 1
            estimate = clean_estimate(drawing.latents, guided, drawing.time)
            index = each.previews.index(step)
            self.vae.preview(EarlyPicture(id_, index, step, estimate, drawing, each.output, self.vae.launched()))

        return on_velocity
