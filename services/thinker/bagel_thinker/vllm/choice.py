"""The torch engine's rule for choosing tokens, carried in a vLLM request. Imports nothing of vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from bagel.engine.noise import text_uniforms
from bagel.engine.sampling import Choice
from bagel.request import TextSettings

KEY = "bagel_choice"


def choice(settings: TextSettings, seed: int, seen: Sequence[int]) -> dict[str, Any]:
    """The `extra_args` of a request that samples or penalises; empty for greedy text, which vLLM chooses itself.

    seen: the ids of the prompt's text, to which the repetition penalty applies.
    """
    if not settings.do_sample and settings.repetition_penalty == 1.0:
        return {}
    values = asdict(settings) | {"stop_token_ids": list(settings.stop_token_ids)}
    return {KEY: {"settings": values, "seed": seed, "seen": list(seen)}}


@dataclass
class Text:
    """A text whose tokens are chosen by the torch engine's rule.

    output: vLLM's list of its tokens. Only its length is used: on a GPU the host may not know the last token yet.
    chosen: the same tokens, as tensors on the device that chose them.
    """

    settings: TextSettings
    uniforms: list[float]
    seen: list[int]
    output: list[int]
    chosen: list[Tensor]

    @classmethod
    def of(cls, given: dict[str, Any], output: list[int]) -> Text:
        """Make a text from the values of `choice`."""
        values = given["settings"] | {"stop_token_ids": tuple(given["settings"]["stop_token_ids"])}
        settings = TextSettings(**values)
        uniforms = text_uniforms(given["seed"], settings.max_tokens).tolist()
        return cls(settings, uniforms, given["seen"], output, [torch.tensor(token) for token in output])

    @property
    def choice(self) -> Choice:
        """How the next token is chosen."""
        at = len(self.output)  # not a counter: a prompt that is split over steps asks several times for its first token
        penalised = self.settings.repetition_penalty != 1.0
        seen = [*self.seen, *(int(token) for token in self.chosen[:at])] if penalised else ()
        return Choice(self.settings, seen, self.uniforms[at])

    def take(self, token: Tensor) -> None:
        """The next token is this one (0-d)."""
        self.chosen[len(self.output) :] = [token]
