"""The vLLM engine on several ranks against the exact one, on a CPU: `make test-vllm`.

A module of its own: an engine that ends takes vLLM's groups of its process along, and with them another engine's there.
"""

from __future__ import annotations

from bagel.checkpoint.files import Checkpoint
from bagel_thinker.torch_engine import TorchEngine
from tests.thinker.vllm import test_engine
from tests.thinker.vllm.test_engine import STORE_BYTES, agrees, mixed

pytestmark = test_engine.pytestmark
small, exact = test_engine.small, test_engine.exact


def test_two_ranks_that_share_every_layer_come_to_the_same(small: Checkpoint, exact: TorchEngine) -> None:
    """vLLM's tensor parallelism, with a process a rank: each copies the K/V of its heads to the store."""
    from bagel_thinker.vllm.engine import VllmEngine
    from bagel_thinker.vllm.settings import VllmSettings

    chosen = VllmSettings("cpu", "float32", max_num_seqs=8, max_model_len=600, tensor_parallel_size=2)
    engine = VllmEngine(small, chosen, model_name="tiny", kv_store_bytes=STORE_BYTES)
    try:
        agrees(engine, exact, mixed(6))
    finally:
        engine.close()
