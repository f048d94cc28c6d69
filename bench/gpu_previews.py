"""The cost of previews: the DiT's own engine draws one picture without and with three previews, in turn."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from queue import SimpleQueue
from statistics import median

import torch

from bagel.checkpoint.roles import Role
from bagel.deployment.defaults import NANO_NAME, find_model
from bagel.engine.commands import AddPicture, Begin, LandedPage, LoadPages, PlacedContext
from bagel.engine.engine import Engine
from bagel.engine.events import Drawn, Event, Failed, Previewed
from bagel.engine.loading import LoadedModel
from bagel.engine.scheduler import Scheduler
from bagel.images.output import OutputFormat
from bagel.model.bagel import Bagel
from bagel.model.tokenizer import BagelTokenizer
from bagel.prompts import BranchName
from bagel.request import ImageSettings
from bench import cases
from bench.lab import Lab
from bench.report import Table

PREVIEWS = 3
RUNS = 3


@dataclass(frozen=True)
class _Drawn:
    """Seconds from the first plan to the picture and to its first preview."""

    total: float
    first_preview: float


def previews(lab: Lab) -> Iterator[Table]:
    """Role denoise: a text-to-image of the largest size, including the encoding to PNG."""
    side = lab.sizes.sides[-1]
    note = f"text-to-image {side}x{side}, {lab.sizes.steps} timesteps, medians of {RUNS}; encoding to PNG included"
    table = Table("gpu previews", note)
    with lab.model(Role.DENOISE) as model, torch.inference_mode():
        drawer = _Drawer(model)
        drawer.draw(side, cases.GUIDED, PREVIEWS)  # warm-up
        plain, shown = [], []
        for _ in range(RUNS):  # in turn, so that the GPU's clock and temperature affect both alike
            plain.append(drawer.draw(side, replace(cases.GUIDED, steps=lab.sizes.steps), 0))
            shown.append(drawer.draw(side, replace(cases.GUIDED, steps=lab.sizes.steps), PREVIEWS))
        drawer.stop()
    without, with_previews = median(each.total for each in plain), median(each.total for each in shown)
    first = median(each.first_preview / each.total for each in shown)
    cost = 100 * (with_previews / without - 1)
    table.add(without_s=without, with_three_s=with_previews, cost_percent=cost, first_at_percent=100 * first)
    lab.headline("three previews cost", cost, "%")
    lab.headline("the first preview comes at", 100 * first, "% of the time")
    yield table


class _Drawer:
    """A rank's engine with a model of random weights; the benchmark acts as its server."""

    def __init__(self, model: Bagel) -> None:
        llm = model.config.llm
        self._layers, row_bytes = llm.num_hidden_layers, llm.num_key_value_heads * llm.head_dim * model.dtype.itemsize
        self._half = cases.PROMPT * row_bytes
        values = torch.randn(2 * self._half // model.dtype.itemsize).to(model.dtype)
        _, checkpoint = find_model(NANO_NAME)  # for its tokenizer alone
        loaded = LoadedModel.of(model, BagelTokenizer(checkpoint.folder), Role.DENOISE, b"bench")
        self._events: SimpleQueue[Event] = SimpleQueue()
        self._engine = Engine(loaded, self._events.put, pages=values.view(torch.uint8))
        self._count = 0

    def draw(self, side: int, settings: ImageSettings, previews: int) -> _Drawn:
        """Draw one picture, planned step by step as the server does."""
        self._count += 1
        rows = side // 16
        gen, empty = PlacedContext(b"gen", cases.PROMPT, cases.PROMPT), PlacedContext(b"", 0, 0)
        contexts = {BranchName.GEN: gen, BranchName.CFG_TEXT: empty}
        output = OutputFormat("PNG", None, previews)
        add = AddPicture(self._count, settings, (rows, rows), self._count, (), contexts, output)
        pages = tuple(
            LandedPage(BranchName.GEN, layer, 0, cases.PROMPT, 0, self._half) for layer in range(self._layers)
        )
        for command in (add, LoadPages(self._count, pages), Begin(self._count)):
            self._engine.execute(command)
        scheduler, begin, first = Scheduler(), time.perf_counter(), 0.0
        while True:
            event = self._events.get()
            scheduler.observe(event)
            if isinstance(event, Previewed):
                first = first or time.perf_counter() - begin
            elif isinstance(event, Drawn):
                return _Drawn(time.perf_counter() - begin, first)
            elif isinstance(event, Failed):
                raise event.error
            if (plan := scheduler.plan()) is not None:
                self._engine.execute(plan)

    def stop(self) -> None:
        self._engine.close()
