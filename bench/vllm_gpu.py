"""Compare the Thinker on vLLM with plain vLLM, in full size with random weights.

    python -m bench.vllm_check                          first, check that it is right on this GPU
    python -m bench.vllm_gpu [--json FILE]              one side after the other
    python -m bench.vllm_gpu --gpus 0 1                 both sides at the same time, each on its own GPU
    python -m bench.vllm_gpu --in-turns                 both start at once on the same GPUs and measure in turns
    python -m bench.vllm_gpu --side ours --json A       one side; later --merge A B
    python -m bench.vllm_gpu --tensor-parallel-size 2   both sides, each on two GPUs
    python -m bench.vllm_gpu --tiny                     the same code on a CPU, only to check the code

Each side runs in a process of its own. The same loop steps both over vLLM's engine core, with equal places, tokens per
step and asynchronous scheduling. Plain is vLLM's Qwen2 in BAGEL's shape, including its norms of queries and keys. Each
figure is written at once, as a line of JSON, to stderr and to the file. bench/README.md explains the rows and limits.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from PIL import Image

from bagel.arguments import OnceParser
from bagel.checkpoint.config import BAGEL_7B_MOT, ModelConfig
from bagel.engine.noise import Posterior
from bagel.engine.segments import Chain, Segment
from bagel.kv.digests import DIGEST_BYTES, SegmentKind
from bagel.kv.pages import KvLayout
from bagel.kv.store import KvStore
from bagel.request import PosteriorMode
from bagel_thinker.vllm.core import Core
from bagel_thinker.vllm.requests import Placeholders, segment_starts
from bagel_thinker.vllm.settings import VllmSettings
from bagel_thinker.vllm.sink import Notice, Sink
from bench.models import TINY
from bench.vllm_here import check

AT_ONCE = 64
IN_TURNS = {"gpu_memory_utilization": 0.3, "kv_cache_memory_bytes": 2**33}
"""What each side takes where both share GPUs: what vLLM measures itself there is both sides' memory."""
REPEATS = 5
PROMPT, REPLY = 64, 256
LENGTHS = (64, 1024, 9000)
IDS = Placeholders(151652, 151653, 151645, 151644)
Figures = dict[str, float]


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

        llm, given = self.config.llm, self.settings
        with tempfile.TemporaryDirectory() as folder:
            shape = {
                "architectures": ["Qwen2ForCausalLM"],
                "model_type": "qwen2",
                "hidden_act": "silu",
                "hidden_size": llm.hidden_size,
                "intermediate_size": llm.intermediate_size,
                "num_hidden_layers": llm.num_hidden_layers,
                "num_attention_heads": llm.num_attention_heads,
                "num_key_value_heads": llm.num_key_value_heads,
                "vocab_size": llm.vocab_size,
                "max_position_embeddings": 32_768,
                "rms_norm_eps": llm.rms_norm_eps,
                "rope_theta": llm.rope_theta,
                "qk_norm": True,
                "tie_word_embeddings": False,
            }
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
        self.sink = Sink(self.store.arena, layout, self.on_notice)
        folder = Path(tempfile.mkdtemp())
        (folder / "config.json").write_text("{}")
        given = self.sink.open(other_processes=ranks > 1)
        self.core = Core(self.config, self.settings, self.ids, folder, given)

    def on_notice(self, notice: Notice) -> None:
        if notice.failure:
            raise RuntimeError(notice.failure)
        if notice.digest:
            self.landed.setdefault(notice.digest, []).append(time.perf_counter())

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
            # The copies end after the first token, in the connector's own thread.
            while any(len(self.landed.get(digest.hex(), ())) < notices for digest, _ in lengths):
                time.sleep(0.0002)
            last = max(self.landed[digest.hex()][-1] for digest, _ in lengths) - begin
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

    yield "decode_tokens_per_s", middle(lambda: decode(side))
    for length in lengths:
        yield f"first_token_ms_{length}", middle(lambda length=length: first_token(side, length))  # type: ignore[misc]
    if isinstance(side, Ours):
        side.edit(export=True), side.edit(export=False)
        runs = [(side.edit(export=True), side.edit(export=False)) for _ in range(repeats)]
        yield "edit_tokens", float(runs[0][0][2])
        yield "edit_first_token_ms_exported", 1000 * median(with_export[0] for with_export, _ in runs)
        yield "edit_first_token_ms", 1000 * median(without[0] for _, without in runs)
        yield "edit_landed_ms", 1000 * median(with_export[1] for with_export, _ in runs)


def report(side: str, name: str, value: float, file: Path | None) -> None:
    """Write one figure at once, so that an interrupted run keeps it."""
    line = json.dumps({"side": side, "name": name, "value": value})
    print(line, file=sys.stderr, flush=True)
    if file is not None:
        with file.open("a") as out:
            out.write(line + "\n")


def reported(files: Sequence[Path]) -> dict[str, Figures]:
    """Read each side's figures; a side that did not finish has fewer."""
    figures: dict[str, Figures] = {name: {} for name in SIDES}
    for file in files:
        for line in file.read_text().splitlines() if file.exists() else ():
            entry = json.loads(line)
            figures[entry["side"]][entry["name"]] = entry["value"]
    return figures


