"""Names of the K/V that Thinkers of different numbers make: a DiT takes both, and never one for the other."""

from __future__ import annotations

import torch

from bagel.checkpoint.files import Checkpoint
from bagel.checkpoint.roles import Role
from bagel.engine.loading import load_role
from bagel.engine.segments import ChainPlanner
from bagel.kv.digests import fingerprint
from bagel.model.tokenizer import BagelTokenizer
from bagel.prompts import TextPart
from bagel_thinker.vllm.settings import VllmSettings
from tests.conftest import GOLDEN


def test_segments_of_a_quantised_thinker_have_names_of_their_own() -> None:
    checkpoint = Checkpoint(GOLDEN / "checkpoint")

    def names(quantization: str | None) -> set[bytes]:
        settings = VllmSettings("cpu", "bfloat16", max_num_seqs=1, max_model_len=600, quantization=quantization)
        made = settings.segments_fingerprint(checkpoint.fingerprint)
        planner = ChainPlanner(checkpoint.config, BagelTokenizer(checkpoint.folder), made)
        return {segment.digest for segment in planner.chain((TextPart("a red cube"),), {}).segments}

    dit = load_role(checkpoint, Role.DENOISE, dtype=torch.bfloat16, device=torch.device("cpu"), quantization="fp8")
    assert names(None) and not names(None) & names("fp8") and not names("fp8") & names("fp8_per_channel")
    # What a DiT expects, quantised itself or not, is what either Thinker's store says of itself.
    assert dit.kv_fingerprint == fingerprint(checkpoint.fingerprint, "bfloat16")
