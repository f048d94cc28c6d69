"""Which pages a browser may be asked to call a gateway by: hosts, origins, types; CORS; and HEAD."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from openai import AsyncOpenAI
from starlette.applications import Starlette
from starlette.types import ASGIApp

from bagel.deployment.http_front import HttpFront
from bagel.errors import ConfigError
from bagel.rpc.api_keys import key_line, new_key
from bagel_gateway.metrics import Metrics
from bagel_gateway.rest.origins import CheckHost
from tests.gateway_stages import Deployment
from tests.rest.test_front import CHAT, IMAGES, raw, through
from tests.rest.test_limits import EDITS, FORM, edit

HERE = "Host: localhost"
ELSEWHERE = "Origin: https://evil.example"


async def ask(at: Deployment, request: str, *headers: str, body: bytes = b"") -> tuple[int, str]:
    """Status, and head and body."""
    assert at.gateway.rest is not None
    reader, writer = await asyncio.open_connection("127.0.0.1", at.gateway.rest.port)
    length = [f"Content-Length: {len(body)}"] if body else []
    writer.write("\r\n".join([f"{request} HTTP/1.1", "Connection: close", *headers, *length, "", ""]).encode() + body)
    answer = (await reader.read()).decode()
    writer.close()
    return int(answer.split()[1]), answer


JSON, BODY = "Content-Type: application/json", b'{"prompt": "a cat"}'
MAY = [
    [],
    ["Sec-Fetch-Site: same-origin", "Origin: http://localhost"],
    ["Sec-Fetch-Site: same-origin", "Origin: https://behind.a.proxy"],
    ["Sec-Fetch-Site: none"],
    ["Origin: http://localhost"],
    ["Origin: https://app.example", "Sec-Fetch-Site: cross-site"],
]
MAY_NOT = [
    [ELSEWHERE, "Sec-Fetch-Site: cross-site"],
    ["Sec-Fetch-Site: cross-site"],
    ["Sec-Fetch-Site: same-site", "Origin: http://localhost:9"],
    [ELSEWHERE],
    ["Origin: null"],
    ["Origin: http://localhost:9"],
    ["Origin: https://app.example.evil.example"],
]


def test_pages_of_other_sites_can_have_no_work_done() -> None:
    async def work(at: Deployment, client: AsyncOpenAI) -> None:
        for headers in MAY_NOT:
            for path, kind, body in (
                (IMAGES, "application/json", BODY),
                (EDITS, FORM, edit()),
                (CHAT, "text/plain", b"{}"),
            ):
                status, answer = await ask(at, f"POST {path}", HERE, f"Content-Type: {kind}", *headers, body=body)
                assert status == 403 and "--allow-origin" in answer and "foreign_origin" in answer, (headers, answer)
        assert at.dits[0].asked == []
        for headers in MAY:
            assert (await ask(at, f"POST {IMAGES}", HERE, JSON, *headers, body=BODY))[0] == 200, headers
        assert (await ask(at, "GET /v1/models", HERE, ELSEWHERE, "Sec-Fetch-Site: cross-site"))[0] == 200

    through(work, allow_origins=("https://app.example",))


def test_json_is_demanded_by_its_type() -> None:
    async def work(at: Deployment, client: AsyncOpenAI) -> None:
        for kind in ([], ["Content-Type: text/plain"], ["Content-Type:"], ["Content-Type: text/json"]):
            status, answer = await ask(at, f"POST {IMAGES}", HERE, *kind, body=BODY)
            assert status == 415 and "application/json" in answer
        status, _ = await ask(at, f"POST {IMAGES}", HERE, "Content-Type: Application/JSON; charset=utf-8", body=BODY)
        assert status == 200

    through(work)


def test_a_front_on_loopback_answers_to_no_name_that_a_page_has_rebound() -> None:
    async def work(at: Deployment, client: AsyncOpenAI) -> None:
        assert at.gateway.rest is not None
        for host in (
            "evil.example",
            "evil.example:8000",
            "localhost.evil.example",
            "10.0.0.5",
            "0.0.0.0:8000",
            "a@localhost",
        ):
            for request in (f"POST {IMAGES}", "GET /", "GET /v1/models", "GET /healthz"):
                status, answer = await ask(at, request, f"Host: {host}", JSON, body=BODY if "POST" in request else b"")
                assert status == 421 and "--allow-host" in answer and "wrong_host" in answer, (host, answer)
        assert at.dits[0].asked == []
        for host in (
            "localhost",
            "127.0.0.1:8000",
            "[::1]:8000",
            "LOCALHOST.",
            "a.localhost:1",
            "bagel.lan",
            "127.1.2.3",
        ):
            assert (await ask(at, "GET /healthz", f"Host: {host}"))[0] == 200, host
        assert (await raw(at, b"GET /healthz HTTP/1.0\r\n\r\n"))[0] == 200

    through(work, allow_hosts=("bagel.lan",))


def test_refused_pages_and_hosts_are_told_what_to_allow() -> None:
    async def work(at: Deployment, client: AsyncOpenAI) -> None:
        told = (await ask(at, "GET /", "Host: my-box.lan:8000"))[1]
        assert "call it by localhost" in told and "--allow-host my-box.lan" in told and "lan:8000;" not in told
        assert "--allow-host NAME" in (await ask(at, "GET /", "Host: a b"))[1]
        told = (await ask(at, f"POST {IMAGES}", HERE, JSON, "Origin: http://my-box.lan", body=BODY))[1]
        assert "--allow-origin http://my-box.lan" in told and "pass on Host" in told

    through(work)


@pytest.mark.parametrize(
    ("host", "origin", "status"),
    [
        ("localhost:80", "http://localhost", 200),
        ("localhost:443", "https://localhost", 200),
        ("localhost:443", "http://localhost", 403),
        ("localhost:8080", "http://localhost", 403),
        ("localhost", "http://localhost:8080", 403),
    ],
)
def test_a_schemes_own_port_may_be_told_or_left_out(host: str, origin: str, status: int) -> None:
    async def work(at: Deployment, client: AsyncOpenAI) -> None:
        assert (await ask(at, f"POST {IMAGES}", f"Host: {host}", JSON, f"Origin: {origin}", body=BODY))[0] == status

    through(work)


HOSTS = [
    ("0.0.0.0:8000", (), "any.example", True),
    ("0.0.0.0:8000", ("ours.example",), "any.example", False),
    ("0.0.0.0:8000", ("ours.example",), "ours.example:8000", True),
    ("0.0.0.0:8000", ("ours.example",), "192.168.1.2:8000", True),
    ("0.0.0.0:8000", ("ours.example",), "[fd00::1]", True),
    ("0.0.0.0:8000", ("ours.example",), "localhost:8000", True),
    ("[::1]:8000", (), "any.example", False),
    ("localhost:8000", ("*",), "any.example", True),
]


@pytest.mark.parametrize(("listen", "allowed", "host", "ours"), HOSTS)
def test_a_front_that_others_reach_takes_any_name_unless_some_are_allowed(
    listen: str, allowed: tuple[str, ...], host: str, ours: bool
) -> None:
    app: ASGIApp = Starlette()
    check = CheckHost(app, listen, allowed, Metrics())
    assert (check._any or check._is_ours(host)) is ours


def test_allowed_origins_are_told_what_they_may_even_of_errors(tmp_path: Path) -> None:
    key, file = new_key(), tmp_path / "keys"
    file.write_text(key_line("page", key))

    async def work(at: Deployment, client: AsyncOpenAI) -> None:
        page = "Origin: https://app.example"
        asks = ["Access-Control-Request-Method: POST", "Access-Control-Request-Headers: authorization,content-type"]
        status, answer = await ask(at, f"OPTIONS {IMAGES}", HERE, page, *asks)
        assert status == 200, answer
        for header in (
            "origin: https://app.example",
            "headers: authorization,content-type",
            "methods: GET, HEAD, POST",
        ):
            assert f"access-control-allow-{header}" in answer.lower().replace("get, head, post", "GET, HEAD, POST")
        status, answer = await ask(at, f"POST {IMAGES}", HERE, page, JSON, f"Authorization: Bearer {key}", body=BODY)
        assert status == 200 and "access-control-allow-origin: https://app.example" in answer.lower()
        assert "access-control-expose-headers: x-request-id, retry-after" in answer.lower()
        for headers in ([JSON], [JSON, f"Authorization: Bearer {key}"]):
            status, answer = await ask(at, f"POST {IMAGES}", HERE, page, *headers, body=b"{}")
            assert status in (400, 401) and "access-control-allow-origin: https://app.example" in answer.lower()
        status, answer = await ask(at, f"OPTIONS {IMAGES}", HERE, ELSEWHERE, *asks)
        assert status == 400 and "access-control-allow-origin" not in answer.lower()

    through(work, api_keys=file, allow_origins=("https://app.example",))


def test_by_default_no_origin_is_told_anything() -> None:
    async def work(at: Deployment, client: AsyncOpenAI) -> None:
        status, answer = await ask(at, f"OPTIONS {IMAGES}", HERE, ELSEWHERE, "Access-Control-Request-Method: POST")
        assert status == 405 and "access-control" not in answer.lower()
        assert "access-control" not in (await ask(at, "GET /v1/models", HERE, ELSEWHERE))[1].lower()

    through(work)


@pytest.mark.parametrize(
    "origin",
    ["https://app.example/", "app.example", "null", "HTTPS://APP.example", "https://a b", "https://app.example:443"],
)
def test_what_is_no_origin_is_told_at_the_start(origin: str) -> None:
    with pytest.raises(ConfigError, match="--allow-origin is"):
        HttpFront(http="127.0.0.1:0", allow_origins=(origin,))


# HEAD


def test_head_is_wherever_get_is_with_its_headers_and_no_body() -> None:
    async def work(at: Deployment, client: AsyncOpenAI) -> None:
        assert at.gateway.rest is not None
        schema = json.loads(
            (await raw(at, f"GET /openapi.json HTTP/1.1\r\n{HERE}\r\nConnection: close\r\n\r\n".encode()))[1]
        )
        paths = {path.replace("{model}", "tiny") for path, methods in schema["paths"].items() if "get" in methods}
        paths |= {
            "/",
            "/docs",
            "/openapi.json",
            "/playground/style.css",
            "/docs/assets/swagger-ui.css",
            "/v1/models/other",
        }
        assert {"/healthz", "/readyz", "/metrics", "/v1/models", "/v1/models/tiny"} <= paths
        for path in paths:
            (status, got), (of_head, told) = await ask(at, f"GET {path}", HERE), await ask(at, f"HEAD {path}", HERE)
            assert (of_head, told.partition("\r\n\r\n")[2]) == (status, ""), path
            lengths = {"content-length"} if path == "/metrics" else set()  # which count these very requests
            assert lines(told, lengths) == lines(got, lengths), path
        assert (await ask(at, f"HEAD {IMAGES}", HERE))[0] == 405

    through(work)


def lines(answer: str, but: set[str]) -> set[str]:
    """Names of an answer's headers; with their values for those that say what the body would be."""
    head = [each.partition(":") for each in answer.partition("\r\n\r\n")[0].lower().splitlines()[1:]]
    told = ("content-", "etag")
    return {name + value if name.startswith(told) and name not in but else name for name, _, value in head}
