"""A gateway in an installation without its extra."""

from __future__ import annotations

import sys

import pytest

from bagel_gateway.__main__ import main


def test_http_without_its_packages_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "bagel_gateway.rest.server", None)  # as an import that is not found
    services = ["--thinker", "thinker-0=127.0.0.1:1", "--dit", "dit-0=127.0.0.1:2"]
    assert main(["--listen", "127.0.0.1:0", "--http", "127.0.0.1:0", *services]) == 2
    err = capsys.readouterr().err
    assert "pip install '.[gateway]' in a checkout" in err and err.splitlines()[-1].startswith("error: --http needs")
