"""What a run makes of its flags, with an engine that computes nothing: requests, files, answers, notes, tables."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from bagel.cli import main
from bagel.errors import InvalidRequest
from bagel.images import read_settings
from bagel.prompts import ImagePart, TextPart
from bagel.request import Modality, PosteriorMode, RenormType
from tests.cli.fake_cli import ANSWER, LOCAL, THOUGHT, FakeEngine, fake_module
from tests.conftest import GOLDEN

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    """The engine that commands in this process get; the present folder is empty but for an image, in.png."""
    fake = FakeEngine()
    monkeypatch.setitem(sys.modules, LOCAL, fake_module(fake))
    monkeypatch.setenv("BAGEL_MODEL", str(GOLDEN / "checkpoint"))
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (30, 20), "red").save("in.png")
    return fake


def generate(*arguments: str) -> None:
    assert main(["generate", *arguments]) == 0


def test_flags_reach_the_request(engine: FakeEngine) -> None:
    picture = "--steps 9 --height 128 --width 96 --cfg-text-scale 3 --cfg-img-scale 1.2 --cfg-interval 0.1 0.9"
    more = "--cfg-renorm-type channel --cfg-renorm-min 0.5 --timestep-shift 2 --posterior mean --seed 11"
    text = "--think --max-think-tokens 77 --do-sample --text-temperature 0.7 --top-p 0.8 --top-k 5"
    words = ["--prompts", "snow", "--negative-prompt", "rain", "--repetition-penalty", "1.2"]
    generate("--modality", "img2img", "--image-path", "in.png", *f"{picture} {more} {text}".split(), *words)
    (request,) = engine.requests
    image, writing = request.image, request.text
    assert (image.steps, image.height, image.width, image.timestep_shift) == (9, 128, 96, 2.0)
    assert (image.cfg_text_scale, image.cfg_img_scale, image.cfg_interval) == (3.0, 1.2, (0.1, 0.9))
    assert (image.cfg_renorm_type, image.cfg_renorm_min) == (RenormType.CHANNEL, 0.5)
    assert (request.seed, request.posterior, request.negative_prompt) == (11, PosteriorMode.MEAN, "rain")
    assert (request.think, request.max_think_tokens) == (True, 77)
    assert (writing.do_sample, writing.temperature, writing.top_p, writing.top_k) == (True, 0.7, 0.8, 5)
    assert writing.repetition_penalty == 1.2


@pytest.mark.parametrize(("modality", "for_generation"), [("img2img", True), ("img2text", False)])
def test_image_goes_before_the_text(engine: FakeEngine, modality: str, for_generation: bool) -> None:
    generate("--modality", modality, "--image-path", "in.png", "--prompts", "snow")
    image, text = engine.requests[0].prompt
    assert isinstance(image, ImagePart)
    assert (image.for_generation, image.for_understanding) == (for_generation, True)
    assert image.image.size == (30, 20)
    assert text == TextPart("snow")


def test_prompts_of_flags_and_file_together(engine: FakeEngine) -> None:
    Path("prompts.txt").write_bytes("\ufeffün café\r\n\r\n  two words \nthree\u2028lines".encode())
    generate("--modality", "text2text", "--prompts", "a", "b", "--txt-prompts", "prompts.txt", "--prompts", "c")
    texts = [part.text for request in engine.requests for part in request.prompt if isinstance(part, TextPart)]
    assert texts == ["a", "b", "c", "ün café", "two words", "three\u2028lines"]


def test_seed_is_every_prompts_or_drawn_for_each(engine: FakeEngine) -> None:
    generate("--prompts", "a", "b", "--seed", "5")
    assert [request.seed for request in engine.requests] == [5, 5]
    generate("--prompts", "a", "b")
    assert len({request.seed for request in engine.requests}) == 2


def test_user_then_deploy_file_then_table(engine: FakeEngine) -> None:
    defaults = "default_sampling_params: {temperature: 0.9, max_tokens: 12, seed: 52}"
    Path("d.yaml").write_text(f"pipeline: bagel_single_stage\nstages: [{{stage_id: 0, {defaults}}}]\n")
    generate("--modality", "text2text", "--prompts", "a", "--deploy-config", "d.yaml", "--max-tokens", "7")
    request = engine.requests[0]
    assert (request.text.max_tokens, request.text.temperature, request.text.top_p) == (7, 0.9, 1.0)
    assert request.seed == 52


def test_deploy_stage_device_and_dtype_reach_the_engine(engine: FakeEngine, capsys: Captured) -> None:
    stage = "stage_id: 0, devices: '2', max_num_seqs: 4, max_model_len: 99, vae_use_tiling: true, enforce_eager: true"
    more = "attention_backend: sdpa, enable_prefix_caching: true"
    Path("d.yaml").write_text(f"pipeline: bagel_single_stage\nstages: [{{{stage}, {more}}}]\n")
    generate("--prompts", "a", "--deploy-config", "d.yaml", "--device", "cuda:1", "--dtype", "bfloat16")
    asked = engine.load_arguments
    assert (asked["device"], asked["dtype"]) == ("cuda:1", "bfloat16")
    seen = asked["stage"]
    assert (seen.device_ids, seen.max_num_seqs, seen.max_model_len, seen.tiling) == ((2,), 4, 99, True)
    assert (seen.enforce_eager, seen.attention_backend) == (True, "sdpa")
    err = capsys.readouterr().err
    assert err.count("only for vLLM: enable_prefix_caching") == 1
    assert "vae_use_tiling true, device cpu, dtype float32" in err


def test_what_only_the_model_could_refuse_is_refused_before_it_is_loaded(engine: FakeEngine, capsys: Captured) -> None:
    assert main(["generate", "--modality", "text2text", "--prompts", "a", "--max-tokens", "9999999"]) == 2
    assert "lower --max-tokens" in capsys.readouterr().err
    assert engine.load_arguments == {}


@pytest.mark.usefixtures("engine")
def test_deploy_settings_without_effect_are_noted(capsys: Captured) -> None:
    defaults = "default_sampling_params: {temperature: 0.9, top_k: 3}"
    Path("d.yaml").write_text(f"pipeline: bagel_single_stage\nstages: [{{stage_id: 0, devices: '7', {defaults}}}]\n")
    generate("--modality", "text2text", "--prompts", "a", "--deploy-config", "d.yaml")
    err = capsys.readouterr().err
    assert "no effect on this request: temperature, top_k of the deploy file" in err
    assert "devices '7' has no effect on a CPU" in err


@pytest.mark.usefixtures("engine")
def test_a_blank_model_in_the_environment_is_none(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BAGEL_MODEL", " ")
    generate("--modality", "text2text", "--prompts", "a")
    assert "no --model given" in capsys.readouterr().err


@pytest.mark.usefixtures("engine")
def test_picture_is_saved_with_what_made_it(capsys: Captured) -> None:
    arguments = "--seed 4 --think --height 32 --width 48 --cfg-text-scale 2".split()
    generate("--prompts", "A red cube!", "--negative-prompt", "blue", "--output", "new/folder", *arguments)
    out, err = capsys.readouterr()
    path = Path("new/folder/a-red-cube_seed4.png")
    assert out == f"{path}\n"
    expected = {
        "prompt": "A red cube!",
        "negative_prompt": "blue",
        "seed": "4",
        "modality": "text2img",
        "steps": "50",
        "cfg_text_scale": "2.0",
        "cfg_img_scale": "1.0",
        "cfg_interval": "0.4 1.0",
        "cfg_renorm_type": "global",
        "cfg_renorm_min": "0.0",
        "height": "32",
        "width": "48",
        "think": "true",
        "think_text": "".join(THOUGHT),
        "model": "checkpoint",  # the folder's name: no path of the machine
        "dtype": "float32",
    }
    settings = read_settings(path)
    assert expected.items() <= settings.items()
    assert len(settings["fingerprint"]) == 32
    assert settings["bagel_version"]
    assert "".join(THOUGHT) + "\n" in err
    assert "bagel: picture 1 of 1, 'A red cube!' is done, 3.8 s\n" in err


@pytest.mark.usefixtures("engine")
def test_same_name_is_never_overwritten(capsys: Captured) -> None:
    generate("--prompts", "cube", "cube", "--seed", "4")
    generate("--prompts", "cube", "--seed", "4")
    assert capsys.readouterr().out.split() == ["cube_seed4.png", "cube_seed4-2.png", "cube_seed4-3.png"]


@pytest.mark.usefixtures("engine")
def test_think_texts_of_several_prompts_are_told_apart(capsys: Captured) -> None:
    generate("--prompts", "one", "two", "--think")
    lines = capsys.readouterr().err.splitlines()
    thought = "".join(THOUGHT)
    assert lines.index(f"picture 1 of 2, 'one': {thought}") < lines.index(f"picture 2 of 2, 'two': {thought}")


@pytest.mark.usefixtures("engine")
def test_single_answer_is_the_text_alone(capsys: Captured) -> None:
    generate("--modality", "text2text", "--prompts", "what?")
    assert capsys.readouterr().out == "".join(ANSWER) + "\n"


@pytest.mark.usefixtures("engine")
def test_several_answers_are_json_lines(capsys: Captured) -> None:
    generate("--modality", "text2text", "--prompts", "é: what?", "two\nlines", "--seed", "3")
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    answer = "".join(ANSWER)
    assert lines == [{"prompt": prompt, "answer": answer, "seed": 3} for prompt in ("é: what?", "two\nlines")]


NOTES = [
    ("text2text", "--enable-diffusion-pipeline-profiler", "text answer: --enable-diffusion-pipeline-profiler"),
    ("text2img", "--batch-timeout 9", "in one process, where no request is queued: --batch-timeout"),
]


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize(("modality", "flags", "note"), NOTES)
def test_flags_of_the_deployment_without_effect_are_noted(
    modality: str, flags: str, note: str, capsys: Captured
) -> None:
    generate("--modality", modality, "--prompts", "a", *flags.split())
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("bagel: note: ")]
    assert len(notes) == 1
    assert note in notes[0]


REFUSED = [
    ("text2text", "--steps 9 --height 64", "--steps has no effect on a text answer"),
    ("text2text", "--output x", "--output has no effect on a text answer"),
    ("text2img", "--max-tokens 9 --think", "--max-tokens has no effect on a picture"),
    ("text2img", "--posterior mean", "--posterior has no effect where no image is edited"),
    ("text2img", "--do-sample --top-k 3", "--top-k has no effect on a picture without think"),
    (
        "text2img",
        "--think --text-temperature 0.5",
        "--text-temperature has no effect without sampling; leave it out, or",
    ),
    ("text2text", "--text-temperature 0 --do-sample --top-p 0.5", "--top-p has no effect at temperature 0"),
    ("text2text", "--max-tokens 9 --max-think-tokens 9", "--max-think-tokens has no effect on an answer"),
    ("text2img", "--cfg-text-scale 1 --cfg-renorm-min 1", "--cfg-renorm-min has no effect without guidance"),
    ("text2img", "--cfg-interval 0.95 0.99 --steps 4", "--cfg-interval has no effect as it holds no timestep"),
]


@pytest.mark.parametrize(("modality", "flags", "said"), REFUSED)
def test_flags_without_effect_are_refused(
    modality: str, flags: str, said: str, engine: FakeEngine, capsys: Captured
) -> None:
    assert main(["generate", "--modality", modality, "--prompts", "a", *flags.split()]) == 2
    assert said in capsys.readouterr().err
    assert engine.load_arguments == {}
    assert not Path("x").exists()


EFFECTIVE = [
    ("text2img", "--steps 9 --height 64 --negative-prompt b --output x --cfg-img-scale 2"),
    ("text2img", "--cfg-text-scale 1.5 --negative-prompt b --cfg-renorm-min 1"),
    ("text2img", "--think --do-sample --top-k 3 --max-think-tokens 5"),
    ("text2text", "--max-think-tokens 9"),
    ("text2text", "--max-tokens 9 --max-think-tokens 9 --think --do-sample --text-temperature 1"),
]


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize(("modality", "flags"), EFFECTIVE)
def test_flags_with_effect_are_not_noted(modality: str, flags: str, capsys: Captured) -> None:
    generate("--modality", modality, "--prompts", "a", *flags.split())
    assert "note" not in capsys.readouterr().err


@pytest.mark.usefixtures("engine")
def test_tables(capsys: Captured) -> None:
    generate("--prompts", "a", "b", "--steps", "7", "--think", "--log-stats", "--enable-diffusion-pipeline-profiler")
    cells = [line.split() for line in capsys.readouterr().err.splitlines()]
    (first,) = [row for row in cells if row[:1] == ["1"] and row[-1] == "a"]
    assert (first[1:4], first[6:]) == (["0.500", "4", "16.0"], ["6", "333.3", "1.000", "3.750", "a"])
    assert ["mean", "0.500", "4", "16.0"] in [row[:4] for row in cells]
    assert ["2", "64x64", "denoise", "1-10", "1.500", "150.0", "38%"] in cells
    assert ["2", "64x64", "decode", "1.000", "-", "25%"] in cells


@pytest.mark.usefixtures("engine")
def test_default_model_says_what_it_is(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    monkeypatch.delenv("BAGEL_MODEL")
    generate("--prompts", "a")
    assert (
        capsys.readouterr()
        .err.splitlines()[0]
        .endswith("using bagel-nano, a small model that knows coloured shapes on plain backgrounds")
    )
    generate("--prompts", "a", "--model", str(GOLDEN / "checkpoint"))
    assert "bagel-nano" not in capsys.readouterr().err


def test_img2img_defaults_are_an_edits(engine: FakeEngine) -> None:
    generate("--modality", "img2img", "--image-path", "in.png", "--prompts", "snow")
    image = engine.requests[0].image
    assert engine.requests[0].modality is Modality.IMG2IMG
    assert (image.cfg_img_scale, image.cfg_interval, image.cfg_renorm_type) == (1.5, (0.0, 1.0), "text_channel")


@pytest.mark.usefixtures("engine")
def test_a_prompt_that_the_model_refuses_is_named(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise InvalidRequest("prompt", "the prompt takes 9002 positions", index=2)

    monkeypatch.setattr(FakeEngine, "generate", refuse)
    Path("prompts.txt").write_text("one\n\ntwo\n")
    assert main(["generate", "--prompts", "zero", "--txt-prompts", "prompts.txt"]) == 2
    assert "line 3 of 'prompts.txt': the prompt takes 9002 positions" in capsys.readouterr().err
