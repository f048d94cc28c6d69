"""What the vLLM engine knows of one reading: its chain, its text so far, and the segments it fills."""

from __future__ import annotations

from dataclasses import dataclass, field

from bagel.engine.context import Context
from bagel.engine.segments import Chain
from bagel.engine.text_scheduler import Reading, Written
from bagel.model.tokenizer import BagelTokenizer, TextStream


@dataclass(eq=False)
class Filling:
    """A segment that a request fills in the store: claimed and pinned until all workers are done with the request.

    told: (layer, rank) pairs that are written.
    """

    digest: bytes
    told: set[tuple[int, int]] = field(default_factory=set)


@dataclass(eq=False)
class Request:
    """One request at vLLM; `job` is None once its reading is no longer wanted.

    fresh: segments that this request is the first to compute. begun: it has a token, so its prompt
    is computed; over: vLLM has ended it; quiet: ranks that write nothing more for it.
    """

    name: str
    job: Job | None
    fresh: frozenset[bytes]
    fillings: dict[bytes, Filling]
    begun: bool = False
    over: bool = False
    quiet: set[int] = field(default_factory=set)

    def filled(self, marks: int) -> bool:
        """Whether every segment has all its marks: layers times ranks."""
        return all(len(each.told) == marks for each in self.fillings.values())


@dataclass(eq=False)
class Job:
    """A reading on its way. chain grows by the text where that is to be appended; writes: the request writes text."""

    reading: Reading
    chain: Chain
    stream: TextStream
    tokens: list[int] = field(default_factory=list)
    written: bool = False
    request: Request | None = None

    @property
    def writes(self) -> bool:
        return self.reading.settings is not None and not self.written

    def reply(self, tokenizer: BagelTokenizer) -> str:
        """The text so far, as the reference reads it."""
        return "" if self.reading.settings is None else tokenizer.reply([tokenizer.bos, *self.tokens])

    def result(self, tokenizer: BagelTokenizer) -> Written:
        """What the reading came to; its K/V are in the store, not here."""
        return Written(Context(self.chain), self.reply(tokenizer), tuple(self.tokens))
