"""bagel.Omni and `bagel generate` through real services, in both topologies: they give what the engine gives."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import bagel
from bagel.cli import main
from bagel.client.batch import ask_of
from bagel.client.omni import describe
from bagel.deployment.deploy_file import shipped_deploy_config
from bagel.engine.local import BagelEngine
from bagel.errors import BagelError, ConfigError, InvalidRequest, NotSupported, SourceUnavailable
from bagel.events import Result, StepDone, TextDelta
from bagel.images import read_settings
from bagel.prompts import ImagePart, TextPart
from bagel.request import Modality, resolve
from bagel.rpc.transport import sync_channel
from bagel.v1 import thinker_pb2
from bagel.v1.thinker_pb2_grpc import ThinkerServiceStub
from tests.helpers import agree, request, sketch
from tests.shared import MODEL, Borrow

pytestmark = pytest.mark.slow  # each start of services takes seconds

SMALL = "--height 64 --width 96 --steps 4 --seed 3".split()


@pytest.fixture(params=["bagel", "bagel_single_stage"])
def omni(request: pytest.FixtureRequest, borrow: Borrow) -> bagel.Omni:
    return borrow(request.param).omni


def same(one: Result, other: Result) -> bool:
    pictures = one.image is other.image or (one.image and other.image and agree(one.image, other.image))
    return bool(pictures) and (one.index, one.text, one.token_ids) == (other.index, other.text, other.token_ids)


def test_every_modality_is_the_engines(omni: bagel.Omni, engine: BagelEngine) -> None:
    requests = [
        request("text2img"),
        request("text2img", "a tree", think=True),
        request("img2img", image=sketch(), height=64, width=64),
        request("img2text", max_tokens=5),
        request("text2text", max_tokens=5),
    ]
    served, expected = omni.generate(requests), engine.generate(requests)
    assert [same(*pair) for pair in zip(served, expected, strict=True)] == [True] * len(requests)


def test_several_images_are_one_context(omni: bagel.Omni) -> None:
    images = [sketch(), sketch(64, 64, "navy")]
    drawn: dict[str, Any] = {"height": 64, "width": 64, "steps": 3, "seed": 5}
    for modality, settings in (("img2img", drawn), ("img2text", {"max_tokens": 4, "seed": 5})):
        parts = [ImagePart(image, for_generation=modality == "img2img") for image in images]
        [result] = omni.generate("join them", modality=modality, image=images, **settings)
        whole = resolve(Modality(modality), (*parts, TextPart("join them")), settings)
        assert same(result, omni.generate(whole)[0])
        assert result.images == ([result.image] if modality == "img2img" else [])


def test_several_prompts_are_in_order(omni: bagel.Omni) -> None:
    events: list[object] = []
    prompts = ["one", "two", "three", "four"]
    results = omni.generate(prompts, seed=5, height=64, width=64, steps=3, on_event=events.append)
    assert [result.index for result in results] == [0, 1, 2, 3]
    assert {result.seed for result in results} == {5}
    [alone] = omni.generate("three", seed=5, height=64, width=64, steps=3)
    assert alone.image is not None and results[2].image is not None
    assert agree(alone.image, results[2].image)
    steps = [event for event in events if isinstance(event, StepDone)]
    assert [event.step for event in steps if event.index == 3] == [1, 2]


def test_stream_gives_text_as_it_comes(omni: bagel.Omni) -> None:
    *before, result = omni.stream("how many?", modality="text2text", max_tokens=6, seed=1)
    assert isinstance(result, Result)
    assert "".join(event.text for event in before if isinstance(event, TextDelta)) == result.text != ""


def test_stream_that_is_left_ends_the_request_and_the_next_works(omni: bagel.Omni) -> None:
    stream = omni.stream("a cube", height=512, width=512, steps=1000)
    assert any(isinstance(event, StepDone) for event in stream)
    stream.close()  # type: ignore[attr-defined]
    assert omni.generate("a cube", height=64, width=64, steps=3)[0].image is not None


def test_error_of_a_callback_ends_the_call(omni: bagel.Omni) -> None:
    def full(event: object) -> None:
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        omni.generate(["a", "b"], height=512, width=512, steps=1000, on_event=full)


def test_what_is_wrong_with_a_request_is_told(omni: bagel.Omni) -> None:
    with pytest.raises(InvalidRequest, match="steps is 1"):
        omni.generate("x", steps=1)
    with pytest.raises(InvalidRequest, match="needs an input image"):
        omni.generate("x", modality="img2img")
    with pytest.raises(InvalidRequest, match="'video'"):
        omni.generate("x", modality="video")
    with pytest.raises(InvalidRequest, match="no prompt"):
        omni.generate([])
    with pytest.raises(InvalidRequest, match="seed, steps has no effect on a Request"):
        omni.generate(request("text2img"), seed=1, steps=3)
    events: list[object] = []
    with pytest.raises(InvalidRequest, match="prompt takes") as caught:  # told before any is begun
        omni.generate(["x", "y", "far too long " * 20_000, "z"], steps=2, height=64, width=64, on_event=events.append)
    assert (caught.value.field, caught.value.index, events) == ("prompt", 2, [])
    with pytest.raises(InvalidRequest, match="height is 1040"):  # which the gateway knows
        omni.generate("x", height=1040)


def test_command_at_an_endpoint(
    omni: bagel.Omni, tmp_path: Path, engine: BagelEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    there = ["generate", "--endpoint", omni.address]
    assert main([*there, "--prompts", "a red cube", "--output", str(tmp_path), *SMALL, "--log-stats"]) == 0
    out, err = capsys.readouterr()
    path = Path(out.strip())
    [expected] = engine.generate([request("text2img", "a red cube", height=64, width=96, steps=4, seed=3)])
    assert expected.image is not None
    with Image.open(path) as picture:
        assert agree(picture, expected.image)
    settings = read_settings(path)
    assert (settings["seed"], settings["steps"], settings["dtype"]) == ("3", "4", "float32")
    assert settings["fingerprint"] == describe(omni.address).checkpoint_fingerprint.hex()
    assert "is done" in err
    assert main([*there, "--modality", "text2text", "--prompts", "a", "b", "c", "--max-tokens", "3"]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [answer["prompt"] for answer in answers] == ["a", "b", "c"]
    assert main([*there, "--prompts", "x", "--height", "1040"]) == 2
    assert "height is 1040" in capsys.readouterr().err


def test_engine_is_the_keywords_and_a_service_that_died_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BAGEL_ENGINE", "vllm")
    with bagel.Omni(MODEL, deploy_config=shipped_deploy_config("bagel"), device="cpu", engine="torch") as omni:
        thinker = omni._engine.deployment.services[0]
        with sync_channel(thinker.address(0)) as channel:
            told = ThinkerServiceStub(channel).Describe(thinker_pb2.ThinkerServiceDescribeRequest())
        assert told.engine == "torch"
        thinker.process.kill()
        with pytest.raises(BagelError, match=f"{re.escape(thinker.title)} was killed by SIGKILL"):
            omni.generate("x", height=64, width=64, steps=3)


def test_nobody_at_the_endpoint(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--endpoint", "127.0.0.1:1", "--prompts", "x"]) == 1
    assert "no gateway answers at 127.0.0.1:1: nothing listens there; start one" in capsys.readouterr().err
    with pytest.raises(SourceUnavailable):
        describe("127.0.0.1:1", timeout_s=2)


def test_what_is_not_built_is_refused_before_anything_starts() -> None:
    with pytest.raises(NotSupported, match="pipeline_parallel_size is 2, which is not built yet"):
        bagel.Omni(MODEL, pipeline_parallel_size=2)
    with pytest.raises(BagelError, match="nonsense is not a known setting"):
        bagel.Omni(MODEL, nonsense=1)


def test_keywords_of_vllm_omni_are_taken_or_told() -> None:
    with pytest.raises(ConfigError, match="no stage_configs_path: give deploy_config; no stage_init_"):
        bagel.Omni(MODEL, stage_configs_path="x.yaml", stage_init_timeout=3)
    with pytest.raises(ConfigError, match="worker_backend is 'mp'; it must be one of process, ray"):
        bagel.Omni(MODEL, worker_backend="mp")
    with pytest.raises(ConfigError, match="ray_address is 'a:1', with process as worker backend; it must be ray"):
        bagel.Omni(MODEL, ray_address="a:1")
    with pytest.raises(ConfigError, match="it must be HOST:PORT as"):
        bagel.Omni(MODEL, worker_backend="ray", ray_address="ray://a:10001")


def test_request_is_sent_with_every_setting() -> None:
    ask = ask_of(request("img2img", "snow", steps=9, posterior="mean"))
    assert (ask["modality"], ask["steps"], ask["posterior"]) == ("img2img", 9, "mean")
    image, text = list(ask["prompt"])
    assert isinstance(image, ImagePart) and text == TextPart("snow")
    assert ask["cfg_img_scale"] == 1.5
    assert Modality(ask["modality"]).reads_image


def test_command_with_services_of_its_own(
    tmp_path: Path, engine: BagelEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    """With bagel_think.yaml, which inherits bagel.yaml, a picture is thought about without --think."""
    deploy = str(shipped_deploy_config("bagel_think"))
    where = ["--model", str(MODEL), "--deploy-config", deploy, "--device", "cpu", "--output", str(tmp_path)]
    assert main(["generate", *where, "--prompts", "a cube", *SMALL, "--max-think-tokens", "6"]) == 0
    out, err = capsys.readouterr()
    assert "thinker-0 is ready at 127.0.0.1:" in err
    assert "stage 1: tensor_parallel_size 1" in err
    options: dict[str, Any] = {"height": 64, "width": 96, "steps": 4, "think": True, "max_think_tokens": 6}
    [expected] = engine.generate([request("text2img", "a cube", seed=3, **options)])
    assert expected.image is not None
    with Image.open(out.strip()) as picture:
        assert agree(picture, expected.image)
    settings = read_settings(Path(out.strip()))
    assert (settings["think"], settings["think_text"], settings["model"]) == ("true", expected.text, MODEL.name)
