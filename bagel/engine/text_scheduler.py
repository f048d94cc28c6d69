"""Computing contexts and decoding text for many requests, fairly: a unit of one, then a token of every text."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from torch import Tensor

from bagel.checkpoint.limits import check_kv_room, check_positions
from bagel.engine.context import Context, ContextBuilder
from bagel.engine.loading import LoadedModel
from bagel.engine.segments import Chain, Segment
from bagel.engine.slab import SharedSlab
from bagel.engine.text import TextBatch, TextRun
from bagel.model.tokenizer import TextStream
from bagel.request import TextSettings


@dataclass(frozen=True)
class LayersComputed:
    """Layers of a segment are computed: k and v, each [layers, length, kv_heads, head_dim]."""

    segment: Segment
    layers: range
    k: Tensor
    v: Tensor


@dataclass(frozen=True)
class PromptComputed:
    """The context that the text continues is computed. computed: segments that no cache had, digest to length."""

    computed: Mapping[bytes, int]


@dataclass(frozen=True)
class TextWritten:
    """Some more text. tokens: those of the whole text so far."""

    text: str
    tokens: int


@dataclass(frozen=True)
class ChainExtended:
    """The text is complete and becomes the last segment of this longer chain, which is computed next."""

    chain: Chain


@dataclass(frozen=True)
class ContextDone:
    """A request is complete: its context (with the text appended, if asked for), its text and the visible ids.

    computed: segments that no cache had, digest to length; layer_times: when the layers of each of them were done, by
    time.monotonic.
    """

    context: Context
    text: str
    token_ids: tuple[int, ...]
    computed: Mapping[bytes, int] = field(default_factory=dict)
    layer_times: Mapping[bytes, Sequence[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class ContextFailed:
    """A request ended with an error."""

    error: Exception


ContextEvent = LayersComputed | PromptComputed | TextWritten | ChainExtended | ContextDone | ContextFailed


@dataclass(eq=False)
class ContextRequest:
    """One context to compute, perhaps with a text to decode after it.

    emit: receives each event, on the engine's thread; an error that it raises ends this request and no other.
    settings: how the text is decoded, None for no text. append: the text becomes the last segment of the context.
    with_kv: whether ContextDone has the context's K/V even if they were known; without it, they may only be cached.
    """

    chain: Chain
    seed: int
    emit: Callable[[ContextEvent], None]
    settings: TextSettings | None = None
    append: bool = False
    with_kv: bool = True
    computed: dict[bytes, int] = field(default_factory=dict, init=False)
    layer_times: dict[bytes, list[float]] = field(default_factory=dict, init=False)


@dataclass(eq=False)
class _Entry:
    """A request under way: the steps of its context, then its text."""

    request: ContextRequest
    steps: Generator[Segment, None, Context]
    run: TextRun | None = None
    stream: TextStream | None = None

    @property
    def writing(self) -> TextRun:
        assert self.run is not None
        return self.run


class TextScheduler:
    """Works through requests in small units: call `work` as long as there is something `busy`.

    A long text delays a short prompt by one token at most, a long prompt a text by one unit (an image, or a text).
    """

    def __init__(
        self,
        loaded: LoadedModel,
        builder: ContextBuilder,
        space: SharedSlab,
        *,
        max_num_seqs: int,
        on_write: Callable[[int, float], None] = lambda texts, seconds: None,
    ) -> None:
        """space: holds the K/V of texts, which wait for room there.

        max_num_seqs: texts decoded at once, further ones wait; on_write: called after each token of all texts with
        their number and the seconds that it took.
        """
        self.builder, self.max_num_seqs = builder, max_num_seqs
        self._loaded, self._tokenizer, self._space, self._on_write = loaded, loaded.tokenizer, space, on_write
        self.texts = TextBatch(loaded.model, loaded.tokenizer, space)
        """The texts that are decoded together."""
        self._building: deque[_Entry] = deque()
        self._waiting: deque[_Entry] = deque()
        self._writing: dict[int, _Entry] = {}

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self._building or self._waiting or self._writing)

    def add(self, request: ContextRequest) -> None:
        """Start a request; raises InvalidRequest if its text can never have room."""
        if request.settings is not None:
            needed = self._space.needed([request.chain.length + request.settings.max_tokens])
            check_kv_room(needed, self._space.size)
        self._building.append(_Entry(request, self._steps(request, request.chain)))

    def cancel(self, request: ContextRequest) -> None:
        """Drop a request without an event; nothing if it is over."""
        for entry in [entry for entry in self._entries() if entry.request is request]:
            self._drop(entry)

    def abandon(self, error: Exception) -> None:
        """End every request with the error, and give back the memory of their texts."""
        entries = self._entries()
        for entry in entries:
            self._drop(entry)
        self.texts = TextBatch(self._loaded.model, self._tokenizer, self._space)
        for entry in entries:
            with suppress(Exception):  # one receiver that fails must not keep the error from the others
                entry.request.emit(ContextFailed(error))

    def work(self) -> None:
        """Compute one unit of the request whose turn it is, then decode one token of every text.

        An error of one request ends that request alone; an exception from here concerns the engine as a whole.
        """
        if self._building:
            entry = self._building.popleft()
            with self._alone(entry):
                self._build(entry)
        while self._waiting and len(self.texts) < self.max_num_seqs and self.texts.has_room(self._waiting[0].writing):
            entry = self._waiting.popleft()
            with self._alone(entry):  # memory may run out
                self.texts.add(entry.writing)
                self._writing[id(entry.run)] = entry
        if len(self.texts):
            self._write()

    def _entries(self) -> list[_Entry]:
        return [*self._building, *self._waiting, *self._writing.values()]

    def _drop(self, entry: _Entry) -> None:
        for queue in (self._building, self._waiting):
            if entry in queue:  # the ValueError of a missing one would print its tensors (Python 3.12)
                queue.remove(entry)
        if entry.run is not None:
            self._writing.pop(id(entry.run), None)
            self.texts.remove(entry.run)

    @contextmanager
    def _alone(self, entry: _Entry) -> Iterator[None]:
        """An error of the block ends this request, and no other."""
        try:
            yield
        except Exception as error:
            self._drop(entry)
            entry.request.emit(ContextFailed(error))

    def _steps(self, request: ContextRequest, chain: Chain) -> Generator[Segment, None, Context]:
        def on_kv(segment: Segment, layers: range, k: Tensor, v: Tensor) -> None:
            request.computed[segment.digest] = segment.length
            request.layer_times.setdefault(segment.digest, []).extend([time.monotonic()] * len(layers))
            request.emit(LayersComputed(segment, layers, k, v))

        # A text that follows needs them in any case, but no text follows an appended one.
        follows = request.settings is not None and chain is request.chain
        return self.builder.steps(chain, on_kv, with_kv=request.with_kv or follows)

    def _build(self, entry: _Entry) -> None:
        try:
            next(entry.steps)
        except StopIteration as done:
            self._built(entry, done.value)
        else:
            # At the end of the queue, so that each request computes one unit a turn.
            self._building.append(entry)

    def _built(self, entry: _Entry, context: Context) -> None:
        request = entry.request
        if entry.run is not None or request.settings is None:
            self._done(entry, context)
            return
        request.emit(PromptComputed(dict(request.computed)))
        entry.run = TextRun(context, request.settings, request.seed)
        entry.stream = TextStream(self._tokenizer)
        self._waiting.append(entry)

    def _write(self) -> None:
        texts, began = len(self.texts), time.perf_counter()
        try:
            tokens = self.texts.step()
        except Exception as error:  # one forward for all: which text caused it cannot be known
            for entry in list(self._writing.values()):
                self._drop(entry)
                entry.request.emit(ContextFailed(error))
            return
        self._on_write(texts, time.perf_counter() - began)
        for run, token in tokens:
            entry = self._writing[id(run)]
            assert entry.stream is not None
            with self._alone(entry):
                self._emit_text(entry, entry.stream.push(token))
        for entry in [entry for entry in self._writing.values() if entry.writing.finished]:
            del self._writing[id(entry.run)]
            with self._alone(entry):
                self._written(entry)

    @staticmethod
    def _emit_text(entry: _Entry, text: str) -> None:
        # A token may complete no character.
        if text:
            entry.request.emit(TextWritten(text, len(entry.writing.tokens)))

    def _written(self, entry: _Entry) -> None:
        run, request = entry.writing, entry.request
        if run.error is not None:
            # `_alone` makes it this request's failure.
            raise run.error
        assert entry.stream is not None
        self._emit_text(entry, entry.stream.end())
        if not request.append:
            self._done(entry, run.context)
            return
        chain = self._loaded.planner.append_text(run.context.chain, self._reply(entry))
        # The text is encoded again, so only now is the length of its segment known.
        check_positions(chain.rope, 0, self._loaded.max_model_len)
        request.emit(ChainExtended(chain))
        entry.steps = self._steps(request, chain)
        self._building.append(entry)

    def _done(self, entry: _Entry, context: Context) -> None:
        tokens = tuple(entry.run.tokens) if entry.run else ()
        request = entry.request
        request.emit(ContextDone(context, self._reply(entry), tokens, request.computed, request.layer_times))

    def _reply(self, entry: _Entry) -> str:
        if entry.run is None:
            return ""
        return self._tokenizer.reply([self._tokenizer.bos, *entry.run.tokens])
