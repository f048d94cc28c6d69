"""Prompts and the branches that classifier-free guidance needs. Pure: no torch, no I/O.

A prompt is an ordered list of parts. Guidance compares the whole prompt (gen) with two that say less: cfg_text lacks
the last text, cfg_img lacks the images. The rules are those of the reference's
`InterleaveInferencer.interleave_inference` (ByteDance-Seed/Bagel).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeVar

from PIL.Image import Image

from bagel.errors import IncompleteContext, InvalidImage, InvalidRequest
from bagel.images import InputImage, plain

# To the letter the reference's prompts, with the space before each line break: the model was trained on them.
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
    """One text, which becomes a segment of its own: <|im_start|> text <|im_end|>.

    Raises InvalidRequest for a text that is not valid Unicode.
    """

    text: str

    def __post_init__(self) -> None:
        try:  # fails on lone surrogates, into which Python decodes arguments and file names that are not UTF-8
            self.text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequest(
                "prompt", f"the prompt {self.text!r:.80} is no UTF-8 text at character {error.start + 1}; send UTF-8"
            ) from None


@dataclass(frozen=True)
class ImagePart:
    """One image, entered as VAE tokens (for_generation), ViT tokens (for_understanding) or both, in that order.

    A Pillow image is converted as if it were read from a file (`bagel.images.to_rgb`), or refused with InvalidImage.
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
        """The decoded image; only for a part whose image was decoded in this process."""
        assert isinstance(self.image, Image)
        return self.image


Part = TextPart | ImagePart
Prompt = tuple[Part, ...]


class BranchName(StrEnum):
    """The three contexts from which a picture is drawn."""

    GEN = "gen"
    CFG_TEXT = "cfg_text"
    CFG_IMG = "cfg_img"


@dataclass(frozen=True)
class Branch:
    """A prompt to build K/V for.

    max_tokens: visible tokens of text to decode after it. writes: that text is kept and becomes the last text part, as
    the think text does in gen. The companions stop after prefill: max_tokens is 1, and that token is dropped. A think
    text may be limited to 1 token too, so `writes` tells the two apart.
    """

    name: BranchName
    parts: Prompt
    max_tokens: int = 1
    writes: bool = False


def expand_cfg_prompts(prompt: Prompt, *, negative_prompt: str = "") -> tuple[Branch, ...]:
    """The branches gen, cfg_text and cfg_img of a picture's prompt, in this order.

    cfg_text is gen up to its last text; if an image follows that text, it is all of gen. A negative prompt is appended
    to it. cfg_img is the texts alone. Branches with equal parts have equal K/V.
    """
    gen: Prompt = ()
    cfg_text: Prompt = ()
    cfg_img: Prompt = ()
    for part in prompt:
        if isinstance(part, TextPart):
            cfg_text = gen  # what stood before this text, until the next part
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
    """Like expand_cfg_prompts, with the think system prompt first in every branch.

    gen decodes up to max_think_tokens of think text. The companions decode nothing and never include that text.
    """
    branches = expand_cfg_prompts((TextPart(THINK_IMAGE_PROMPT), *prompt), negative_prompt=negative_prompt)
    gen, *companions = branches
    return (Branch(gen.name, gen.parts, max_think_tokens, writes=True), *companions)


def prompt_text(prompt: Prompt) -> str:
    """The texts of a prompt as one."""
    return " ".join(part.text for part in prompt if isinstance(part, TextPart))


def text_prompt(prompt: Prompt, *, think: bool) -> Prompt:
    """The prompt of a text answer, with the think system prompt first if it thinks."""
    return (TextPart(THINK_TEXT_PROMPT), *prompt) if think else prompt


def collect_cfg_kv_caches(
    branches: tuple[Branch, ...], contexts: Mapping[BranchName, C], needed: frozenset[BranchName]
) -> dict[BranchName, C]:
    """Collect the contexts from which a picture is drawn, one per needed branch.

    Raises IncompleteContext if one is missing: a lost cache must never become a wrong picture.
    """
    expanded = {branch.name for branch in branches}
    names = [name for name in BranchName if name in needed]
    missing = [name for name in names if name not in expanded or name not in contexts]
    if missing:
        raise IncompleteContext(f"no K/V for the branch {', '.join(missing)}; the picture was not drawn")
    return {name: contexts[name] for name in names}
