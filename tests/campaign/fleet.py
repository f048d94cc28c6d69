"""The services under test as processes, a proxy between every two of them, and their undisturbed twins."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from bagel.deployment.process import Service
from bagel.errors import BagelError
from bagel.rpc.transport import PLAINTEXT, Security
from tests.campaign.certificates import Certificates
from tests.campaign.clock import Clock
from tests.campaign.proxy import Link
from tests.shared import MODEL

ROOT = Path(__file__).parents[2]
SOURCES = ("", "services/thinker", "services/dit", "gateway")
START_S = 1200.0
SILENCE_S, PAGE_S, LEASE_S = 2.5, 1.5, 2.0
"""Limits of the services: of a silent service, of a silent source, and of a lease."""
TRANSFORMS = {"vae": [96, 64, 16], "vit": [112, 56, 14]}
"""Images become few tokens, so that an edit takes as long as a picture."""
THINKERS, DITS = ("thinker-0", "thinker-1"), ("dit-0", "dit-1")
STAGES = (*THINKERS, *DITS, "single")
FRONTS = {"gateway": "bagel", "gateway-single": "bagel_single_stage"}
"""The gateways, and the pipeline of each."""
TWIN, TWIN_FRONT = "twin", "gateway-twin"


_running: list[Fleet] = []


def python_path(root: Path) -> str:
    """Where the services' packages are, in a copy of the repository or in itself."""
    return os.pathsep.join(str(root / each) for each in SOURCES)


def encrypted(place: str, tls: bool) -> bool:
    """Whether a service, or what passes a link, is encrypted. tls: whether that of the two stages is."""
    return tls is not ("single" in place)


def is_framed(link: str, tls: bool) -> bool:
    """Whether a link carries gRPC in plaintext, whose frames can be told apart."""
    return not encrypted(link, tls) and not link.endswith("/http")


def small_model(folder: Path) -> Path:
    """The tiny checkpoint, which reads images as few tokens."""
    shutil.copytree(MODEL, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "image_transforms": TRANSFORMS}))
    return folder


