"""The REST front as a client of it: one request a connection, its answer read to the last byte."""

from __future__ import annotations

import asyncio
import base64
import json
import ssl
from typing import TYPE_CHECKING, Any
from uuid import NAMESPACE_URL, uuid5

import h11

from bagel.errors import RemoteError

if TYPE_CHECKING:
    from bagel.rpc.transport import Security
    from tests.campaign.workload import Ask, Front, Outcome


async def request(outcome: Outcome, front: Front) -> None:
    """Send a request of the workload, and take its answer in."""
    ask = outcome.ask
    path, kind, body = _body(ask)
    status, data = await call(front.http, "POST", path, body, kind, front.security, reads_s=ask.reads_s)
    if status != 200:
        error = _json(data).get("error", {})
        outcome.error, outcome.status, outcome.message = "HTTP", str(status), str(error.get("message", data[:200]))
        return
    found = _events(data) if ask.front == "rest-stream" else [_json(data)]
    if failed := next((each["error"] for each in found if each.get("error")), None):
        outcome.error, outcome.status, outcome.message = "HTTP event", str(failed.get("code")), str(failed["message"])
        return
    outcome.answer = _picture(found) if ask.modality.endswith("img") else _text(found)


async def call(
    address: str, method: str, path: str, body: bytes, kind: str, security: Security, *, reads_s: float = 0.0
) -> tuple[int, bytes]:
    """The status and the body of an answer; RemoteError if it does not come whole."""
    host, _, port = address.rpartition(":")
    try:
        reader, writer = await asyncio.open_connection(host, int(port), ssl=_context(security))
        try:
            return await _exchange(reader, writer, method, path, body, kind, address, reads_s)
        finally:
            writer.transport.abort()
    except (OSError, h11.RemoteProtocolError, EOFError) as error:
        raise RemoteError(f"{address}: {error or type(error).__name__}", "UNAVAILABLE") from None


async def _exchange(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    method: str,
    path: str,
    body: bytes,
    kind: str,
    address: str,
    reads_s: float,
) -> tuple[int, bytes]:
    connection = h11.Connection(h11.CLIENT)
    headers = [("host", "localhost"), ("connection", "close"), ("content-length", str(len(body)))]
    if kind:
        headers.append(("content-type", kind))
    writer.write(connection.send(h11.Request(method=method, target=path, headers=headers)) or b"")
    writer.write(connection.send(h11.Data(body)) or b"")
    connection.send(h11.EndOfMessage())
    await writer.drain()
    status, data = 0, b""
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            if reads_s:
                await asyncio.sleep(reads_s)
            connection.receive_data(await reader.read(65536))
        elif isinstance(event, h11.Response):
            status = event.status_code
        elif isinstance(event, h11.Data):
            data += bytes(event.data)
        elif isinstance(event, h11.EndOfMessage):
            return status, data
        elif isinstance(event, h11.ConnectionClosed):
            raise EOFError("it closed the connection without an answer")


def _body(ask: Ask) -> tuple[str, str, bytes]:
    """(path, content type, body)."""
    settings = ask.settings()
    image = settings.pop("image", b"")
    values: dict[str, Any] = {"model": "tiny", "seed": ask.seed, "think": ask.think}
    for name in ("cfg_text_scale", "negative_prompt", "posterior", "do_sample", "max_tokens", "max_think_tokens"):
        if name in settings:
            values[name] = settings[name]
    if "steps" in settings:
        values["num_inference_steps"] = settings["steps"]
    if ask.front == "rest-stream":
        values["stream"] = True
    if ask.modality == "text2img":
        values |= {"prompt": ask.prompt, "size": "64x64"}
        return "/v1/images/generations", "application/json", json.dumps(values).encode()
    if ask.modality == "img2img":
        return ("/v1/images/edits", *_form({**values, "prompt": ask.prompt}, image))
    content: list[dict[str, Any]] = [{"type": "text", "text": ask.prompt}]
    if image:
        url = "data:image/png;base64," + base64.b64encode(image).decode()
        content.insert(0, {"type": "image_url", "image_url": {"url": url}})
    values["messages"] = [{"role": "user", "content": content}]
    return "/v1/chat/completions", "application/json", json.dumps(values).encode()


def _form(values: dict[str, Any], image: bytes) -> tuple[str, bytes]:
    """(content type, body) of a multipart form."""
    mark = uuid5(NAMESPACE_URL, repr(sorted(values.items()))).hex
    parts = [
        f'--{mark}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{_plain(value)}\r\n'.encode()
        for name, value in values.items()
    ]
    file = 'Content-Disposition: form-data; name="image"; filename="a.png"\r\nContent-Type: image/png\r\n\r\n'
    parts += [f"--{mark}\r\n{file}".encode(), image, f"\r\n--{mark}--\r\n".encode()]
    return f"multipart/form-data; boundary={mark}", b"".join(parts)


def _plain(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _json(data: bytes) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except ValueError:
        return {"error": {"code": "UNREADABLE", "message": f"an answer that is no JSON: {data[:200]!r}"}}
    return found if isinstance(found, dict) else {}


def _events(data: bytes) -> list[dict[str, Any]]:
    """The events of a stream; one that ends without its last one has an error more."""
    lines = [line.removeprefix(b"data: ") for line in data.split(b"\n") if line.startswith(b"data: ")]
    events = [_json(line) for line in lines if line != b"[DONE]"]
    ended = b"[DONE]" in lines or any(str(each.get("type")).endswith("completed") for each in events)
    if not ended and not any(each.get("error") for each in events):
        events.append({"error": {"code": "UNREADABLE", "message": "the stream ended without its last event"}})
    return events


def _picture(found: list[dict[str, Any]]) -> tuple[Any, ...]:
    last = found[-1]
    last = last["data"][0] if "data" in last else last
    return (last.get("think_text"), last.get("seed"), base64.b64decode(last["b64_json"]))


def _text(found: list[dict[str, Any]]) -> tuple[Any, ...]:
    """An answer's text, whole or in pieces."""
    pieces = [choice.get("message") or choice.get("delta") for each in found for choice in each.get("choices", ())]
    return ("".join(each.get("content") or "" for each in pieces if each),)


def _context(security: Security) -> ssl.SSLContext | None:
    if not security.encrypted:
        return None
    context = ssl.create_default_context(cafile=str(security.ca))
    if security.certificate is not None:
        context.load_cert_chain(str(security.certificate), str(security.key))
    return context
