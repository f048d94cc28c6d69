"""The playground as a person uses it: real Chromium, real services, bagel-nano."""

from __future__ import annotations

import base64
import re
import time
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from tests.browser.conftest import Front, Seen, free_port, open_page

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

pytestmark = [pytest.mark.browser, pytest.mark.slow]

DRAWN = "a large red circle to the left of a small blue square"
RELEASED_WITHIN_S = 10.0


def scene(width: int = 128, height: int = 128) -> bytes:
    """A PNG of a red circle, drawn by hand."""
    image = Image.new("RGB", (width, height), "white")
    image.paste((220, 30, 30), (width // 3, height // 3, width * 2 // 3, height * 2 // 3))
    file = BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def as_file(name: str = "scene.png", data: bytes | None = None, kind: str = "image/png") -> Any:
    return {"name": name, "mimeType": kind, "buffer": scene() if data is None else data}


def choose(page: Page, mode: str) -> None:
    page.get_by_role("radio", name=mode, exact=True).check(force=True)


def ask(page: Page, prompt: str, **options: str) -> None:
    """Fill in the form and send it."""
    page.get_by_label("Prompt", exact=True).fill(prompt)
    for name, value in options.items():
        field = page.locator(f"#option-{name}")
        if not field.is_visible():
            page.get_by_text("More options").click()
        field.fill(value)
    page.locator("#generate").click()


def until_done(page: Page) -> Locator:
    """The result, once it is complete."""
    page.locator("#outcome .facts").wait_for()
    return page.locator("#outcome")


def pixels(page: Page, image: Locator) -> Image.Image:
    """What a picture of the page shows."""
    data = image.evaluate(
        """async image => {
            await image.decode();
            const canvas = document.createElement("canvas");
            [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
            canvas.getContext("2d").drawImage(image, 0, 0);
            return canvas.toDataURL();
        }"""
    )
    return Image.open(BytesIO(base64.b64decode(data.partition(",")[2]))).convert("RGB")


def share_of(picture: Image.Image, near: tuple[int, int, int], box: tuple[float, float]) -> float:
    """Share of the pixels between two fractions of the width that are about of a colour."""
    left, right = (int(edge * picture.width) for edge in box)
    values = np.asarray(picture, dtype=np.int16)[:, left:right]
    return float((np.abs(values - near).max(axis=-1) < 70).mean())


def agree(one: Image.Image, other: Image.Image) -> bool:
    """Whether two pictures are one up to rounding, as another place in a batch makes it."""
    difference = np.abs(np.asarray(one, dtype=np.int16) - np.asarray(other, dtype=np.int16))
    return bool(one.size == other.size and difference.max() <= 2)


def test_draw_with_a_plan_and_previews(page: Page) -> None:
    page.evaluate(
        """() => {
            window.seen = { shares: [], previews: new Set(), plans: new Set(), told: new Set() };
            const look = () => {
                const bar = document.querySelector("progress");
                if (bar?.hasAttribute("value")) seen.shares.push(bar.value);
                const tag = document.querySelector(".tag");
                if (tag) seen.previews.add(tag.textContent);
                const plan = document.querySelector(".thought p");
                if (plan) seen.plans.add(plan.textContent);
                seen.told.add(document.querySelector("#announce").textContent);
            };
            const all = { subtree: true, childList: true, characterData: true, attributes: true };
            new MutationObserver(look).observe(document.body, all);
        }"""
    )
    page.get_by_role("switch", name="Think first").check()
    ask(page, DRAWN, seed="7")
    outcome = until_done(page)
    told = page.evaluate(
        "({ shares: seen.shares, previews: [...seen.previews], plans: [...seen.plans], told: [...seen.told] })"
    )
    assert told["shares"] == sorted(told["shares"]) and len(set(told["shares"])) > 10
    assert {"Preview 1", "Preview 2"} <= set(told["previews"])  # the last may be gone before it is shown
    assert len(told["plans"]) > 3 and "<think>" not in "".join(told["plans"])
    assert any(text.startswith("Thinking") for text in told["told"]) and any("50%" in text for text in told["told"])
    assert len(told["told"]) < 14, "a screen reader is told of quarters, not of steps"
    assert "red" in outcome.locator(".thought p").inner_text()
    picture = pixels(page, outcome.get_by_role("img", name="Picture: "))
    assert picture.size == (128, 128)
    assert share_of(picture, (220, 40, 40), (0, 0.5)) > 0.05 > share_of(picture, (220, 40, 40), (0.5, 1))
    assert share_of(picture, (40, 80, 230), (0.5, 1)) > 0.02
    assert "Seed 7" in outcome.locator(".facts").inner_text()
    with page.expect_download() as download:
        outcome.get_by_role("link", name="Download").click()
    assert download.value.suggested_filename == "bagel-7.png"


def test_edit_with_before_and_after(page: Page) -> None:
    choose(page, "Edit")
    page.locator("#file").set_input_files(as_file())
    ask(page, "change the background to navy", seed="3")
    outcome = until_done(page)
    before, after = outcome.get_by_alt_text("Before the edit"), outcome.get_by_alt_text("Edited picture: ")
    assert pixels(page, before).size == pixels(page, after).size == (128, 128)
    assert pixels(page, before).getpixel((5, 5)) == (255, 255, 255)
    corner = pixels(page, after).getpixel((5, 5))
    assert isinstance(corner, tuple) and corner[2] > 80 > corner[0]
    slider = outcome.get_by_role("slider")
    for key, position in (("End", "100%"), ("Home", "0%"), ("ArrowRight", "1%")):
        slider.press(key)
        assert page.locator(".compare").evaluate("box => box.style.getPropertyValue('--at')") == position
    outcome.get_by_role("radio", name="Side by side").check(force=True)
    boxes = [outcome.get_by_alt_text(name).bounding_box() for name in ("Before the edit", "Edited picture: ")]
    assert boxes[0] and boxes[1] and boxes[0]["x"] + boxes[0]["width"] <= boxes[1]["x"]


PASTE = """async ([name, kind, data, drop]) => {
    const transfer = new DataTransfer();
    transfer.items.add(new File([new Uint8Array(data)], name, { type: kind }));
    const event = drop
        ? new DragEvent("drop", { dataTransfer: transfer, bubbles: true, cancelable: true })
        : new ClipboardEvent("paste", { clipboardData: transfer, bubbles: true, cancelable: true });
    document.body.dispatchEvent(event);
}"""


def test_ask_about_a_pasted_image(page: Page) -> None:
    choose(page, "Write")
    page.evaluate(PASTE, ["shapes.png", "image/png", list(scene()), False])
    page.get_by_alt_text("Image 1: shapes.png").wait_for()
    assert page.get_by_role("radio", name="Ask").is_checked()
    page.get_by_role("switch", name="Think first").check()
    ask(page, "describe the image")
    outcome = until_done(page)
    assert re.search(r"red square", outcome.locator(".answer").inner_text())
    assert "<think>" not in outcome.inner_text() and outcome.locator(".thought p").inner_text().strip()


def test_a_dropped_image_turns_drawing_into_an_edit(page: Page) -> None:
    page.evaluate(PASTE, ["shapes.png", "image/png", list(scene()), True])
    page.get_by_alt_text("Image 1: shapes.png").wait_for()
    assert page.get_by_role("radio", name="Edit").is_checked()
    assert (
        "Switched to Image edit" in page.locator("#announce").inner_text()
        or "1 of 7" in page.locator("#announce").inner_text()
    )


def test_write(page: Page) -> None:
    choose(page, "Write")
    page.locator("#examples button", has_text="3 plus 4").click()
    outcome = until_done(page)
    assert "seven" in outcome.locator(".answer").inner_text().lower()
    assert "Tokens out" in outcome.locator(".facts").inner_text()


def test_several_pictures(page: Page) -> None:
    ask(page, DRAWN, n="3", num_inference_steps="8", seed="5", partial_images="1")
    outcome = until_done(page)
    pictures = [pixels(page, outcome.get_by_role("img").nth(number)).tobytes() for number in range(3)]
    assert len(set(pictures)) == 3
    assert outcome.get_by_role("link", name="Download").count() == 3


@pytest.mark.parametrize("how", ["button", "key"])
def test_cancel_stops_the_work(page: Page, front: Front, how: str) -> None:
    ask(page, DRAWN, num_inference_steps="1000")
    page.get_by_text("Drawing, step").wait_for()
    assert front.under_way()
    page.locator("#cancel").click() if how == "button" else page.keyboard.press("Escape")
    page.get_by_text("Cancelled. The server has stopped working on it.").wait_for()
    deadline = time.monotonic() + RELEASED_WITHIN_S
    while front.under_way():
        assert time.monotonic() < deadline, front.under_way()
        time.sleep(0.1)
    assert page.locator("#generate").evaluate("button => button === document.activeElement")
    ask(page, DRAWN, num_inference_steps="5")
    until_done(page)


def test_a_backend_that_is_down_explains_itself_and_comes_back(browser: Browser, front: Front, seen: Seen) -> None:
    page = open_page(browser, front.url, seen)
    front.stop()
    ask(page, DRAWN, num_inference_steps="5")
    alert = page.locator("#outcome [role=alert]")
    alert.wait_for()
    told = alert.inner_text()
    assert "The server does not answer" in told and "bagel serve" in told and front.url.rstrip("/") in told
    page.locator('#server[data-state="down"]').wait_for()
    front.start()
    alert.get_by_role("button", name="Try again").click()
    until_done(page)
    page.locator('#server[data-state="ready"]').wait_for()
    page.context.close()


def test_a_server_that_stops_under_a_request_is_told(browser: Browser, front: Front, seen: Seen) -> None:
    page = open_page(browser, front.url, seen)
    ask(page, DRAWN, num_inference_steps="1000")
    page.get_by_text("Drawing, step").wait_for()
    assert front.process is not None
    front.process.process.kill()
    page.get_by_text("The connection broke").wait_for()
    assert "same seed" in page.locator("#outcome [role=alert]").inner_text()
    front.stop()
    page.context.close()


def test_services_that_are_not_ready_are_told(browser: Browser, seen: Seen, tmp_path: Path) -> None:
    nobody = f"127.0.0.1:{free_port()}"
    front = Front({"thinker-0": nobody, "dit-0": nobody}, tmp_path, free_port(), ["--backend-timeout", "0.5"])
    front.start(ready=False)
    try:
        page = open_page(browser, front.url, seen)
        page.get_by_text("The model is not ready yet").wait_for()
        ask(page, DRAWN)
        page.get_by_role("heading", name="The model is not ready").wait_for()
        assert "Wait a few seconds" in page.locator("#outcome [role=alert]").inner_text()
        page.context.close()
    finally:
        front.stop()


def test_a_body_too_large_is_told(browser: Browser, services: dict[str, str], seen: Seen, tmp_path: Path) -> None:
    front = Front(services, tmp_path, free_port(), ["--max-body-bytes", "20000"])
    front.start()
    try:
        page = open_page(browser, front.url, seen)
        choose(page, "Edit")
        noise = BytesIO()
        Image.effect_noise((256, 256), 90).convert("RGB").save(noise, "PNG")
        page.locator("#file").set_input_files(as_file("noise.png", noise.getvalue()))
        ask(page, "make it calm")
        page.get_by_role("heading", name="That is too much to send").wait_for()
        assert "Make the images smaller" in page.locator("#outcome [role=alert]").inner_text()
        page.context.close()
    finally:
        front.stop()


def test_a_refused_setting_is_shown_where_it_is(page: Page) -> None:
    page.locator("#option-size-height").fill("128")
    ask(page, DRAWN, size="4096")
    page.get_by_role("heading", name="This cannot be done as asked").wait_for()
    assert "this model draws" in page.locator("#problem").inner_text()
    width = page.locator("#option-size")
    assert width.get_attribute("aria-invalid") == "true"
    assert width.evaluate("input => input === document.activeElement")
    width.fill("128")
    page.locator("#option-num_inference_steps").fill("4")
    page.locator("#generate").click()
    until_done(page)
    assert width.get_attribute("aria-invalid") is None


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("num_inference_steps", "1", "Steps must be a whole number from 2 to 1000."),
        ("seed", "1.5", "Seed must be a whole number"),
        ("cfg_interval", "0.5", "Guidance interval: fill in both fields, or neither."),
    ],
)
def test_a_value_that_cannot_be_is_not_sent(page: Page, field: str, value: str, told: str) -> None:
    ask(page, DRAWN, **{field: value})
    assert told in page.locator("#problem").inner_text()
    assert page.locator("#outcome").is_hidden()


