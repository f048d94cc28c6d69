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
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from bagel.arguments import OnceParser
from bench.vllm_here import check
from bench.vllm_sides import Ours, Plain, measure

IN_TURNS = {"gpu_memory_utilization": 0.3, "kv_cache_memory_bytes": 2**33}
"""What each side takes where both share GPUs: what vLLM measures itself there is both sides' memory."""
LEAST_RATE, LEAST_RATE_OF_RANKS = 0.95, 0.9
"""Of plain's decoding, on one GPU and on several."""
MOST_EXPORT = 1.1
"""Times the first token of an edit may take with its K/V exported, on one GPU."""
SIDES = ("plain", "ours")
Figures = dict[str, float]


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


def compare(figures: dict[str, Figures], ranks: int) -> tuple[dict[str, float], bool]:
    """The ratios of ours to plain, and of export to no export; and whether what has a limit was measured and holds."""
    plain, ours = figures["plain"], figures["ours"]
    ratios = {name: ours[name] / value for name, value in plain.items() if name in ours}
    if "edit_first_token_ms" in ours:
        ratios["edit_export"] = ours["edit_first_token_ms_exported"] / ours["edit_first_token_ms"]
    rate = ratios.get("decode_tokens_per_s", 0.0)
    if ranks > 1:
        return ratios, rate >= LEAST_RATE_OF_RANKS
    return ratios, rate >= LEAST_RATE and ratios.get("edit_export", 9.9) <= MOST_EXPORT


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
    ratios, good = compare(figures, options.tensor_parallel_size)
    result = {**figures, "ratios": ratios}
    print(json.dumps(result, indent=1))
    if options.json:
        options.json.write_text(json.dumps(result))
    return 0 if good or options.tiny else 1


if __name__ == "__main__":
    sys.exit(main())
