"""The playground of a gateway that asks for API keys: where a person gives theirs, and where it never goes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from bagel.rpc.api_keys import key_line, new_key
from tests.browser.conftest import Front, Seen, free_port, open_page
from tests.browser.test_playground import DRAWN, ask, until_done
from tests.browser.test_playground_access import CHECKS, OVERFLOWING

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = [pytest.mark.browser, pytest.mark.slow]

KEY = new_key()
FIELD = "API key"
STORED = "JSON.stringify([sessionStorage, localStorage, document.cookie, location.href, document.body.innerHTML])"
HISTORY = """new Promise(done => {
    indexedDB.open("bagel-playground").onsuccess = ({ target }) => {
        const entries = target.result.transaction("entries").objectStore("entries");
        entries.getAll().onsuccess = all => done(JSON.stringify(all.target.result));
    };
})"""
LIMIT_S = 120


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("keys") / "keys"


@pytest.fixture(scope="module")
def keyed(services: dict[str, str], file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    """A gateway that knows KEY."""
    file.write_text(key_line("alice", KEY))
    front = Front(services, tmp_path_factory.mktemp("keyed"), free_port(), ["--api-keys", str(file)])
    front.start()
    yield front
    front.stop()


@pytest.fixture
def page(browser: Browser, keyed: Front, file: Path, seen: Seen) -> Iterator[Page]:
    """The page of somebody who has given no key yet."""
    file.write_text(key_line("alice", KEY))
    page = open_page(browser, keyed.url, seen)
    page.get_by_label(FIELD).wait_for()
    yield page
    page.context.close()
    assert seen.elsewhere == []
    assert seen.errors == []


def give(page: Page, key: str) -> None:
    page.get_by_label(FIELD).fill(key)
    page.get_by_role("button", name="Use this key").click()


def until_ready(page: Page) -> None:
    page.wait_for_selector('#server[data-state="ready"]')
    page.get_by_label(FIELD).wait_for(state="hidden")


def test_the_page_asks_for_a_key_and_works_with_one(page: Page, browser: Browser, keyed: Front, seen: Seen) -> None:
    assert page.locator("#server").inner_text() == "An API key is needed"
    assert not page.get_by_role("link", name="API", exact=True).is_visible(), "it would lead to an error"
    give(page, new_key())
    page.get_by_text("The server does not know this key").wait_for()
    assert page.locator("#api-key").get_attribute("aria-invalid") == "true"
    give(page, "schlüssel 1")
    page.get_by_text("That is no key").wait_for()
    give(page, f" {KEY} ")
    until_ready(page)
    ask(page, DRAWN, num_inference_steps="4")
    until_done(page)
    page.reload()
    page.wait_for_selector('#server[data-state="ready"]')
    assert not page.get_by_label(FIELD).is_visible(), "this tab still has it"
    other = open_page(browser, keyed.url, seen)
    other.get_by_label(FIELD).wait_for()
    other.context.close()


def test_the_key_is_in_the_session_alone_and_code_has_a_placeholder(page: Page, tmp_path: Path) -> None:
    give(page, KEY)
    until_ready(page)
    ask(page, DRAWN, num_inference_steps="4", seed="3")
    until_done(page)
    page.get_by_text("This request as code").click()
    codes = {}
    for name in ("curl", "Python", "grpcurl"):
        page.get_by_role("tab", name=name, exact=True).click()
        codes[name] = page.locator("#code-text").evaluate("text => text.textContent")
        assert "BAGEL_API_KEY" in codes[name] and KEY not in codes[name]
    session = page.evaluate("JSON.stringify(sessionStorage)")
    assert KEY in session and page.evaluate(STORED).count(KEY) == 1
    history = page.evaluate(HISTORY)
    assert DRAWN in history and KEY not in history
    (tmp_path / "code.py").write_text(codes["Python"])
    for environment, works in (({"BAGEL_API_KEY": KEY}, True), ({"BAGEL_API_KEY": new_key()}, False)):
        run = subprocess.run(
            [sys.executable, "code.py"],
            cwd=tmp_path,
            env=os.environ | environment,
            capture_output=True,
            timeout=LIMIT_S,
        )
        assert (run.returncode == 0) is works, run.stderr
    assert (tmp_path / "picture-1.png").stat().st_size > 0


def test_a_key_that_is_revoked_meanwhile_is_told_and_another_can_be_given(page: Page, file: Path) -> None:
    give(page, KEY)
    until_ready(page)
    other = new_key()
    file.write_text(key_line("bob", other))
    page.wait_for_selector('#server[data-state="down"]')
    ask(page, DRAWN, num_inference_steps="4")
    page.get_by_role("heading", name="This server wants an API key").wait_for()
    page.get_by_role("button", name="Enter a key").click()
    assert page.evaluate("document.activeElement.id") == "api-key"
    give(page, other)
    until_ready(page)
    page.get_by_role("button", name="Try again").click()
    until_done(page)


def test_by_keyboard(page: Page) -> None:
    page.locator("#theme").focus()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "api-key"
    page.keyboard.type(KEY)
    page.keyboard.press("Enter")
    until_ready(page)
    # The question goes once the server has answered, the focus a moment after it.
    page.locator("#prompt:focus").wait_for()
    page.locator("#announce", has_text="The key is accepted.").wait_for(state="attached")


def test_a_key_that_the_server_learns_of_later_is_taken_without_asking_again(page: Page, file: Path) -> None:
    other = new_key()
    give(page, other)
    page.get_by_text("The server does not know this key").wait_for()
    file.write_text(key_line("bob", other))
    until_ready(page)
    page.locator("#prompt:focus").wait_for()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_asking_can_be_read_and_reached(browser: Browser, keyed: Front, seen: Seen, width: int, scheme: Any) -> None:
    page = open_page(browser, keyed.url, seen, viewport={"width": width, "height": 844}, color_scheme=scheme)
    give(page, new_key())
    page.get_by_text("The server does not know this key").wait_for()
    for check in ("contrast", "nameless", "smallTargets", "unseenFocus"):
        assert page.evaluate(f"{CHECKS}.{check}()") == []
    assert page.evaluate(OVERFLOWING) <= 0
    page.context.close()
