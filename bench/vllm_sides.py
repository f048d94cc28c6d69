"""The two engines that `python -m bench.vllm_gpu` measures: the Thinker's core on vLLM, and vLLM's own Qwen2.

Both have BAGEL's shape and random weights, and take requests in the same way.
"""

from __future__ import annotations

import json
import os
import random
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from threading import Condition
from typing import Any

from PIL import Image

from bagel.checkpoint.config import BAGEL_7B_MOT, ModelConfig
from bagel.engine.noise import Posterior
from bagel.engine.segments import Chain, Segment
from bagel.kv.digests import DIGEST_BYTES, SegmentKind
from bagel.kv.pages import KvLayout
from bagel.kv.store import KvStore
from bagel.request import PosteriorMode
from bagel_thinker.vllm.core import Core
from bagel_thinker.vllm.requests import Placeholders, segment_starts
from bagel_thinker.vllm.settings import VllmSettings, hf_config
from bagel_thinker.vllm.sink import Notice, Sink
from bench.models import TINY

AT_ONCE = 64
REPEATS = 5
PROMPT, REPLY = 64, 256
LENGTHS = (64, 1024, 9000)
LANDING_S = 60.0
"""Until the K/V of an edit must be in the store."""
IDS = Placeholders(151652, 151653, 151645, 151644)


class Side(ABC):
    """One of the two engines to measure, with a common way to add requests."""

    def __init__(self, tiny: bool, ranks: int, memory: Mapping[str, Any]) -> None:
        self.tiny, self.words = tiny, random.Random(1)
        self.config: ModelConfig = replace(TINY, max_latent_size=8) if tiny else BAGEL_7B_MOT
        self.ids = Placeholders(1, 2, 3, 4) if tiny else IDS
        self.settings = VllmSettings(
            device="cpu" if tiny else "cuda",
            dtype="float32" if tiny else "bfloat16",
            max_num_seqs=AT_ONCE,
            max_model_len=16_384,
            max_num_batched_tokens=16_384,
            load_format="dummy",
            tensor_parallel_size=ranks,
            **{"gpu_memory_utilization": 0.85, **memory},
        )
        self.count = 0

    def text(self, length: int) -> list[int]:
        """Random ids, none of which is a control token."""
        return [self.words.randrange(10, min(self.config.llm.vocab_size, 150_000)) for _ in range(length)]

    def name(self) -> str:
        self.count += 1
        return f"b{self.count}"

    @abstractmethod
    def add(self, ids: list[int], tokens: int) -> None:
        """Start to write `tokens` tokens after a text."""

    @abstractmethod
    def step(self) -> list[Any]:
        """Run one step; returns the outputs of requests that got a token."""

    @abstractmethod
    def busy(self) -> bool:
        """Whether any request is in progress."""


class Plain(Side):
    """vLLM's own Qwen2."""

    def __init__(self, tiny: bool, ranks: int, memory: Mapping[str, Any]) -> None:
        super().__init__(tiny, ranks, memory)
        from bagel_thinker.vllm import core

        # The same environment as the Thinker's core, so that only the engines differ.
        for name, value in core._ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.core_client import InprocClient
        from vllm.v1.executor.abstract import Executor

        given = self.settings
        # The Thinker's own language model, as vLLM's Qwen2 takes it.
        shape = hf_config(self.config, given, self.ids)["llm_config"]
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(shape))
            more = {"block_size": 32, "enforce_eager": True} if tiny else {}
            config = EngineArgs(
                model=folder,
                skip_tokenizer_init=True,
                load_format="dummy",
                dtype=given.dtype,
                max_model_len=given.max_model_len,
                max_num_seqs=AT_ONCE + 16,
                max_num_batched_tokens=given.max_num_batched_tokens,
                gpu_memory_utilization=given.gpu_memory_utilization,
                kv_cache_memory_bytes=given.kv_cache_memory_bytes,
                generation_config="vllm",
                tensor_parallel_size=ranks,
                kernel_config={"enable_jit_warmup": False},  # as on our side: of speculative decoding alone
                disable_log_stats=True,
                **more,
            ).create_engine_config()
            self.client: Any = InprocClient(config, Executor.get_class(config), log_stats=False)

    def add(self, ids: list[int], tokens: int) -> None:
        from vllm import SamplingParams
        from vllm.v1.engine import EngineCoreRequest

        greedy = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        self.client.add_request(EngineCoreRequest(self.name(), ids, None, greedy, None, time.time(), None, None, None))

    def step(self) -> list[Any]:
        outputs: list[Any] = self.client.get_output().outputs
        return outputs

    def busy(self) -> bool:
        return bool(self.client.engine_core.scheduler.has_requests())


