"""Prompts and the branches that classifier-free guidance needs. Pure: no torch, no I/O.

A prompt is an ordered list of parts. Guidance compares the whole prompt with two poorer ones:
gen (everything), cfg_text (without the last text) and cfg_img (without the images). The rules are the
reference's `InterleaveInferencer.interleave_inference` (ByteDance-Seed/Bagel).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeVar

from PIL.Image import Image

from bagel.errors import IncompleteContext, InvalidImage, InvalidRequest
from bagel.images import InputImage, plain

# The space before each line break is the reference's.
THINK_IMAGE_PROMPT = (
    "You should first think about the planning process in the mind and then generate the image. \n"
    "The planning process is enclosed within <think> </think> tags, i.e. "
    "<think> planning process here </think> image here"
)
THINK_TEXT_PROMPT = (
    "You should first think about the reasoning process in the mind and then provide the user with the answer. \n"
    "The reasoning process is enclosed within <think> </think> tags, i.e. "
    "<think> reasoning process here </think> answer here"
)

C = TypeVar("C")


@dataclass(frozen=True)
class TextPart:
    """One text; it becomes a segment of its own, <|im_start|> text <|im_end|>.

    Raises InvalidRequest if it is no Unicode text (a lone surrogate, as bytes that are not UTF-8 become).
    """

    text: str

    def __post_init__(self) -> None:
        try:
            self.text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequest(
                "prompt", f"the prompt {self.text!r:.80} is no UTF-8 text at character {error.start + 1}; send UTF-8"
            ) from None


@dataclass(frozen=True)
class ImagePart:
    """One image, entered as VAE tokens (for_generation), ViT tokens (for_understanding) or both, in that order.

    A Pillow image becomes what a file of it is read as (`bagel.images.to_rgb`); InvalidImage if it cannot.
    """

    image: InputImage
    for_generation: bool
    for_understanding: bool = True

    def __post_init__(self) -> None:
        if not (self.for_generation or self.for_understanding):
            raise InvalidRequest("image", "an image part is for generation, for understanding or both; neither is set")
        if not isinstance(self.image, InputImage):
            raise InvalidImage("image", f"the image of a part is {self.image!r:.80}; it must be a Pillow image")
        if isinstance(self.image, Image):
            object.__setattr__(self, "image", plain(self.image))

    @property
    def pixels(self) -> Image:
        """The image, of a part whose image is decoded in this process."""
        assert isinstance(self.image, Image)
        return self.image


Part = TextPart | ImagePart
Prompt = tuple[Part, ...]


class BranchName(StrEnum):
    """The three contexts that a picture is drawn from."""

    GEN = "gen"
    CFG_TEXT = "cfg_text"
    CFG_IMG = "cfg_img"


@dataclass(frozen=True)
class Branch:
    """A prompt to build K/V for.

    max_tokens: visible tokens of text decoded after it. writes: that text is kept, and appended as a text part of its
    own, as the think text is to gen. Companions stop after prefill: max_tokens 1, of which nothing is kept. A think
    text may be limited to 1 token too, so the limit alone cannot say which of the two it is.
    """

    name: BranchName
    parts: Prompt
    max_tokens: int = 1
    writes: bool = False


def expand_cfg_prompts(prompt: Prompt, *, negative_prompt: str = "") -> tuple[Branch, ...]:
    """The branches gen, cfg_text and cfg_img of a prompt for a picture, in this order.

    cfg_text is gen before its last text, or with the image if one follows that text, plus the negative
    prompt if there is one; cfg_img is the texts alone. Branches with equal parts have equal K/V.
    """
    gen: Prompt = ()
    cfg_text: Prompt = ()
    cfg_img: Prompt = ()
    for part in prompt:
        if isinstance(part, TextPart):
            cfg_text = gen
            gen, cfg_img = (*gen, part), (*cfg_img, part)
        else:
            gen = (*gen, part)
            cfg_text = gen
    if negative_prompt:
        cfg_text = (*cfg_text, TextPart(negative_prompt))
    return (
        Branch(BranchName.GEN, gen),
        Branch(BranchName.CFG_TEXT, cfg_text),
        Branch(BranchName.CFG_IMG, cfg_img),
    )


def expand_cfg_prompts_think(
    prompt: Prompt, *, negative_prompt: str = "", max_think_tokens: int = 1000
) -> tuple[Branch, ...]:
    """As expand_cfg_prompts, with the think system prompt first in every branch.

    gen decodes up to max_think_tokens of think text; the companions decode nothing and never get that text.
    """
    branches = expand_cfg_prompts((TextPart(THINK_IMAGE_PROMPT), *prompt), negative_prompt=negative_prompt)
    gen, *companions = branches
    return (Branch(gen.name, gen.parts, max_think_tokens, writes=True), *companions)


def text_prompt(prompt: Prompt, *, think: bool) -> Prompt:
    """The parts that a text answer is decoded after."""
    return (TextPart(THINK_TEXT_PROMPT), *prompt) if think else prompt


def collect_cfg_kv_caches(
    branches: tuple[Branch, ...], contexts: Mapping[BranchName, C], needed: frozenset[BranchName]
) -> dict[BranchName, C]:
    """The contexts a picture is drawn from, one per needed branch, once all of them are there.

    Raises IncompleteContext if one is missing: a lost cache must never turn into a wrong picture.
    """
    expanded = {branch.name for branch in branches}
    names = [name for name in BranchName if name in needed]
    missing = [name for name in names if name not in expanded or name not in contexts]
    if missing:
        raise IncompleteContext(f"no K/V for the branch {', '.join(missing)}; the picture was not drawn")
    return {name: contexts[name] for name in names}
