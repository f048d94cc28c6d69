"""Where images lie in a prompt: positions, whole images in steps, and what each query sees. vLLM is not needed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from bagel.checkpoint.files import Checkpoint
from bagel.checkpoint.roles import Role
from bagel.engine.noise import Posterior, text_uniforms
from bagel.engine.segments import ChainPlanner
from bagel.errors import ConfigError
from bagel.kv.digests import SegmentKind
from bagel.model.tokenizer import BagelTokenizer
from bagel.prompts import ImagePart, TextPart
from bagel.request import PosteriorMode, TextSettings
from bagel_thinker.vllm.choice import KEY, Text, choice
from bagel_thinker.vllm.requests import Placeholders, segment_starts, token_ids
from bagel_thinker.vllm.settings import VllmSettings, batched_tokens, engine_arguments, read_hf_config, row_limit
from bagel_thinker.vllm.spans import Span, pieces, placed_positions, whole_images
from tests.helpers import sketch

SETTINGS = VllmSettings("cpu", "float32", max_num_seqs=4, max_model_len=1000)
layouts = st.lists(st.tuples(st.integers(0, 9), st.integers(3, 9)), max_size=4)


def spans_of(layout: list[tuple[int, int]]) -> tuple[list[Span], int]:
    """(text before, image) pairs as spans, and the tokens of all of it with a text of 5 behind."""
    spans, at = [], 0
    for text, image in layout:
        spans.append((at + text, image))
        at += text + image
    return spans, at + 5


def test_an_image_takes_one_position() -> None:
    assert placed_positions(9, [(2, 3), (5, 2)]) == [0, 1, 2, 2, 2, 3, 3, 4, 5]
    assert placed_positions(3, [(0, 3)]) == [0, 0, 0]
    assert placed_positions(2, []) == [0, 1]


@given(layouts, st.data())
def test_no_step_ends_within_an_image(layout: list[tuple[int, int]], data: st.DataObject) -> None:
    spans, tokens = spans_of(layout)
    done = data.draw(st.integers(0, tokens - 1))
    new = whole_images(spans, done, data.draw(st.integers(1, tokens - done)))
    assert not any(start < done + new < start + length for start, length in spans if new)


@given(layouts, st.data())
def test_pieces_see_what_the_model_says(layout: list[tuple[int, int]], data: st.DataObject) -> None:
    spans, tokens = spans_of(layout)
    begin = data.draw(st.integers(0, tokens - 1))
    end = begin + whole_images(spans, begin, data.draw(st.integers(1, tokens - begin)))
    assume(end > begin)  # else the request waits for another step
    seen: dict[int, int] = {}
    for piece in pieces(begin, end, spans):
        for query in range(piece.begin, piece.end):
            seen[query] = query + 1 if piece.causal else piece.visible
    image = {query: start + length for start, length in spans for query in range(start, start + length)}
    assert seen == {query: image.get(query, query + 1) for query in range(begin, end)}


def test_an_image_that_is_cut_is_never_computed() -> None:
    with pytest.raises(RuntimeError, match="an image at rows 2 to 8 was scheduled only up to row 5"):
        list(pieces(0, 5, [(2, 6)]))


def test_a_chain_as_tokens(checkpoint: Checkpoint, tokenizer: BagelTokenizer) -> None:
    planner = ChainPlanner(checkpoint.config, tokenizer, b"tests")
    prompt = (TextPart("a cup"), ImagePart(sketch(), for_generation=True), TextPart("red"))
    chain = planner.chain(prompt, planner.prepare_images(prompt, PosteriorMode.MEAN, 0))
    ids = Placeholders.of(tokenizer, checkpoint.config.llm.vocab_size)
    tokens = token_ids(chain, ids)
    assert len(tokens) == chain.length
    for segment, start in zip(chain.segments, segment_starts(chain), strict=True):
        rows = tokens[start : start + segment.length]
        if segment.kind is SegmentKind.TEXT:
            assert tuple(rows) == segment.token_ids
        else:
            assert (rows[0], rows[-1]) == (tokenizer.image_start, tokenizer.image_end)
            # Latents are told by their id within a block, so no other token of a block may have it.
            assert (ids.latent in rows) == (segment.kind is SegmentKind.VAE)
            assert rows.count(ids.latent) in (0, segment.length - 2)


def test_the_configuration_survives_the_way_through_vllm(
    checkpoint: Checkpoint, tokenizer: BagelTokenizer, tmp_path: Path
) -> None:
    settings = replace(SETTINGS, role=Role.UNDERSTAND)
    ids = Placeholders.of(tokenizer, checkpoint.config.llm.vocab_size)
    arguments = engine_arguments(
        checkpoint.config, settings, ids, model=checkpoint.folder, config_folder=tmp_path, sink={}
    )
    written = json.loads((tmp_path / "config.json").read_text())
    assert read_hf_config(written["bagel"]) == (checkpoint.config, Role.UNDERSTAND)
    assert written["llm_config"]["max_position_embeddings"] == arguments["max_model_len"]
    assert arguments["max_model_len"] == row_limit(checkpoint.config, settings) > 1000


def test_a_step_too_small_for_an_image_is_refused(checkpoint: Checkpoint) -> None:
    assert batched_tokens(checkpoint.config, SETTINGS) >= 4902
    with pytest.raises(ConfigError, match=r"max_num_batched_tokens is 2048; the largest image and 4 texts .* 4922"):
        batched_tokens(checkpoint.config, replace(SETTINGS, max_num_batched_tokens=2048))


def test_only_what_is_not_the_likeliest_is_chosen_by_our_rule() -> None:
    assert choice(TextSettings(), 3, [1]) == {}
    settings = TextSettings(do_sample=True, temperature=1.0, max_tokens=2, stop_token_ids=(5,))
    carried = json.loads(json.dumps(choice(settings, 3, [1])))
    output: list[int] = []
    text = Text.of(carried[KEY], output)
    first, second = text_uniforms(3, 2).tolist()
    logits = [0.0, 0.0]  # a token each for one half of [0, 1)
    assert _next(text, logits) == int(first >= 0.5)
    output.append(0)
    assert _next(text, logits) == int(second >= 0.5)


def test_the_repetition_penalty_sees_prompt_and_text() -> None:
    penalised = choice(TextSettings(repetition_penalty=4.0), 0, [0])[KEY]
    logits = [3.0, 2.0, 1.0]
    assert _next(Text.of(penalised, []), logits) == 1
    assert _next(Text.of(penalised, [1]), logits) == 2


def _next(text: Text, logits: list[float]) -> int:
    """A text's next token."""
    import torch

    from bagel.engine.sampling import choose

    return int(choose(torch.tensor([logits]), [text.choice]))


def test_noise_is_drawn_as_everywhere(checkpoint: Checkpoint, tokenizer: BagelTokenizer) -> None:
    import torch

    from bagel.images import pixel_digest
    from bagel_thinker.vllm.images import image_item

    planner = ChainPlanner(checkpoint.config, tokenizer, b"tests")
    prompt = (ImagePart(sketch(), for_generation=True),)
    vae, vit = planner.chain(prompt, planner.prepare_images(prompt, PosteriorMode.SEED, 9)).segments
    assert vae.image is not None
    item = image_item(vae, checkpoint.config)
    shape = (1, 16, vae.image.height // 8, vae.image.width // 8)
    assert torch.equal(item["vae_noise"], Posterior(PosteriorMode.SEED, 9).draw(shape, pixel_digest(vae.image)))
    assert image_item(vit, checkpoint.config)["vit_patches"].shape == (vit.length - 2, 588)
