"""A picture, an edit of it, and a question about it, over gRPC.

bagel serve
python -m examples.sync_client 127.0.0.1:50051 pictures
"""

from __future__ import annotations

import sys
from pathlib import Path

from bagel.client import Client
from bagel.errors import Busy, InvalidRequest


def main(address: str, folder: Path) -> None:
    """Write pictures to the folder and answers to stdout."""
    folder.mkdir(parents=True, exist_ok=True)
    with Client(address) as client:
        drawn = client.generate("a large red circle", seed=7, steps=24)
        assert drawn.image is not None
        drawn.image.save(folder / "drawn.png")
        print(f"drawn with seed {drawn.seed} in {drawn.timings['total']:.1f} s")

        edited = client.generate("make the circle blue", modality="img2img", image=drawn.image, seed=7, steps=24)
        assert edited.image is not None
        edited.image.save(folder / "edited.png")

        answer = client.generate("describe the image", modality="img2text", image=edited.image)
        print("answer:", answer.text)

        # Sent together; the services work on both at once.
        pair = client.generate_many([{"prompt": f"a small {colour} star", "seed": 7} for colour in ("green", "yellow")])
        print("at once:", len(pair), "pictures;", pair[0].usage["reused_tokens"], "tokens were reused")

        try:  # one timestep is too few, so the gateway refuses it before any work
            client.generate("a large red circle", steps=1)
        except InvalidRequest as error:
            print(f"refused: {error.field}: {error}")
        except Busy as error:
            print(f"try again in {error.retry_after_s:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2] if len(sys.argv) > 2 else "pictures"))
