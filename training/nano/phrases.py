"""Words for objects, backgrounds and places, and the ways in which people phrase a request."""

from __future__ import annotations

import re
from collections.abc import Sequence
from random import Random

from training.nano.world import CELLS, Item, Look, Scene

NUMBERS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty"),
)
SYNONYMS = {
    "circle": ("disc", "dot"),
    "square": ("box",),
    "cross": ("plus", "plus sign"),
    "diamond": ("rhombus",),
    "large": ("big", "huge"),
    "small": ("little", "tiny"),
    "grey": ("gray",),
    "centre": ("center", "middle"),
}
ORDERS = (
    *("draw {}", "please draw {}", "create {}", "make {}", "generate {}", "show me {}", "paint {}", "i want {}"),
    *("a picture of {}", "an image of {}", "can you draw {}?", "could you make {} please", "i would like {}"),
    *("draw me {}", "{} please", "give me {}", "a drawing of {}", "{}, nothing else", "make me {}", "i need {}"),
    *("could you draw {} for me?", "can i get {}?", "i'd like to see {}", "let's see {}", "paint me {}"),
    *("please make a picture of {}", "kindly draw {}", "would you draw {}?", "just {}", "try to draw {}"),
)
OPENINGS, THANKS = ("hey, ", "hello, ", "ok, ", "so, ", "hello! "), (", thank you", " thanks", " pls", ", ok?", " :)")
LEFT, RIGHT = ("to the left of", "left of", "on the left of"), ("to the right of", "right of", "on the right of")
WITH = {
    "left": ("to its left", "on its left"),
    "right": ("to its right", "on its right"),
    "above": ("above it", "over it"),
    "below": ("below it", "under it"),
}
ABOVE, BELOW = ("above", "over", "on top of"), ("below", "under", "beneath", "underneath")


def word(rng: Random, name: str, often: float = 0.15) -> str:
    """The word itself, or now and then a synonym."""
    return rng.choice(SYNONYMS[name]) if name in SYNONYMS and rng.random() < often else name


def article(phrase: str) -> str:
    """Put a or an before a phrase."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def plural(noun: str) -> str:
    """The plural: circle -> circles, cross -> crosses."""
    return noun + ("es" if noun.endswith(("s", "x")) else "s")


def plain(thing: Item | Look, *, size: bool = True) -> str:
    """Name an object, like "large red circle"."""
    return f"{thing.size + ' ' if size else ''}{thing.colour} {thing.shape}"


def listed(parts: Sequence[str]) -> str:
    """List phrases, like "a, b and c"."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def varied(rng: Random, thing: Item | Look, *, size: bool) -> str:
    """Name an object, with a synonym now and then."""
    words = [word(rng, thing.size)] if size else []
    return " ".join([*words, thing.colour, word(rng, thing.shape)])


def on_background(rng: Random, phrase: str, background: str) -> str:
    """Add the background to a phrase, in one of many ways."""
    name = word(rng, background)
    forms = (
        *(f"{phrase} on {article(name)} background",) * 4,  # the most usual form, so four times as often
        f"{phrase} on {name}",
        f"{phrase}, {name} background",
        f"{phrase}, {name} bg",
        f"{phrase} on a {name} bg",
        f"{phrase} with {article(name)} background",
        f"{phrase} against {article(name)} background",
        f"{name} background, {phrase}",
        f"on {article(name)} background, {phrase}",
        f"{phrase}. the background is {name}",
        f"{phrase}, bg {name}",
        f"{phrase} {name} bg",
        f"{phrase}; background: {name}",
        f"{phrase}, the bg is {name}",
        f"{phrase} in front of {article(name)} background",
        f"{phrase} on a plain {name} background",
        f"{phrase} - {name} background",
        f"{name} bg, {phrase}",
    )
    return rng.choice(forms)


def place_phrase(rng: Random, cell: int) -> str:
    """Name a place, like "in the top left corner", "on the left" or "in the middle"."""
    name = CELLS[cell]
    if name == "centre":
        return rng.choice(("in the centre", "in the center", "in the middle", "at the centre"))
    if " " in name:
        swapped = {"top": "upper", "bottom": "lower"}[name.split()[0]] + " " + name.split()[1]
        named = rng.choice((name, name, name, swapped))
        return rng.choice((f"in the {named}", f"in the {named} corner", f"at the {named}", f"on the {named}"))
    return rng.choice((f"at the {name}", f"on the {name}", f"on the {name} side", f"in the {name}"))


def relation(rng: Random, words: Sequence[str], *, often: float = 0.5) -> str:
    """Choose one of the words for a relation, the first one more often."""
    return words[0] if rng.random() < often else rng.choice(words)


def ordered(rng: Random, phrase: str) -> str:
    """Turn a phrase into an order, or leave it as it is."""
    return rng.choice(ORDERS).format(phrase) if rng.random() < 0.4 else phrase


def styled(rng: Random, text: str) -> str:
    """Vary a text as people do: greetings, thanks, capitals, full stops, missing articles, or nothing of that."""
    if rng.random() < 0.05:
        text = rng.choice(OPENINGS) + text
    if rng.random() < 0.05:
        text = text.rstrip(".?!") + rng.choice(THANKS)
    if rng.random() < 0.15:
        text = re.sub(r"\ban? ", lambda found: "" if rng.random() < 0.7 else found[0], text)
    kind = rng.random()  # mostly unchanged, in lower case
    if kind < 0.22:
        text = text[0].upper() + text[1:]
    elif kind < 0.3:
        text = text.upper()
    elif kind < 0.34:
        text = text.title()
    ending = rng.random()
    if ending < 0.25 and text[-1] not in ".?!":
        text += "."
    elif ending < 0.28 and text[-1] not in ".?!":
        text += "!"
    return text


def described(world: Scene) -> str:
    """The canonical description: every object with its size and colour, and the background."""
    # Equal objects are counted instead of listed.
    if len(world.items) > 1 and len({(i.shape, i.colour, i.size) for i in world.items}) == 1:
        first = world.items[0]
        what = f"{NUMBERS[len(world.items)]} {first.size} {first.colour} {plural(first.shape)}"
    else:
        what = listed([article(plain(item)) for item in world.items])
    return f"{what} on {article(world.background)} background."


def plan(world: Scene) -> str:
    """The think text of a picture: numbered objects with their places, then the background."""
    objects = ", ".join(
        f"{NUMBERS[i + 1]}: {plain(item)} at the {CELLS[item.cell]}" for i, item in enumerate(world.items)
    )
    return f"<think> {objects}. {world.background} background. </think>"
