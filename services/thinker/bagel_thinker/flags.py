"""Flags of the Thinker's engines. No torch here."""

from __future__ import annotations

import argparse
import os

from bagel.checkpoint.roles import Role
from bagel.cli.flags import ENGINES
from bagel.errors import ConfigError

ENGINE_VARIABLE = "BAGEL_ENGINE"
VLLM_ONLY = {
    "tensor_parallel_size": 1,
    "gpu_memory_utilization": None,
    "max_num_batched_tokens": None,
    "enforce_eager": None,
    "enable_prefix_caching": None,
    "quantization": None,
}
"""Options that the torch engine does not have, with the values that ask nothing of it."""


def add_engine_flags(flags: argparse.ArgumentParser) -> None:
    """What computes, and what vLLM is started with; the deploy file's keys of the same names end up here."""
    flags.add_argument(
        "--engine",
        choices=ENGINES,
        default=default_engine(),
        help=f"what computes; auto: vllm where it is installed and there is a GPU, else torch "
        f"(default: {ENGINE_VARIABLE} of the environment, else auto)",
    )
    flags.add_argument(
        "--role",
        type=Role,
        choices=(Role.CONTEXT, Role.UNDERSTAND),
        default=Role.CONTEXT,
        help="understand: no generation expert is loaded, and images to edit are refused (default: context)",
    )
    vllm = flags.add_argument_group("vLLM")
    vllm.add_argument("--tensor-parallel-size", type=_at_least_one, default=1, metavar="N", help="GPUs of one model")
    vllm.add_argument("--gpu-memory-utilization", type=float, metavar="X", help="share of the GPU's memory")
    vllm.add_argument("--max-num-batched-tokens", type=_at_least_one, metavar="N", help="tokens of one forward pass")
    vllm.add_argument("--enforce-eager", action=argparse.BooleanOptionalAction, help="no CUDA graphs")
    vllm.add_argument("--enable-prefix-caching", action=argparse.BooleanOptionalAction, help="keep equal beginnings")
    vllm.add_argument("--quantization", metavar="NAME", help="vLLM's name of a way to quantise, like fp8")


def default_engine() -> str:
    """The engine that the environment names; raises ConfigError for one that there is not."""
    engine = os.environ.get(ENGINE_VARIABLE, "auto")
    if engine not in ENGINES:
        raise ConfigError(f"{ENGINE_VARIABLE} is {engine!r}; it must be one of {', '.join(ENGINES)}")
    return engine


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)
