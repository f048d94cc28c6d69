"""Call a running gateway with every method of OpenAI's client that it supports.

bagel serve --http 127.0.0.1:8000
python -m examples.openai_client http://127.0.0.1:8000/v1 pictures
"""

from __future__ import annotations

import base64
import sys
from pathlib import Path

from openai import OpenAI

PROMPT, EDIT, QUESTION = "a large red circle", "make the circle blue", "describe the image"


def main(base_url: str, folder: Path) -> None:
    """Draw, edit, follow a picture, ask about it, and draw in a chat; writes pictures to the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    # The client insists on a key; a gateway without --api-keys ignores it.
    with OpenAI(base_url=base_url, api_key="none") as client:
        model = next(iter(client.models.list())).id
        print("model:", model)
        picture = draw(client, folder)
        edit_and_follow(client, folder, picture)
        chat(client, model, folder, picture)


def draw(client: OpenAI, folder: Path) -> bytes:
    """Draw two pictures; returns the first."""
    # extra_body carries settings that OpenAI's API does not have.
    drawn = client.images.generate(prompt=PROMPT, n=2, extra_body={"seed": 7, "num_inference_steps": 24})
    pictures = [base64.b64decode(item.b64_json or "") for item in drawn.data or ()]
    for number, picture in enumerate(pictures):
        (folder / f"drawn-{number}.png").write_bytes(picture)
    print("drawn:", drawn.size, drawn.usage)
    return pictures[0]


def edit_and_follow(client: OpenAI, folder: Path, picture: bytes) -> None:
    """Edit a picture, then follow another one from its previews to its end."""
    edited = client.images.edit(image=picture, prompt=EDIT, output_format="webp", extra_body={"seed": 7})
    (folder / "edited.webp").write_bytes(base64.b64decode((edited.data or [])[0].b64_json or ""))
    for event in client.images.generate(prompt=PROMPT, stream=True, partial_images=2, extra_body={"seed": 7}):
        name = f"{event.type}-{getattr(event, 'partial_image_index', 0)}.png"
        (folder / name).write_bytes(base64.b64decode(event.b64_json))
        print("stream:", event.type)


def chat(client: OpenAI, model: str, folder: Path, picture: bytes) -> None:
    """Ask about a picture in a chat, then draw one in a chat."""
    url = "data:image/png;base64," + base64.b64encode(picture).decode()
    chunks = client.chat.completions.create(
        model=model,
        messages=[
            {
                "role": "user",
                "content": [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTION}],
            }
        ],
        stream=True,
    )
    # The last chunk may have no choices: it carries the usage.
    print("answer:", "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices))
    drawn = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": PROMPT}],
        extra_body={"modalities": ["image"], "num_inference_steps": 24},
    )
    extra = drawn.choices[0].message.model_extra or {}  # images are not in OpenAI's chat API
    data = extra["images"][0]["image_url"]["url"].partition("base64,")[2]
    (folder / "from-a-chat.png").write_bytes(base64.b64decode(data))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2] if len(sys.argv) > 2 else "pictures"))
