"""The cost of previews: the DiT's own runner draws one picture without and with three previews, in turn."""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from statistics import median
from typing import TypeVar

import torch

from bagel.checkpoint.roles import Role
from bagel.deployment.defaults import NANO_NAME, find_model
from bagel.deployment.dit_config import DitConfig
from bagel.engine.loading import LoadedModel
from bagel.engine.segments import ChainPlanner
from bagel.kv.arena import Arena
from bagel.model.bagel import Bagel
from bagel.model.tokenizer import BagelTokenizer
from bagel.prompts import BranchName
from bagel.request import ImageSettings
from bagel.v1 import common_pb2
from bagel_dit import messages
from bagel_dit.pulse import Pulses
from bagel_dit.runner import Runner
from bagel_dit.runner_process import Pipe
from bench import cases
from bench.lab import Lab
from bench.report import Table

PREVIEWS = 3
RUNS = 3
Reply = TypeVar("Reply")
FORMAT = common_pb2.IMAGE_FORMAT_PNG


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
        runner = _RunnerThread(model)
        runner.draw(side, cases.GUIDED, PREVIEWS)  # warm-up
        plain, shown = [], []
        for _ in range(RUNS):  # in turn, so that the GPU's clock and temperature affect both alike
            plain.append(runner.draw(side, replace(cases.GUIDED, steps=lab.sizes.steps), 0))
            shown.append(runner.draw(side, replace(cases.GUIDED, steps=lab.sizes.steps), PREVIEWS))
        runner.stop()
    without, with_previews = median(each.total for each in plain), median(each.total for each in shown)
    first = median(each.first_preview / each.total for each in shown)
    cost = 100 * (with_previews / without - 1)
    table.add(without_s=without, with_three_s=with_previews, cost_percent=cost, first_at_percent=100 * first)
    lab.headline("three previews cost", cost, "%")
    lab.headline("the first preview comes at", 100 * first, "% of the time")
    yield table


class _RunnerThread:
    """A runner in a thread instead of a process, with a model of random weights; the benchmark acts as its server."""

    def __init__(self, model: Bagel) -> None:
        self._connection, theirs = multiprocessing.Pipe()
        llm = model.config.llm
        self._layers, row_bytes = llm.num_hidden_layers, llm.num_key_value_heads * llm.head_dim * model.dtype.itemsize
        self._half = cases.PROMPT * row_bytes
        self._arena = Arena(2 * self._half)
        values = torch.randn(2 * self._half // model.dtype.itemsize).to(model.dtype)
        self._arena.buffer[:] = values.view(torch.uint8).numpy().data
        self._thread = threading.Thread(target=_serve, args=(theirs, self._arena, model), daemon=True)
        self._thread.start()
        self._until(messages.Ready)
        self._count = 0

    def draw(self, side: int, settings: ImageSettings, previews: int) -> _Drawn:
        """Draw one picture, planned step by step as the server does."""
        self._count += 1
        rows = side // 16
        gen, empty = messages.PlacedContext(b"gen", cases.PROMPT, cases.PROMPT), messages.PlacedContext(b"", 0, 0)
        contexts = {BranchName.GEN: gen, BranchName.CFG_TEXT: empty}
        output = messages.Output(FORMAT, None, previews)
        add = messages.AddPicture(self._count, settings, (rows, rows), self._count, (), contexts, output)
        pages = tuple(
            messages.LandedPage(BranchName.GEN, layer, 0, cases.PROMPT, 0, self._half) for layer in range(self._layers)
        )
        for command in (add, messages.Land(self._count, pages), messages.Begin(self._count)):
            self._connection.send(command)
        steps = self._until(messages.Begun).steps
        begin, first = time.perf_counter(), 0.0
        self._connection.send(messages.StepPlan((self._count,), read=False))
        while True:
            reply = self._connection.recv()
            if isinstance(reply, messages.Stepped) and reply.pictures[self._count] < steps:
                self._connection.send(messages.StepPlan((self._count,), read=False))
            elif isinstance(reply, messages.Previewed):
                first = first or time.perf_counter() - begin
            elif isinstance(reply, messages.Drawn):
                return _Drawn(time.perf_counter() - begin, first)
            elif isinstance(reply, messages.Failed):
                raise RuntimeError(f"a picture failed: {reply.status!r}")

    def stop(self) -> None:
        self._connection.send(messages.Stop())
        self._thread.join()

    def _until(self, kind: type[Reply]) -> Reply:
        while True:
            reply = self._connection.recv()
            if isinstance(reply, kind):
                return reply


def _serve(connection: Connection, arena: Arena, model: Bagel) -> None:
    _, checkpoint = find_model(NANO_NAME)  # for its tokenizer and names alone: nothing is read or written
    tokenizer = BagelTokenizer(checkpoint.folder)
    planner = ChainPlanner(model.config, tokenizer, b"bench")
    loaded = LoadedModel(model, tokenizer, checkpoint, planner, b"bench", 16_384)
    config = DitConfig(model="bench", device=str(model.device), max_num_seqs=1, log_level="WARNING")
    Runner(Pipe(connection), Pulses(), arena, config, loaded).run()
