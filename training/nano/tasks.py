"""The groups of tasks, each of which makes examples from a random generator.

In training all sequences of a group have one shape: `draw` (text, picture), `plan` (think text, picture), `edit`
(picture, text, picture), `see` (picture or none, question, answer) and `reason` (the same with a think text).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from random import Random

from training.nano.drawing import draw, planned
from training.nano.edits import edit
from training.nano.examples import Example
from training.nano.questions import reason, see

NOISY = 0.08
"""Share of drawings with the text of another one: captions from the web are like that, and guidance corrects it."""

GROUPS: dict[str, Callable[[Random], Example]] = {
    "draw": draw,
    "plan": planned,
    "edit": edit,
    "see": see,
    "reason": reason,
}


def drop(rng: Random, example: Example) -> Example:
    """Remove conditions at random, so that training covers each branch of guidance.

    draw: no text, or another picture's (NOISY). plan: no plan (cfg_img), or only the system prompt (cfg_text).
    edit: only the picture (cfg_text), only the text (cfg_img), or nothing.
    """
    if example.target is None:  # answers are not guided
        return example
    chance = rng.random()
    if example.source is not None:
        if chance < 0.1:
            return replace(example, texts=())
        if chance < 0.2:
            return replace(example, source=None, vae=False, vit=False)
        return replace(example, texts=(), source=None, vae=False, vit=False) if chance < 0.23 else example
    if example.answer is not None:
        if chance < 0.1:
            return replace(example, answer=None)
        return replace(example, answer=None, texts=example.texts[:1]) if chance < 0.2 else example
    if chance < 0.1:
        return replace(example, texts=())
    return replace(example, texts=draw(rng).texts) if chance < 0.1 + NOISY else example
