"""`python -m bagel.images.worker`: reads image files for a pool, one at a time, until its input ends.

It holds nothing but Pillow, may take only so much memory, gives way to the services beside it, and ends itself if an
image takes longer than its time: also if the pool's process has been killed meanwhile.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import warnings
from typing import IO, Any

from PIL import Image

from bagel.errors import InvalidImage
from bagel.images import frames
from bagel.images.reading import image_size, load_image
from bagel.images.transforms import ImageTransform, prepare

MEMORY_BYTES = 4 * 2**30
"""Of address space: several times what 64 megapixels take on their way to RGB."""
NICENESS = 10
LATE_S = 5.0
"""Beyond the pool's own limit, at which it kills the worker."""


def main() -> None:
    """Answer every frame of standard input on standard output."""
    for name in (signal.SIGINT, signal.SIGTERM):  # those are for the pool's process, at whose end the input ends
        signal.signal(name, signal.SIG_IGN)
    os.nice(NICENESS)
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    bound = MEMORY_BYTES if most == resource.RLIM_INFINITY else min(MEMORY_BYTES, most)
    resource.setrlimit(resource.RLIMIT_AS, (bound, most))
    warnings.simplefilter("ignore")  # of odd metadata
    answers: IO[bytes] = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    while (asked := frames.read(sys.stdin.buffer)) is not None:
        _answer(answers, *asked)
        del asked  # before the next one comes


def _answer(answers: IO[bytes], fields: dict[str, Any], data: bytes) -> None:
    signal.setitimer(signal.ITIMER_REAL, fields["seconds"] + LATE_S)  # whose signal ends the process
    try:
        told, pieces = _describe(data) if fields["work"] == "size" else _resized(fields, data)
    except InvalidImage as error:
        told, pieces = {"refused": str(error)}, []
    signal.setitimer(signal.ITIMER_REAL, 0)
    frames.write(answers, told, *pieces)


def _describe(data: bytes) -> tuple[dict[str, Any], list[bytes]]:
    return {"size": image_size(data)}, []


def _resized(fields: dict[str, Any], data: bytes) -> tuple[dict[str, Any], list[bytes]]:
    """The image decoded and resized; what was decoded is let go at once."""
    image = load_image(data)
    size = image.size
    prepared = prepare(
        image,
        ImageTransform(*fields["vae_transform"]),
        ImageTransform(*fields["vit_transform"]),
        for_generation=fields["for_generation"],
        for_understanding=fields["for_understanding"],
    )
    made = {"vae": prepared.vae, "vit": prepared.vit}
    sizes = {name: None if image is None else image.size for name, image in made.items()}
    return {"size": size, "resized": prepared.size, **sizes}, [_pixels(image) for image in made.values() if image]


def _pixels(image: Image.Image) -> bytes:
    return image.tobytes()


if __name__ == "__main__":
    main()
