"""The first image of a context, encoded by the VAE while it is still hashed, and resized for the ViT."""

from __future__ import annotations

from concurrent.futures import Future
from types import TracebackType
from typing import Self

from PIL.Image import Image

from bagel_thinker.engine import Engine


class HeadStart:
    """Lets an engine encode what a context will begin with. Leaving the block drops what is not begun yet.

    Errors are not told here, as the whole context meets the same.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._begun: Future[None] | None = None

    def begin(self, image: Image) -> None:
        """Encode an image; from any thread. Only the first call does, as an image may be read twice."""
        if self._begun is None:
            self._begun = self._engine.encode_ahead(image)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._begun is not None:
            self._begun.cancel()