def run_side(name: str, options: argparse.Namespace) -> None:
    """Measure one side in this process."""
    begin, file = time.perf_counter(), options.json
    tiny, ranks, memory = options.tiny, options.tensor_parallel_size, IN_TURNS if options.turns else {}
    if tiny:
        memory = {"kv_cache_memory_bytes": 2**28}
    with _turn(options.turns, fcntl.LOCK_SH):
        side = Ours(tiny, ranks, memory) if name == "ours" else Plain(tiny, ranks, memory)
    report(name, "start_s", time.perf_counter() - begin, file)
    figures = measure(side)
    while True:
        with _turn(options.turns, fcntl.LOCK_EX):
            if (figure := next(figures, None)) is None:
                return
        report(name, *figure, file)


@contextmanager
def _turn(file: Path | None, how: int) -> Iterator[None]:
    """Hold a lock: shared while a side starts, alone while it measures a figure. Nothing without a file."""
    if file is None:
        yield
        return
    with file.open("a") as lock:
        fcntl.flock(lock, how)
        yield


def run_sides(files: dict[str, Path], options: argparse.Namespace) -> None:
    """Measure both sides, each in a process of its own, and at the same time if there are two GPUs."""
    running = []
    with ExitStack() as stack:
        for i, (name, file) in enumerate(files.items()):
            command = [sys.executable, "-m", "bench.vllm_gpu", "--side", name, "--json", str(file)]
            command += ["--tiny"] if options.tiny else []
            command += ["--tensor-parallel-size", str(options.tensor_parallel_size)]
            command += ["--turns", str(file.with_name("turns"))] if options.in_turns else []
            gpus = {"CUDA_VISIBLE_DEVICES": options.gpus[i % len(options.gpus)]} if options.gpus else {}
            child = subprocess.Popen(command, env={**os.environ, **gpus})
            stack.callback(child.kill)
            running.append(child)
            if len(options.gpus) < len(files) and not options.in_turns:
                _wait(running.pop(), name, options.limit_s)
        begin = time.monotonic()
        for child, name in zip(running, files, strict=False):
            _wait(child, name, begin + options.limit_s - time.monotonic())


def _wait(child: subprocess.Popen[bytes], name: str, seconds: float) -> None:
    try:
        code = child.wait(max(0.0, seconds))
    except subprocess.TimeoutExpired:
        child.kill()
        code = -9
    if code:
        print(f"{name} failed with exit code {code}", file=sys.stderr, flush=True)


def compare(figures: dict[str, Figures]) -> tuple[dict[str, float], bool]:
    """The ratios of ours to plain, and of export to no export; and whether both limits were measured and hold."""
    plain, ours = figures["plain"], figures["ours"]
    ratios = {name: ours[name] / value for name, value in plain.items() if name in ours}
    if "edit_first_token_ms" in ours:
        ratios["edit_export"] = ours["edit_first_token_ms_exported"] / ours["edit_first_token_ms"]
    good = ratios.get("decode_tokens_per_s", 0.0) >= 0.95 and ratios.get("edit_export", 9.9) <= 1.1
    return ratios, good


SIDES = ("plain", "ours")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print figures and ratios; returns 1 if a ratio is missing or beyond its limit."""
    parser = OnceParser(prog="python -m bench.vllm_gpu", description="The Thinker's vLLM on a GPU.")
    parser.add_argument("--tiny", action="store_true", help="a tiny model on the CPU: tries the code, measures nothing")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write figures there; with --side, line by line")
    parser.add_argument("--side", choices=SIDES, help="measure only this side, in this process")
    parser.add_argument(
        "--gpus", nargs="+", default=[], metavar="N", help="a GPU for each side (default: one for both)"
    )
    parser.add_argument("--in-turns", action="store_true", help="both sides on the same GPUs, measured in turns")
    parser.add_argument("--turns", type=Path, metavar="FILE", help="of --side: a lock that the other side has too")
    parser.add_argument("--tensor-parallel-size", type=int, default=1, metavar="N", help="GPUs of each side (1)")
    parser.add_argument("--limit-s", type=float, default=480, help="seconds for a side (480)")
    parser.add_argument("--merge", nargs="+", type=Path, metavar="FILE", help="measure nothing, compare these files")
    options = parser.parse_args(argv)
    if not options.merge:
        check(parser, gpu=not options.tiny, without="--tiny")
    if options.side:
        run_side(options.side, options)
        os._exit(0)  # vLLM's own shutdown takes longer than the measurements
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / name for name in SIDES}
        if not options.merge:
            run_sides(files, options)
        figures = reported(options.merge or list(files.values()))
    ratios, good = compare(figures)
    result = {**figures, "ratios": ratios}
    print(json.dumps(result, indent=1))
    if options.json:
        options.json.write_text(json.dumps(result))
    return 0 if good or options.tiny else 1


if __name__ == "__main__":
    sys.exit(main())
