"""The page's files as the gateway serves them; no browser needed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from bagel_gateway.playground import STATIC, GrpcFront, add_playground

FILES = sorted(path.name for path in STATIC.iterdir())


@pytest.fixture
def client() -> TestClient:
    app = FastAPI()
    add_playground(app, GrpcFront(50051, tls=False))
    return TestClient(app)


@pytest.mark.parametrize("path", ["/", *(f"/playground/{name}" for name in FILES)])
def test_every_file_comes_with_its_type_and_a_policy(client: TestClient, path: str) -> None:
    answer = client.get(path)
    assert answer.status_code == 200
    kinds = {".js": "javascript", ".css": "text/css", ".svg": "image/svg+xml", ".png": "image/png"}
    assert kinds.get(Path(path).suffix, "text/html") in answer.headers["content-type"]
    policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert answer.headers["x-content-type-options"] == "nosniff"
    if path != "/":
        assert client.get(path, headers={"if-none-match": answer.headers["etag"]}).status_code == 304


def test_the_page_is_told_where_grpc_is(client: TestClient) -> None:
    assert '<meta name="grpc" content="50051 plaintext">' in client.get("/").text


def test_nothing_beside_the_files_is_served(client: TestClient) -> None:
    for path in (
        "/playground/",
        "/playground/../__init__.py",
        "/playground/%2e%2e/__init__.py",
        "/playground/nothing.js",
    ):
        assert client.get(path).status_code == 404


@pytest.mark.parametrize("name", [name for name in FILES if not name.endswith(".png")])
def test_no_file_names_another_host(name: str) -> None:
    text = (STATIC / name).read_text().replace("http://www.w3.org/2000/svg", "")
    assert re.findall(r"(?:https?:)?//[\w-]+\.[\w.]+", text) == []


def test_the_page_has_no_inline_script_or_style() -> None:
    page = (STATIC / "index.html").read_text()
    assert re.search(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son\w+=", page) is None


def test_modules_import_what_is_there() -> None:
    for path in STATIC.glob("*.js"):
        for name in re.findall(r'from "\./([\w.]+)"', path.read_text()):
            assert (STATIC / name).is_file(), f"{path.name} imports {name}"
