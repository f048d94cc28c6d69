"""Every example, run as its head says, against a gateway with bagel-nano; `openai_client.py`: test_openai_client."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
import threading
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import json_format
from PIL import Image

from bagel.deployment.defaults import NANO_NAME
from bagel.rpc.transport import sync_channel
from bagel.v1 import gateway_pb2
from bagel.v1.gateway_pb2_grpc import GatewayServiceStub
from tests.shared import Borrow, Stages

pytestmark = pytest.mark.slow  # each example takes seconds

ROOT = Path(__file__).parents[2]
LIMIT_S = 240


@pytest.fixture
def services(borrow: Borrow) -> Stages:
    """Those of bagel-nano; what an example gives up, or leaves, stops in each of them."""
    return borrow("bagel", NANO_NAME)


def run(*command: str | Path, folder: Path = ROOT, environment: Mapping[str, str] = os.environ) -> str:
    done = subprocess.run(
        [str(each) for each in command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def pictures(folder: Path) -> list[str]:
    """Names of the pictures, all of bagel-nano's size."""
    for path in folder.iterdir():
        with Image.open(path) as image:
            assert image.size == (128, 128), path
    return sorted(path.name for path in folder.iterdir())


def red(path: Path) -> bool:
    """Whether the picture's middle is as bagel-nano draws a large red circle."""
    with Image.open(path) as image:
        r, g, b = image.convert("RGB").resize((1, 1), box=(48, 48, 80, 80)).getpixel((0, 0))  # type: ignore[misc]
    return r > 2 * max(g, b)


def test_python_sync(services: Stages, tmp_path: Path) -> None:
    said = run(sys.executable, "-m", "examples.sync_client", services.address, tmp_path)
    assert pictures(tmp_path) == ["drawn.png", "edited.png"]
    assert red(tmp_path / "drawn.png") and not red(tmp_path / "edited.png")
    assert "answer: " in said and "blue" in said
    assert "refused: steps: steps is 1" in said


def test_python_asyncio(services: Stages, tmp_path: Path) -> None:
    said = run(sys.executable, "-m", "examples.async_client", services.address, tmp_path)
    assert pictures(tmp_path) == ["picture.png", *(f"preview-{number}.png" for number in range(3))]
    assert "step 23 of 23" in said and "<think>" in said and "given up after step 3" in said


def test_reflection_needs_no_code_of_ours(services: Stages, tmp_path: Path) -> None:
    """bagel cannot be imported in that process."""
    without = (
        "import runpy, sys; sys.modules['bagel'] = None; del sys.argv[0]; runpy.run_path(sys.argv[0], None, '__main__')"
    )
    script = ROOT / "examples" / "reflection_client.py"
    said = run(sys.executable, "-c", without, script, services.address, tmp_path)
    assert "bagel.v1.GatewayService" in said and "Generate(request, output_format" in said
    assert "event: accepted" in said and said.rstrip().endswith("event: finished")
    assert pictures(tmp_path) == ["reflected.png"] and red(tmp_path / "reflected.png")


def test_curl(services: Stages, tmp_path: Path) -> None:
    missing = [program for program in ("bash", "curl", "jq", "base64") if shutil.which(program) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} is not installed")
    said = run(ROOT / "examples" / "curl.sh", f"http://{services.http}", tmp_path)
    streamed = ["image_generation.completed-0.png", *(f"image_generation.partial_image-{i}.png" for i in range(2))]
    assert pictures(tmp_path) == ["drawn.png", "edited.png", *streamed]
    assert red(tmp_path / "drawn.png") and not red(tmp_path / "edited.png")
    assert (tmp_path / "drawn.png").read_bytes() == (tmp_path / streamed[0]).read_bytes()
    assert "blue" in said and '"param":"n"' in said and f"bagel-serving/{NANO_NAME}" in said
    assert all(path in said for path in ("/v1/images/edits", "/v1/chat/completions", "/readyz", "/metrics"))


def test_node(services: Stages, tmp_path: Path) -> None:
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("node and npm are not installed")
    shutil.copytree(ROOT / "protos", tmp_path / "protos")
    node = tmp_path / "examples" / "node"
    shutil.copytree(ROOT / "examples" / "node", node, ignore=shutil.ignore_patterns("node_modules"))
    run("npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", folder=node)
    said = run("node", "client.js", services.address, tmp_path / "pictures", folder=node)
    assert "step 23 of 23" in said and "finished: 23 steps" in said and "given up after step 3" in said
    assert pictures(tmp_path / "pictures") == ["node.png"] and red(tmp_path / "pictures" / "node.png")


