"""The entry point for vLLM's plugins (`vllm.general_plugins`); vLLM runs it in every process of an engine."""

from __future__ import annotations

ARCHITECTURE = "BagelThinker"


def register() -> None:
    """Register the model and its attention with vLLM. It is cheap, and calling it again changes nothing."""
    from vllm import ModelRegistry
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    ModelRegistry.register_model(ARCHITECTURE, "bagel_thinker.vllm.model:BagelThinker")
    # vLLM's own CPU attention silently treats images as causal, and does not support heads of 16 or 40.
    register_backend(AttentionBackendEnum.CPU_ATTN, "bagel_thinker.vllm.cpu_attention.SpanAttentionBackend")
    # vLLM attends images in full only with FlashAttention 4; without ours, GPUs up to Hopper would fall back to Triton.
    register_backend(AttentionBackendEnum.FLASH_ATTN, "bagel_thinker.vllm.gpu_attention.SpanFlashBackend")