def test_what_is_missing_is_asked_for(page: Page) -> None:
    page.locator("#generate").click()
    assert page.locator("#problem").inner_text() == "Write what you want first."
    choose(page, "Edit")
    ask(page, "make it blue")
    assert "Add an image first" in page.locator("#images-problem").inner_text()
    assert page.locator("#file").evaluate("input => input === document.activeElement")


def test_files_that_are_no_input_are_refused_with_a_reason(page: Page) -> None:
    choose(page, "Ask")
    problem = page.locator("#images-problem")
    page.locator("#file").set_input_files(as_file("notes.txt", b"hello", "text/plain"))
    assert "notes.txt is no image that can be read here; use PNG" in problem.inner_text()
    page.locator("#file").set_input_files(as_file("broken.png", b"not a png"))
    problem.filter(has_text="broken.png is damaged").wait_for()
    page.locator("#file").set_input_files([as_file(f"{number}.png") for number in range(8)])
    page.get_by_alt_text("Image 7: 6.png").wait_for()
    assert "At most 7 images" in problem.inner_text()
    page.get_by_role("button", name="Remove image 2, 1.png").click()
    assert page.locator("#thumbs img").count() == 6
    assert page.locator("#thumbs button").nth(1).evaluate("button => button === document.activeElement")


def test_history_is_kept_over_a_reload_and_restores_everything(page: Page) -> None:
    choose(page, "Edit")
    page.locator("#file").set_input_files(as_file("house.png"))
    ask(page, "make the square green", seed="11", num_inference_steps="6", cfg_text_scale="3.5")
    picture = pixels(page, until_done(page).get_by_alt_text("Edited picture: "))
    choose(page, "Write")
    ask(page, "what is 3 plus 4?")
    page.locator("#outcome .answer").wait_for()
    until_done(page)
    page.reload()
    entries = page.locator("#entries button")
    entries.nth(1).wait_for()
    assert [entries.nth(number).get_attribute("aria-label") for number in range(2)] == [
        "Text: what is 3 plus 4?",
        "Image edit: make the square green",
    ]
    entries.nth(1).click()
    assert page.get_by_role("radio", name="Edit").is_checked()
    assert page.locator("#prompt").input_value() == "make the square green"
    values = [
        page.locator(f"#option-{name}").input_value() for name in ("seed", "num_inference_steps", "cfg_text_scale")
    ]
    assert values == ["11", "6", "3.5"]
    page.get_by_alt_text("Image 1: house.png").wait_for()
    assert pixels(page, page.locator("#outcome").get_by_alt_text("Edited picture: ")).tobytes() == picture.tobytes()
    page.locator("#generate").click()
    page.locator("progress").wait_for()
    assert agree(pixels(page, until_done(page).get_by_alt_text("Edited picture: ")), picture)
    page.get_by_role("button", name="Clear").click()
    page.locator("#history").wait_for(state="hidden")
    page.locator("#welcome").wait_for()
    page.reload()
    page.wait_for_selector("#examples button")
    assert page.locator("#entries button").count() == 0


