"""Train the tokenizer, a byte-level BPE in Qwen2's format, on the tasks' texts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers.models import BPE

from training.nano.tasks import GROUPS

VOCABULARY = 1024
CONTROL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>"),
    *("<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>"),
    *("<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
)
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Qwen2's pattern, which splits a text before BPE."""


def corpus(seed: int, count: int) -> Iterator[str]:
    """Yield texts of all tasks."""
    rng = Random(seed)  # a fixed seed, so that every run gets the same tokenizer
    for _ in range(count):
        for make in GROUPS.values():
            example = make(rng)
            yield from (*example.texts, example.answer or "")


def train_tokenizer(folder: Path, *, seed: int = 0, examples: int = 4000) -> None:
    """Write tokenizer.json, vocab.json, merges.txt and tokenizer_config.json."""
    tokenizer: Any = Tokenizer(BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(CONTROL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[],
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(seed, examples), trainer)
    tokenizer.add_special_tokens(list(CONTROL))  # after training, so that their ids come last, as Qwen2's do
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer.model.save(str(folder))
    first = tokenizer.get_vocab_size() - len(CONTROL)
    config = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(first + i): {"content": token, "special": True, **dict.fromkeys(_FLAGS, False)}
            for i, token in enumerate(CONTROL)
        },
        "additional_special_tokens": list(CONTROL[1:]),
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 4096,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")


_FLAGS = ("lstrip", "normalized", "rstrip", "single_word")
