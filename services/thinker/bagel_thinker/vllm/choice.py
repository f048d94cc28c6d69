"""The exact engine's choice of tokens, as a vLLM request carries it. Nothing of vLLM here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from bagel.engine.noise import text_uniforms
from bagel.engine.sampling import choose
from bagel.request import TextSettings

KEY = "bagel_choice"


def choice(settings: TextSettings, seed: int, seen: Sequence[int]) -> dict[str, Any]:
    """`extra_args` of a request whose tokens are not simply the likeliest; empty for greedy text.

    seen: the prompt's text, which the repetition penalty looks at.
    """
    if not settings.do_sample and settings.repetition_penalty == 1.0:
        return {}
    values = asdict(settings) | {"stop_token_ids": list(settings.stop_token_ids)}
    return {KEY: {"settings": values, "seed": seed, "seen": list(seen)}}


@dataclass
class Text:
    """A text that chooses by our rule.

    output: vLLM's own list of its tokens, of which only the length is relied on: on a GPU the last of them may not be
    known there yet. chosen: the same tokens, known where they were chosen.
    """

    settings: TextSettings
    uniforms: list[float]
    seen: list[int]
    output: list[int]
    chosen: list[Tensor]

    @classmethod
    def of(cls, given: dict[str, Any], output: list[int]) -> Text:
        """From what `choice` made."""
        values = given["settings"] | {"stop_token_ids": tuple(given["settings"]["stop_token_ids"])}
        settings = TextSettings(**values)
        uniforms = text_uniforms(given["seed"], settings.max_tokens).tolist()
        return cls(settings, uniforms, given["seen"], output, [torch.tensor(token) for token in output])

    def next(self, logits: Tensor) -> Tensor:
        """The next token from logits [vocab]. A prompt that is split over steps asks several times for its first."""
        at = len(self.output)
        penalised = self.settings.repetition_penalty != 1.0
        seen = [*self.seen, *(int(token) for token in self.chosen[:at])] if penalised else ()
        token = choose(logits, self.settings, seen, self.uniforms[at])
        self.chosen[at:] = [token]
        return token
