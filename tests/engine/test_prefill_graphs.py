"""Short texts as CUDA graphs: the K/V of a forward that is launched kernel by kernel."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from bagel.checkpoint.files import Checkpoint
from bagel.checkpoint.roles import Role
from bagel.engine.context import ContextBuilder, SegmentCache
from bagel.engine.memory import kv_space
from bagel.engine.prefill_graphs import SIZES, PrefillGraphs
from bagel.engine.segments import ChainPlanner
from bagel.model.tokenizer import BagelTokenizer
from bagel.model.weights import load_model
from bagel.prompts import ImagePart, TextPart
from bagel.request import PosteriorMode

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.mark.parametrize("words", [1, 5, 9, 40, 2 * SIZES[-1]])
def test_texts_alone_and_behind_an_image(checkpoint: Checkpoint, tokenizer: BagelTokenizer, words: int) -> None:
    model = load_model(checkpoint, Role.FULL, delimiter_ids=(1, 2), dtype=torch.bfloat16, device="cuda")
    space = kv_space(model, None)
    planner = ChainPlanner(model.config, tokenizer, b"k")
    text, image = TextPart("red " * words), ImagePart(Image.new("RGB", (64, 64), "red"), for_generation=True)
    for prompt in ((text,), (image, text), (text, image, text)):
        chain = planner.chain(prompt, planner.prepare_images(prompt, PosteriorMode.MEAN, seed=0))
        graphs = PrefillGraphs.over(model, space)
        assert graphs is not None
        captured, launched = (ContextBuilder(model, SegmentCache(0), texts).build(chain) for texts in (graphs, None))
        for ours, wanted in zip(captured.kv, launched.kv, strict=True):
            for one, other in ((ours.k, wanted.k), (ours.v, wanted.v)):
                assert (one - other).float().norm() < 0.02 * other.float().norm()
        assert not space.taken