def test_another_session_sees_nothing_of_it(page: Page, browser: Browser, front: Front) -> None:
    ask(page, DRAWN, num_inference_steps="4")
    until_done(page)
    other = page.context.new_page()
    other.goto(front.url)
    other.wait_for_selector("#examples button")
    assert other.locator("#entries button").count() == 0


def test_a_result_is_the_next_input(page: Page) -> None:
    ask(page, DRAWN, num_inference_steps="20", seed="7")
    until_done(page).get_by_role("button", name="Ask about it").click()
    assert page.get_by_role("radio", name="Ask").is_checked()
    assert page.locator("#prompt").evaluate("input => input === document.activeElement")
    ask(page, "what colour is the circle?")
    page.locator("#outcome .answer:not(.live)").wait_for()
    assert "red" in page.locator("#outcome .answer").inner_text().lower()


def test_options_are_those_of_the_mode(page: Page) -> None:
    page.get_by_text("More options").click()
    scale = page.locator("#option-cfg_img_scale")
    assert scale.get_attribute("placeholder") == "1.0"
    choose(page, "Edit")
    assert scale.get_attribute("placeholder") == "1.5"
    page.locator("#option-cfg_text_scale").fill("1")
    assert scale.is_hidden(), "without guidance it has no effect"
    assert page.locator("#changed").inner_text() == "1 changed"
    page.get_by_role("button", name="Back to the defaults").click()
    assert scale.is_visible() and page.locator("#changed").is_hidden()
    choose(page, "Write")
    assert scale.is_hidden() and page.locator("#option-max_tokens").is_visible()
    unexplained = page.evaluate(
        "[...document.querySelectorAll('.option :is(input, select)')].filter(input => "
        "!document.getElementById(input.getAttribute('aria-describedby'))?.textContent.trim()).map(input => input.id)"
    )
    assert unexplained == []
