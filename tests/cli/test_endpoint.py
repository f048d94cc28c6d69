"""`bagel generate --endpoint`: what a picture says of itself is what the gateway used."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from bagel.cli import main
from bagel.images import read_settings
from tests.client.test_client import serving
from tests.gateway_stages import Deployment

DEFAULTS = {"steps": 7, "cfg_text_scale": 2.5, "negative_prompt": "blurred", "timestep_shift": 2.0}


@pytest.fixture
def gateway() -> Iterator[Deployment]:
    """One with defaults of its own."""
    yield from serving(sampling_defaults=DEFAULTS)


def test_a_pictures_settings_are_those_that_the_gateway_used(
    gateway: Deployment, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["generate", "--endpoint", gateway.target, "--prompts", "a red cube", "--cfg-text-scale", "3"]
    assert main([*asked, "--output", str(tmp_path)]) == 0
    settings = read_settings(Path(capsys.readouterr().out.strip()))
    used = DEFAULTS | {"cfg_text_scale": 3.0, "width": 512, "height": 1024}
    assert {name: settings[name] for name in used} == {name: str(value) for name, value in used.items()}