@dataclass
class Fleet:
    """All services, started at once. code: the packages that they run.

    tls: whether the two stages and their gateway speak it; the single stage and its own gateway do if these do not. So
    one fleet has both. ranks: those of one of the DiTs, which divide every layer among them.
    """

    folder: Path
    code: Path
    tls: bool
    ranks: int = 1
    services: dict[str, Service] = field(default_factory=dict)
    links: dict[str, Link] = field(default_factory=dict)
    restarts: int = 0

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True)
        self.certificates = Certificates(self.folder / "tls")
        self.models = {name: small_model(self.folder / f"model-{name}") for name in ("all", "dit-1")}
        self.clock = Clock(self.folder)
        self._commands: dict[str, tuple[str, list[str], Mapping[str, str]]] = {}
        self._caches = self.folder / "cache"
        self._quiet_links: list[Link] = []

    async def start(self) -> None:
        """Start everything; returns when all of it is ready."""
        _running.append(self)
        for thinker in THINKERS:
            self._thinker(thinker)
        for dit in DITS:
            await self._dit(dit)
        self._spawn("single", "bagel_dit", [*self._model("single"), *self._stage("single"), "--single-stage"])
        self._spawn(TWIN, "bagel_dit", [*self._model(TWIN), "--name", TWIN, "--single-stage"], ROOT)
        for front, pipeline in FRONTS.items():
            await self._gateway(front, pipeline)
        link = await self._link(f"{TWIN_FRONT}>{TWIN}")
        twin = ["--dit", f"{TWIN}={link.address}", "--pipeline", "bagel_single_stage", *self._front()]
        self._spawn(TWIN_FRONT, "bagel_gateway", twin, ROOT)
        await asyncio.gather(*(self.listens(name) for name in self.services))
        await self.until_ready()

    async def stop(self) -> None:
        """End everything."""
        _running.remove(self)
        for service in self.services.values():
            with suppress(ProcessLookupError):
                service.process.send_signal(signal.SIGCONT)
                service.process.kill()
        await asyncio.gather(*(asyncio.to_thread(each.end, 5) for each in self.services.values()))
        for link in (*self.links.values(), *self._quiet_links):
            await link.close()
        for model in self.models.values():
            shutil.rmtree(model, ignore_errors=True)

    def direct(self, name: str) -> str:
        """Where a service itself listens."""
        return self.services[name].address(time.monotonic() + START_S)

    def security(self, name: str) -> Security:
        """What a caller of that service needs who may call all of it."""
        return self.certificates.of("client" if name in FRONTS else "gateway") if self.encrypted(name) else PLAINTEXT

    def encrypted(self, name: str) -> bool:
        """Whether that service speaks TLS."""
        return name not in (TWIN, TWIN_FRONT) and encrypted(name, self.tls)

    async def respawn(self, name: str) -> None:
        """End a service, and start it again without waiting for it."""
        old = self.services[name]
        old.process.kill()
        await asyncio.to_thread(old.end, 5)
        module, arguments, env = self._commands[name]
        self.services[name] = Service(name, name, module, arguments, env, self.folder / "logs")
        self.restarts += 1

    async def restart(self, name: str) -> None:
        """End a service, or one that has ended already, and start it again until it listens."""
        await self.respawn(name)
        await self.listens(name)

    async def run_code(self, code: Path, services: Collection[str]) -> None:
        """Have these services run the packages of that folder, the others the fleet's; starts again what changes."""
        changed = []
        for name, (module, arguments, env) in self._commands.items():
            path = python_path(code if name in services else self.code)
            if name in (*STAGES, *FRONTS) and env["PYTHONPATH"] != path:
                self._commands[name] = (module, arguments, {**env, "PYTHONPATH": path})
                changed.append(name)
        await asyncio.gather(*(self.respawn(name) for name in changed))
        await asyncio.gather(*(self.listens(name) for name in changed))
        await self.until_ready()

    def repair(self, name: str) -> None:
        """Put the file back that a service loads, if a fault has changed it: others may be reading it just now."""
        file, right = self.models[name] / "ema.safetensors", (MODEL / "ema.safetensors").read_bytes()
        if file.read_bytes() != right:
            file.write_bytes(right)

    def dead(self) -> list[str]:
        """Services that have ended."""
        return [name for name, service in self.services.items() if service.process.poll() is not None]

    async def until_ready(self, limit_s: float = START_S) -> None:
        """Wait until each gateway has all of its services. Raises BagelError for one that has ended."""
        from tests.campaign.watch import backends_ready, serving

        deadline = time.monotonic() + limit_s
        waiting = [*FRONTS, TWIN_FRONT]
        while waiting:
            for name in list(waiting):
                self.services[name].check()
                wanted = 4 if name == "gateway" else 1
                if serving(self, name) and await backends_ready(self, name) == wanted:
                    waiting.remove(name)
            for name in (*STAGES, TWIN):
                self.services[name].check()
            if time.monotonic() > deadline:
                raise BagelError(f"not ready after {limit_s:g} s: {', '.join(waiting)}")
            if waiting:
                await asyncio.sleep(0.05)

    # One service of each kind

    def _thinker(self, name: str) -> None:
        kv = ["--kv-store-bytes", str(2 << 20), "--lease-seconds", str(LEASE_S)]
        self._spawn(name, "bagel_thinker", [*self._model(name), *self._stage(name), *kv])

    async def _dit(self, name: str) -> None:
        sources: list[str] = []
        for thinker in THINKERS:
            link = await self._link(f"{name}>{thinker}")
            sources += ["--source", f"{thinker}={link.address}"]
        if name == DITS[1] and self.ranks > 1:
            sources += ["--tensor-parallel-size", str(self.ranks)]
        kv = ["--kv-page-timeout", str(PAGE_S), "--kv-cache-bytes", str(1 << 20), "--kv-device-bytes", str(2 << 20)]
        self._spawn(name, "bagel_dit", [*self._model(name), *self._stage(name), *sources, *kv])

    async def _gateway(self, name: str, pipeline: str) -> None:
        stages: list[str] = []
        for stage in STAGES if pipeline == "bagel" else ("single",):
            if pipeline == "bagel" and stage == "single":
                continue
            link = await self._link(f"{name}>{stage}")
            stages += ["--thinker" if stage in THINKERS else "--dit", f"{stage}={link.address}"]
        for front in ("grpc", "http"):
            await self._link(f"client>{name}/{front}")
        limits = ["--silence-timeout", str(SILENCE_S), "--backend-timeout", "4", "--reader-timeout", "4"]
        tls = self._tls(name, "gateway") + (["--tls-allow-client", "client"] if self.encrypted(name) else [])
        self._spawn(name, "bagel_gateway", ["--pipeline", pipeline, *stages, *self._front(), *limits, *tls])

    def _front(self) -> list[str]:
        return ["--http", "127.0.0.1:0", "--served-model-name", "tiny", "--batch-timeout", "4", "--max-requests", "48"]

    def _model(self, name: str) -> list[str]:
        return ["--model", str(self.models.get(name, self.models["all"])), "--device", "cpu", "--image-workers", "1"]

    def _stage(self, name: str) -> list[str]:
        limits = ["--batch-timeout", "8", "--drain-timeout", "4", "--reader-timeout", "4", "--max-num-seqs", "4"]
        return ["--name", name, *limits, *self._tls(name, "thinker" if name in THINKERS else "dit")]

    def _tls(self, name: str, role: str) -> list[str]:
        if not self.encrypted(name):
            return []
        own = self.certificates.of(role)
        return ["--tls-certificate", str(own.certificate), "--tls-key", str(own.key), "--tls-ca", str(own.ca)]

    # Processes and links

    async def _link(self, name: str) -> Link:
        link = Link(name, framed=is_framed(name, self.tls))
        await link.open()
        if name.startswith(TWIN_FRONT):  # nothing happens to it
            self._quiet_links.append(link)
        else:
            self.links[name] = link
        return link

    def _spawn(self, name: str, module: str, arguments: Sequence[str], code: Path | None = None) -> None:
        env = {
            **os.environ,
            "PYTHONPATH": python_path(code or self.code),
            "PYTHONSAFEPATH": "1",  # the working directory has these packages too
            "OMP_NUM_THREADS": "1",
            "BAGEL_CACHE_DIR": str(self._caches),
            **({} if code else self.clock.env(name)),
        }
        self._commands[name] = (module, ["--listen", "127.0.0.1:0", *arguments], env)
        self.services[name] = Service(name, name, module, self._commands[name][1], env, self.folder / "logs")

    async def listens(self, name: str) -> None:
        """Wait for a service's address, and have its links lead there."""
        address = await asyncio.to_thread(self.services[name].address, time.monotonic() + START_S)
        for link in (*self.links.values(), *self._quiet_links):
            to, _, front = link.name.partition(">")[2].partition("/")
            if to == name:
                link.target = self.services[name].http if front == "http" else address


def running_pids() -> list[int]:
    """The services' processes of all fleets."""
    return [service.process.pid for fleet in _running for service in fleet.services.values()]
