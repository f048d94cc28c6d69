"""Ranks as actors of a real Ray cluster of two nodes, both of them on this machine: tensor parallel over the two."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Event
from typing import Any

import pytest

pytest.importorskip("ray", reason="Ray is not installed: the extra ray")

from PIL.Image import Image
from ray.cluster_utils import Cluster

from bagel.client import Client
from bagel.deployment.deploy_file import load_deploy_config, shipped_deploy_config
from bagel.deployment.dit_config import DitConfig
from bagel.deployment.launcher import Deployment
from bagel.errors import BagelError, ConfigError, InitTimeout
from bagel.events import ServiceEvent, StepDone
from bagel.request import Modality
from bagel_dit.workers import RankSettings
from bagel_dit.workers.messages import LoadFailed, Ready, Report
from tests.helpers import agree
from tests.ray_nodes import NODE, patiently
from tests.shared import MODEL, Borrow, released, stats

pytestmark = [
    pytest.mark.slow,
    # Of Ray itself, which leaves files open that it has read.
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"),
]

LIMIT_S = 120
DRAWN: dict[str, Any] = {"height": 64, "width": 64, "steps": 5, "seed": 7}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Two nodes with one CPU each, so that of two ranks each has a node of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        cluster = patiently(lambda: Cluster(initialize_head=True, head_node_args=NODE))
        patiently(lambda: cluster.add_node(**NODE))
        yield cluster
        cluster.shutdown()


@pytest.fixture(scope="module")
def served(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """A Thinker here, and a DiT of two ranks on the cluster."""
    config = load_deploy_config(shipped_deploy_config("bagel"), engine="torch", tensor_parallel_size=2)
    settings = {"worker_backend": "ray", "ray_address": cluster.address, "logs": tmp_path_factory.mktemp("logs")}
    with Deployment(config, MODEL, device="cpu", init_timeout_s=180, **settings) as services:
        yield services


def stage(services: Deployment, name: str) -> str:
    return next(each.address(0) for each in services.services if each.name == name)


def draw(
    address: str, on_event: Callable[[ServiceEvent], None] | None = None, prompt: str = "a red cup", **settings: Any
) -> Image:
    with Client(address) as client:
        options = {**DRAWN, **settings}
        result = client.generate(prompt, modality=Modality.TEXT2IMG, timeout=LIMIT_S, on_event=on_event, **options)
    assert result.image is not None
    return result.image


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def actors(kind: bytes = b"") -> list[int]:
    """Process ids of the actors on this machine."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                command = (folder / "cmdline").read_bytes()
            except OSError:
                continue
            found += [int(folder.name)] if command.startswith(b"ray::") and (kind or b"Actor") in command else []
    return found


def test_ranks_on_two_nodes_draw_what_a_child_process_draws(served: Deployment, borrow: Borrow) -> None:
    one = borrow("bagel")
    thinkers = (stage(served, "thinker-0"), one.stage("thinker-0"))
    before = [stats(each).sent_bytes for each in thinkers]
    prompt = "a cup for two nodes"  # which no other test has drawn with the services that all share
    assert agree(draw(served.address, prompt=prompt), draw(one.address, prompt=prompt))
    far, near = (stats(each).sent_bytes - sent for each, sent in zip(thinkers, before, strict=True))
    # Besides this host, the other node has pulled the one of two K/V heads that its rank needs.
    assert near > 0 and far == near * 3 // 2
    draw(served.address, prompt=prompt, seed=8)
    assert stats(thinkers[0]).sent_bytes - before[0] == far, "contexts that a node has are pulled again"
    assert released(thinkers[0], stage(served, "dit-0"))


def fails(served: Deployment, loss: Callable[[], None], told: str) -> None:
    """A picture under way ends with this cause."""
    begun = Event()

    def on_event(event: ServiceEvent) -> None:
        if isinstance(event, StepDone):
            begun.set()

    with ThreadPoolExecutor() as pool:
        drawing = pool.submit(draw, served.address, on_event, steps=1000)
        assert begun.wait(LIMIT_S)
        loss()
        with pytest.raises(BagelError, match=rf"\({told}\) under this request; send it again") as ended:
            drawing.result(LIMIT_S)
    assert ended.value.grpc_status == "UNAVAILABLE"


def test_a_node_that_is_lost_is_told_and_another_takes_its_place(served: Deployment, cluster: Cluster) -> None:
    before, after = draw(served.address), list[Image]()

    def lose() -> None:
        (node,) = cluster.worker_nodes
        cluster.remove_node(node, allow_graceful=False)
        patiently(lambda: cluster.add_node(**NODE))

    def drawn_again() -> bool:
        with suppress(BagelError):  # while the ranks are started
            after.append(draw(served.address))
        return bool(after)

    fails(served, lose, r"node \S+ was lost, with rank 1")
    until(drawn_again)
    assert agree(after[0], before)
    assert released(stage(served, "thinker-0"), stage(served, "dit-0"))


def test_a_rank_that_is_killed_is_told_and_nothing_is_left_of_a_service_that_is(served: Deployment) -> None:
    def kill() -> None:
        os.kill(actors(b"RankActor")[0], signal.SIGKILL)

    assert len(actors()) == 3  # two ranks, and what pulls K/V for the other node
    fails(served, kill, r"rank \d on node \S+: its process ended")
    # While it starts the ranks again.
    os.kill(next(each for each in served.services if each.name == "dit-0").process.pid, signal.SIGKILL)
    until(lambda: not actors())


def started(config: DitConfig) -> list[Report]:
    """What a group of this configuration says first, after it was stopped again."""
    from bagel_dit.workers.ray import RayGroup

    said: list[Report] = []

    async def main() -> None:
        heard = asyncio.Event()

        def emit(report: Report) -> None:
            said.append(report)
            heard.set()

        group = RayGroup(RankSettings(config, MODEL), emit=emit, on_death=lambda cause: None)
        async with asyncio.timeout(LIMIT_S):
            await heard.wait()
        await group.stop()

    asyncio.run(main())
    return said


def test_more_ranks_than_the_cluster_has_room_for_are_refused(cluster: Cluster) -> None:
    config = DitConfig(
        model=str(MODEL), device="cpu", worker_backend="ray", ray_address=cluster.address, cfg_parallel_size=3,
        ray_timeout_s=0.5,
    )  # fmt: skip
    (failed,) = started(config)
    assert isinstance(failed, LoadFailed) and isinstance(failed.error, InitTimeout)
    assert "no room for 3 ranks within 0.5 s: each needs one CPU, and of 2 there are 2 free" in str(failed.error)


def test_a_ray_that_cannot_be_started_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**_: Any) -> None:
        raise Exception("The current node timed out during startup.\nMore.")  # as Ray does

    monkeypatch.setattr("ray.init", init)
    (failed,) = started(DitConfig(model=str(MODEL), device="cpu", worker_backend="ray"))
    assert isinstance(failed, LoadFailed) and isinstance(failed.error, ConfigError)
    assert "no Ray could be started here: The current node timed out during startup.; see" in str(failed.error)


def test_without_an_address_a_ray_is_started_and_stopped() -> None:
    (ready,) = started(DitConfig(model=str(MODEL), device="cpu", worker_backend="ray", single_stage=True))
    assert isinstance(ready, Ready)
    until(lambda: not actors())
