"""The settings of a Thinker on vLLM, and the vLLM configuration that they become."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bagel.checkpoint.config import LlmConfig, ModelConfig, VaeConfig, VitConfig
from bagel.checkpoint.roles import Role
from bagel.errors import ConfigError
from bagel.images import ImageTransform
from bagel.kv.digests import fingerprint
from bagel_thinker.vllm.plugin import ARCHITECTURE
from bagel_thinker.vllm.requests import Placeholders

BATCHED_TOKENS = 8192
CONTEXT_PLACES = 16
"""Places for requests that only build a context, beside max_num_seqs texts, so that texts never delay them."""
FULL_IMAGES = 3
"""Images of the largest size for which a prompt has room beside its max_model_len positions."""
CPU_KV_BYTES = 2**32
CPU_BLOCK = 32


@dataclass(frozen=True)
class VllmSettings:
    """Options of the vLLM engine; None leaves the choice to vLLM.

    max_num_seqs: the number of texts written at once; max_model_len: positions of prompt and text (an image takes one);
    role: `understand` loads no generation expert and refuses images to edit.
    """

    device: str
    dtype: str
    max_num_seqs: int
    max_model_len: int
    role: Role = Role.CONTEXT
    tensor_parallel_size: int = 1
    gpu_memory_utilization: float = 0.9
    max_num_batched_tokens: int | None = None
    enforce_eager: bool = False
    enable_prefix_caching: bool = True
    quantization: str | None = None
    kv_cache_memory_bytes: int | None = None
    load_format: str = "auto"

    def segments_fingerprint(self, checkpoint: bytes) -> bytes:
        """What the digests of its segments begin with. checkpoint: the fingerprint of it.

        Of quantised weights it is another one than of K/V that may be exchanged: a DiT takes K/V from both kinds of
        Thinkers, and must never take the pages of one for those of the other.
        """
        # With the engine: a name of vLLM's may stand for other numbers than ours.
        return fingerprint(checkpoint, self.dtype, self.quantization and f"vllm {self.quantization}")


def largest_blocks(config: ModelConfig) -> tuple[int, int]:
    """K/V rows of the largest VAE and the largest ViT block of a model, delimiters included."""
    vit_side = min(config.vit_max_num_patch_per_side, config.vit.positions_per_side)
    return config.max_latent_size**2 + 2, vit_side**2 + 2


def row_limit(config: ModelConfig, settings: VllmSettings) -> int:
    """The most K/V rows of one request: its positions, and room for images, which have many rows on one position."""
    return settings.max_model_len + FULL_IMAGES * sum(largest_blocks(config))


def batched_tokens(config: ModelConfig, settings: VllmSettings) -> int:
    """Tokens of one step; raises ConfigError if the largest image would not fit."""
    # An image is never split over steps, so one that does not fit would wait forever.
    needed = max(largest_blocks(config)) + settings.max_num_seqs + CONTEXT_PLACES
    if settings.max_num_batched_tokens is None:
        return max(BATCHED_TOKENS, needed)
    if settings.max_num_batched_tokens < needed:
        raise ConfigError(
            f"max_num_batched_tokens is {settings.max_num_batched_tokens}; the largest image and "
            f"{settings.max_num_seqs} texts beside it take {needed} tokens of one step: set it to at least that, or "
            "leave it out"
        )
    return settings.max_num_batched_tokens


def hf_config(config: ModelConfig, settings: VllmSettings, ids: Placeholders) -> dict[str, Any]:
    """The model's configuration in the form of vLLM's BagelConfig, with our own under `bagel`."""
    llm, rows = config.llm, row_limit(config, settings)
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "bagel",
        "is_mm_prefix_lm": True,
        # Only makes vLLM keep positions apart from places in the sequence; the rotation does not use it.
        "mrope_section": [llm.head_dim // 2, 0, 0],
        "llm_config": {
            "model_type": "qwen2",
            "architectures": ["Qwen2ForCausalLM"],
            "qk_norm": True,
            "hidden_act": "silu",
            "hidden_size": llm.hidden_size,
            "intermediate_size": llm.intermediate_size,
            "num_hidden_layers": llm.num_hidden_layers,
            "num_attention_heads": llm.num_attention_heads,
            "num_key_value_heads": llm.num_key_value_heads,
            "vocab_size": llm.vocab_size,
            "rms_norm_eps": llm.rms_norm_eps,
            "rope_theta": llm.rope_theta,
            "max_position_embeddings": rows,
            "tie_word_embeddings": False,
            "use_sliding_window": False,
            "sliding_window": None,  # with a window, vLLM would ignore longer images
        },
        "tie_word_embeddings": False,
        "bagel": {**asdict(config), "role": settings.role.value},
        "delimiter_ids": [ids.start, ids.end],
        "latent_id": ids.latent,
        "overflow_id": ids.overflow,
    }


def read_hf_config(values: Mapping[str, Any]) -> tuple[ModelConfig, Role]:
    """Read back our configuration and the role, which `hf_config` put under `bagel`."""
    fields = dict(values)
    role = Role(fields.pop("role"))
    fields["llm"], fields["vit"] = LlmConfig(**fields["llm"]), VitConfig(**fields["vit"])
    vae = fields["vae"]
    fields["vae"] = VaeConfig(**{**vae, "ch_mult": tuple(vae["ch_mult"])})
    for name in ("vae_transform", "vit_transform"):
        fields[name] = ImageTransform(**fields[name])
    fields["default_image_size"] = tuple(fields["default_image_size"])
    return ModelConfig(**fields), role


def engine_arguments(
    config: ModelConfig,
    settings: VllmSettings,
    ids: Placeholders,
    *,
    model: Path,
    config_folder: Path,
    sink: Mapping[str, Any],
) -> dict[str, Any]:
    """Keyword arguments for vLLM's EngineArgs.

    model: the checkpoint; config_folder: the folder to write config.json to; sink: the result of `Sink.open`.
    """
    (config_folder / "config.json").write_text(json.dumps(hf_config(config, settings, ids)), encoding="utf-8")
    cpu = settings.device == "cpu"
    arguments: dict[str, Any] = {
        "model": str(model),
        "hf_config_path": str(config_folder),
        "skip_tokenizer_init": True,  # requests arrive as token ids with prepared images
        "generation_config": "vllm",
        "dtype": settings.dtype,
        "load_format": settings.load_format,
        "quantization": settings.quantization,
        "max_model_len": row_limit(config, settings),
        "max_num_seqs": settings.max_num_seqs + CONTEXT_PLACES,
        "max_num_batched_tokens": batched_tokens(config, settings),
        "enable_prefix_caching": settings.enable_prefix_caching,
        "enforce_eager": settings.enforce_eager or cpu,
        "tensor_parallel_size": settings.tensor_parallel_size,
        "gpu_memory_utilization": settings.gpu_memory_utilization,
        "kv_cache_memory_bytes": settings.kv_cache_memory_bytes,
        "disable_chunked_mm_input": True,
        "skip_mm_profiling": True,
        "mm_processor_cache_gb": 0,
        "async_scheduling": not cpu,
        "scheduler_cls": f"bagel_thinker.vllm.scheduler.WholeImage{'' if cpu else 'Async'}Scheduler",
        "logits_processors": ["bagel_thinker.vllm.choosing:Chooser"],
        "kv_transfer_config": {
            "kv_connector": "KvExport",
            "kv_connector_module_path": "bagel_thinker.vllm.connector",
            "kv_role": "kv_producer",
            "kv_connector_extra_config": {"sink": dict(sink)},
        },
        # It compiles kernels of speculative decoding alone, which takes one to two minutes at a first start.
        "kernel_config": {"enable_jit_warmup": False},
        "disable_log_stats": True,
    }
    if cpu:
        arguments["block_size"] = CPU_BLOCK
        if settings.kv_cache_memory_bytes is None:
            arguments["kv_cache_memory_bytes"] = _cpu_kv_bytes(config, settings)
    return arguments


def _cpu_kv_bytes(config: ModelConfig, settings: VllmSettings) -> int:
    """Memory for four of the longest requests, but at most CPU_KV_BYTES unless one alone needs more."""
    llm = config.llm
    itemsize = 4 if settings.dtype == "float32" else 2
    row = 2 * llm.num_hidden_layers * llm.num_key_value_heads * llm.head_dim * itemsize
    longest = row * (row_limit(config, settings) + CPU_BLOCK)
    return max(longest + row * CPU_BLOCK, min(4 * longest, CPU_KV_BYTES))
