"""`python -m bench PART` prints tables; with --json FILE it also writes their rows as JSON lines."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from bagel.arguments import OnceParser
from bagel.errors import BagelError, ConfigError
from bench import (
    attacks,
    cpu,
    edits,
    gpu,
    load,
    nano,
    overhead,
    parallel,
    peer,
    profiler,
    pull,
    stages,
    streaming,
    threads,
)
from bench.report import Table, machine, write_json


def main(argv: Sequence[str] | None = None) -> int:
    """Run a benchmark; returns 0, 1 if a part of it failed, or 2 if it cannot run here."""
    options = _parser().parse_args(argv)
    try:
        device = _device(options)
        return _run(options, device)
    except BagelError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def _run(options: argparse.Namespace, device: torch.device) -> int:
    if options.part == "cpu":
        torch.set_num_threads(options.threads)
    on = machine(device)
    print(", ".join(f"{name} {value}" for name, value in on.items()), flush=True)
    tables: list[Table] = []
    only = " ".join(options.only)
    parts: dict[str, Callable[[], Iterator[Table]]] = {
        "attacks": lambda: attacks.run(only),
        "cpu": lambda: cpu.run(only, options.repeats),
        "edits": lambda: edits.run(device, options.repeats, options.checkpoint),
        "gpu": lambda: gpu.run(device, only, tiny=options.tiny),
        "load": lambda: load.run(options.minutes, options.requests),
        "nano": lambda: nano.run(only, options.repeats),
        "overhead": lambda: overhead.run(options.repeats, options.rate),
        "parallel": lambda: parallel.run(device, options.ranks, options.only, options.checkpoint),
        "peer": lambda: peer.run(
            device, only, tiny=options.tiny, checkpoint=options.checkpoint, python=options.peer_python
        ),
        "profiler": lambda: profiler.run(only, options.repeats),
        "pull": pull.run,
        "stages": lambda: stages.run(only, options.repeats),
        "streaming": lambda: streaming.run(device, options.repeats, options.checkpoint),
        "threads": lambda: threads.run(options.repeats),
    }
    for table in parts[options.part]():
        print(table.render(), flush=True)
        tables.append(table)
        if options.json:  # after every table, so that an interrupted run keeps its results
            write_json(options.json, tables, on)
    return 1 if any(table.failed for table in tables) else 0


def _device(options: argparse.Namespace) -> torch.device:
    """The device to measure; raises ConfigError if it does not exist."""
    if options.peer_python and options.part != "peer":
        raise ConfigError("--peer-python belongs to python -m bench peer")
    if options.checkpoint and options.part not in ("edits", "parallel", "peer", "streaming"):
        raise ConfigError("--checkpoint belongs to python -m bench edits, parallel, peer and streaming")
    if options.ranks is not None and options.part != "parallel":
        raise ConfigError("--ranks belongs to python -m bench parallel")
    if options.part in ("edits", "streaming") and not options.tiny:
        return options.device or torch.device("cpu")
    if options.part == "parallel":
        return _device_of_ranks(options)
    if options.part not in ("gpu", "peer"):
        if options.device or options.tiny:
            raise ConfigError("--device and --tiny belong to the GPU benchmarks; run python -m bench gpu, or peer")
        return torch.device("cpu")
    device: torch.device = options.device or torch.device("cuda:0")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("PyTorch sees no CUDA device; run this on a GPU, or check the code with --tiny --device cpu")
    if device.type != "cuda" and not options.tiny:
        raise ConfigError(f"the full-size model on {device} takes hours; add --tiny")
    return device


def _device_of_ranks(options: argparse.Namespace) -> torch.device:
    """GPUs, or a CPU, where the model is always the tiny one."""
    if options.tiny:
        raise ConfigError("python -m bench parallel is tiny where it runs on a CPU; give --device cpu without --tiny")
    device: torch.device = options.device or torch.device("cuda:0")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("PyTorch sees no CUDA device; run this on two GPUs, or check the code with --device cpu")
    return device


def _device_name(name: str) -> torch.device:
    if name not in ("cpu", "cuda") and not re.fullmatch(r"cuda:\d+", name):
        raise argparse.ArgumentTypeError(f"{name!r} is no device; it must be cuda, cuda:N or cpu")
    return torch.device("cuda:0" if name == "cuda" else name)


def _parser() -> argparse.ArgumentParser:
    parser = OnceParser(prog="python -m bench", description="Benchmarks; see bench/README.md.")
    parts = (
        "attacks",
        "cpu",
        "edits",
        "gpu",
        "load",
        "nano",
        "overhead",
        "parallel",
        "peer",
        "profiler",
        "pull",
        "stages",
        "streaming",
        "threads",
    )
    parser.add_argument("part", nargs="?", choices=parts, default="cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows as JSON lines")
    parser.add_argument(
        "--only", nargs="+", default=(), metavar="TEXT", help="only rows, sections (gpu), attacks or parts named so"
    )
    parser.add_argument("--repeats", type=int, default=5, help="least samples, but for gpu and pull (default 5)")
    parser.add_argument("--rate", type=float, default=overhead.RATE, help="overhead: requests a second (default 20)")
    parser.add_argument("--minutes", type=float, default=2.0, help="load: of the soak (default 2)")
    parser.add_argument("--requests", type=int, metavar="N", help="load: the gateway's --max-requests (default: none)")
    parser.add_argument("--threads", type=int, default=2, help="cpu: PyTorch's threads (default 2)")
    parser.add_argument(
        "--device",
        type=_device_name,
        help="gpu, peer: cuda (default), or cpu with --tiny; parallel: cuda (default); edits, streaming: cpu (default)",
    )
    parser.add_argument("--tiny", action="store_true", help="gpu, peer: the tiny model, to check the code")
    parser.add_argument("--checkpoint", type=Path, metavar="FOLDER", help="edits, parallel, peer, streaming: this one")
    parser.add_argument("--ranks", type=int, metavar="N", help="parallel: GPUs (default: all; 2 on a CPU)")
    parser.add_argument("--peer-python", type=Path, metavar="PATH", help="peer: a Python that can import vllm_omni")
    return parser


if __name__ == "__main__":
    sys.exit(main())
