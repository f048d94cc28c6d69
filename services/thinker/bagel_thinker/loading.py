"""From a Thinker's flags to its engine."""

from __future__ import annotations

import argparse
import os
from importlib.util import find_spec

import torch

from bagel.checkpoint.files import Checkpoint
from bagel.checkpoint.limits import position_limit
from bagel.errors import ConfigError, NotSupported
from bagel.model.device import choose_device, choose_dtype
from bagel.telemetry.logs import Log
from bagel_thinker.engine import Engine
from bagel_thinker.flags import VLLM_ONLY

log = Log("bagel.thinker")


def load_engine(args: argparse.Namespace, checkpoint: Checkpoint) -> Engine:
    """The engine that the flags ask for, ready. Raises BagelError for what it does not have or cannot load."""
    device = choose_device(args.device)
    if args.engine == "vllm" or (args.engine == "auto" and device.type == "cuda" and find_spec("vllm") is not None):
        return _vllm(args, checkpoint, device)
    return _torch(args, checkpoint)


def _torch(args: argparse.Namespace, checkpoint: Checkpoint) -> Engine:
    from bagel_thinker.torch_engine import TorchEngine

    given = [name for name, unset in VLLM_ONLY.items() if getattr(args, name) != unset]
    if refused := [name for name in given if name in ("tensor_parallel_size", "quantization")]:
        raise NotSupported(
            f"the torch engine has no {' and no '.join(refused)}; leave it out, or start the Thinker with --engine vllm"
        )
    if given:
        log.info("no meaning for the torch engine, only for vLLM", settings=given)
    return TorchEngine.load(
        args.model,
        checkpoint,
        device=args.device,
        dtype=args.dtype,
        kv_store_bytes=args.kv_store_bytes,
        max_num_seqs=args.max_num_seqs,
        max_model_len=args.max_model_len,
        role=args.role,
    )


def _vllm(args: argparse.Namespace, checkpoint: Checkpoint, device: torch.device) -> Engine:
    if find_spec("vllm") is None:
        raise ConfigError(
            "--engine vllm needs vLLM, which is not installed here: pip install 'bagel-serving[vllm]', or choose "
            "--engine torch"
        )
    from bagel_thinker.vllm.engine import VllmEngine
    from bagel_thinker.vllm.settings import VllmSettings

    cuda = device.type == "cuda"
    if cuda:
        _show_gpus(device.index or 0, args.tensor_parallel_size)
    chosen = {name: getattr(args, name) for name in VLLM_ONLY if getattr(args, name) is not None}
    settings = VllmSettings(
        device=device.type,
        dtype=choose_dtype(args.dtype, device),
        max_num_seqs=args.max_num_seqs,
        max_model_len=position_limit(checkpoint.config, args.max_model_len),
        role=args.role,
        **chosen,
    )
    return VllmEngine(checkpoint, settings, model_name=args.model, kv_store_bytes=args.kv_store_bytes)


def _show_gpus(first: int, count: int) -> None:
    """Let vLLM, which numbers its GPUs from 0, see those it is to take. Raises ConfigError if there are too few."""
    there = torch.cuda.device_count()
    if first + count > there:
        raise ConfigError(f"tensor_parallel_size is {count} from GPU {first} on; torch sees {there} GPUs here")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(there)))).split(",")
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(visible[first : first + count])
