"""vLLM's plugin entry point (`vllm.general_plugins`), which runs in every process of an engine."""

from __future__ import annotations

ARCHITECTURE = "BagelThinker"


def register() -> None:
    """Make the model and its attention known to vLLM. Cheap, and the same however often it is called."""
    from vllm import ModelRegistry
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    ModelRegistry.register_model(ARCHITECTURE, "bagel_thinker.vllm.model:BagelThinker")
    # vLLM's own CPU attention ignores bidirectional images without a word, and takes no head of 16 or 40.
    register_backend(AttentionBackendEnum.CPU_ATTN, "bagel_thinker.vllm.cpu_attention.SpanAttentionBackend")
    # vLLM's FlashAttention sees images in full only from version 4 on; without it, GPUs up to Hopper would take Triton.
    register_backend(AttentionBackendEnum.FLASH_ATTN, "bagel_thinker.vllm.gpu_attention.SpanFlashBackend")
