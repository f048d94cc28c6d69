"""Engines of other settings: without the generation expert, and on two ranks."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bagel.checkpoint.files import Checkpoint
from bagel.checkpoint.roles import Role
from bagel.deployment.launcher import is_serving
from bagel.deployment.process import Service
from bagel.errors import ConfigError
from bagel.kv.digests import fingerprint
from bagel.prompts import TextPart
from bagel.request import TextSettings
from bagel_thinker.torch_engine import TorchEngine
from tests.conftest import GOLDEN
from tests.thinker.vllm import test_engine
from tests.thinker.vllm.test_engine import LIMIT_S, STORE_BYTES, Ask, agrees, ask, image, mixed, settled

pytestmark = test_engine.pytestmark
small, exact = test_engine.small, test_engine.exact
START_S = 300
"""Two workers import vLLM again, which on a busy machine takes minutes."""


def test_an_understanding_model_is_smaller_and_writes_the_same(small: Checkpoint, exact: TorchEngine) -> None:
    from bagel_thinker.vllm.engine import VllmEngine
    from bagel_thinker.vllm.settings import VllmSettings

    chosen = VllmSettings("cpu", "float32", max_num_seqs=2, max_model_len=600, role=Role.UNDERSTAND)
    engine = VllmEngine(small, chosen, model_name="tiny", kv_store_bytes=STORE_BYTES)
    try:
        model = engine._core._client.engine_core.model_executor.driver_worker.worker.model_runner.model
        assert not len(model.generation) and model.images.vae is None
        asked = [
            Ask((image(96, edit=False), TextPart("what is it")), TextSettings(max_tokens=6)),
            Ask((TextPart("x"),)),
        ]
        agrees(engine, exact, asked)
    finally:
        engine.close()


def test_two_ranks_write_their_halves(small: Checkpoint, exact: TorchEngine) -> None:
    from bagel_thinker.vllm.engine import VllmEngine
    from bagel_thinker.vllm.settings import VllmSettings

    chosen = VllmSettings("cpu", "float32", max_num_seqs=4, max_model_len=600, tensor_parallel_size=2)
    engine = VllmEngine(small, chosen, model_name="tiny", kv_store_bytes=STORE_BYTES)
    try:
        agrees(engine, exact, mixed(6))
        assert settled(engine)
    finally:
        engine.close()


def test_quantised_layers_are_those_of_both_experts(small: Checkpoint, exact: TorchEngine) -> None:
    """Of vLLM's ways the one that its CPU build has for a checkpoint that is not quantised."""
    from bagel_thinker.vllm.engine import VllmEngine
    from bagel_thinker.vllm.settings import VllmSettings

    chosen = VllmSettings("cpu", "bfloat16", max_num_seqs=4, max_model_len=600, quantization="fp8_per_channel")
    engine = VllmEngine(small, chosen, model_name="tiny", kv_store_bytes=STORE_BYTES)
    try:
        # A DiT takes its K/V, by names that no other Thinker gives to its own.
        assert engine.info.kv_fingerprint == engine.store.fingerprint == fingerprint(small.fingerprint, "bfloat16")
        assert engine.planner.fingerprint == chosen.segments_fingerprint(small.fingerprint)
        for prompt in ((TextPart("a cube"),), (image(96, edit=True), TextPart("make it blue"))):
            answer, alone = ask(engine, Ask(prompt)), ask(exact, Ask(prompt))
            for (k, _), (right, _) in zip(answer.kv(), alone.kv(), strict=True):
                assert float((k - right).norm() / right.norm()) < 0.2
    finally:
        engine.close()


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("fb8", "Unknown quantization method: fb8"),
        ("experts_int8", "which leaves 32 linear layers as they are here, language_model.model.layers.0.self_attn.qkv"),
        ("fp8", "with which vLLM cannot load this model on cpu: "),
        ("awq", "vLLM refuses these settings: "),
    ],
)
def test_what_vllm_cannot_quantise_is_refused_in_one_line(name: str, told: str, small: Checkpoint) -> None:
    from bagel_thinker.vllm.engine import VllmEngine
    from bagel_thinker.vllm.settings import VllmSettings

    chosen = VllmSettings("cpu", "bfloat16", max_num_seqs=4, max_model_len=600, quantization=name)
    with pytest.raises(ConfigError) as caught:
        VllmEngine(small, chosen, model_name="tiny", kv_store_bytes=STORE_BYTES)
    assert told in str(caught.value) and "\n" not in str(caught.value)


def child(parent: int, name: str) -> int:
    """The process with that name among the children of another."""
    for children in Path(f"/proc/{parent}/task").glob("*/children"):
        for pid in children.read_text().split():
            if name in Path(f"/proc/{pid}/cmdline").read_text():
                return int(pid)
    raise LookupError(f"{parent} has no child {name}")


@pytest.fixture
def short_tmp() -> Iterator[Path]:
    """A folder for temporary files whose path leaves room for the names of vLLM's sockets."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.mark.parametrize("victim", ["Worker_TP1", "bagel_thinker"])
def test_a_service_ends_with_its_worker_and_leaves_nothing(victim: str, tmp_path: Path, short_tmp: Path) -> None:
    flags = ["--listen", "127.0.0.1:0", "--model", str(GOLDEN / "checkpoint"), "--max-model-len", "600"]
    flags += ["--engine", "vllm", "--tensor-parallel-size", "2"]
    thinker = Service(
        "thinker-0", "the Thinker", "bagel_thinker", flags, {**os.environ, "TMPDIR": str(short_tmp)}, tmp_path
    )
    try:
        address, deadline = thinker.address(time.monotonic() + LIMIT_S), time.monotonic() + START_S
        while not is_serving(address):
            assert time.monotonic() < deadline
            thinker.check()
            time.sleep(0.2)
        own = victim == "bagel_thinker"
        os.kill(thinker.process.pid if own else child(thinker.process.pid, victim), signal.SIGKILL)
        assert thinker.process.wait(60) == (-signal.SIGKILL if own else 1)
    finally:
        thinker.process.kill()
        thinker.end(10)
    assert own or "the Thinker's engine cannot go on" in next(tmp_path.glob("*.log")).read_text()
    assert not list(short_tmp.glob("bagel-*"))
