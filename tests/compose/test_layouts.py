"""The further compose files on a real engine: one stage, two hosts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from PIL import Image

from bagel.client import Client
from bagel.errors import RemoteError, Unauthenticated
from bagel.rpc.transport import Security
from tests.compose.stack import COMPOSE, DEPLOY, HERE, LIMIT_S, PICTURE, Stack, docker, drawn, until
from tests.helpers import agree

pytestmark = pytest.mark.compose


def test_a_single_stage_draws_without_a_thinker(expected: Image.Image) -> None:
    with Stack("bagel-test-single", [COMPOSE, DEPLOY / "compose.single-stage.yaml"]).up() as stack:
        assert stack.services() == {"dit", "gateway"}
        assert drawn(stack, expected)


def test_with_keys_those_who_have_one_are_served(tmp_path: Path, expected: Image.Image) -> None:
    key, line = subprocess.run(
        [sys.executable, "-m", "bagel.cli", "keys", "new", "alice"], check=True, capture_output=True, text=True
    ).stdout.split("\n")[:2]
    (tmp_path / "api-keys").write_text(line + "\n")
    tmp_path.chmod(0o755)
    files = [COMPOSE, DEPLOY / "compose.single-stage.yaml", DEPLOY / "compose.keys.yaml"]
    env = {"BAGEL_API_KEYS_FOLDER": str(tmp_path)}
    with Stack("bagel-test-keys", files, env).up() as stack:  # healthy: checks need no key
        address = stack.compose("port", "gateway", "50051")
        with Client(address, api_key=key) as alice:
            picture = alice.generate(**PICTURE, timeout=LIMIT_S).image
            assert picture is not None and agree(picture, expected)
        with Client(address) as stranger, pytest.raises(Unauthenticated):
            stranger.generate(**PICTURE, timeout=LIMIT_S)
        models = f"http://{stack.compose('port', 'gateway', '8000')}/v1/models"
        with urlopen(Request(models, headers={"Authorization": f"Bearer {key}"}), timeout=LIMIT_S) as answer:
            assert answer.status == 200
        with pytest.raises(HTTPError, match="401"):
            urlopen(models, timeout=LIMIT_S)
        (tmp_path / "api-keys").write_text("# nobody\n" + line.replace("alice", "bob").replace(line[-8:], "0" * 8))
        until(lambda: refused(address, key))  # revoked, nothing restarted


def refused(address: str, key: str) -> bool:
    """Whether the key opens nothing."""
    with Client(address, api_key=key) as client:
        try:
            client.generate(**PICTURE | {"steps": 2}, timeout=LIMIT_S)
        except Unauthenticated:
            return True
    return False


def test_two_hosts_on_two_networks_speak_mutual_tls(tmp_path: Path, expected: Image.Image) -> None:
    address, network = "10.231.78.5", "bagel-test-wan"
    ca = tmp_path / "tls"
    make = [sys.executable, str(DEPLOY / "dev-ca"), str(ca), f"thinker={address}", "dit", "gateway", "client"]
    subprocess.run([*make, "--uid", "10001"], check=True, timeout=LIMIT_S)
    files = [COMPOSE, DEPLOY / "compose.two-hosts.yaml", HERE / "wan.yaml"]
    env = {"BAGEL_TLS_FOLDER": str(ca), "BAGEL_THINKER_ADDRESS": f"{address}:50052", "BAGEL_THINKER_PORT": "0"}
    env |= {"WAN_THINKER": address, "WAN_NETWORK": network, "BAGEL_THINKER_BIND": "127.0.0.1"}
    client = Security(ca / "client.pem", ca / "client-key.pem", ca / "ca.pem")
    hosts = [Stack(f"bagel-test-{host}", files, env, f"{host}-host", client) for host in ("thinker", "dit")]
    docker("network", "create", "--internal", "--subnet", "10.231.78.0/24", network)
    try:
        with hosts[0].up() as thinker, hosts[1].up() as dit:
            assert (thinker.services(), dit.services()) == ({"thinker"}, {"dit", "gateway"})
            assert networks(thinker, "thinker") & networks(dit, "dit") == {network}
            assert drawn(dit, expected)
            stranger = Client(dit.compose("port", "gateway", "50051"), Security(ca=ca / "ca.pem"))
            with stranger, pytest.raises(RemoteError, match="UNAVAILABLE"):
                stranger.generate(**PICTURE, timeout=5)
    finally:
        docker("network", "rm", network)


def networks(stack: Stack, service: str) -> set[str]:
    return set(stack.inspect(service)["NetworkSettings"]["Networks"])
