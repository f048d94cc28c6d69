"""docs/open-webui.md: what Open WebUI sends for its pictures and edits, and a browser before a direct connection."""

from __future__ import annotations

import base64

from openai import AsyncOpenAI

from tests.gateway_stages import Deployment
from tests.rest.test_front import parts, photo, raw, through

PAGE = "http://localhost:3000"


def test_its_requests_are_served() -> None:
    async def work(at: Deployment, client: AsyncOpenAI) -> None:
        parameters = {"num_inference_steps": 24, "cfg_text_scale": 4.0}
        drawn = await client.images.generate(
            model="bagel", prompt="a cat", n=1, size="1024x1024", response_format="b64_json", extra_body=parameters
        )
        assert drawn.data is not None and base64.b64decode(drawn.data[0].b64_json or "").startswith(b"\x89PNG")
        images = [("a.png", photo(), "image/png"), ("b.png", photo(), "image/png")]  # sent as image[]
        edited = await client.images.edit(
            model="bagel", prompt="join them", n=1, image=images, response_format="b64_json", background="auto"
        )
        assert edited.data is not None and parts(at) == ["edit", "edit", "join them"]

    through(work, served_model_names=("bagel",))


def test_a_direct_connection_is_allowed_by_its_origin() -> None:
    async def work(at: Deployment, client: AsyncOpenAI) -> None:
        asked = (
            "OPTIONS /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
            f"Origin: {PAGE}\r\nAccess-Control-Request-Method: POST\r\n"
            "Access-Control-Request-Headers: authorization,content-type\r\n\r\n"
        )
        status, _ = await raw(at, asked.encode())
        assert status in (200, 204)
        status, _ = await raw(at, asked.replace(PAGE, "http://a.example").encode())
        assert status == 400

    through(work, allow_origins=(PAGE,))
