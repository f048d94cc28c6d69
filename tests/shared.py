"""Services that tests share: started when a test first asks for them, looked over after each test that had them.

A test that kills, hangs, fills or configures services starts its own.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import bagel
from bagel.deployment.deploy_file import shipped_deploy_config
from bagel.deployment.gateway_config import KEYS_FILE
from bagel.deployment.launcher import is_serving
from bagel.deployment.process import Service
from bagel.errors import BagelError
from bagel.rpc.api_keys import key_line, new_key
from bagel.rpc.transport import sync_channel
from bagel.v1 import kv_pb2
from bagel.v1.kv_pb2_grpc import KvBlocksServiceStub

MODEL = Path(__file__).parent / "golden" / "checkpoint"
START_S = 180
AT_REST_WITHIN_S = 15.0
SOCKETS = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
ESTABLISHED = "01"


def stats(address: str) -> kv_pb2.GetStatsResponse:
    """What the store of the service there has counted."""
    with sync_channel(address) as channel:
        return KvBlocksServiceStub(channel).GetStats(kv_pb2.GetStatsRequest(), timeout=10)


def released(*addresses: str) -> bool:
    """Whether nothing is held and nothing under way, at once or soon."""
    return not still(lambda: [told for each in addresses for told in _held(each)])


@dataclass
class Stages:
    """Services of one topology that speak for as long as the tests run, and the gateways in front of them."""

    omni: bagel.Omni
    logs: Path
    gateways: dict[tuple[str, ...], Service] = field(default_factory=dict)

    @property
    def services(self) -> list[Service]:
        return [*self.omni._engine.deployment.services, *self.gateways.values()]

    @property
    def address(self) -> str:
        """The gateway's host:port."""
        return self.omni.address

    @property
    def http(self) -> str:
        """Where a gateway of these stages speaks HTTP."""
        return self.gateway("--http", "127.0.0.1:0", "--served-model-name", self.omni.model).http

    def stage(self, name: str) -> str:
        """The address of a stage, such as thinker-0."""
        return next(service.address(0) for service in self.services if service.name == name)

    def gateway(self, *flags: str, pipeline: str | None = None) -> Service:
        """One more gateway of these stages, with flags of its own; it takes a second, not a model's loading."""
        key = (pipeline or self.omni.config.pipeline, *flags)
        if key not in self.gateways:
            arguments = ["--listen", "127.0.0.1:0", "--pipeline", *key]
            for service in self.omni._engine.deployment.services[:-1]:
                arguments += [f"--{service.name.partition('-')[0]}", f"{service.name}={service.address(0)}"]
            name = f"gateway-{len(self.gateways) + 1}"
            made = Service(name, name, "bagel_gateway", arguments, os.environ, self.logs)
            self.gateways[key] = made
            until_serving(made)
        return self.gateways[key]

    def unrest(self) -> list[str]:
        """What keeps these services from being as they were: a death, what is held, a connection."""
        for service in self.services:
            try:
                service.check()
            except BagelError as error:
                return [str(error)]
        stages = [each for each in self.services if each.name in ("thinker-0", "dit-0")]
        held = [f"{each.name}: {told}" for each in stages if len(stages) > 1 for told in _held(each.address(0))]
        return held + [
            f"{each.name}: {count} connections to {address}"
            for each in self.services
            if each not in stages
            for address in (each.address(0), each.http)
            if (count := connections(address))
        ]

    def end(self) -> None:
        for gateway in self.gateways.values():
            gateway.tell_to_stop()
        for gateway in self.gateways.values():
            gateway.end(10)
        self.omni.close()


class Pool:
    """All that is shared, by topology and model."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._running = folder, dict[object, Stages]()

    def get(self, topology: str, model: str, settings: dict[str, int]) -> Stages:
        key = (topology, model, *settings.items())
        if key not in self._running:
            self._running[key] = self._start(topology, model, settings)
        return self._running[key]

    def _start(self, topology: str, model: str, settings: dict[str, int]) -> Stages:
        logs = self._folder / f"logs-{len(list(self._folder.iterdir()))}"
        keys = self._folder / "keys"
        keys.write_text(key_line("nobody", new_key()))
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(KEYS_FILE, str(keys))  # which services of one's own never heed
            return Stages(
                bagel.Omni(
                    model,
                    deploy_config=shipped_deploy_config(topology),
                    device="cpu",
                    init_timeout=START_S,
                    log_stats=True,
                    enable_diffusion_pipeline_profiler=True,
                    logs=logs,
                    **settings,  # type: ignore[arg-type]
                ),
                logs,
            )

    def look_over(self, stages: Stages) -> None:
        """Fail the test that leaves something behind. The next one gets services that are new."""
        if left := still(stages.unrest):
            self._running = {key: each for key, each in self._running.items() if each is not stages}
            stages.end()
            pytest.fail(f"this test leaves behind: {'; '.join(left)}")

    def end(self) -> None:
        for stages in self._running.values():
            stages.end()


Borrow = Callable[..., Stages]


@contextmanager
def lending(pool: Pool) -> Iterator[Borrow]:
    """What hands shared services to one test: `borrow("bagel")`; of another model, or with settings of Omni's."""
    lent: list[Stages] = []

    def borrow(topology: str, model: str = str(MODEL), **settings: int) -> Stages:
        lent.append(pool.get(topology, model, settings))
        return lent[-1]

    yield borrow
    for stages in lent:
        pool.look_over(stages)


def until_serving(*services: Service, limit_s: float = START_S) -> None:
    deadline = time.monotonic() + limit_s
    for service in services:
        address = service.address(deadline)
        while not is_serving(address):
            service.check()
            assert time.monotonic() < deadline, f"{service.name} is not ready"
            time.sleep(0.1)


def _held(address: str) -> list[str]:
    now = stats(address)
    return [f"{name} {value}" for name in ("held_bytes", "leases", "pulls") if (value := getattr(now, name))]


def connections(address: str) -> int:
    """How many are open to a port of this machine; 0 where the system does not tell."""
    if not address:
        return 0
    port = f":{int(address.rpartition(':')[2]):04X}"
    rows = [row.split() for table in SOCKETS if table.exists() for row in table.read_text().splitlines()[1:]]
    return sum(row[1].endswith(port) and row[3] == ESTABLISHED for row in rows)


def still(found: Callable[[], list[str]]) -> list[str]:
    """What is still found when services have had the time to come to rest."""
    deadline = time.monotonic() + AT_REST_WITHIN_S
    while (left := found()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left
