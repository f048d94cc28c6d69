"""Tests with containers run only when asked for: `make test-compose`, or `pytest -m compose`."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

HERE = Path(__file__).parent


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "compose: starts containers on a Docker engine; only when asked for")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "compose" in str(config.getoption("markexpr")):
        return
    left_out = [item for item in items if HERE in item.path.parents]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="session")
def expected() -> Image.Image:
    """The picture of the same services as plain processes."""
    from bagel import Omni
    from tests.compose.stack import PICTURE

    with Omni("bagel-nano", device="cpu") as omni:
        [result] = omni.generate(PICTURE["prompt"], seed=PICTURE["seed"], steps=PICTURE["steps"])
    assert result.image is not None
    return result.image
