"""Decoding text, several contexts in one batch; the contexts stay as they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from bagel.engine.context import Context
from bagel.engine.layout import text_rows
from bagel.engine.noise import text_uniforms
from bagel.engine.sampling import choose
from bagel.engine.segments import Chain
from bagel.errors import NotFinite
from bagel.model.attention import KvSlab
from bagel.model.bagel import Bagel
from bagel.model.tokenizer import BagelTokenizer
from bagel.request import TextSettings

OnToken = Callable[[int, int], None]
"""Called with (index of the run, visible token id)."""


@dataclass
class TextRun:
    """One text to decode after a context. tokens are the visible ids so far."""

    context: Context
    settings: TextSettings
    seed: int
    tokens: list[int] = field(default_factory=list)
    finished: bool = False


class TextDecoder:
    """Writes text after contexts, beginning with a fresh <|im_start|> as the reference does."""

    def __init__(self, model: Bagel, tokenizer: BagelTokenizer) -> None:
        self.model, self.tokenizer = model, tokenizer

    @torch.inference_mode()
    def decode(self, runs: Sequence[TextRun], on_token: OnToken | None = None) -> None:
        """Fill every run's tokens until its limit or a stop token, which is not kept."""
        device = self.model.device
        capacities = [run.context.length + run.settings.max_tokens for run in runs]
        starts = [sum(capacities[:i]) for i in range(len(runs))]
        slab = KvSlab(self.model.config.llm, sum(capacities), dtype=self.model.dtype, device=device)
        uniforms = [text_uniforms(run.seed, run.settings.max_tokens) for run in runs]
        for run, start in zip(runs, starts, strict=True):
            run.context.copy_to(slab, start)
        while active := [i for i, run in enumerate(runs) if not run.finished]:
            logits = self._forward([runs[i] for i in active], [starts[i] for i in active], slab)
            chosen = [
                choose(row, runs[i].settings, _seen(runs[i]), float(uniforms[i][len(runs[i].tokens)]))
                for i, row in zip(active, logits, strict=True)
            ]
            *tokens, finite = torch.stack([*chosen, logits.isfinite().all().long()]).tolist()
            if not finite:
                raise NotFinite("the text overflowed: its logits are not finite; use float32")
            for i, token in zip(active, tokens, strict=True):
                if self._take(runs[i], token) and on_token is not None:
                    on_token(i, token)

    def _forward(self, runs: Sequence[TextRun], starts: Sequence[int], slab: KvSlab) -> torch.Tensor:
        """Feed each run's last token (the start token first); logits [runs, vocab]."""
        last = [run.tokens[-1] if run.tokens else self.tokenizer.bos for run in runs]
        rows = text_rows(
            self.model.language_model,
            starts,
            [run.context.length + len(run.tokens) for run in runs],
            [run.context.rope + len(run.tokens) for run in runs],
            1,
        )
        embedded = self.model.embed(torch.tensor(last, device=self.model.device)[:, None])
        hidden, _ = self.model.language_model(embedded, None, rows, slab)
        return self.model.language_model.logits(hidden[:, -1])

    def _take(self, run: TextRun, token: int) -> bool:
        """Add a predicted token; False if it is one that ends the text."""
        if token == self.tokenizer.eos or token in run.settings.stop_token_ids:
            run.finished = True
            return False
        run.tokens.append(token)
        run.finished = len(run.tokens) == run.settings.max_tokens
        return True

    def reply(self, run: TextRun) -> str:
        """The text of a finished run."""
        return self.tokenizer.reply([self.tokenizer.bos, *run.tokens])


def prompt_ids(chain: Chain) -> tuple[int, ...]:
    """Ids of all text of a chain."""
    return tuple(token for segment in chain.segments for token in segment.token_ids)


def _seen(run: TextRun) -> Sequence[int]:
    """What the repetition penalty looks at; empty if there is none, which is the common case."""
    return (*prompt_ids(run.context.chain), *run.tokens) if run.settings.repetition_penalty != 1.0 else ()
