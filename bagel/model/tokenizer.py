"""Text to ids and back, with the checkpoint's own Qwen2 byte-level BPE."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Tokenizer as FastTokenizer
from transformers import Qwen2Tokenizer

from bagel.checkpoint.json_files import read_json_file
from bagel.errors import CheckpointError

IM_START, IM_END = "<|im_start|>", "<|im_end|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
_FILES = (("tokenizer.json",), ("vocab.json", "merges.txt"))
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class BagelTokenizer:
    """Encodes what a user writes as plain text: control tokens in it are characters, not tokens.

    Attributes bos, eos, image_start and image_end are the ids that delimit text and image segments.
    """

    def __init__(self, folder: Path) -> None:
        """Read the tokenizer files of a checkpoint folder; raises CheckpointError if they are missing or odd."""
        if not any(all((folder / name).is_file() for name in names) for names in _FILES):
            raise CheckpointError(
                f"{folder} has no tokenizer; a BAGEL checkpoint has tokenizer.json, or vocab.json and merges.txt"
            )
        try:
            loaded = Qwen2Tokenizer.from_pretrained(str(folder), local_files_only=True)
            self._control: FastTokenizer = loaded.backend_tokenizer
        except Exception as error:  # the tokenizers library raises Exception itself
            reason = str(error).strip().splitlines()[0]
            raise CheckpointError(f"{folder}: {_damaged(folder)} cannot be read: {reason}") from None
        self._plain = _without_added_tokens(self._control)
        self.bos, self.eos = self._id(folder, IM_START), self._id(folder, IM_END)
        self.image_start, self.image_end = self._id(folder, VISION_START), self._id(folder, VISION_END)

    def __len__(self) -> int:
        return int(self._control.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str, *, allow_control: bool = False) -> list[int]:
        """Ids of a text, nothing added. allow_control lets control words become their tokens, as the reference does."""
        tokenizer = self._control if allow_control else self._plain
        return list(tokenizer.encode(text, add_special_tokens=False).ids)

    def segment(self, text: str) -> list[int]:
        """A text segment: <|im_start|> text <|im_end|>."""
        return [self.bos, *self.encode(text), self.eos]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids, control tokens kept."""
        return str(self._control.decode(list(ids), skip_special_tokens=False))

    def reply(self, ids: Sequence[int]) -> str:
        """A generated reply as the reference reads it.

        Cut before the first <|im_end|>, then what lies after the first <|im_start|>, and before a second one. ids
        begin with the start token that generation was begun with.
        """
        text = self.decode(ids).split(IM_END)[0]
        pieces = text.split(IM_START)
        return pieces[1] if len(pieces) > 1 else text

    def _id(self, folder: Path, token: str) -> int:
        number = self._control.token_to_id(token)
        if number is None:
            raise CheckpointError(f"{folder}: the tokenizer has no {token}")
        return int(number)


def _damaged(folder: Path) -> str:
    """The file that is no JSON, which the library does not name; all of them if it is none."""
    for path in sorted({*folder.glob("*token*.json"), *folder.glob("vocab.json")}):
        try:
            read_json_file(path)
        except CheckpointError:
            return path.name
    return "the tokenizer files"


class TextStream:
    """Decodes a growing list of ids piece by piece; a character whose bytes are not all there yet is held back.

    As in `BagelTokenizer.reply`, a start or end token among them ends the text.
    """

    def __init__(self, tokenizer: BagelTokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._ended = False
        self._shown = 0  # ids before this one have been given out
        self._window = 0  # decoding starts here: enough context to know how the next piece joins

    def push(self, token: int) -> str:
        """Add an id; the text that became certain."""
        self._ended = self._ended or token in (self._tokenizer.bos, self._tokenizer.eos)
        if self._ended:
            return ""
        self._ids.append(token)
        return self._take(final=False)

    def end(self) -> str:
        """What is left, incomplete characters included."""
        return self._take(final=True)

    def _take(self, *, final: bool) -> str:
        before = self._tokenizer.decode(self._ids[self._window : self._shown])
        text = self._tokenizer.decode(self._ids[self._window :])
        if len(text) <= len(before) or (text.endswith(REPLACEMENT) and not final):
            return ""
        self._window, self._shown = self._shown, len(self._ids)
        return text[len(before) :]


def _without_added_tokens(tokenizer: FastTokenizer) -> FastTokenizer:
    """The same BPE with no token that text could name: all added tokens are control words."""
    description = json.loads(tokenizer.to_str())
    description["added_tokens"] = []
    description["post_processor"] = None
    return FastTokenizer.from_str(json.dumps(description))
