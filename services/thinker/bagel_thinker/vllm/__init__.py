"""The Thinker on vLLM: BAGEL as an out-of-tree model of it, and its K/V exported to the store (docs/vllm.md)."""
