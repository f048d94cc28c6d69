"""The code that the playground gives to copy does what the page did."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from google.protobuf import json_format
from PIL import Image

from bagel.rpc.transport import sync_channel
from bagel.v1 import gateway_pb2
from bagel.v1.gateway_pb2_grpc import GatewayServiceStub
from tests.browser.conftest import Front
from tests.browser.test_playground import agree, as_file, ask, choose, pixels, scene, until_done

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = [pytest.mark.browser, pytest.mark.slow]

HARD = "what's \"3\" plus `4`? \\n $HOME ${x} 'JSON'\nJSON\n日本"
"""A prompt that shells, JSON and Python must each leave as it is."""
PROGRAMS = ("bash", "curl", "jq", "base64")
OPTIONS = {"num_inference_steps": "5", "cfg_text_scale": "3.5", "cfg_interval": "0.2", "cfg_interval-high": "0.9"}
LIMIT_S = 120.0


def asked(page: Page, mode: str, prompt: str, options: dict[str, str]) -> dict[str, str]:
    """Make a request in the page; its code by language."""
    choose(page, mode)
    if mode in ("Edit", "Ask"):
        page.locator("#file").set_input_files([as_file("the input's.png"), as_file("second.png", scene(96, 128))])
        page.get_by_alt_text("Image 2: second.png").wait_for()
    ask(page, prompt, seed="12", **options)
    until_done(page)
    page.get_by_text("This request as code").click()
    found = {}
    for name in ("curl", "Python", "grpcurl"):
        page.get_by_role("tab", name=name, exact=True).click()
        found[name] = page.locator("#code-text").evaluate("text => text.textContent")
    return found


def run(command: list[str], code: str, folder: Path) -> str:
    """Run code where the inputs lie; what it wrote to stdout."""
    (folder / "the input's.png").write_bytes(scene())
    (folder / "second.png").write_bytes(scene(96, 128))
    (folder / "code").write_text(code)
    done = subprocess.run([*command, "code"], cwd=folder, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


def over_grpc(front: Front, code: str, folder: Path) -> gateway_pb2.GenerateResponse:
    """Let the shell make the request that grpcurl would send, and send it; the event with the result."""
    said = 'printf "%s\\n" "$@" > arguments; cat > request.json'
    run(["bash"], f"grpcurl() {{ {said}; }}; jq() {{ cat; }}\n{code}", folder)
    message = json_format.Parse((folder / "request.json").read_text(), gateway_pb2.GenerateRequest())
    plaintext, *_, address, method = (folder / "arguments").read_text().split()
    assert (plaintext, address, method) == ("-plaintext", front.grpc, "bagel.v1.GatewayService/Generate")
    with sync_channel(address) as channel:
        events = list(GatewayServiceStub(channel).Generate(message, timeout=LIMIT_S))
    return next((event for event in events if event.HasField("picture")), events[-1])


@pytest.mark.parametrize("mode", ["Draw", "Edit"])
def test_code_of_a_picture(page: Page, front: Front, mode: str, tmp_path: Path) -> None:
    needs()
    codes = asked(page, mode, f"@{HARD}", OPTIONS)
    shown = pixels(page, page.locator("#outcome img[alt^='Picture:'], #outcome img[alt^='Edited picture:']"))
    run(["bash"], codes["curl"], tmp_path)
    assert agree(Image.open(tmp_path / "picture.png").convert("RGB"), shown)
    run([sys.executable], codes["Python"], tmp_path)
    assert agree(Image.open(tmp_path / "picture-1.png").convert("RGB"), shown)
    (tmp_path / "grpc.png").write_bytes(over_grpc(front, codes["grpcurl"], tmp_path).picture.data)
    assert agree(Image.open(tmp_path / "grpc.png").convert("RGB"), shown)


@pytest.mark.parametrize("mode", ["Ask", "Write"])
def test_code_of_an_answer(page: Page, front: Front, mode: str, tmp_path: Path) -> None:
    needs()
    codes = asked(page, mode, HARD, {"max_tokens": "12"})
    shown = page.locator("#outcome .answer").inner_text()
    assert run(["bash"], codes["curl"], tmp_path).strip() == shown
    assert run([sys.executable], codes["Python"], tmp_path).strip() == shown
    assert over_grpc(front, codes["grpcurl"], tmp_path).finished.text.strip() == shown


def test_code_of_several_pictures_with_a_plan(page: Page, tmp_path: Path) -> None:
    needs()
    page.get_by_role("switch", name="Think first").check()
    codes = asked(page, "Draw", "a red circle", {"num_inference_steps": "5", "n": "2", "max_think_tokens": "20"})
    shown = [pixels(page, page.locator("#outcome .canvas img").nth(number)) for number in range(2)]
    for language, command in (("curl", ["bash"]), ("Python", [sys.executable])):
        run(command, codes[language], tmp_path)
        for number, picture in enumerate(shown, 1):
            assert agree(Image.open(tmp_path / f"picture-{number}.png").convert("RGB"), picture), (language, number)


def needs() -> None:
    """What the code itself needs."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing and not os.environ.get("BAGEL_NEEDS_BROWSER"):
        pytest.skip(f"{', '.join(missing)} is not installed")
    assert not missing, f"install {', '.join(missing)}"
