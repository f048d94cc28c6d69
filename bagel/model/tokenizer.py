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
    """Turns text into ids. A control word in a user's text is characters like any other, not a control token.

    bos, eos, image_start and image_end are the ids that delimit text and image segments.
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
        # A second tokenizer, so that no text of a user becomes a control token.
        self._plain = _without_added_tokens(self._control)
        self.bos, self.eos = self._id(folder, IM_START), self._id(folder, IM_END)
        self.image_start, self.image_end = self._id(folder, VISION_START), self._id(folder, VISION_END)

    def __len__(self) -> int:
        return int(self._control.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str, *, allow_control: bool = False) -> list[int]:
        """Ids of a text, with nothing added. allow_control: control words become their tokens, as in the reference."""
        tokenizer = self._control if allow_control else self._plain
        return list(tokenizer.encode(text, add_special_tokens=False).ids)

    def segment(self, text: str) -> list[int]:
        """A text segment: <|im_start|> text <|im_end|>."""
        return [self.bos, *self.encode(text), self.eos]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids, control tokens kept."""
        # Control tokens are kept, as `reply` cuts the text by them.
        return str(self._control.decode(list(ids), skip_special_tokens=False))

    def reply(self, ids: Sequence[int]) -> str:
        """The text of a generated reply, by the reference's rule.

        The text is cut before the first <|im_end|>. What lies between the first <|im_start|> and a second one is the
        reply. ids begin with the start token that generation began with.
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
    """The file that is not JSON, as the library does not name it; if all are, the files as a whole."""
    for path in sorted({*folder.glob("*token*.json"), *folder.glob("vocab.json")}):
        try:
            read_json_file(path)
        except CheckpointError:
            return path.name
    return "the tokenizer files"


class TextStream:
    """Decodes a growing list of ids piece by piece. A character is held back until all of its bytes are there.

    A start or end token ends the text, as in `BagelTokenizer.reply`.
    """

    def __init__(self, tokenizer: BagelTokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._ended = False
        self._shown = 0  # the text of ids before this one has been returned
        self._window = 0  # decoding begins here, so that the next piece is decoded with what it joins

    def push(self, token: int) -> str:
        """Add an id; returns the text that it completes."""
        self._ended = self._ended or token in (self._tokenizer.bos, self._tokenizer.eos)
        if self._ended:
            return ""
        self._ids.append(token)
        return self._take(final=False)

    def end(self) -> str:
        """Returns the rest, incomplete characters included."""
        return self._take(final=True)

    def _take(self, *, final: bool) -> str:
        before = self._tokenizer.decode(self._ids[self._window : self._shown])
        text = self._tokenizer.decode(self._ids[self._window :])
        if len(text) <= len(before) or (text.endswith(REPLACEMENT) and not final):
            return ""
        self._window, self._shown = self._shown, len(self._ids)
        return text[len(before) :]


def _without_added_tokens(tokenizer: FastTokenizer) -> FastTokenizer:
    """The same BPE without its added tokens. All of them are control words, which no text may become."""
    description = json.loads(tokenizer.to_str())
    description["added_tokens"] = []
    description["post_processor"] = None
    return FastTokenizer.from_str(json.dumps(description))
