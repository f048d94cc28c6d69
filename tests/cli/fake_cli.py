"""The command line with an engine that computes nothing, for tests that are not about the model.

`python -m tests.cli.fake_cli ARGS` runs `bagel ARGS` with it. The environment variable WAIT makes it hang: `load` and
`draw` sleep there, `torch` computes with torch instead of loading.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from itertools import product
from types import ModuleType
from typing import Any

from PIL import Image

from bagel.cli import main
from bagel.events import OnEvent, Result, StepDone, TextDelta
from bagel.request import Request

LOCAL = "bagel.engine.local"
THOUGHT = ("<think> a", " cube", " </think>")
ANSWER = ("It is", " red:\n", "quite.")
TIMINGS = {"context": 0.5, "text": 0.25, "denoise": 2.0, "decode": 1.0}
PROFILE = {"context": 0.5, "denoise 1-10": 1.5, "denoise 11-12": 1.0, "decode": 1.0}


class FakeEngine:
    """Returns a grey square for every picture and ANSWER for every text, and records the requests."""

    device, dtype, fingerprint = "cpu", "float32", bytes(16)

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.load_arguments: dict[str, Any] = {}

    def load(self, checkpoint: object, stage: object, **options: Any) -> FakeEngine:
        """In the place of bagel.engine.local.load."""
        self.load_arguments = {"checkpoint": checkpoint, "stage": stage, **options}
        _wait_if("load")
        while os.environ.get("WAIT") == "torch":
            _multiply()
        return self

    def generate(self, requests: Sequence[Request], on_event: OnEvent) -> list[Result]:
        """Events as a real engine has them: all texts, then the pictures, two drawn together at a time."""
        self.requests = list(requests)
        for index, request in enumerate(requests):
            picture = request.modality.makes_image
            for text in THOUGHT if picture and request.think else () if picture else ANSWER:
                on_event(TextDelta(index, text, think=picture))
        results = []
        for pack in (list(enumerate(requests))[at : at + 2] for at in range(0, len(requests), 2)):
            steps = requests[0].image.steps - 1 if requests[0].modality.makes_image else 0
            for step, (index, _) in product(range(1, steps + 1), pack):
                on_event(StepDone(index, step, steps))
                _wait_if("draw")
            for index, request in pack:
                results.append(_result(index, request))
                on_event(results[-1])
        return results


def _result(index: int, request: Request) -> Result:
    picture = request.modality.makes_image
    image = Image.new("RGB", (request.image.width or 64, request.image.height or 64), "grey") if picture else None
    text = "".join(THOUGHT if picture and request.think else () if picture else ANSWER)
    return Result(index, image, text, tuple(range(len(text.split()))), request.seed, TIMINGS, profile=PROFILE)


def _wait_if(place: str) -> None:
    if os.environ.get("WAIT") == place:
        time.sleep(60)


def _multiply() -> None:
    import torch

    torch.randn(100, 100) @ torch.randn(100, 100)


def fake_module(engine: FakeEngine) -> ModuleType:
    """What is imported for bagel.engine.local."""
    module = ModuleType(LOCAL)
    module.load = engine.load  # type: ignore[attr-defined]
    return module


if __name__ == "__main__":
    if os.environ.get("WAIT") == "torch":
        _multiply()  # the import takes longer than a test's --init-timeout
    sys.modules[LOCAL] = fake_module(FakeEngine())
    sys.exit(main())
