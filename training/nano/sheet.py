"""Contact sheets: sections of captioned pictures on one canvas."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

SIDE, GAP, LINE, TITLE = 128, 14, 13, 26
LINES = 9
"""The most lines of a caption; the rest is cut off."""
PAPER, INK, WRONG = (238, 238, 238), (30, 30, 30), (215, 0, 0)


@dataclass(frozen=True)
class Cell:
    """Pictures, one above the other, with a caption below; right=False gives them a red frame."""

    pictures: tuple[Image.Image, ...]
    caption: str
    right: bool = True


@dataclass(frozen=True)
class Section:
    """A title and its cells, side by side."""

    title: str
    cells: tuple[Cell, ...]


def wrapped(text: str, width: float, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    """Wrap a text into lines of at most `width` pixels, unless one word is longer; keeps its own line breaks."""
    lines: list[str] = []
    for paragraph in text.splitlines():
        lines.append("")
        for word in paragraph.split():
            longer = f"{lines[-1]} {word}".lstrip()
            if not lines[-1] or font.getlength(longer) <= width:  # a word that is too long gets its own line
                lines[-1] = longer
            else:
                lines.append(word)
    return lines


def _caption(cell: Cell) -> list[str]:
    return wrapped(cell.caption, SIDE + GAP - 4, ImageFont.load_default(11))[:LINES]


def contact_sheet(sections: Sequence[Section]) -> Image.Image:
    """Draw all sections on one canvas, one below the other."""
    columns = max((len(section.cells) for section in sections), default=1)
    heights = [_height(section) for section in sections]
    canvas = Image.new("RGB", (columns * (SIDE + GAP) + GAP, sum(heights) + GAP), PAPER)
    pen, top = ImageDraw.Draw(canvas), GAP
    for section, height in zip(sections, heights, strict=True):
        pen.text((GAP, top), section.title, fill=INK, font=ImageFont.load_default(15))
        for column, cell in enumerate(section.cells):
            _put(canvas, pen, cell, GAP + column * (SIDE + GAP), top + TITLE)
        top += height
    return canvas


def _height(section: Section) -> int:
    cells = section.cells
    pictures, lines = max(len(cell.pictures) for cell in cells), max(len(_caption(cell)) for cell in cells)
    return TITLE + pictures * (SIDE + 6) + lines * LINE + GAP


def _put(canvas: Image.Image, pen: ImageDraw.ImageDraw, cell: Cell, left: int, top: int) -> None:
    font = ImageFont.load_default(11)
    for picture in cell.pictures:
        canvas.paste(picture.resize((SIDE, SIDE)), (left, top))
        top += SIDE + 6
    if not cell.right:
        pen.rectangle((left - 4, top - SIDE - 10, left + SIDE + 3, top - 3), outline=WRONG, width=3)
    for line in _caption(cell):
        pen.text((left, top), line, fill=INK if cell.right else WRONG, font=font)
        top += LINE
