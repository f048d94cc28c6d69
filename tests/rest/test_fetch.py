"""Images by URL: from a host of the list, over TLS, bounded, nothing followed."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
import trustme

from bagel.errors import InvalidImage
from bagel_gateway.rest.fetch import Fetcher

LIMIT = 1000


class Handler(BaseHTTPRequestHandler):
    """/image is one, /large has more bytes than are taken, /elsewhere leads to /image."""

    def do_GET(self) -> None:
        body = {"/image?a=b": b"an image", "/large": b"x" * (LIMIT + 1)}.get(self.path, b"")
        self.send_response(302 if self.path == "/elsewhere" else 200 if body else 404)
        self.send_header("Location", "/image?a=b")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


class Server(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """A client that does not trust us leaves."""


@pytest.fixture
def host() -> Iterator[tuple[str, ssl.SSLContext]]:
    """A server's host:port, and what trusts it."""
    authority, server, client = trustme.CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context()
    authority.issue_cert("localhost").configure_cert(server)
    authority.configure_trust(client)
    with Server(("127.0.0.1", 0), Handler) as serving:
        serving.socket = server.wrap_socket(serving.socket, server_side=True, do_handshake_on_connect=False)
        thread = Thread(target=serving.serve_forever)
        thread.start()
        yield f"localhost:{serving.server_port}", client
        serving.shutdown()
        thread.join(10)


def fetch(host: tuple[str, ssl.SSLContext], url: str, tls: ssl.SSLContext | None = None) -> bytes:
    return asyncio.run(Fetcher((host[0],), LIMIT, tls or host[1]).fetch(url))


def test_an_image_of_a_host_on_the_list_is_fetched(host: tuple[str, ssl.SSLContext]) -> None:
    assert fetch(host, f"https://{host[0]}/image?a=b") == b"an image"


@pytest.mark.parametrize(
    ("path", "said"), [("/large", "more than 1000 bytes"), ("/elsewhere", "302"), ("/none", "404"), ("/a b", "encoded")]
)
def test_what_else_comes_is_refused(host: tuple[str, ssl.SSLContext], path: str, said: str) -> None:
    with pytest.raises(InvalidImage, match=said):
        fetch(host, f"https://{host[0]}{path}")


def test_a_host_that_cannot_prove_itself_is_refused(host: tuple[str, ssl.SSLContext]) -> None:
    with pytest.raises(InvalidImage, match="SSLCertVerificationError"):
        fetch(host, f"https://{host[0]}/image?a=b", ssl.create_default_context())


def test_other_hosts_are_refused_without_being_asked(host: tuple[str, ssl.SSLContext]) -> None:
    for url in (
        f"https://127.0.0.1:{host[0].rpartition(':')[2]}/image?a=b",
        f"http://{host[0]}/image?a=b",
        "https://[",
    ):
        with pytest.raises(InvalidImage):
            fetch(host, url)
