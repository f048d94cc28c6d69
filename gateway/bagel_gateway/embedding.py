"""Put the settings of a request into the file of its picture, as the gateway's --picture-settings says."""

from __future__ import annotations

from collections.abc import Callable

from bagel.deployment.defaults import model_label
from bagel.images import embed
from bagel.picture_settings import picture_settings, without_texts
from bagel_gateway.planning import Plan
from bagel_gateway.routes.base import Event


def embedding(planned: Plan, how: str) -> Callable[[Event], None]:
    """Takes the events of one request in their order, and changes the picture among them.

    how: full, no-prompt or none. A DiT does not know the prompt, so this is done here.
    """
    if how == "none":
        return lambda event: None
    thought: list[str] = []

    def take(event: Event) -> None:
        if event.HasField("text"):
            thought.append(event.text.text)
        elif event.HasField("picture"):
            model = planned.model
            about = {"model": model_label(model.name), "fingerprint": model.checkpoint_fingerprint.hex()}
            settings = picture_settings(planned.request, "".join(thought), {**about, "dtype": model.dtype})
            event.picture.data = embed(event.picture.data, settings if how == "full" else without_texts(settings))

    return take
