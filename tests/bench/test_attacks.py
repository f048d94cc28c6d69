"""The bench of attacks attacks: each kind reaches a gateway, and says what came of it."""

from __future__ import annotations

import asyncio
import io
from dataclasses import replace

import pytest
from PIL import Image

from bagel.errors import ConfigError
from bench import attack_grpc, attack_http, attacks
from bench.attack_files import deep_json, large_png, many_values, scans_jpeg
from tests.gateway_stages import deployment

LIMIT_S = 60


def test_the_files_are_what_they_are_called() -> None:
    picture = Image.open(io.BytesIO(large_png(64)))
    picture.load()
    assert picture.size == (64, 64)
    scans = scans_jpeg(64, 30)
    assert scans.count(b"\xff\xda") > 30
    Image.open(io.BytesIO(scans)).load()
    assert many_values(300).count(b"{}") == 101 and deep_json(20).count(b"[") == 10


@pytest.mark.slow
def test_attacks_reach_a_gateway_and_are_refused_there() -> None:
    async def run() -> None:
        async with asyncio.timeout(LIMIT_S), deployment(http="127.0.0.1:0") as made:
            assert made.gateway.rest is not None
            target = attack_http.Target(made.target, made.gateway.rest.address, 1.0)
            taken = await attack_http.huge_length(target)
            assert int(taken.partition(" ")[0]) < 32, taken
            for seconds in (1.0, 5.0, 20.0):  # a busy machine may not get round to all streams in a second
                told = await attack_grpc.watches(replace(target, seconds=seconds))
                if "RESOURCE_EXHAUSTED" in told:
                    break
            assert "RESOURCE_EXHAUSTED" in told

    asyncio.run(run())


def test_an_attack_that_there_is_not_is_told_with_those_that_there_are() -> None:
    with pytest.raises(ConfigError, match="20-digit Content-Length"):
        next(attacks.run("nothing of that name"))
