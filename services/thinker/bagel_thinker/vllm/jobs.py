"""The state of one reading in the vLLM engine: its chain, its text so far, and the segments it exports."""

from __future__ import annotations

from dataclasses import dataclass, field

from bagel.engine.context import Context
from bagel.engine.segments import Chain
from bagel.engine.text_scheduler import ContextDone, ContextRequest, TextWritten
from bagel.kv.segment import Claim
from bagel.model.tokenizer import BagelTokenizer, TextStream


@dataclass(eq=False)
class Filling:
    """A segment that a request writes to the store; it is claimed and pinned until no worker writes for the request.

    written: the (layer, rank) pairs that are written.
    """

    digest: bytes
    claim: Claim
    written: set[tuple[int, int]] = field(default_factory=set)


@dataclass(eq=False)
class Request:
    """One request to vLLM; `job` is None once its reading is no longer wanted.

    fresh: the segments that no earlier request has computed. begun: it has a token, so its prompt is computed;
    over: vLLM has ended it; ended_ranks: the ranks that have finished their copies for it.
    """

    name: str
    job: Job | None
    fresh: frozenset[bytes]
    fillings: dict[bytes, Filling]
    begun: bool = False
    over: bool = False
    ended_ranks: set[int] = field(default_factory=set)

    def filled(self, marks: int) -> bool:
        """Whether every segment has all its marks, one per layer and rank."""
        return all(len(each.written) == marks for each in self.fillings.values())

    def count(self, job: Job, cached: int, block: int) -> None:
        """Count the computed tokens of a chain: all of a new segment, and of a known one those that vLLM had evicted.

        cached: tokens of the prompt that vLLM's cache still had; block: tokens per block of that cache.
        """
        at = 0
        for segment in job.chain.segments:
            end = at + segment.length
            if segment.digest in self.fresh:
                job.reading.computed[segment.digest] = segment.length
            # vLLM caches whole blocks and always computes the last one again, so one block missing is no eviction.
            elif cached < end // block * block - block:
                job.reading.computed.setdefault(segment.digest, min(segment.length, end - cached))
            at = end


@dataclass(eq=False)
class Job:
    """A reading in progress. The text is appended to `chain` if the reading wants that."""

    reading: ContextRequest
    chain: Chain
    stream: TextStream
    tokens: list[int] = field(default_factory=list)
    written: bool = False
    request: Request | None = None

    @property
    def writes(self) -> bool:
        """Whether its current request writes text; the one that computes an appended text does not."""
        return self.reading.settings is not None and not self.written

    def stops(self, tokenizer: BagelTokenizer) -> list[int]:
        """The tokens that end its text."""
        assert self.reading.settings is not None
        return [tokenizer.eos, *self.reading.settings.stop_token_ids]

    def take(self, tokens: list[int], tokenizer: BagelTokenizer) -> None:
        """Add tokens to its text, and emit what can be shown of them."""
        stops = self.stops(tokenizer)
        for token in tokens:
            if token in stops:
                continue
            self.tokens.append(token)
            if text := self.stream.push(token):
                self.reading.emit(TextWritten(text, len(self.tokens)))

    def reply(self, tokenizer: BagelTokenizer) -> str:
        """The text so far, trimmed as the reference trims it."""
        return "" if self.reading.settings is None else tokenizer.reply([tokenizer.bos, *self.tokens])

    def result(self, tokenizer: BagelTokenizer) -> ContextDone:
        """The result of the request. Its context has no tensors, since the K/V are in the store."""
        reading = self.reading
        reply = self.reply(tokenizer)
        return ContextDone(Context(self.chain), reply, tuple(self.tokens), reading.computed, reading.layer_times)
