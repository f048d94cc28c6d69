"""The tables of --log-stats and of the profiler: what a user reads off them, and that they are true."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import bagel
from bagel.cli import main
from bagel.client.stats import Firsts, stats_table
from bagel.engine.local import BagelEngine
from bagel.events import Accepted, Result, StepDone, TextDelta
from bagel.telemetry.stages import window_stages
from tests.helpers import request
from tests.shared import Borrow

SERVED = {"queue": 0.1, "context": 0.2, "text": 0.5, "transfer": 0.3, "denoise": 2.0, "decode": 0.4, "total": 3.5}


def result(index: int = 0, *, factor: float = 1.0, image: bool = True) -> Result:
    """Of a picture that a gateway gave."""
    timings = {stage: factor * seconds for stage, seconds in SERVED.items()}
    usage = {"steps": 20, "pulled_bytes": 3 << 20, "kv_reused_bytes": 1 << 19}
    picture = Image.new("RGB", (64, 64)) if image else None
    return Result(index, picture, "", (1, 2, 3, 4, 5), 7, timings, usage)


def columns(table: str) -> dict[str, list[str]]:
    """Cells by title, with every column's cells below each other."""
    head, *rows = table.splitlines()
    titles = [(match[0], match.end()) for match in re.finditer(r"\S+(?: \S+)*", head)]
    starts = [0, *(end for _, end in titles[:-1])]
    ends = [*(end for _, end in titles[:-1]), None]
    return {
        title: [row[start:end].strip() for row in rows]
        for (title, _), start, end in zip(titles, starts, ends, strict=True)
    }


def test_every_stage_of_a_served_request_has_its_figure() -> None:
    table = columns(stats_table([request("text2img", "a tree")], [result()], Firsts({0: 0.25}, {0: 1.125})))
    assert {title: cells[0] for title, cells in table.items()} == {
        "request": "1", "queue s": "0.100", "prefill s": "0.200", "K/V s": "0.300", "pulled MiB": "3.00",
        "reused MiB": "0.50", "tokens": "5", "tokens/s": "10.0", "first text s": "0.250", "first step s": "1.125",
        "steps": "20", "ms/step": "100.0", "VAE s": "0.400", "total s": "3.500", "prompt": "a tree",
    }  # fmt: skip


def test_several_requests_have_mean_and_percentiles() -> None:
    results = [result(index, factor=factor) for index, factor in enumerate((1, 2, 3, 10))]
    table = columns(stats_table([request("text2img")] * 4, results, Firsts()))
    assert table["request"] == ["1", "2", "3", "4", "mean", "p50", "p99"]
    assert table["total s"][4:] == ["14.000", "8.750", "34.265"]
    assert "first text s" not in table


def test_what_a_request_has_not_is_no_zero() -> None:
    mixed = [request("text2img"), request("text2text")]
    table = columns(stats_table(mixed, [result(0), result(1, image=False)], Firsts({}, {0: 1.0})))
    assert table["steps"] == ["20", "-", "20", "20", "20"]
    assert table["first step s"][:2] == ["1.000", "-"]


def test_firsts_count_from_when_a_request_was_accepted() -> None:
    now = iter([10.0, 12.0, 13.0, 14.0, 15.5, 20.0])
    firsts = Firsts(clock=lambda: next(now))
    firsts(Accepted(0, "a", 1, "bagel"))
    firsts(TextDelta(0, "a", think=True))
    firsts(TextDelta(0, "b", think=True))
    firsts(StepDone(0, 1, 4))
    firsts(StepDone(1, 1, 4))  # of an engine in this process, which accepts nothing
    assert (firsts.text, firsts.step) == ({0: 1.0}, {0: 3.5, 1: 10.0})


def test_windows_are_of_ten_steps_and_the_rest() -> None:
    assert window_stages(12, [1.0, 0.5]) == {"denoise 1-10": 1.0, "denoise 11-12": 0.5}
    assert window_stages(10, [1.0]) == {"denoise 1-10": 1.0}


def test_profiled_stages_are_those_of_the_run(checkpoint: bagel.checkpoint.files.Checkpoint) -> None:
    engine = BagelEngine.load(checkpoint, profile=True)
    asked = [request("text2img", steps=13), request("text2img", "a tree", steps=13, think=True)]
    for done in engine.generate(asked):
        denoise = [seconds for stage, seconds in done.profile.items() if stage.startswith("denoise")]
        assert [stage for stage in done.profile if stage not in ("context", "text")] == [
            "denoise 1-10", "denoise 11-12", "decode"
        ]  # fmt: skip
        assert all(seconds > 0 for seconds in denoise)
    assert "text" in done.profile


def test_an_engine_profiles_only_if_asked(engine: BagelEngine) -> None:
    assert engine.generate([request("text2img")])[0].profile == {}


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["bagel", "bagel_single_stage"])
def test_services_tell_both_tables(
    borrow: Borrow, topology: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    omni, two_stages = borrow(topology).omni, topology == "bagel"
    options: dict[str, Any] = {"steps": 13, "height": 64, "width": 64, "max_think_tokens": 6, "think": True}
    [drawn] = omni.generate("a red circle", seed=3, **options)
    assert list(drawn.profile) == [
        "context", "text", *(["transfer"] if two_stages else []), "denoise 1-10", "denoise 11-12", "decode"
    ]  # fmt: skip
    stats, profile = capsys.readouterr().err.split("picture", 1)
    table = columns(stats.rstrip("\n"))
    assert (table["steps"], table["tokens"], "K/V s" in table) == (["12"], ["6"], two_stages)
    assert all(float(table[title][0]) > 0 for title in ("prefill s", "first text s", "first step s", "VAE s"))
    assert [line.split()[2] for line in profile.splitlines()[1:]] == [stage.split()[0] for stage in drawn.profile]

    there = ["generate", "--endpoint", omni.address, "--output", str(tmp_path), "--height", "64", "--width", "64"]
    assert main([*there, "--prompts", "a red circle", "--steps", "4", "--log-stats"]) == 0
    err = capsys.readouterr().err
    table = columns(err[err.index("request ") :])
    assert table["steps"] == ["3"]
    if two_stages:
        assert float(table["reused MiB"][0]) + float(table["pulled MiB"][0]) > 0
