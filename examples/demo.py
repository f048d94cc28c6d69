"""Show what the model can do, on one contact sheet: python -m examples.demo [FOLDER].

Starts Thinker, DiT and gateway with `bagel.Omni`, asks for pictures, edits, descriptions and pictures with think, and
writes a contact sheet. With bagel-nano it takes less than a minute on two cores.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from bagel import Omni
from bagel.arguments import OnceParser
from bagel.errors import BagelError
from examples.sheet import Card, contact_sheet

PICTURES = (
    "a large red circle to the left of a small blue square",
    "three yellow stars on a navy background",
    "a large purple heart on a beige background",
    "a green triangle above an orange diamond, black background",
)
EDITS = ("make the circle green", "add a small yellow star in the top right corner", "change the background to navy")
PLANNED = ("four small pink hearts on a black background", "a cyan cross below a large orange circle")
QUESTION = "how many objects are there?"


@dataclass(frozen=True)
class Step:
    """One part of the demo: its title and its cards."""

    title: str
    cards: tuple[Card, ...]


def main() -> int:
    """Run the demo; returns 0, or the exit code of the error that ended it."""
    parser = OnceParser(prog="python -m examples.demo", description="What the model can do, on one sheet.")
    parser.add_argument("folder", nargs="?", default="demo-output", help="where the files go (default: demo-output)")
    folder = Path(parser.parse_args().folder)
    folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    try:
        with Omni(logs=folder / "logs", on_ready=_say_ready) as omni:
            print(f"{omni.model} is served at {omni.address}", flush=True)
            steps = draw(omni, folder)
    except BagelError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    sheet = folder / "sheet.png"
    contact_sheet([(step.title, step.cards) for step in steps]).save(sheet)
    print(f"\nAll of it took {time.perf_counter() - started:.0f} s. The contact sheet: {sheet}")
    return 0


def draw(omni: Omni, folder: Path) -> list[Step]:
    """Run every part of the demo, and save each picture."""
    steps, pictures = [], []
    # All in one call, so that the services work on them together.
    for number, result in enumerate(omni.generate(PICTURES, seed=7), 1):
        pictures.append(_saved(result.image, folder / f"picture-{number}.png"))
    steps.append(_printed("Text to image", [Card((p,), t) for p, t in zip(pictures, PICTURES, strict=True)]))
    edited = []
    for number, text in enumerate(EDITS, 1):
        [result] = omni.generate(text, modality="img2img", image=pictures[0], seed=7)
        edited.append(Card((pictures[0], _saved(result.image, folder / f"edit-{number}.png")), text))
    steps.append(_printed("Edits, before and after", edited))
    described = []
    for picture in pictures:
        [text, answer] = (
            omni.generate(question, modality="img2text", image=picture)[0].text
            for question in ("describe the image", QUESTION)
        )
        described.append(Card((picture,), "describe the image", f"{text}\n\n{QUESTION}\n{answer}"))
    steps.append(_printed("Descriptions and answers", described))
    planned = []
    for number, result in enumerate(omni.generate(PLANNED, think=True, seed=7), 1):
        picture = _saved(result.image, folder / f"think-{number}.png")
        planned.append(Card((picture,), PLANNED[number - 1], result.text, beside=True))
    steps.append(_printed("Pictures that are thought about first", planned))
    return steps


def _printed(title: str, cards: list[Card]) -> Step:
    print(f"\n{title}", flush=True)
    for card in cards:
        print(f"  {card.title}" + (f" -> {' '.join(card.text.split())}" if card.text else ""), flush=True)
    return Step(title, tuple(cards))


def _saved(picture: Image.Image | None, path: Path) -> Image.Image:
    assert picture is not None
    picture.save(path)
    return picture


def _say_ready(name: str, address: str, seconds: float) -> None:
    print(f"{name} is ready at {address}, {seconds:.1f} s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
