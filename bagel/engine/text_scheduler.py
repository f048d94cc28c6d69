"""Reading prompts and writing text for many requests, fairly: a segment of one, then a token of every text."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from bagel.checkpoint.limits import check_positions
from bagel.engine.context import Context, ContextBuilder, OnKv
from bagel.engine.segments import Chain, ChainPlanner, Segment
from bagel.engine.slab import SharedSlab
from bagel.engine.text import TextBatch, TextRun
from bagel.model.bagel import Bagel
from bagel.model.tokenizer import BagelTokenizer, TextStream
from bagel.request import TextSettings

OnWrite = Callable[[int, float], None]
"""Called with (texts, seconds)."""


@dataclass(frozen=True)
class Written:
    """What a reading came to: its context (with the text appended, if it was to be), the text, its visible ids."""

    context: Context
    text: str
    token_ids: tuple[int, ...]


@dataclass(eq=False)
class Reading:
    """One context to build, perhaps with a text to write after it, and who is told of it.

    settings: how the text is decoded, None for none; on_read hears that the context which it goes on from is computed;
    append: the text becomes the last segment of the context, and on_chain hears of the longer chain before it is
    computed. computed, kv_times: for whoever sets on_kv, the
    segments (digest and length) that it saw and when it was called.
    """

    chain: Chain
    seed: int
    on_done: Callable[[Written], None]
    on_error: Callable[[Exception], None]
    settings: TextSettings | None = None
    append: bool = False
    on_read: Callable[[], None] = lambda: None
    on_text: Callable[[str], None] = lambda text: None
    on_chain: Callable[[Chain], None] = lambda chain: None
    on_kv: OnKv | None = None
    computed: dict[bytes, int] = field(default_factory=dict)
    kv_times: list[float] = field(default_factory=list)
    _steps: Generator[Segment, None, Context] | None = field(default=None, init=False)
    _run: TextRun | None = field(default=None, init=False)
    _stream: TextStream | None = field(default=None, init=False)


class Reader:
    """Works through readings in small units; `work` does one and is called as long as there is `busy`.

    A long text holds up a short prompt by one token at most, a long prompt a text by one segment.
    """

    def __init__(
        self,
        model: Bagel,
        tokenizer: BagelTokenizer,
        planner: ChainPlanner,
        builder: ContextBuilder,
        *,
        max_num_seqs: int,
        max_model_len: int,
        on_write: OnWrite = lambda texts, seconds: None,
        space: SharedSlab | None = None,
    ) -> None:
        """max_num_seqs: texts written at once, further ones wait; max_model_len: positions of prompt and text.

        on_write hears of every token written: of how many texts, and the seconds that it took. space: where the K/V
        of texts go, which wait for room there; else one that grows.
        """
        self.tokenizer, self.planner, self.builder = tokenizer, planner, builder
        self.max_num_seqs, self.max_model_len, self._on_write = max_num_seqs, max_model_len, on_write
        self._model = model
        self._space = space
        self._texts = TextBatch(model, tokenizer, space=space)
        self._building: deque[Reading] = deque()
        self._waiting: deque[tuple[Reading, TextRun]] = deque()
        self._writing: dict[int, Reading] = {}

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self._building or self._waiting or self._writing)

    def add(self, reading: Reading) -> None:
        """Take a reading on."""
        reading._steps = self.builder.steps(reading.chain, reading.on_kv)
        self._building.append(reading)

    def cancel(self, reading: Reading) -> None:
        """Drop a reading; nobody is told. Nothing if it is over."""
        if reading in self._building:
            self._building.remove(reading)
        self._waiting = deque(entry for entry in self._waiting if entry[0] is not reading)
        if reading._run is not None:
            self._writing.pop(id(reading._run), None)
            self._texts.remove(reading._run)

    def abandon(self, error: Exception) -> None:
        """Drop every reading, tell each of the error, and give the memory of their texts back."""
        readings = [*self._building, *(reading for reading, _ in self._waiting), *self._writing.values()]
        for reading in readings:
            if reading._run is not None:
                self._texts.remove(reading._run)
        for queue in (self._building, self._waiting, self._writing):
            queue.clear()
        self._texts = TextBatch(self._model, self.tokenizer, space=self._space)
        for reading in readings:
            with suppress(Exception):  # a listener that fails must not keep it from the others
                reading.on_error(error)

    def work(self) -> None:
        """One segment of the reading whose turn it is, then one token of every text.

        What goes wrong with one reading ends that one; an exception from here is about the engine as a whole.
        """
        if self._building:
            reading = self._building.popleft()
            with self._alone(reading):
                self._build(reading)
        while self._waiting and len(self._texts) < self.max_num_seqs and self._texts.has_room(self._waiting[0][1]):
            reading, run = self._waiting.popleft()
            with self._alone(reading):  # its K/V may find no room
                self._texts.add(run)
                self._writing[id(run)] = reading
        if len(self._texts):
            self._write()

    @contextmanager
    def _alone(self, reading: Reading) -> Iterator[None]:
        """What the block fails with ends this reading, and no other."""
        try:
            yield
        except Exception as error:
            self.cancel(reading)
            reading.on_error(error)

    def _build(self, reading: Reading) -> None:
        assert reading._steps is not None
        try:
            next(reading._steps)
        except StopIteration as done:
            self._built(reading, done.value)
        else:
            self._building.append(reading)

    def _built(self, reading: Reading, context: Context) -> None:
        if reading._run is not None or reading.settings is None:
            self._done(reading, context)
            return
        reading.on_read()
        reading._run = TextRun(context, reading.settings, reading.seed)
        reading._stream = TextStream(self.tokenizer)
        self._waiting.append((reading, reading._run))

    def _write(self) -> None:
        texts, began = len(self._texts), time.perf_counter()
        try:
            shown = self._texts.step()
        except Exception as error:  # one forward for all: which text it was cannot be told
            for reading in list(self._writing.values()):
                self.cancel(reading)
                reading.on_error(error)
            return
        self._on_write(texts, time.perf_counter() - began)
        for run, token in shown:
            reading = self._writing[id(run)]
            assert reading._stream is not None
            with self._alone(reading):
                if text := reading._stream.push(token):
                    reading.on_text(text)
        for run_id, reading in list(self._writing.items()):
            if reading._run is not None and reading._run.finished:
                del self._writing[run_id]
                with self._alone(reading):
                    if reading._run.error is not None:
                        raise reading._run.error
                    self._written(reading)

    def _written(self, reading: Reading) -> None:
        assert reading._run is not None and reading._stream is not None
        if text := reading._stream.end():
            reading.on_text(text)
        if not reading.append:
            self._done(reading, reading._run.context)
            return
        chain = self.planner.append_text(reading._run.context.chain, self._reply(reading))
        check_positions(chain.rope, 0, self.max_model_len)
        reading.on_chain(chain)
        reading._steps = self.builder.steps(chain, reading.on_kv)
        self._building.append(reading)

    def _done(self, reading: Reading, context: Context) -> None:
        tokens = tuple(reading._run.tokens) if reading._run else ()
        reading.on_done(Written(context, self._reply(reading), tokens))

    def _reply(self, reading: Reading) -> str:
        if reading._run is None:
            return ""
        return self.tokenizer.reply([self.tokenizer.bos, *reading._run.tokens])
