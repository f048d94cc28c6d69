"""The playground without a mouse, without eyes, on a phone, in the dark."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.browser.conftest import Front, Seen, open_page
from tests.browser.test_playground import DRAWN, as_file, ask, choose, until_done

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = [pytest.mark.browser, pytest.mark.slow]


CHECKS = (Path(__file__).parent / "checks.js").read_text().partition("\n")[2].strip()
OVERFLOWING = "document.documentElement.scrollWidth - document.documentElement.clientWidth"


def states(page: Page) -> list[str]:
    """Walk the page's states; what is wrong in each."""
    wrong: list[str] = []

    def look(state: str) -> None:
        for check in ("contrast", "nameless", "smallTargets"):
            wrong.extend(f"{state}: {found}" for found in page.evaluate(f"{CHECKS}.{check}()"))
        if page.evaluate(OVERFLOWING) > 0:
            wrong.append(f"{state}: wider than the screen")

    look("empty")
    page.get_by_text("More options").click()
    page.get_by_role("switch", name="Think first").check()
    page.get_by_role("switch", name="Sample").check()
    page.locator("#option-cfg_text_scale").fill("5")
    look("options")
    page.get_by_text("More options").click()
    ask(page, DRAWN, num_inference_steps="300")
    page.get_by_text("Preview 1").wait_for()
    look("drawing")
    page.locator("#cancel").click()
    page.get_by_text("Cancelled. The server").wait_for()
    look("cancelled")
    choose(page, "Edit")
    page.locator("#file").set_input_files([as_file("one.png"), as_file("two.png")])
    page.get_by_alt_text("Image 2: two.png").wait_for()
    ask(page, "make the square green", num_inference_steps="6")
    until_done(page)
    page.get_by_text("This request as code").click()
    look("edited")
    choose(page, "Ask")
    ask(page, "describe the image")
    page.locator("#outcome .answer:not(.live)").wait_for()
    look("answered")
    choose(page, "Draw")
    page.locator("#option-size-height").fill("4096")
    ask(page, "a very tall tree", size="4096")
    page.get_by_role("heading", name="This cannot be done").wait_for()
    look("refused")
    return wrong


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_every_state_can_be_read_and_reached(
    browser: Browser, front: Front, seen: Seen, width: int, scheme: Any
) -> None:
    page = open_page(browser, front.url, seen, viewport={"width": width, "height": 844}, color_scheme=scheme)
    assert states(page) == []
    page.context.close()


def test_all_by_keyboard(page: Page) -> None:
    """From the skip link to a restored result, with no pointer."""
    focused = "document.activeElement.id || document.activeElement.textContent.trim()"
    page.keyboard.press("Tab")
    assert page.evaluate(focused) == "Skip to the result"
    assert page.locator(".skip").bounding_box()["y"] >= 0  # type: ignore[index]
    order = []
    for _ in range(12):
        page.keyboard.press("Tab")
        order.append(page.evaluate(focused))
    assert order[:2] == ["api", "theme"]
    assert order[3:9] == [
        "prompt",
        "think",
        "option-size",
        "option-size-height",
        "option-num_inference_steps",
        "option-seed",
    ]
    page.locator('input[name="mode"]:checked').focus()
    page.keyboard.press("ArrowRight")
    assert page.get_by_role("radio", name="Edit").is_checked()
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Tab")
    page.keyboard.type(DRAWN)
    page.keyboard.press("Control+Enter")
    until_done(page)
    page.locator("#entries button").first.focus()
    page.keyboard.press("Enter")
    assert page.locator("#announce").inner_text() == f"Restored: {DRAWN}"
    assert page.evaluate("document.activeElement.closest('#entries') !== null"), "focus stays where it was"
    page.locator(".code summary").focus()
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowRight")
    assert page.get_by_role("tab", name="Python").get_attribute("aria-selected") == "true"
    assert "from openai import OpenAI" in page.locator("#code-text").inner_text()


def test_every_focus_can_be_seen(page: Page) -> None:
    unseen = []
    for _ in range(14):
        page.keyboard.press("Tab")
        unseen += page.evaluate(CHECKS + ".unseenFocus()")
    assert unseen == []


def test_the_theme_follows_the_system_until_one_is_chosen(browser: Browser, front: Front, seen: Seen) -> None:
    page = open_page(browser, front.url, seen, color_scheme="dark")
    ground = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(ground)
    page.emulate_media(color_scheme="light")
    page.locator('html[data-theme="light"]').wait_for()
    light = page.evaluate(ground)
    assert dark != light
    page.get_by_role("button", name="Use the dark theme").click()
    assert page.evaluate(ground) == dark
    page.reload()
    page.wait_for_selector("#examples button")
    assert page.evaluate(ground) == dark
    assert page.get_by_role("button", name="Use the light theme").is_visible()
    page.context.close()
