"""A compose project for a test: up, looked at, broken, down."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from bagel.client import Client
from bagel.errors import BagelError
from bagel.rpc.transport import PLAINTEXT, Security
from tests.helpers import agree

ROOT = Path(__file__).parents[2]
DEPLOY, HERE = ROOT / "deploy", Path(__file__).parent
COMPOSE = DEPLOY / "compose.yaml"
BUILD_S, COMMAND_S, HEALTHY_S = 1500, 180, 180
LIMIT_S = 120
PICTURE: dict[str, Any] = {"prompt": "a large red circle to the left of a small blue square", "seed": 7, "steps": 20}
"""What every stack draws; the fixture `expected` is the same, drawn without containers."""
GATEWAY_IMAGE = os.environ.get("BAGEL_GATEWAY_IMAGE", "bagel-gateway")


def docker(*arguments: str | Path, env: dict[str, str] | None = None, limit_s: float = COMMAND_S) -> str:
    """What a docker command prints; AssertionError with what it says if it fails."""
    done = subprocess.run(
        ["docker", *map(str, arguments)],
        env=os.environ | (env or {}),
        capture_output=True,
        text=True,
        timeout=limit_s,
        check=False,
    )
    assert done.returncode == 0, f"docker {' '.join(map(str, arguments))}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout.strip()


@dataclass
class Stack:
    """One project. files: compose files; profile: the profile that is started; env: its variables."""

    name: str
    files: Sequence[Path]
    env: dict[str, str] = field(default_factory=dict)
    profile: str | None = None
    security: Security = PLAINTEXT

    def compose(self, *arguments: str, limit_s: float = COMMAND_S) -> str:
        """`docker compose ARGUMENTS` of this project."""
        files = [part for file in self.files for part in ("-f", str(file))]
        profile = [] if self.profile is None else ["--profile", self.profile]
        quick = {"BAGEL_PORT": "0", "BAGEL_HTTP_PORT": "0", "BAGEL_HEALTH_INTERVAL": "2s", "BAGEL_KV_BYTES": str(2**29)}
        return docker("compose", "-p", self.name, *files, *profile, *arguments, env=quick | self.env, limit_s=limit_s)

    @contextmanager
    def up(self) -> Iterator[Stack]:
        """The project, healthy; at the end nothing of it is left."""
        self.compose("down", "--volumes", "--remove-orphans")
        try:
            self.compose("build", limit_s=BUILD_S)
            self.compose("up", "--detach", "--no-build", "--pull", "never", "--wait", limit_s=COMMAND_S + HEALTHY_S)
            yield self
        except BaseException:
            print(self.compose("logs", "--no-color", "--tail", "40"))
            raise
        finally:
            self.compose("down", "--volumes", "--remove-orphans", "--timeout", "5")

    def container(self, service: str) -> str:
        """The container's id, running or not."""
        return self.compose("ps", "--all", "--quiet", service)

    def inspect(self, service: str) -> dict[str, Any]:
        """What the engine knows of a service's container."""
        (found,) = json.loads(docker("inspect", self.container(service)))
        assert isinstance(found, dict)
        return found

    def run(self, service: str, *command: str) -> str:
        """What a command prints that runs in a service's container."""
        return docker("exec", self.container(service), *command)

    def services(self) -> set[str]:
        """Those that have a container."""
        return set(self.compose("ps", "--all", "--services").split())

    def client(self) -> Client:
        """A client of the gateway, whose port is another after each start."""
        return Client(self.compose("port", "gateway", "50051"), self.security)

    def crash(self, service: str) -> None:
        """End a service's first process as a crash does; `docker kill` would keep the engine from restarting it."""
        process = str(self.inspect(service)["State"]["Pid"])
        kill = "import os, sys; os.kill(int(sys.argv[1]), 9)"
        privileges = ("--pid", "host", "--user", "0", "--cap-drop", "ALL", "--cap-add", "KILL", "--network", "none")
        docker("run", "--rm", *privileges, "--entrypoint", "python3", GATEWAY_IMAGE, "-c", kill, process)

    def set_cpus(self, service: str, cpus: str) -> None:
        """Change a running container's share of CPUs; one that is being started again is waited for."""

        def changed() -> bool:
            command = ["docker", "update", "--cpus", cpus, self.container(service)]
            return subprocess.run(command, capture_output=True, timeout=COMMAND_S, check=False).returncode == 0

        until(changed)

    def until_healthy(self, *services: str) -> None:
        """Return once the services' health checks succeed."""
        until(lambda: all(self.health(service) == "healthy" for service in services))

    def health(self, service: str) -> str:
        """What the engine says of a service: starting, healthy, unhealthy, or how its container is."""
        state = self.inspect(service)["State"]
        return str(state["Health"]["Status"] if state["Running"] else state["Status"])


def until(true: Callable[[], bool], limit_s: float = HEALTHY_S) -> None:
    """Return once it is true; AssertionError if it is not in time."""
    deadline = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.2)


def drawn(stack: Stack, expected: Image.Image) -> bool:
    """Whether the gateway draws the expected picture."""
    try:
        with stack.client() as client:
            result = client.generate(**PICTURE, timeout=LIMIT_S)
    except BagelError:
        print(stack.compose("logs", "--no-color", "--tail", "40"))
        raise
    return result.image is not None and agree(result.image, expected)
