"""`python -m bagel.images.worker FD` reads image files for a pool, one at a time, until its input ends.

Files come by standard input, pixels go to the file of descriptor FD (`bagel.images.pixels_file`), and what is to be
said of them goes to standard output.

It loads nothing but Pillow, limits its memory and lowers its priority. A timer ends it if an image takes too long, even
when the pool's process has been killed in the meantime.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import warnings
from typing import IO, Any

from bagel.errors import InvalidImage
from bagel.freed_memory import reuse_freed_memory
from bagel.images import frames, pixels_file
from bagel.images.reading import image_size, load_image
from bagel.images.transforms import ImageTransform, encoder_images, resize

MEMORY_BYTES = 4 * 2**30
"""Limit of the address space: several times what the decoding of 64 megapixels takes."""
NICENESS = 10
LATE_S = 5.0
"""Seconds after the pool's own limit, at which the pool should have killed the worker."""


def main() -> None:
    """Answer every frame of standard input on standard output."""
    pixels = int(sys.argv[1])
    for name in (signal.SIGINT, signal.SIGTERM):  # meant for the pool's process; its end closes our input
        signal.signal(name, signal.SIG_IGN)
    os.nice(NICENESS)
    for pipe in (0, 1):
        frames.widen(pipe)
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    bound = MEMORY_BYTES if most == resource.RLIM_INFINITY else min(MEMORY_BYTES, most)
    resource.setrlimit(resource.RLIMIT_AS, (bound, most))
    reuse_freed_memory()  # an image takes some mebibytes several times over
    warnings.simplefilter("ignore")  # Pillow warns of odd metadata
    answers: IO[bytes] = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # a library that prints must not break the frames
    while (frame := frames.read(sys.stdin.buffer)) is not None:
        _answer(answers, pixels, *frame)
        del frame  # frees its bytes while the worker waits for the next one


def _answer(answers: IO[bytes], pixels: int, fields: dict[str, Any], data: bytes) -> None:
    signal.setitimer(signal.ITIMER_REAL, fields["seconds"] + LATE_S)  # SIGALRM ends the process
    try:
        if fields["work"] == "size":
            answer: dict[str, Any] = {"size": image_size(data)}
        else:
            answer = _resized(answers, pixels, fields, data)
    except InvalidImage as error:
        answer = {"refused": str(error)}
    signal.setitimer(signal.ITIMER_REAL, 0)
    frames.write(answers, answer)


def _resized(answers: IO[bytes], pixels: int, fields: dict[str, Any], data: bytes) -> dict[str, Any]:
    """Decode and resize an image, and give the pixels for the VAE, then those for the ViT; the last answer.

    Each at once: the VAE's work, which takes longer, need not wait until the ViT's pixels are resized.
    """
    image = load_image(data)
    vae_transform, vit_transform = (ImageTransform(*fields[name]) for name in ("vae_transform", "vit_transform"))
    first, at = resize(image, vae_transform), 0
    facts = {"size": image.size, "resized": first.size}
    purposes = {name: fields[name] for name in ("for_generation", "for_understanding")}
    for name, part in encoder_images(first, vae_transform, vit_transform, **purposes):
        made = part.tobytes()
        pixels_file.write(pixels, made, at)
        frames.write(answers, {"part": name, "image": part.size})
        at += len(made)
    return facts


if __name__ == "__main__":
    main()
