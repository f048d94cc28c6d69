"""A contact sheet: titled rows of cards, each with one or two pictures and texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from training.nano.sheet import wrapped

SIDE, GAP, LINE, HEAD = 192, 20, 17, 44
ARROW, BESIDE = 34, 220
"""The widths of the arrow between two pictures, and of a text beside a picture."""
PAPER, CARD, INK, FAINT, EDGE = (243, 244, 246), (255, 255, 255), (25, 28, 33), (95, 102, 112), (214, 217, 222)
Rows = Sequence[tuple[str, Sequence["Card"]]]


@dataclass(frozen=True)
class Card:
    """One picture, or one before and one after an edit; title: the request; text: the model's answer."""

    pictures: tuple[Image.Image, ...]
    title: str
    text: str = ""
    beside: bool = False

    @property
    def pictures_width(self) -> int:
        return len(self.pictures) * SIDE + (len(self.pictures) - 1) * ARROW

    @property
    def width(self) -> int:
        return self.pictures_width + (GAP + BESIDE if self.beside else 0) + GAP

    def captions(self) -> tuple[list[str], list[str]]:
        """The wrapped lines of the title and of the text."""
        text_width = BESIDE if self.beside else self.pictures_width
        title = wrapped(self.title, self.width - GAP, ImageFont.load_default(14))
        return title, wrapped(self.text, text_width, ImageFont.load_default(13))

    @property
    def height(self) -> int:
        title, text = self.captions()
        side = max(SIDE, len(text) * LINE) if self.beside else SIDE + (len(text) * LINE + 4 if text else 0)
        return side + len(title) * LINE + 8 + GAP


def contact_sheet(rows: Rows) -> Image.Image:
    """Draw all rows, one below the other, each with its title above it."""
    widths = [sum(card.width + GAP for card in cards) for _, cards in rows]
    heights = [HEAD + max(card.height for card in cards) for _, cards in rows]
    sheet = Image.new("RGB", (max(widths) + GAP, sum(heights) + GAP), PAPER)
    pen, top = ImageDraw.Draw(sheet), 0
    for (title, cards), height in zip(rows, heights, strict=True):
        pen.text((GAP, top + 16), title, fill=INK, font=ImageFont.load_default(19))
        left = GAP
        for card in cards:
            _draw(sheet, pen, card, (left, top + HEAD), height - HEAD)
            left += card.width + GAP
        top += height
    return sheet


def _draw(sheet: Image.Image, pen: ImageDraw.ImageDraw, card: Card, corner: tuple[int, int], height: int) -> None:
    left, top = corner
    pen.rounded_rectangle((left, top, left + card.width, top + height - 4), 8, fill=CARD, outline=EDGE)
    left, top = left + GAP // 2, top + GAP // 2
    title, text = card.captions()
    _write(pen, (left, top), title, 14, INK)
    top += len(title) * LINE + 4
    x = left
    for index, picture in enumerate(card.pictures):
        if index:
            _arrow(pen, x + 4, top + SIDE // 2)
            x += ARROW
        sheet.paste(picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS), (x, top))
        pen.rectangle((x, top, x + SIDE - 1, top + SIDE - 1), outline=EDGE)
        x += SIDE
    _write(pen, (x + GAP, top) if card.beside else (left, top + SIDE + 6), text, 13, FAINT)


def _arrow(pen: ImageDraw.ImageDraw, x: int, y: int) -> None:
    pen.line((x, y, x + ARROW - 12, y), fill=FAINT, width=2)
    pen.polygon([(x + ARROW - 8, y), (x + ARROW - 16, y - 5), (x + ARROW - 16, y + 5)], fill=FAINT)


def _write(
    pen: ImageDraw.ImageDraw, corner: tuple[int, int], lines: Sequence[str], size: int, ink: tuple[int, int, int]
) -> None:
    for number, line in enumerate(lines):
        pen.text((corner[0], corner[1] + number * LINE), line, fill=ink, font=ImageFont.load_default(size))
