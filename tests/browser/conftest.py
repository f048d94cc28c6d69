"""A real headless Chromium, and a gateway with its services to point it at."""

from __future__ import annotations

import os
import shutil
import socket
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from bagel.deployment.defaults import NANO_NAME, find_model
from bagel.deployment.deploy_file import load_deploy_config, shipped_deploy_config
from bagel.deployment.launcher import LOOPBACK, Deployment
from bagel.deployment.process import Service

if TYPE_CHECKING:
    from playwright.sync_api import Browser, ConsoleMessage, Page, Request

READY_WITHIN_S = 90.0
NEEDED = bool(os.environ.get("BAGEL_NEEDS_BROWSER"))
"""Set by `make test-browser`: a browser that is missing is then a failure."""


@dataclass
class Front:
    """A gateway with the playground, in a process of its own on a port that stays the same."""

    services: dict[str, str]
    logs: Path
    port: int
    flags: list[str] = field(default_factory=list)
    process: Service | None = None
    grpc: str = ""

    @property
    def url(self) -> str:
        return f"http://{LOOPBACK}:{self.port}/"

    def start(self, ready: bool = True) -> None:
        """Until it answers; ready: until its services are too."""
        arguments = ["--listen", f"{LOOPBACK}:0", "--http", f"{LOOPBACK}:{self.port}", *self.flags]
        for name, address in self.services.items():
            arguments += [f"--{name.split('-')[0]}", f"{name}={address}"]
        self.process = Service("gateway", "the gateway", "bagel_gateway", arguments, os.environ, self.logs)
        self.grpc = self.process.address(time.monotonic() + READY_WITHIN_S)
        deadline = time.monotonic() + READY_WITHIN_S
        while not self._answers("readyz" if ready else "healthz"):
            self.process.check()
            assert time.monotonic() < deadline
            time.sleep(0.1)

    def stop(self, drain_s: float = 0.0) -> None:
        if self.process is not None:
            self.process.tell_to_stop()
            self.process.end(drain_s)
            self.process = None

    def under_way(self) -> list[str]:
        """The gateway's counters of what is under way that are not zero."""
        with urllib.request.urlopen(f"{self.url}metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        return [line for line in lines if "under_way" in line and line[0] != "#" and float(line.split()[-1]) > 0]

    def _answers(self, path: str) -> bool:
        try:
            with urllib.request.urlopen(self.url + path, timeout=10) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Addresses of a Thinker and a DiT with bagel-nano."""
    config = load_deploy_config(shipped_deploy_config("bagel"))
    _, checkpoint = find_model(NANO_NAME)
    logs = tmp_path_factory.mktemp("services")
    with Deployment(config, checkpoint.folder, device="cpu", init_timeout_s=READY_WITHIN_S, logs=logs) as running:
        yield {each.name: each.address(0) for each in running.services if each.name != "gateway"}


@pytest.fixture(scope="session")
def shared_front(services: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    front = Front(services, tmp_path_factory.mktemp("front"), free_port())
    front.start()
    yield front
    front.stop()


@pytest.fixture
def front(shared_front: Front) -> Front:
    """A gateway that runs, whatever the test before did to it."""
    if shared_front.process is None:
        shared_front.start()
    return shared_front


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Debian's Chromium; of a module, as Playwright's own event loop is in the way of other tests'."""
    program = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        if NEEDED:
            pytest.fail("there is no Chromium; install it (apt-get install chromium) or name it in CHROMIUM")
        pytest.skip("there is no Chromium; make test-browser says how to get it")
    if not NEEDED:
        pytest.importorskip("playwright", reason="make test-browser installs it")
    from playwright.sync_api import sync_playwright

    flags = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    with sync_playwright() as playwright, playwright.chromium.launch(executable_path=program, args=flags) as chromium:
        yield chromium


@dataclass
class Seen:
    """What a page did that no person sees."""

    errors: list[str] = field(default_factory=list)
    elsewhere: list[str] = field(default_factory=list)
    under_way: list[str] = field(default_factory=list)

    def console(self, said: ConsoleMessage) -> None:
        """Remember what is wrong; that a request was answered with an error is for the page to tell."""
        if said.type in ("error", "warning") and not said.text.startswith("Failed to load resource"):
            self.errors.append(said.text)


def open_page(browser: Browser, url: str, seen: Seen, **options: Any) -> Page:
    """A new tab of a new session at `url`."""
    from playwright.sync_api import TimeoutError as PlaywrightTimeout

    def sent(request: Request) -> None:
        seen.under_way.append(request.url)
        if not request.url.startswith((url, "blob:", "data:")):
            seen.elsewhere.append(request.url)

    page = browser.new_context(**{"viewport": {"width": 1280, "height": 860}, **options}).new_page()
    page.set_default_timeout(30_000)
    page.on("pageerror", lambda error: seen.errors.append(str(error)))
    page.on("console", seen.console)
    page.on("request", sent)
    page.on("requestfinished", lambda request: seen.under_way.remove(request.url))
    page.on("requestfailed", lambda request: seen.under_way.append(f"failed: {request.url} {request.failure}"))
    page.goto(url)
    try:
        page.wait_for_selector("#examples button")
    except PlaywrightTimeout:
        pytest.fail(f"the page did not start; under way: {seen.under_way}; errors: {seen.errors}")
    return page


@pytest.fixture
def seen() -> Seen:
    return Seen()


@pytest.fixture
def page(browser: Browser, front: Front, seen: Seen) -> Iterator[Page]:
    """The playground at 1280 pixels; nothing may come from elsewhere or fail unseen."""
    page = open_page(browser, front.url, seen)
    page.wait_for_selector('#server[data-state="ready"]')
    yield page
    page.context.close()
    assert seen.elsewhere == []
    assert seen.errors == []
