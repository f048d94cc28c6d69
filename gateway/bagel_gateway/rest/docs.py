"""The page at /docs, without a network, and what OpenAPI says of bodies."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import HTMLResponse
from starlette.staticfiles import StaticFiles

from bagel.images import FORMATS
from bagel_gateway.rest.messages import FIELD, MESSAGE, NOT_BLANK
from bagel_gateway.rest.parameters import Only

ASSETS = "/docs/assets"
UI_PACKAGE = "fastapi_offline"
"""The package that carries Swagger UI 5, which reads OpenAPI 3.1. Its files alone are used, so it is never imported."""


def add_docs(app: FastAPI) -> None:
    """Serve the page and what it is made of."""
    app.mount(ASSETS, StaticFiles(directory=_swagger_ui()), name="docs-assets")

    @app.api_route("/docs", methods=["GET", "HEAD"], include_in_schema=False)
    async def docs(request: Request) -> HTMLResponse:
        return get_swagger_ui_html(
            openapi_url="/openapi.json",
            title="bagel-serving",
            swagger_js_url=f"{ASSETS}/swagger-ui-bundle.js",
            swagger_css_url=f"{ASSETS}/swagger-ui.css",
            swagger_favicon_url=f"{ASSETS}/favicon.png",
        )


def _swagger_ui() -> Path:
    found = find_spec(UI_PACKAGE)
    if found is None or found.origin is None:
        raise ModuleNotFoundError(f"No module named {UI_PACKAGE!r}", name=UI_PACKAGE)
    return Path(found.origin).parent / "static"


def json_body(model: type[BaseModel], refused: Mapping[str, Only]) -> dict[str, Any]:
    """The operation's body in JSON."""
    return _body("application/json", _schema(model, refused))


def form_body(model: type[BaseModel], refused: Mapping[str, Only], max_images: int) -> dict[str, Any]:
    """The operation's body as a form with images."""
    schema = _schema(model, refused)
    file = {"type": "string", "format": "binary", "description": f"a {', '.join(FORMATS)} file"}
    files = {"type": "array", "maxItems": max_images, "minItems": 1, "items": file}
    schema["properties"] = {"image": files, **schema["properties"]}
    schema["required"] = ["image", *schema["required"]]
    return _body("multipart/form-data", schema)


def path_parameter(name: str) -> dict[str, Any]:
    """The operation's parameter in its path."""
    return {"parameters": [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}}]}


def _body(kind: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {kind: {"schema": schema}}}}


def _schema(model: type[BaseModel], refused: Mapping[str, Only]) -> dict[str, Any]:
    schema = model.model_json_schema()
    # The schema stands inside of an operation, where a reference to $defs would lead nowhere.
    schema.pop("$defs", None)
    properties = schema["properties"]
    for name in list(properties):
        if "$ref" in str(properties[name]):
            properties[name] = {"type": "object"}
    if "prompt" in properties:
        properties["prompt"]["pattern"] = NOT_BLANK
    if FIELD in properties:
        properties[FIELD]["items"] = MESSAGE
    for name, only in refused.items():
        # null counts as left out, so it is never refused.
        properties[name] = {"description": f"refused: {only.why}", "enum": [None, *only.values]}
    return schema
