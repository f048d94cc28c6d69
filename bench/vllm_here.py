"""Whether this machine has what the benchmarks of vLLM need; said at once and in one line."""

from __future__ import annotations

import argparse
from importlib.util import find_spec

import torch

from bagel.deployment.defaults import how_to_install


def check(parser: argparse.ArgumentParser, *, gpu: bool, without: str) -> None:
    """End with the parser's error if vLLM, or the GPU that is wanted, is missing. without: the flags that need none."""
    if gpu and not torch.cuda.is_available():
        parser.error(f"torch sees no GPU; run this on a GPU, or check the code with {without}")
    if find_spec("vllm") is None:
        parser.error(f"vLLM is not installed here; {how_to_install('vllm')}; for a CPU, make setup-vllm")
