"""Decoding text, several contexts in one batch; the contexts stay as they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bagel.engine.context import Context
from bagel.engine.layout import text_rows
from bagel.engine.noise import text_uniforms
from bagel.engine.sampling import Choice, choose, is_greedy
from bagel.engine.segments import Chain
from bagel.engine.slab import SharedSlab
from bagel.engine.text_graphs import DecodeGraphs, Fed, best
from bagel.errors import NotFinite
from bagel.model.bagel import Bagel
from bagel.model.tokenizer import BagelTokenizer
from bagel.request import TextSettings


@dataclass
class TextRun:
    """One text to decode after a context. tokens: the visible ids so far; error: why it failed, if it did."""

    context: Context
    settings: TextSettings
    seed: int
    tokens: list[int] = field(default_factory=list)
    finished: bool = False
    error: NotFinite | None = None


class TextBatch:
    """Texts being decoded together, one token each a step; they join and leave between steps.

    Each begins with a fresh <|im_start|>, as the reference does.
    """

    def __init__(self, model: Bagel, tokenizer: BagelTokenizer, space: SharedSlab) -> None:
        """space: where the K/V of the texts lie."""
        self.model, self.tokenizer, self._space = model, tokenizer, space
        self._entries: list[_Entry] = []
        # Made when first needed, as only a GPU captures.
        self._graphs: DecodeGraphs | None = None

    def __len__(self) -> int:
        return len(self._entries)

    @torch.inference_mode()
    def add(self, run: TextRun) -> None:
        """Let a text take part from the next step on."""
        # All of them now, by the text's own seed, so that the batch around it changes nothing.
        uniforms = text_uniforms(run.seed, run.settings.max_tokens).tolist()
        start = self._space.take(text_kv_tokens(run))
        try:
            run.context.copy_to(self._space.slab, start)
        except BaseException:
            self._space.give(start)
            raise
        self._entries.append(_Entry(run, start, uniforms))

    def has_room(self, run: TextRun) -> bool:
        """Whether a text can be added now; if not, it waits in line for room."""
        return self._space.has_room(("text", id(run)), [text_kv_tokens(run)])

    def remove(self, run: TextRun) -> None:
        """Let a text leave, or wait no more; nothing if it has left, as a finished one has."""
        self._space.withdraw(("text", id(run)))
        for entry in self._entries:
            if entry.run is run:
                self._space.give(entry.start)
                self._entries.remove(entry)
                return

    @torch.inference_mode()
    def step(self) -> list[tuple[TextRun, int]]:
        """One token of each text; the visible ones, with their texts. Finished texts leave.

        A text whose logits are not finite is finished too, with an error: the others go on.
        """
        entries = self._entries
        chosen = self._chosen()
        # All ranks go on with the same ids, whatever the last bit of their logits is. Contiguous, as NCCL wants it: a
        # graph of more texts than there are gives a part of its tensor.
        chosen = self.model.groups.world.share(chosen.contiguous())
        # Ids and checks in one transfer, as each makes the host wait for the device.
        tokens, finite = chosen.tolist()
        for entry, ok in zip(entries, finite, strict=True):
            if not ok:
                entry.run.error = NotFinite("the text overflowed: its logits are not finite; use float32")
                entry.run.finished = True
        shown = [
            (entry.run, token)
            for entry, token in zip(entries, tokens, strict=True)
            if not entry.run.finished and self._take(entry.run, token)
        ]
        # A list first, as `remove` changes the batch.
        for run in [entry.run for entry in entries if entry.run.finished]:
            self.remove(run)
        return shown

    def _chosen(self) -> Tensor:
        """The next ids of all texts, and whether their logits are finite: [2, texts] int64."""
        logits, chosen = self._forward()
        settings = [entry.run.settings for entry in self._entries]
        # `best` has chosen for greedy texts.
        if all(is_greedy(each) for each in settings):
            return chosen
        choices = [_choice(entry) for entry in self._entries]
        penalised = any(each.repetition_penalty != 1.0 for each in settings)
        if self.model.language_model.backend.captures and not penalised:
            self._captured().sample(choices)
        else:
            chosen[0] = choose(logits, choices)
        return chosen

    def _forward(self) -> tuple[Tensor, Tensor]:
        """Feed each text's last token (the start token first); logits [texts, vocab] and `best` of them."""
        fed = [self._fed(entry) for entry in self._entries]
        captured = self.model.language_model.backend.captures
        return self._captured().forward(fed) if captured else self._eager(fed)

    def _fed(self, entry: _Entry) -> Fed:
        """What a text is fed next: its last token, or the start token."""
        written, context = len(entry.run.tokens), entry.run.context
        token = entry.run.tokens[-1] if written else self.tokenizer.bos
        return Fed(token, context.rope + written, entry.start + context.length + written, entry.start)

    def _eager(self, fed: Sequence[Fed]) -> tuple[Tensor, Tensor]:
        decoder = self.model.language_model
        starts, pasts = [each.start for each in fed], [each.slot - each.start for each in fed]
        rows = text_rows(decoder, starts, pasts, [each.position for each in fed], 1)
        tokens = torch.tensor([each.token for each in fed], device=self.model.device)
        hidden, _ = decoder(self.model.embed(tokens[:, None]), None, rows, self._space.slab)
        logits = decoder.logits(hidden[:, -1])
        return logits, best(logits)

    def _captured(self) -> DecodeGraphs:
        """The graphs of the slab."""
        if self._graphs is None:
            place = self._space.spare
            spare = Fed(self.tokenizer.bos, 0, place, place)
            self._graphs = DecodeGraphs(self.model, self._space.slab, spare)
        return self._graphs

    def _take(self, run: TextRun, token: int) -> bool:
        """Add a predicted token; False if it is one that ends the text."""
        if token == self.tokenizer.eos or token in run.settings.stop_token_ids:
            run.finished = True
            return False
        run.tokens.append(token)
        run.finished = len(run.tokens) == run.settings.max_tokens
        return True


@dataclass(frozen=True)
class _Entry:
    """A text of a batch: where its K/V begin, and its random numbers."""

    run: TextRun
    start: int
    uniforms: list[float]


def text_kv_tokens(run: TextRun) -> int:
    """The most tokens of K/V that a text takes."""
    return run.context.length + run.settings.max_tokens


def prompt_ids(chain: Chain) -> tuple[int, ...]:
    """Ids of all text of a chain."""
    return tuple(token for segment in chain.segments for token in segment.token_ids)


def _choice(entry: _Entry) -> Choice:
    """How a text's next token is chosen."""
    run = entry.run
    # Only a repetition penalty looks at what was seen.
    seen = (*prompt_ids(run.context.chain), *run.tokens) if run.settings.repetition_penalty != 1.0 else ()
    return Choice(run.settings, seen, entry.uniforms[len(run.tokens)])
