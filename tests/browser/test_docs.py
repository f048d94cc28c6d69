"""The page at /docs in a real Chromium: it reads our OpenAPI document."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = [pytest.mark.browser, pytest.mark.slow]


def test_the_playgrounds_api_link_lists_every_operation(page: Page) -> None:
    page.locator("#api").click()
    page.locator(".opblock").first.wait_for()
    paths = page.locator(".opblock-summary-path").all_inner_texts()
    told = {each.replace("\u200b", "") for each in paths}  # it lets long paths break
    assert {"/v1/images/generations", "/v1/images/edits", "/v1/chat/completions"} <= told
    assert page.locator(".errors-wrapper, .failed-config, .version-pragma__message").count() == 0
