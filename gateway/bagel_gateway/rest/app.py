"""The application: routes, and what becomes of errors."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

import bagel
from bagel.errors import BagelError, Draining, NoBackend
from bagel.telemetry.logs import LONGEST_REQUEST_ID, REQUEST_ID, Log, current_caller, current_request, new_request_id
from bagel.telemetry.tracing import annotate_request, record_request_failure
from bagel_gateway.backends import Backends
from bagel_gateway.metrics import Metrics
from bagel_gateway.playground import GrpcFront, add_playground
from bagel_gateway.rest.bodies import Bodies
from bagel_gateway.rest.chat import Chat
from bagel_gateway.rest.docs import add_docs, form_body, json_body, path_parameter
from bagel_gateway.rest.errors import ClientGone, error_response, status_of
from bagel_gateway.rest.fetch import Fetcher
from bagel_gateway.rest.images import Images
from bagel_gateway.rest.parameters import (
    REFUSED_CHAT,
    REFUSED_EDIT,
    REFUSED_GENERATION,
    ChatParameters,
    ImageParameters,
)
from bagel_gateway.rest.responses import (
    MODELS,
    WORK,
    Answer,
    ChatAnswer,
    ImagesAnswer,
    Model,
    ModelList,
    Responses,
    responses,
)
from bagel_gateway.rest.serve import Front

GONE = 499
"""The status of a request whose client has left, for counters and traces alone."""
ABOUT = "OpenAI's API for images and chats; docs/rest.md says what of it is honoured and what is refused."

Endpoint = Callable[[Request], Awaitable[Response]]

log = Log("bagel_gateway.rest")


def make_app(
    front: Front,
    bodies: Bodies,
    fetcher: Fetcher,
    metrics: Metrics,
    backends: Backends,
    draining: Callable[[], bool],
    created: int,
    grpc: GrpcFront,
    *,
    keyed: bool,
) -> FastAPI:
    """The application. created: when the models of the list came to be, in Unix seconds; grpc: for the playground;
    keyed: callers need a key.
    """
    app = _bare_app()
    images, chat = Images(front, bodies, fetcher), Chat(front, bodies, fetcher)

    def post(path: str, endpoint: Endpoint, summary: str, body: Mapping[str, Any], answer: type[Answer]) -> None:
        app.add_api_route(
            path,
            _handled(endpoint, path, metrics),
            methods=["POST"],
            summary=summary,
            openapi_extra=dict(body),
            response_model=None,
            responses=responses(answer, WORK, streams=True),
        )

    def get(path: str, endpoint: Endpoint, summary: str, answers: Responses, **more: Any) -> None:
        handle = _handled(endpoint, path, metrics)
        options = {"summary": summary, "response_model": None, "responses": answers, **more}
        app.add_api_route(path, handle, methods=["GET"], **options)
        app.add_route(path, handle, methods=["HEAD"], include_in_schema=False)

    post(
        "/v1/images/generations", images.generate, "Draw", json_body(ImageParameters, REFUSED_GENERATION), ImagesAnswer
    )
    edit = form_body(ImageParameters, REFUSED_EDIT, front.max_images)
    post("/v1/images/edits", images.edit, "Edit images", edit, ImagesAnswer)
    post("/v1/chat/completions", chat.complete, "Answer, or draw", json_body(ChatParameters, REFUSED_CHAT), ChatAnswer)
    models, text = _Models(front, created), {"response_class": PlainTextResponse}
    get("/v1/models", models.all, "The served model and its aliases", responses(ModelList, MODELS))
    named = {"openapi_extra": path_parameter("model")}
    get("/v1/models/{model:path}", models.one, "One of them", responses(Model, MODELS), **named)
    get("/healthz", _healthz, "Whether the process lives", {}, **text)
    readyz = _readyz(backends, draining, keyed)
    for path in ("/readyz", "/health") if front.compat == "vllm-omni" else ("/readyz",):
        get(path, readyz, "Whether requests can be served", responses(None, (503,)), **text)
    get("/metrics", _metrics(metrics), "Prometheus", responses(None, (401,)), **text)
    add_docs(app)
    add_playground(app, grpc)
    app.add_exception_handler(HTTPException, _no_such_route)
    return app


def _bare_app() -> FastAPI:
    return FastAPI(
        title="bagel-serving",
        version=bagel.__version__,
        description=ABOUT,
        # FastAPI's own pages load Swagger UI from the network; `add_docs` serves it from here.
        docs_url=None,
        redoc_url=None,
        # The root span of a request over HTTP; spans of our own show what happens in it.
        telemetry={"operation_spans": False, "logs": False, "auto_configure": False, "exclude": _is_no_work},
    )


def _handled(endpoint: Endpoint, route: str, metrics: Metrics) -> Endpoint:
    """The endpoint under its request's id, its errors in OpenAI's form, counted."""

    async def handle(request: Request) -> Response:
        given = request.headers.get(REQUEST_ID, "")[:LONGEST_REQUEST_ID]
        # It goes into a header and into logs, so it is taken only if both can hold it.
        request_id = given if given and given.isascii() and given.isprintable() else new_request_id()
        current_request.set(request_id)
        annotate_request(request_id=request_id)
        response = await _answered(endpoint, request)
        response.headers[REQUEST_ID] = request_id
        metrics.http(route, response.status_code)
        return response

    return handle


async def _answered(endpoint: Endpoint, request: Request) -> Response:
    try:
        return await endpoint(request)
    except BagelError as error:
        fault = status_of(error) >= 500
        log.info("failed" if fault else "refused", **error.for_log())
        record_request_failure(error, fault=fault)
        return error_response(error)
    except (ClientGone, ClientDisconnect):  # the second while its body was read
        log.info("the client left")
        record_request_failure(asyncio.CancelledError())
        return Response(status_code=GONE)
    except Exception as error:
        log.error("internal error", exc_info=True)
        record_request_failure(error)
        message = f"internal error: {type(error).__name__}; the log of this service has the details"
        return error_response(BagelError(message))


def _is_no_work(scope: MutableMapping[str, Any]) -> bool:
    """Whether an HTTP request needs no trace: probes, pages and lists."""
    return scope.get("method") != "POST" or not scope["path"].startswith("/v1/")


async def _no_such_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path:.200}: {error.detail}; /docs lists what there is"
    body = {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}}
    return JSONResponse(body, error.status_code, error.headers)


class _Models:
    def __init__(self, front: Front, created: int) -> None:
        self._front, self._created = front, created

    async def all(self, request: Request) -> Response:
        """The served model under its name, then its aliases."""
        names = await self._front.names()
        return JSONResponse({"object": "list", "data": [self._model(name, names[0]) for name in names]})

    async def one(self, request: Request) -> Response:
        """One of them; UnknownModel for another name."""
        name = await self._front.check_model(request.path_params["model"])
        return JSONResponse(self._model(name, (await self._front.names())[0]))

    def _model(self, name: str, root: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self._created, "owned_by": "bagel-serving", "root": root}


async def _healthz(request: Request) -> Response:
    return PlainTextResponse("ok\n")


def _readyz(backends: Backends, draining: Callable[[], bool], keyed: bool) -> Endpoint:
    async def readyz(request: Request) -> Response:
        if draining():
            raise Draining("the gateway is shutting down and takes no new requests")
        if not backends.ready:
            if keyed and not current_caller.get():  # a probe: only callers with a key learn what is missing
                raise NoBackend("not ready: a stage has no service; with an API key this says which")
            every = (*backends.thinkers, *backends.dits)
            each = "; ".join(f"{backend.name}: {backend.why_not}" for backend in every if backend.model is None)
            raise NoBackend(f"not ready: {each}")
        return PlainTextResponse("ready\n")

    return readyz


def _metrics(metrics: Metrics) -> Endpoint:
    async def scrape(request: Request) -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return scrape
