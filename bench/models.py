"""The shapes of the measured models, whose weights are random."""

from __future__ import annotations

from dataclasses import replace

from bagel.checkpoint.config import LlmConfig, ModelConfig, VaeConfig, VitConfig

MID = ModelConfig(
    llm=LlmConfig(
        hidden_size=1024,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=4,
        intermediate_size=2816,
        vocab_size=8192,
    ),
    vit=VitConfig(hidden_size=384, num_hidden_layers=8, num_attention_heads=6, intermediate_size=1536),
    vae=VaeConfig(ch=32, ch_mult=(1, 2, 2, 2)),
)
"""Large enough that matrix products dominate a step on a CPU, small enough to measure a row in seconds."""

TINY = ModelConfig(
    llm=LlmConfig(
        hidden_size=96,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        intermediate_size=256,
        vocab_size=1000,
    ),
    vit=VitConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=160),
    vae=VaeConfig(ch=32, ch_mult=(1, 2, 2, 2)),
)
"""The shape of the tests' tiny checkpoint, where the overhead of calls exceeds their computation."""

DIVISIBLE = replace(TINY, llm=replace(TINY.llm, num_attention_heads=8))
"""TINY with heads that two, four and eight tensor-parallel ranks divide."""
