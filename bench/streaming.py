"""Many texts at once: tokens a second that reach one client, beside the engine's own rate in this process."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from queue import SimpleQueue
from statistics import median, quantiles
from typing import Any

import torch

from bagel.checkpoint.files import Checkpoint
from bagel.client import Client
from bagel.deployment.deploy_file import load_deploy_config, shipped_deploy_config
from bagel.deployment.launcher import Deployment
from bagel.deployment.thinker_config import ThinkerConfig
from bagel.engine.segments import Chain
from bagel.engine.text_scheduler import ContextDone, ContextEvent, ContextFailed, ContextRequest
from bagel.events import TextDelta
from bagel.pipelines import BAGEL
from bagel.request import TextSettings
from bagel_thinker.engine import Engine
from bagel_thinker.loading import load_engine
from bench.report import Table
from bench.stages import MODEL

TEXTS = 64
LIMIT = 0.8
"""The least share of the engine's own rate that must reach the client."""
PROMPT = "tell me a story"
SETTINGS: dict[str, Any] = {"do_sample": True, "temperature": 1.0}


def run(device: torch.device, repeats: int, checkpoint: Path | None, *, tokens: int = 128) -> Iterator[Table]:
    """Measure both in turn, after one warm-up of each; yields one table.

    checkpoint: where not given, the tests' one, whose texts run to their limit (bagel-nano's are of three tokens).
    """
    folder = checkpoint or MODEL
    settings: dict[str, Any] = {"max_num_seqs": TEXTS}
    if device.type == "cuda":
        settings["gpu_memory_utilization"] = 0.27  # a DiT and two engines have room on one GPU of 140 GB
    # Where there are two GPUs, the engine of this process has the first to itself.
    theirs = "cuda:1" if device.type == "cuda" and torch.cuda.device_count() > 1 else str(device)
    if device.type == "cpu":
        torch.set_num_threads(1)  # as the services of a small model have it
    with ExitStack() as stack:
        nowhere = stack.enter_context(Path(os.devnull).open("w"))
        config = load_deploy_config(shipped_deploy_config(BAGEL.model_type))
        services = stack.enter_context(Deployment(config, folder, logs=nowhere, device=theirs, **settings))
        client = stack.enter_context(Client(services.address))
        engine = load_engine(ThinkerConfig(model=str(folder), device=str(device), **settings), Checkpoint(folder))
        stack.callback(engine.close)
        ours, own, pieces = [], [], []
        for take in range(repeats + 1):
            seeds = range(TEXTS * take, TEXTS * (take + 1))
            rate, count = _at_the_client(client, seeds, tokens)
            alone = _of_the_engine(engine, seeds, tokens)
            if take:  # the first only warms up
                ours.append(rate)
                own.append(alone)
                pieces.append(count)
    ratios = [a / b for a, b in zip(ours, own, strict=True)]
    low, ratio, high = quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    note = (
        f"{TEXTS} texts of up to {tokens} tokens at once on {engine.name}; medians of interleaved runs; limit {LIMIT:g}"
    )
    table = Table("streaming", note)
    table.add(
        case=f"{TEXTS} texts",
        client_tokens_per_s=median(ours),
        engine_tokens_per_s=median(own),
        ratio=ratio,
        quartiles=f"{low:.2f} to {high:.2f}",
        tokens_a_message=median(pieces),
    )
    table.failed = ratio < LIMIT
    yield table


def _at_the_client(client: Client, seeds: range, tokens: int) -> tuple[float, float]:
    """Tokens a second of texts that are streamed to one client, and tokens a message."""
    messages = 0

    def count(event: object) -> None:
        nonlocal messages
        messages += isinstance(event, TextDelta)

    asked = [
        {"prompt": PROMPT, "modality": "text2text", "seed": seed, "max_tokens": tokens, **SETTINGS} for seed in seeds
    ]
    began = time.perf_counter()
    results = client.generate_many(asked, count, at_once=TEXTS)
    seconds = time.perf_counter() - began
    written = sum(len(result.token_ids) for result in results)
    return written / seconds, written / max(messages, 1)


def _of_the_engine(engine: Engine, seeds: range, tokens: int) -> float:
    """Tokens a second of the same texts in this process, without messages."""
    events: SimpleQueue[ContextEvent] = SimpleQueue()

    def emit(event: ContextEvent) -> None:
        if isinstance(event, ContextDone | ContextFailed):
            events.put(event)

    chain = engine.planner.append_text(Chain(), PROMPT)
    settings = TextSettings(max_tokens=tokens, **SETTINGS)
    began = time.perf_counter()
    for seed in seeds:
        engine.submit(ContextRequest(chain, seed, emit, settings))
    written = 0
    for _ in seeds:
        event = events.get()
        if isinstance(event, ContextFailed):
            raise event.error
        assert isinstance(event, ContextDone)
        written += len(event.token_ids)
    return written / (time.perf_counter() - began)
