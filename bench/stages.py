"""The services benchmark: the same request through two stages and through the single stage."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bagel.client import Client
from bagel.deployment.deploy_file import load_deploy_config, shipped_deploy_config
from bagel.deployment.launcher import Deployment
from bench.report import Table
from bench.timing import compare

MODEL = Path(__file__).resolve().parents[1] / "tests" / "golden" / "checkpoint"
LIMIT = 1.25
"""The longest time that the tiny model's text-to-image may take in two stages, as a multiple of the single stage's."""
NOTE = f"tiny model on a CPU, all services up; wall time at the client, medians of interleaved samples; limit {LIMIT:g}"
CASES: Mapping[str, Mapping[str, Any]] = {
    "text-to-image 64, 50 timesteps": {"height": 64, "width": 64},
    "text-to-image 128, 50 timesteps": {"height": 128, "width": 128},
    "text-to-image 512, 10 timesteps": {"height": 512, "width": 512, "steps": 10},
}


def run(only: str, repeats: int) -> Iterator[Table]:
    """Measure every case whose name contains `only`."""
    table = Table("services, two stages beside one", NOTE)
    with ExitStack() as stack:
        clients, nowhere = [], stack.enter_context(Path(os.devnull).open("w"))
        for topology in ("bagel", "bagel_single_stage"):
            config = load_deploy_config(shipped_deploy_config(topology))
            deployment = stack.enter_context(Deployment(config, MODEL, device="cpu", logs=nowhere))
            clients.append(stack.enter_context(Client(deployment.address)))
        for name, options in CASES.items():
            if only in name:
                _measure(table, name, clients, options, repeats)
    yield table


def _measure(table: Table, name: str, clients: list[Client], options: Mapping[str, Any], repeats: int) -> None:
    seeds = iter(range(10**6))

    def draw(client: Client) -> None:
        seed = next(seeds)
        # A new prompt each time, so that no K/V are reused.
        client.generate(f"a large red circle, take {seed}", seed=seed, **options)

    two, one = clients
    result = compare(lambda: draw(two), lambda: draw(one), repeats)
    low, high = result.spread
    table.add(
        case=name,
        two_stages_ms=1e3 * result.ours_s,
        single_stage_ms=1e3 * result.control_s,
        ratio=result.ratio,
        quartiles=f"{low:.2f} to {high:.2f}",
    )
    if result.ratio > LIMIT:
        table.failed = True