def test_comfyui_nodes(services: Stages, monkeypatch: pytest.MonkeyPatch) -> None:
    """As ComfyUI imports and calls them; of ComfyUI only the progress bar and the cancel button are not real."""
    steps: list[tuple[int, int]] = []
    bar = type(
        "ProgressBar", (), {"__init__": lambda self, total: None, "update_absolute": lambda self, *at: steps.append(at)}
    )
    pressed = threading.Event()

    def stop_if_pressed() -> None:
        if pressed.is_set():
            raise KeyboardInterrupt

    utils, management, comfy = (types.ModuleType(f"comfy{name}") for name in (".utils", ".model_management", ""))
    vars(utils)["ProgressBar"], vars(management)["throw_exception_if_processing_interrupted"] = bar, stop_if_pressed
    vars(comfy).update(utils=utils, model_management=management)
    for module in (comfy, utils, management):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    nodes = runpy.run_path(str(ROOT / "examples" / "comfyui" / "bagel_nodes.py"))["NODE_CLASS_MAPPINGS"]

    def call(name: str, **inputs: Any) -> tuple[Any, ...]:
        """With the defaults of every input that is not given, as ComfyUI's front end sends them."""
        node, declared = nodes[name], nodes[name].INPUT_TYPES()
        defaults = {
            key: kind[1]["default"]
            for key, kind in (declared["required"] | declared["optional"]).items()
            if len(kind) > 1 and "default" in kind[1]
        }
        given = {**defaults, "endpoint": services.address, **inputs}
        assert given.keys() <= (declared["required"] | declared["optional"]).keys() >= declared["required"].keys()
        results = getattr(node(), node.FUNCTION)(**given)
        assert len(results) == len(node.RETURN_TYPES) == len(node.RETURN_NAMES)
        return tuple(results)

    image, thought = call("BagelDraw", prompt="a large red circle", seed=7, steps=24)
    assert image.shape == (1, 128, 128, 3) and image.min() >= 0 and image.max() <= 1 and thought == ""
    r, g, b = image[0, 56:72, 56:72].mean((0, 1))
    assert r > 2 * max(g, b) and steps[-1] == (23, 23)
    edited, _ = call("BagelEdit", image=image, prompt="make the circle blue", seed=7, steps=24)
    r, g, b = edited[0, 56:72, 56:72].mean((0, 1))
    assert b > 2 * r
    [answer] = call("BagelAsk", image=edited, prompt="describe the image")
    assert "blue" in answer
    [answer] = call("BagelAsk", prompt="hello")
    assert answer
    pressed.set()
    with pytest.raises(KeyboardInterrupt):
        call("BagelDraw", prompt="a large red circle")


@pytest.mark.parametrize("page", ["grpc.md", "rest.md"])
def test_the_python_of_a_page(services: Stages, tmp_path: Path, page: str) -> None:
    text = (ROOT / "docs" / page).read_text()
    code = "".join(re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    code = code.replace("127.0.0.1:50051", services.address).replace("127.0.0.1:8000", services.http)
    assert services.address in code or services.http in code
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    run(sys.executable, "-c", code, folder=tmp_path, environment=environment)


def test_what_grpcurl_sends_on_the_page(services: Stages) -> None:
    """Its JSON becomes messages as it makes them; the tool itself is not needed."""
    text = (ROOT / "docs" / "grpc.md").read_text()
    [(body, method)] = re.findall(r"-d '(\{.*?\})' 127\.0\.0\.1:50051 bagel\.v1\.GatewayService/(\w+)", text, re.DOTALL)
    message = json_format.Parse(body, gateway_pb2.GenerateRequest())
    with sync_channel(services.address) as channel:
        events = list(getattr(GatewayServiceStub(channel), method)(message, timeout=LIMIT_S))
    assert [event.WhichOneof("event") for event in events][-2:] == ["picture", "finished"]


def test_the_lock_file_names_no_registry() -> None:
    """Another registry than the one that it was made with installs the same."""
    assert '"resolved"' not in (ROOT / "examples" / "node" / "package-lock.json").read_text()
