"""Every modality once, through the services: python -m examples.demo [FOLDER].

Starts Thinker, DiT and gateway with `bagel serve`, asks them with the commands that a user would type, and stops them.
Takes less than a minute on two cores with the tests' tiny model.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image, ImageDraw

MEANINGLESS = (
    "No BAGEL_MODEL is set, so this is the tests' tiny model. Its weights are random: the pictures are coloured noise\n"
    "and the words make no sense. BAGEL_MODEL=ByteDance-Seed/BAGEL-7B-MoT gives real ones (29 GB, needs a GPU)."
)


def main() -> int:
    """Run the demo and return the first exit code that is not 0, or 0."""
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description="Every modality of BAGEL once.")
    parser.add_argument("folder", nargs="?", default="demo-output", help="where the files go (default: demo-output)")
    folder = Path(parser.parse_args().folder)
    folder.mkdir(parents=True, exist_ok=True)
    if not os.environ.get("BAGEL_MODEL"):
        print(MEANINGLESS)
    started = time.perf_counter()
    with services(folder / "logs") as address:
        if not address:
            return 1
        scenes = demo_scenes(folder, draw_input(folder))
        for number, (title, arguments) in enumerate(scenes, 1):
            print(f"\n[{number}/{len(scenes)}] {title}", flush=True)
            if code := run(["--endpoint", address, *arguments], folder / f"answer-{number}.txt"):
                return code
    print(f"\nAll of it took {time.perf_counter() - started:.0f} s. Pictures and answers are in {folder}.")
    return 0


@contextmanager
def services(logs: Path) -> Iterator[str]:
    """All services of the deploy file that fits the model; the gateway's address, "" if they could not start."""
    arguments = ["--port", "0", "--log-dir", str(logs)]
    print(f"$ bagel serve {shlex.join(arguments)}", flush=True)
    command = [sys.executable, "-m", "bagel.cli", "serve", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, encoding="utf-8") as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.terminate()


def draw_input(folder: Path) -> Path:
    """A small picture of a house on a meadow, to be edited and described."""
    image = Image.new("RGB", (256, 256), "skyblue")
    canvas = ImageDraw.Draw(image)
    canvas.rectangle((0, 180, 256, 256), fill="forestgreen")
    canvas.rectangle((80, 120, 176, 200), fill="beige")
    canvas.polygon([(70, 120), (128, 70), (186, 120)], fill="firebrick")
    canvas.ellipse((200, 20, 236, 56), fill="gold")
    path = folder / "input.png"
    image.save(path)
    return path


def demo_scenes(folder: Path, image: Path) -> list[tuple[str, list[str]]]:
    """Titles, and the arguments of `bagel generate` for each: small sizes and few steps, so that a laptop can."""
    edit = ["--modality", "img2img", "--image-path", str(image), "--prompts", "make it winter", "--steps", "4"]
    describe = ["--modality", "img2text", "--image-path", str(image), "--prompts", "What is this?"]
    ask = ["--modality", "text2text", "--prompts", "Why is the sky blue?"]
    think = ["--prompts", "a castle at night", "--think", "--max-think-tokens", "20"]
    small = ["--height", "256", "--width", "256", "--steps", "10"]
    saved = ["--seed", "42", "--output", str(folder)]
    return [
        ("A picture from a text", ["--prompts", "a red cube on a wooden table", *small, *saved]),
        (f"An edit of {image}", [*edit, *saved]),
        (f"A question about {image}", [*describe, "--max-tokens", "20"]),
        ("A question", [*ask, "--max-tokens", "20"]),
        ("A picture that is thought about first", [*think, *small, *saved]),
    ]


def run(arguments: list[str], answer: Path) -> int:
    """Show a command, run it, say what it gave and where; its exit code. answer: the file for a text answer."""
    print(f"$ bagel generate {shlex.join(arguments)}", flush=True)
    command = [sys.executable, "-m", "bagel.cli", "generate", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, encoding="utf-8")
    if done.returncode == 0:
        made = done.stdout.strip()
        if "--output" in arguments:
            print(f"The picture: {made}", flush=True)
        else:
            answer.write_text(done.stdout, encoding="utf-8")
            print(f"The answer, in {answer}: {made}", flush=True)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
