"""From a Thinker's configuration to its engine."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch

from bagel.checkpoint.files import Checkpoint
from bagel.checkpoint.limits import position_limit
from bagel.deployment.defaults import how_to_install
from bagel.deployment.thinker_config import TORCH_LACKS, VLLM_ONLY, ThinkerConfig
from bagel.errors import ConfigError, NotSupported
from bagel.model.device import choose_device, choose_dtype
from bagel.parallel.mesh import Mesh
from bagel.telemetry.logs import Log
from bagel_thinker.engine import Engine

log = Log("bagel.thinker")


def load_engine(config: ThinkerConfig, checkpoint: Checkpoint) -> Engine:
    """The engine that the configuration asks for, ready. Raises BagelError for what it does not have or cannot load."""
    device = choose_device(config.device)
    if config.engine == "vllm" or (config.engine == "auto" and device.type == "cuda" and find_spec("vllm") is not None):
        return _vllm(config, checkpoint, device)
    return _torch(config, checkpoint)


def _torch(config: ThinkerConfig, checkpoint: Checkpoint) -> Engine:
    from bagel_thinker.torch_engine import TorchEngine

    given = [each.name for each in VLLM_ONLY if getattr(config, each.name) != each.default]
    if refused := [name for name in TORCH_LACKS if name in given]:
        raise NotSupported(
            f"the torch engine has no {' and no '.join(refused)}; leave it out, or start the Thinker with --engine vllm"
        )
    if given:
        log.info("no meaning for the torch engine, only for vLLM", settings=given)
    return TorchEngine.load(
        config.model,
        checkpoint,
        device=config.device,
        dtype=config.dtype,
        kv_store_bytes=config.kv_store_bytes,
        max_num_seqs=config.max_num_seqs,
        max_model_len=config.max_model_len,
        kv_device_bytes=config.kv_device_bytes,
        role=config.role,
        enforce_eager=bool(config.enforce_eager),
    )


def _vllm(config: ThinkerConfig, checkpoint: Checkpoint, device: torch.device) -> Engine:
    if find_spec("vllm") is None:
        raise ConfigError(
            f"--engine vllm needs vLLM, which is not installed here: {how_to_install('vllm')}; or choose --engine torch"
        )
    if config.kv_device_bytes is not None:
        raise NotSupported(
            "vLLM divides the device's memory itself and has no --kv-device-bytes; set --gpu-memory-utilization, or "
            "start the Thinker with --engine torch"
        )
    if config.tensor_parallel_size > 1:
        # vLLM would say so with a traceback of each rank.
        Mesh(tp=config.tensor_parallel_size).rank(0).decoder(checkpoint.config.llm)
    # Imported here, as vLLM is an extra that may be missing.
    from bagel_thinker.vllm.engine import VllmEngine
    from bagel_thinker.vllm.settings import VllmSettings

    cuda = device.type == "cuda"
    if cuda:
        _show_gpus(device.index or 0, config.tensor_parallel_size)
    values = {each.name: getattr(config, each.name) for each in VLLM_ONLY}
    chosen = {name: value for name, value in values.items() if value is not None}
    settings = VllmSettings(
        device=device.type,
        dtype=choose_dtype(config.dtype, device),
        max_num_seqs=config.max_num_seqs,
        max_model_len=position_limit(checkpoint.config, config.max_model_len),
        role=config.role,
        enforce_eager=bool(config.enforce_eager),
        **chosen,
    )
    return VllmEngine(checkpoint, settings, model_name=config.model, kv_store_bytes=config.kv_store_bytes)


def _show_gpus(first: int, count: int) -> None:
    """Let vLLM, which numbers its GPUs from 0, see those it is to take. Raises ConfigError if there are too few."""
    there = torch.cuda.device_count()
    if first + count > there:
        raise ConfigError(f"tensor_parallel_size is {count} from GPU {first} on; torch sees {there} GPUs here")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(there)))).split(",")
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(visible[first : first + count])
