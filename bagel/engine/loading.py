"""A model loaded for one role, with what goes with it: tokenizer, planner, fingerprints."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from bagel.checkpoint.files import Checkpoint
from bagel.checkpoint.limits import position_limit
from bagel.checkpoint.roles import Role
from bagel.engine.segments import ChainPlanner
from bagel.errors import ConfigError
from bagel.kv.digests import fingerprint as kv_fingerprint_of
from bagel.kv.pages import KvLayout
from bagel.model.attention_backends import AUTO
from bagel.model.bagel import Bagel
from bagel.model.linear import Fp8Linear, Quantization
from bagel.model.threads import settle_threads
from bagel.model.tokenizer import BagelTokenizer
from bagel.model.weights import load_model
from bagel.parallel.groups import UNDIVIDED, Groups
from bagel.parallel.hsdp import local
from bagel.rpc.convert import model_info
from bagel.v1 import common_pb2

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedModel:
    """A model on its device.

    fingerprint: the checkpoint's; kv_fingerprint names the K/V that the model makes; max_model_len: positions that it
    serves.
    """

    model: Bagel
    tokenizer: BagelTokenizer
    role: Role
    fingerprint: bytes
    planner: ChainPlanner
    kv_fingerprint: bytes
    max_model_len: int

    @property
    def groups(self) -> Groups:
        """The ranks that the model is divided among."""
        return self.model.groups

    @classmethod
    def of(
        cls,
        model: Bagel,
        tokenizer: BagelTokenizer,
        role: Role,
        fingerprint: bytes,
        *,
        max_model_len: int | None = None,
    ) -> LoadedModel:
        """A model with what goes with it; max_model_len None: all positions that it has."""
        # A DiT that receives K/V names what it receives, which its own weights' format does not change.
        quantization = model.quantization if role.parts.text else None
        # K/V of another dtype are other bytes, so the dtype is part of their identity.
        kv_fingerprint = kv_fingerprint_of(fingerprint, str(model.dtype).removeprefix("torch."), quantization)
        planner = ChainPlanner(model.config, tokenizer, kv_fingerprint)
        limit = position_limit(model.config, max_model_len)
        return cls(model, tokenizer, role, fingerprint, planner, kv_fingerprint, limit)

    @property
    def dtype(self) -> str:
        return str(self.model.dtype).removeprefix("torch.")

    def info(self, name: str) -> common_pb2.ModelInfo:
        """What requests to a service of this model are checked against. name: what the service calls it."""
        return model_info(
            self.model.config,
            name=name,
            checkpoint_fingerprint=self.fingerprint,
            kv_fingerprint=self.kv_fingerprint,
            max_positions=self.max_model_len,
            dtype=self.dtype,
            device=str(self.model.device),
        )

    def memory(self) -> dict[str, int]:
        """Bytes of weights on the device by component, those that this rank keeps."""
        sizes: dict[str, int] = {}
        seen: set[int] = set()
        for name, tensor in [*self.model.named_parameters(), *self.model.named_buffers()]:
            component, place = name.partition(".")[0], local(tensor).data_ptr()
            # Layers whose weights are brought as they are needed take turns in the same memory.
            if place in seen:
                continue
            seen.add(place)
            sizes[component] = sizes.get(component, 0) + local(tensor).nbytes
        if (stream := self.model.language_model.layers.stream) is not None and stream.on_device:
            sizes["language_model"] += stream.kept_bytes
        return sizes


def load_role(
    checkpoint: Checkpoint,
    role: Role,
    *,
    dtype: torch.dtype,
    device: torch.device,
    max_model_len: int | None = None,
    vae_use_tiling: bool = False,
    attention_backend: str = AUTO,
    enforce_eager: bool = False,
    groups: Groups = UNDIVIDED,
    quantization: str | None = None,
    cpu_offload: str | None = None,
) -> LoadedModel:
    """Load the parts of a checkpoint that a role needs; raises CheckpointError if its files do not fit.

    vae_use_tiling decodes and encodes large pictures in overlapping tiles: less memory, not exactly the same picture;
    attention_backend, enforce_eager: as `choose_backend` takes them; groups: the ranks that the model is divided over,
    which call this together; quantization: of `Quantization`; cpu_offload: "layers" keeps the weights of the decoder's
    layers in the host's memory, for a GPU alone.
    """
    if cpu_offload is not None and device.type == "cpu":
        raise ConfigError(
            "cpu_offload keeps weights for a GPU in the host's memory; on a CPU they are there already; leave it out"
        )
    with checkpoint.loading():
        tokenizer = BagelTokenizer(checkpoint.folder)
        # Role denoise loads only their two rows of the embedding.
        delimiters = (tokenizer.image_start, tokenizer.image_end)
        model = load_model(
            checkpoint,
            role,
            delimiter_ids=delimiters,
            dtype=dtype,
            device=device,
            attention=attention_backend,
            eager=enforce_eager,
            quantization=None if quantization is None else Quantization(quantization),
            offload=cpu_offload is not None,
            groups=groups,
        )
    settle_threads(model.config, device)
    if vae_use_tiling:
        model.autoencoder().use_tiling(groups.vae_decode, groups.vae_encode)
    backend = model.language_model.backend
    chosen = {"attention": backend.attention, "kernels": backend.kernels.name, "device": str(device)}
    logger.info("backend", extra={"fields": chosen})
    if model.quantization is not None:
        logger.info("quantised", extra={"fields": _quantised(model)})
    if (stream := model.language_model.layers.stream) is not None:
        moving = {"layers": len(stream.moving), "bytes": stream.kept_bytes, "device_bytes": stream.device_bytes}
        where = "divided over ranks that read each other's memory" if stream.on_device else "in the host's memory"
        logger.info(f"weights {where}", extra={"fields": moving})
    return LoadedModel.of(model, tokenizer, role, checkpoint.fingerprint, max_model_len=max_model_len)


def _quantised(model: Bagel) -> dict[str, object]:
    """What is quantised, for the log."""
    layers = [module for module in model.modules() if isinstance(module, Fp8Linear)]
    weights = sum(layer.weight.nbytes + layer.scale.nbytes for layer in layers)
    plain = sum(layer.weight.numel() * model.dtype.itemsize for layer in layers)
    return {"format": model.quantization, "layers": len(layers), "bytes": weights, "bytes_unquantised": plain}


def kv_layout(checkpoint: Checkpoint, dtype: str) -> KvLayout:
    """The K/V of a checkpoint's model."""
    llm = checkpoint.config.llm
    return KvLayout(llm.num_hidden_layers, llm.num_key_value_heads, llm.head_dim, dtype)
