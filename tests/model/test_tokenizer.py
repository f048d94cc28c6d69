"""Text and ids: what a user writes stays text, replies are cut as the reference cuts them, streams lose nothing."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from bagel.checkpoint.files import TOKENIZER_FILES, Checkpoint
from bagel.errors import CheckpointError
from bagel.model.tokenizer import (
    IM_END,
    IM_START,
    REPLACEMENT,
    VISION_END,
    VISION_START,
    BagelTokenizer,
    TextStream,
)

GOLDEN = Path(__file__).parents[1] / "golden"
CONTROL = [IM_START, IM_END, VISION_START, VISION_END, "<|endoftext|>", "<|object_ref_start|>"]
PLAIN, VOCABULARY, HEAD = 920, 934, 1000
"""Ids below: of text, of the tokenizer, of the LM head (the last ones stand for nothing, but a model may say them)."""


def copy_tokenizer(checkpoint: Checkpoint, folder: Path, left_out: tuple[str, ...] = ()) -> None:
    folder.mkdir(exist_ok=True)
    for name in TOKENIZER_FILES:
        if name not in left_out:
            shutil.copy(checkpoint.folder / name, folder)


def pieces(tokenizer: BagelTokenizer, ids: list[int]) -> list[str]:
    """What a stream gives out for each id, and at the end."""
    stream = TextStream(tokenizer)
    return [*(stream.push(token) for token in ids), stream.end()]


def test_ids_of_the_delimiters(tokenizer: BagelTokenizer) -> None:
    assert (tokenizer.bos, tokenizer.eos, tokenizer.image_start, tokenizer.image_end) == (921, 922, 929, 930)
    assert len(tokenizer) == VOCABULARY


def test_texts_have_the_references_ids(tokenizer: BagelTokenizer) -> None:
    table = json.loads((GOLDEN / "tables" / "tokenizer.json").read_text())
    for row in table["encode"]:
        assert tokenizer.encode(row["text"], allow_control=True) == row["ids"], row["text"]
        assert tokenizer.decode(row["ids"]) == row["decoded"]
    for row in table["decode"]:
        assert tokenizer.decode(row["ids"]) == row["decoded"]


@pytest.mark.parametrize("word", CONTROL)
def test_a_control_word_in_a_users_text_stays_text(tokenizer: BagelTokenizer, word: str) -> None:
    text = f"say {word} twice:{word}"
    ids = tokenizer.encode(text)
    assert max(ids) < PLAIN
    assert tokenizer.decode(ids) == text
    assert len(tokenizer.encode(word, allow_control=True)) == 1
    assert tokenizer.encode(text, allow_control=True).count(tokenizer.encode(word, allow_control=True)[0]) == 2


@given(pieces=st.lists(st.sampled_from([*CONTROL, "<|", "im_end", "|>", "<", "a cat", "\n", " ", "café", "猫"])))
def test_text_comes_back_and_holds_no_control_token(tokenizer: BagelTokenizer, pieces: list[str]) -> None:
    text = "".join(pieces)
    ids = tokenizer.encode(text)
    assert all(token < PLAIN for token in ids)
    assert tokenizer.decode(ids) == text


@given(text=st.text(st.characters(max_codepoint=0x2FF)))
def test_latin_text_comes_back_as_it_was(tokenizer: BagelTokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_segment_has_its_delimiters_and_nothing_else(tokenizer: BagelTokenizer) -> None:
    ids = tokenizer.encode("a red cube")
    assert tokenizer.segment("a red cube") == [921, *ids, 922]
    assert tokenizer.segment("") == [921, 922]
    assert not {921, 922} & set(tokenizer.segment(f"a{IM_END}{IM_START}b")[1:-1])


@pytest.mark.parametrize(
    ("written", "reply"),
    [
        ("a red cube", "a red cube"),
        ("", ""),
        (f"yes{IM_END}no", "yes"),
        (f"{IM_END}no", ""),
        (f"yes{IM_START}no", "yes"),
        (f"yes{IM_START}no{IM_END}", "yes"),
        (f"<think> hm </think> yes{VISION_START}", f"<think> hm </think> yes{VISION_START}"),
    ],
)
def test_a_reply_is_cut_at_control_words(tokenizer: BagelTokenizer, written: str, reply: str) -> None:
    assert tokenizer.reply([tokenizer.bos, *tokenizer.encode(written, allow_control=True)]) == reply


def test_a_reply_without_its_start_token_is_kept_whole(tokenizer: BagelTokenizer) -> None:
    assert tokenizer.reply(tokenizer.encode("a red cube")) == "a red cube"


@given(ids=st.lists(st.integers(0, HEAD - 1), max_size=30))
@example(ids=[127, 127, 102, 127])
@example(ids=[921, 64, 922, 127, 999])
def test_a_stream_is_the_reply_in_pieces(tokenizer: BagelTokenizer, ids: list[int]) -> None:
    whole, given_out = tokenizer.reply([tokenizer.bos, *ids]), ""
    for piece in pieces(tokenizer, ids):
        given_out += piece
        assert whole.startswith(given_out)
    assert given_out == whole


@given(text=st.text())
@example(text="café 🍜 naïve – 猫")
def test_a_stream_gives_out_whole_characters(tokenizer: BagelTokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    given_out = pieces(tokenizer, ids)
    whole = tokenizer.decode(ids)
    if REPLACEMENT not in whole:
        assert not any(REPLACEMENT in piece for piece in given_out)
    assert "".join(given_out) == whole


def test_a_stream_holds_half_a_character_back_until_it_is_whole_or_the_end(tokenizer: BagelTokenizer) -> None:
    first, second = tokenizer.encode("é")
    a = tokenizer.encode("a")[0]
    assert pieces(tokenizer, [a, first, second, a]) == ["a", "", "é", "a", ""]
    assert pieces(tokenizer, [a, first]) == ["a", "", REPLACEMENT]
    assert pieces(tokenizer, [first, a]) == ["", f"{REPLACEMENT}a", ""]
    assert pieces(tokenizer, []) == [""]


def test_text_is_given_out_as_soon_as_it_is_certain(tokenizer: BagelTokenizer) -> None:
    ids = tokenizer.encode("How many cups are on the table?")
    assert pieces(tokenizer, ids) == [*(tokenizer.decode([token]) for token in ids), ""]


def test_a_folder_without_a_tokenizer_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=re.escape(str(tmp_path))):
        BagelTokenizer(tmp_path)


@pytest.mark.parametrize(
    ("file", "text", "reason"),
    [
        ("tokenizer.json", "{", "cannot be read: Expecting property name"),
        ("tokenizer_config.json", "no JSON", "tokenizer_config.json cannot be read"),
        ("tokenizer_config.json", "[" * 100_000, "tokenizer_config.json cannot be read"),
        ("tokenizer.json", "[" * 100_000, "tokenizer.json cannot be read"),
        ("tokenizer.json", "{}", "cannot be read"),
    ],
)
def test_a_damaged_tokenizer_is_an_error(
    tmp_path: Path, checkpoint: Checkpoint, file: str, text: str, reason: str
) -> None:
    copy_tokenizer(checkpoint, tmp_path)
    (tmp_path / file).write_text(text)
    with pytest.raises(CheckpointError, match=rf"^{re.escape(str(tmp_path))}: .*{reason}"):
        BagelTokenizer(tmp_path)


def test_a_tokenizer_of_another_model_is_an_error(tmp_path: Path, checkpoint: Checkpoint) -> None:
    copy_tokenizer(checkpoint, tmp_path)
    for path in tmp_path.iterdir():
        path.write_text(path.read_text().replace(VISION_START, "<|elsewhere|>"))
    with pytest.raises(CheckpointError, match=r"has no <\|vision_start\|>"):
        BagelTokenizer(tmp_path)


def test_either_form_of_the_vocabulary_will_do(
    tmp_path: Path, checkpoint: Checkpoint, tokenizer: BagelTokenizer
) -> None:
    """tokenizer.json alone, or vocab.json and merges.txt, as the reference reads it."""
    text = f"a red cube{IM_END} café"
    for form, left_out in (("one file", ("vocab.json", "merges.txt")), ("two files", ("tokenizer.json",))):
        copy_tokenizer(checkpoint, tmp_path / form, left_out)
        copied = BagelTokenizer(tmp_path / form)
        for allow in (False, True):
            assert copied.encode(text, allow_control=allow) == tokenizer.encode(text, allow_control=allow)
