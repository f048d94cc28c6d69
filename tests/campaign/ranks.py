"""Ranks of a DiT that are lost, many times over: python -m tests.campaign.ranks --kind killed --faults 200.

A Thinker, a gateway and a DiT whose model two ranks divide, in another way for each quarter of the faults. Each round
sends two pictures, and in the midst of their steps one rank is killed, stopped, or finds no memory any more, or its
node of a real Ray cluster is lost. Each picture must be right, or end with a documented error soon; then the next one
must be right, no lease, page or place may be held, and no process be left over. A failure prints how to run its round
again.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

import yaml
from PIL.Image import Image

from bagel.client import Client
from bagel.deployment.deploy_file import load_deploy_config, shipped_deploy_config
from bagel.deployment.launcher import Deployment
from bagel.errors import BagelError
from bagel.events import ServiceEvent, StepDone
from tests.campaign.watch import children
from tests.helpers import agree
from tests.ray_nodes import NODE, patiently
from tests.shared import MODEL, released

SIZES: tuple[dict[str, Any], ...] = (
    {"tensor_parallel_size": 2},
    {"cfg_parallel_size": 2},
    {"context_parallel_size": 2},
    {"use_hsdp": True, "hsdp_shard_size": 2},
)
"""How the ranks divide the work."""
STEPS, SEEDS = 12, 4
ENDS_S = 30.0
"""Seconds after a fault in which the pictures that it hits have ended. A stopped rank is noticed after two."""
BACK_S = 120.0
"""Seconds until the next picture is drawn, ranks started again."""
DOCUMENTED = frozenset({"UNAVAILABLE", "RESOURCE_EXHAUSTED"})


@dataclass
class Tally:
    """What has come of the pictures, and how long it took."""

    ends: Counter[str] = field(default_factory=Counter)
    ended_s: float = 0.0
    back_s: float = 0.0
    hit: int = 0
    wrong: list[str] = field(default_factory=list)


Harm = Callable[[random.Random], Callable[[], None]]
"""Loses a rank, and says how to let what was not lost be again."""


class Served:
    """Services whose DiT has two ranks. ranks: their processes."""

    def __init__(self, services: Deployment, harm: Harm, ranks: Callable[[], list[int]]) -> None:
        self.services, self._harm, self._ranks = services, harm, ranks
        # Drawn while nothing happens.
        self._right = [self._draw(seed) for seed in range(SEEDS)]
        self._processes = len(self._ranks())

    def round(self, chance: random.Random, tally: Tally) -> str:
        """Lose a rank while two pictures are drawn; what is wrong after that, or nothing."""
        seeds, after = [chance.randrange(SEEDS), chance.randrange(SEEDS)], chance.randrange(1, STEPS - 1)
        reached = Event()

        def on_event(event: ServiceEvent) -> None:
            if isinstance(event, StepDone) and event.step >= after:
                reached.set()

        with ThreadPoolExecutor() as pool:
            asked = [pool.submit(self._end, seed, on_event) for seed in seeds]
            reached.wait(ENDS_S)
            time.sleep(chance.random() * 0.05)
            undo, began = self._harm(chance), time.monotonic()
            try:
                ends = [each.result(2 * ENDS_S) for each in asked]
            finally:
                took = time.monotonic() - began
                undo()
        tally.ends.update(kind for kind, _ in ends)
        tally.ended_s, tally.hit = max(tally.ended_s, took), tally.hit + any(kind != "right" for kind, _ in ends)
        problems = [problem for _, problem in ends if problem]
        if took > ENDS_S:
            problems.append(f"ended {took:.1f} s after the fault")
        return "; ".join(problems) or self._back(chance, tally)

    def _back(self, chance: random.Random, tally: Tally) -> str:
        began, seed = time.monotonic(), chance.randrange(SEEDS)
        while (end := self._end(seed))[0] != "right":
            if end[1] or time.monotonic() > began + BACK_S:
                return f"afterwards: {end[1] or 'no picture: ' + end[0]}"
            time.sleep(0.1)
        tally.back_s = max(tally.back_s, time.monotonic() - began)
        stages = [each.address(0) for each in self.services.services if each.name != "gateway"]
        if not released(*stages):
            return "afterwards something is still held"
        deadline = time.monotonic() + ENDS_S
        while len(self._ranks()) != self._processes:
            if time.monotonic() > deadline:
                return f"afterwards there are {len(self._ranks())} processes of ranks, not {self._processes}"
            time.sleep(0.1)
        return ""

    def _end(self, seed: int, on_event: Callable[[ServiceEvent], None] | None = None) -> tuple[str, str]:
        """What becomes of a picture, and what is wrong with that."""
        try:
            drawn = self._draw(seed, on_event)
        except BagelError as error:
            kind = f"{type(error).__name__} {error.grpc_status}"
            return kind, "" if error.grpc_status in DOCUMENTED else f"an undocumented error: {kind}: {error}"
        return "right", "" if agree(drawn, self._right[seed]) else f"a wrong picture of seed {seed}"

    def _draw(self, seed: int, on_event: Callable[[ServiceEvent], None] | None = None) -> Image:
        size = 64 + 16 * seed
        with Client(self.services.address) as client:
            result = client.generate(
                "a red cup", seed=seed, steps=STEPS, height=size, width=size, timeout=2 * ENDS_S, on_event=on_event
            )
        assert result.image is not None
        return result.image


def ranks_of(services: Deployment) -> list[int]:
    """The processes of the ranks that the DiT has started."""
    return [pid for pid in children(_dit(services)) if _name(pid).startswith("dit-runner")]


def _dit(services: Deployment) -> int:
    return int(next(each for each in services.services if each.name == "dit-0").process.pid)


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text()
    except OSError:
        return ""


# Ways to lose a rank


def killed(ranks: Callable[[], list[int]]) -> Harm:
    return lambda chance: _signalled(chance.choice(ranks()), signal.SIGKILL)


def stopped(ranks: Callable[[], list[int]]) -> Harm:
    return lambda chance: _signalled(chance.choice(ranks()), signal.SIGSTOP)


def _signalled(pid: int, number: int) -> Callable[[], None]:
    with suppress(ProcessLookupError):
        os.kill(pid, number)
    return lambda: None


def memory(ranks: Callable[[], list[int]]) -> Harm:
    def harm(chance: random.Random) -> Callable[[], None]:
        pid = chance.choice(ranks())
        _, hard = resource.prlimit(pid, resource.RLIMIT_AS)
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
        resource.prlimit(pid, resource.RLIMIT_AS, (pages * resource.getpagesize(), hard))

        def undo() -> None:
            with suppress(OSError):  # it may have ended, as it should
                resource.prlimit(pid, resource.RLIMIT_AS, (hard, hard))

        return undo

    return harm


NO_SPARE_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "16384", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_TOP_PAD_": "0"}
"""Of the environment: glibc gives memory back at once, so that a limit of what a process has now is met at once."""
KINDS = {"killed": killed, "stopped": stopped, "memory": memory}
"""And the loss of a node, of another deployment."""


class Nodes:
    """A Ray cluster of two nodes on this machine, with a CPU each, so that each rank has a node of its own."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster  # an extra

        self._cluster: Any = patiently(lambda: Cluster(initialize_head=True, head_node_args=NODE))
        patiently(lambda: self._cluster.add_node(**NODE))
        self.address = self._cluster.address

    def lose(self, chance: random.Random) -> Callable[[], None]:
        """Lose the node that is not the cluster's first, and start another one."""
        (node,) = self._cluster.worker_nodes
        self._cluster.remove_node(node, allow_graceful=False)
        return lambda: patiently(lambda: self._cluster.add_node(**NODE))

    def close(self) -> None:
        """End it."""
        self._cluster.shutdown()


