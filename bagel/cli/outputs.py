"""What the user gets: pictures as files with what made them inside, their paths and answers on stdout."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from PIL.Image import Image

from bagel.cli.progress import Progress
from bagel.errors import InvalidRequest
from bagel.events import Result, ServiceEvent, StepDone, TextDelta
from bagel.images import free_path, picture_name, save_png, write_error
from bagel.picture_settings import picture_settings
from bagel.prompts import prompt_text
from bagel.request import Request, with_settings


class Output:
    """Called with each event of a run: writes what is finished, shows the rest as progress.

    engine: what the pictures' text chunks say of it (model, fingerprint, dtype). folder is None for answers.
    """

    def __init__(
        self, requests: Sequence[Request], folder: Path | None, engine: Mapping[str, str], progress: Progress
    ) -> None:
        self._requests, self._folder, self._engine, self._progress = requests, folder, engine, progress
        self._answers: dict[int, Result] = {}
        self._written = 0

    def __call__(self, event: ServiceEvent) -> None:
        """Handle one event; raises InvalidRequest if a picture cannot be written."""
        match event:
            case TextDelta(think=True):
                self._progress.think(event)
            case TextDelta():
                if len(self._requests) == 1:
                    write_out(event.text)
            case StepDone():
                self._progress.step(event)
            case Result():
                self._finish(event)

    def _finish(self, result: Result) -> None:
        # What the user left open, a gateway has filled in, or drawn.
        request = replace(with_settings(self._requests[result.index], result.settings), seed=result.seed)
        if result.image is not None and self._folder is not None:
            with self._progress.finish(result):
                path = save_picture(self._folder, result.image, _settings(request, result, self._engine))
                write_out(f"{path}\n")
        elif len(self._requests) == 1:
            write_out("\n")  # the text itself has been written as it came
        else:
            # Kept until the answers before it are written.
            self._answers[result.index] = result
            while (answer := self._answers.pop(self._written, None)) is not None:  # in the prompts' order
                write_answer(prompt_text(self._requests[self._written].prompt), answer)
                self._written += 1


def make_folder(path: str) -> Path:
    """The folder for pictures, created if missing; InvalidRequest if nothing can be written into it."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # tried, as permissions alone do not tell (root, read-only mounts)
            pass
    except OSError as error:
        if folder.is_file():
            why = f"--output {path!r} cannot be written: it is a file; choose another folder"
            raise InvalidRequest("output", why) from None
        raise write_error(f"--output {path!r} cannot be written", error) from None
    return folder


def save_picture(folder: Path, image: Image, settings: Mapping[str, str]) -> Path:
    """Write a picture under a name of its own, with what made it in its text chunks."""
    path = free_path(folder, picture_name(settings["prompt"], int(settings["seed"])))
    save_png(image, path, settings)
    return path


def _settings(request: Request, result: Result, engine: Mapping[str, str]) -> dict[str, str]:
    assert result.image is not None
    # The size as drawn: the request may have left it open, or it was rounded to the grid.
    image = replace(request.image, width=result.image.width, height=result.image.height)
    return picture_settings(replace(request, image=image), result.text, engine)


def write_out(text: str) -> None:
    """Put text on stdout now: a reader of a pipe sees it as it comes."""
    sys.stdout.write(text)
    sys.stdout.flush()


def write_answer(prompt: str, result: Result) -> None:
    """One of several answers on stdout, as one line of JSON: answers may hold line breaks and colons themselves."""
    line = {"prompt": prompt, "answer": result.text, "seed": result.seed}
    write_out(json.dumps(line, ensure_ascii=False) + "\n")