class Ours(Side):
    """The Thinker's core, its store and its sink."""

    def __init__(self, tiny: bool, ranks: int, memory: Mapping[str, Any]) -> None:
        super().__init__(tiny, ranks, memory)
        llm = self.config.llm
        layout = KvLayout(llm.num_hidden_layers, llm.num_key_value_heads, llm.head_dim, self.settings.dtype)
        self.store = KvStore(layout, b"bench", 2**31 if not tiny else 2**26)
        self.landed: dict[str, list[float]] = {}
        self._landing = Condition()
        self.sink = Sink(self.store.arena, layout, self.on_notice)
        folder = Path(tempfile.mkdtemp())
        (folder / "config.json").write_text("{}")
        given = self.sink.open(other_processes=ranks > 1)
        self.core = Core(self.config, self.settings, self.ids, folder, given)

    def on_notice(self, notice: Notice) -> None:
        if notice.failure:
            raise RuntimeError(notice.failure)
        if notice.digest:
            with self._landing:
                self.landed.setdefault(notice.digest, []).append(time.perf_counter())
                self._landing.notify()

    def add(self, ids: list[int], tokens: int) -> None:
        chain = _chain([_text(ids)])
        self.core.add(self.name(), chain, max_tokens=tokens, extra={})

    def step(self) -> list[Any]:
        return self.core.step()

    def busy(self) -> bool:
        return self.core.busy

    def edit(self, *, export: bool) -> tuple[float, float, int]:
        """Seconds to the first token of a new edit context, seconds until its K/V was in the store, and its tokens."""
        chain = self._edit_chain()
        lengths = chain.lengths
        lease = self.store.lease(lengths, 600)  # reserves the place to which the export copies
        extra: dict[str, Any] = {}
        if export:
            exports = [
                (each.digest.hex(), start, each.length, self.store.offsets(each.digest, 0)[0])
                for each, start in zip(chain.segments, segment_starts(chain), strict=True)
            ]
            extra = {"kv_transfer_params": {"exports": exports}}
        begin = time.perf_counter()
        self.core.add(self.name(), chain, extra=extra)
        first = _until_first(self) - begin
        last = 0.0
        if export:
            # Each rank tells of its heads of each layer.
            notices = self.store.layout.layers * self.settings.tensor_parallel_size
            digests = [digest.hex() for digest, _ in lengths]
            # The copies end after the first token, in the connector's own thread.
            with self._landing:
                done = self._landing.wait_for(
                    lambda: all(len(self.landed.get(each, ())) >= notices for each in digests), LANDING_S
                )
            if not done:
                raise TimeoutError(f"after {LANDING_S:g} s the K/V of an edit are not all in the store")
            last = max(self.landed[each][-1] for each in digests) - begin
        self.store.release([lease])
        return first, last, chain.length

    def _edit_chain(self) -> Chain:
        """The largest VAE and ViT blocks, and a short text."""
        config, seed = self.config, self.words.randrange(2**30)
        sides = (config.max_latent_size, config.latent_stride), (config.vit.positions_per_side, config.vit.patch_size)
        if self.tiny:
            sides = (8, config.latent_stride), (min(8, config.vit.positions_per_side), config.vit.patch_size)
        segments = []
        for kind, (side, stride) in zip((SegmentKind.VAE, SegmentKind.VIT), sides, strict=True):
            pixels = random.Random(seed).randbytes(3 * (side * stride) ** 2)
            image = Image.frombytes("RGB", (side * stride,) * 2, pixels)
            posterior = Posterior(PosteriorMode.CONTENT) if kind is SegmentKind.VAE else None
            segments.append((kind, side * side + 2, (), image, (side, side), posterior))
        return _chain([*segments, _text(self.text(12))])


def _text(ids: Sequence[int]) -> Any:
    return (SegmentKind.TEXT, len(ids), tuple(ids), None, (0, 0), None)


def _chain(parts: Sequence[Any]) -> Chain:
    """A chain with random digests, so that no cache knows it."""
    segments, rope = [], 0
    for kind, length, ids, image, grid, posterior in parts:
        following = rope + (length if kind is SegmentKind.TEXT else 1)
        digest = os.urandom(DIGEST_BYTES)
        segments.append(Segment(kind, b"", digest, length, rope, following, ids, image, grid, posterior))
        rope = following
    return Chain(tuple(segments))


def _until_first(side: Side) -> float:
    """Step until no request is left; returns the time of the first token."""
    first = 0.0
    while side.busy():
        if any(output.new_token_ids for output in side.step()) and not first:
            first = time.perf_counter()
    return first


def decode(side: Side) -> float:
    """Tokens per second of AT_ONCE texts, counted from the step in which the last of them begins."""
    reply = 16 if side.tiny else REPLY
    for _ in range(AT_ONCE):
        side.add(side.text(PROMPT), reply)
    begun, tokens, start = 0, 0, 0.0
    while side.busy():
        made = sum(len(output.new_token_ids) for output in side.step())
        if begun < AT_ONCE:  # prefill is not part of the rate
            begun += made
            start = time.perf_counter()
        else:
            tokens += made
    return tokens / (time.perf_counter() - start)


def first_token(side: Side, length: int) -> float:
    """Milliseconds to the first token of a new text."""
    side.add(side.text(length), 1)
    begin = time.perf_counter()
    return 1000 * (_until_first(side) - begin)


def measure(side: Side) -> Iterator[tuple[str, float]]:
    """Yield all figures of a side; the first run of each only warms up."""
    lengths = (64, 256) if side.tiny else LENGTHS
    repeats = 1 if side.tiny else REPEATS

    def middle(run: Callable[[], float]) -> float:
        run()
        return median(run() for _ in range(repeats))

    yield "decode_tokens_per_s", middle(partial(decode, side))
    for length in lengths:
        yield f"first_token_ms_{length}", middle(partial(first_token, side, length))
    if isinstance(side, Ours):
        side.edit(export=True), side.edit(export=False)
        runs = [(side.edit(export=True), side.edit(export=False)) for _ in range(repeats)]
        yield "edit_tokens", float(runs[0][0][2])
        yield "edit_first_token_ms_exported", 1000 * median(with_export[0] for with_export, _ in runs)
        yield "edit_first_token_ms", 1000 * median(without[0] for _, without in runs)
        yield "edit_landed_ms", 1000 * median(with_export[1] for with_export, _ in runs)