@contextmanager
def ray_nodes() -> Iterator[Nodes]:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    nodes = Nodes()
    try:
        yield nodes
    finally:
        nodes.close()


def ray_ranks() -> list[int]:
    """The processes of the actors that are ranks."""
    found = []
    for each in Path("/proc").iterdir():
        with suppress(OSError):
            if each.name.isdecimal() and b"RankActor" in (each / "cmdline").read_bytes():
                found.append(int(each.name))
    return found


@contextmanager
def served(sizes: dict[str, Any], kind: str, folder: Path) -> Iterator[Served]:
    """Services of a tiny model."""
    file, more = folder / "deploy.yaml", dict[str, Any](logs=folder / "logs")
    dit = {"stage_id": 1, "devices": "0,1", "parallel_config": sizes}
    file.write_text(yaml.safe_dump({"base_config": str(shipped_deploy_config("bagel")), "stages": [dit]}))
    config = load_deploy_config(file)
    with ExitStack() as stack:
        if kind == "node":
            nodes = stack.enter_context(ray_nodes())
            more |= {"worker_backend": "ray", "ray_address": nodes.address}
        if kind == "memory":
            more["env"] = NO_SPARE_MEMORY
        start = Deployment(config, MODEL, device="cpu", engine="torch", init_timeout_s=180, **more)
        services = stack.enter_context(start)
        if kind == "node":
            yield Served(services, nodes.lose, ray_ranks)
        else:
            ranks = partial(ranks_of, services)
            yield Served(services, KINDS[kind](ranks), ranks)


def run(kind: str, seed: int, faults: int, only: int | None, tally: Tally) -> None:
    """So many rounds, or the one of that number."""
    numbers = range(faults) if only is None else range(only, only + 1)
    share = -(-faults // len(SIZES))
    for at, sizes in enumerate(SIZES):
        mine = [number for number in numbers if number // share == at]
        if not mine:
            continue
        with tempfile.TemporaryDirectory() as folder, served(sizes, kind, Path(folder)) as services:
            for number in mine:
                began = time.monotonic()
                problem = services.round(random.Random(f"{seed}/{kind}/{number}"), tally)
                print(f"round {number} {sizes}: {problem or 'ok'}, {time.monotonic() - began:.1f} s", flush=True)
                if problem:
                    again = f"--kind {kind} --seed {seed} --faults {faults} --only {number}"
                    tally.wrong.append(f"{problem}\n  again: python -m tests.campaign.ranks {again}")


def main() -> int:
    """Lose ranks; 1 if a round failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.campaign.ranks", description=__doc__.partition("\n")[0])
    parser.add_argument("--kind", choices=[*KINDS, "node"], required=True, help="how a rank is lost")
    parser.add_argument("--faults", type=int, default=200, metavar="N", help="rounds (200)")
    parser.add_argument("--seed", type=int, default=1, metavar="S", help="of what is chosen (1)")
    parser.add_argument("--only", type=int, metavar="N", help="this round alone")
    options = parser.parse_args()
    began, tally = time.monotonic(), Tally()
    run(options.kind, options.seed, options.faults, options.only, tally)
    ends = ", ".join(f"{count} {end}" for end, count in tally.ends.most_common())
    print(f"{options.kind}: {tally.hit} of {options.faults} rounds hit a picture in {time.monotonic() - began:.0f} s")
    print(f"pictures: {ends}")
    print(f"the last ended {tally.ended_s:.1f} s after its fault, the next right one came within {tally.back_s:.1f} s")
    for wrong in tally.wrong:
        print(wrong)
    return 1 if tally.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
