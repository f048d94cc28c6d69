"""Drawing tasks: a text, perhaps a plan in words, and the picture."""

from __future__ import annotations

from dataclasses import replace
from random import Random

from bagel.prompts import THINK_IMAGE_PROMPT
from training.nano.examples import Example, Wanted, pick, things
from training.nano.phrases import (
    ABOVE,
    BELOW,
    LEFT,
    NUMBERS,
    RIGHT,
    WITH,
    article,
    listed,
    on_background,
    ordered,
    place_phrase,
    plan,
    plural,
    relation,
    styled,
    varied,
)
from training.nano.world import (
    BACKGROUNDS,
    CENTRE,
    Scene,
    arrange,
    distinct_looks,
    look,
    make_scene,
    place,
    spread,
)


def _drawn(rng: Random, what: str, phrase: str, world: Scene, wanted: Wanted, *, named: bool) -> Example:
    """An example of drawing. It turns the phrase into an order, names the background if wanted, and adds a style."""
    text = on_background(rng, phrase, world.background) if named else phrase
    return Example(what, (styled(rng, ordered(rng, text)),), target=world, wanted=wanted)


def _ground(rng: Random) -> tuple[str, bool]:
    """A background, and whether the text names it."""
    # Unnamed it is always white, so that the model learns a default.
    return (rng.choice(tuple(BACKGROUNDS)), True) if rng.random() < 0.6 else ("white", False)


def one(rng: Random) -> Example:
    """One object, in the centre unless the text names a place."""
    thing, (background, named) = look(rng), _ground(rng)
    size, placed = rng.random() < 0.6, rng.random() < 0.5
    cell = rng.randrange(9) if placed else CENTRE
    item = place(rng, thing, cell)
    phrase = article(varied(rng, thing, size=size))
    if placed:
        phrase += " " + place_phrase(rng, cell)
    wanted = Wanted(things([item], size=size, cell=placed), background)
    return _drawn(rng, "one", phrase, make_scene([item], background), wanted, named=named)


def two(rng: Random, *, anywhere: bool = False) -> Example:
    """Two objects and a relation between them: on opposite sides, or `anywhere` that makes the relation true."""
    background, named = _ground(rng)
    while True:  # until the two fit
        looks, vertical = distinct_looks(rng, 2), rng.random() < 0.5
        line, ends = (rng.randrange(3), rng.choice(((0, 2), (0, 1), (1, 2)))) if anywhere else (1, (0, 2))
        cells = [end * 3 + line if vertical else line * 3 + end for end in ends]
        items = arrange(rng, looks, cells)
        if items is not None:
            break
    first, second = items
    forward = rng.random() < 0.5  # so that the first object in the text is not always the left or upper one
    a, b = (first, second) if forward else (second, first)
    kind = (("above", "below") if vertical else ("left", "right"))[0 if forward else 1]
    size = rng.random() < 0.35
    one_, other = (article(varied(rng, each, size=size)) for each in (a, b))
    if rng.random() < 0.1:
        phrase = f"{other} with {one_} {rng.choice(WITH[kind])}"
    else:
        words = {"left": LEFT, "right": RIGHT, "above": ABOVE, "below": BELOW}[kind]
        phrase = f"{one_} {relation(rng, words)} {other}"
    wanted = Wanted(things([a, b], size=size, cell=False), background, ((0, kind, 1),))
    return _drawn(rng, "two", phrase, make_scene(items, background), wanted, named=named)


def count(rng: Random) -> Example:
    """The same object several times, spread over the picture."""
    background, named = _ground(rng)
    number, thing, size = rng.choice((2, 3, 3, 4, 4)), look(rng), rng.random() < 0.4
    # Four large objects nearly fill the picture, so half of the large groups become small.
    if number > 2 and thing.size == "large" and rng.random() < 0.5:
        thing = replace(thing, size="small")
    world = make_scene(spread(rng, [thing] * number), background)
    many = str(number) if rng.random() < 0.2 else NUMBERS[number]
    noun = varied(rng, thing, size=size)
    phrase = f"{'exactly ' if rng.random() < 0.05 else ''}{many} {plural(noun)}"
    return _drawn(
        rng, "count", phrase, world, Wanted(things(world.items, size=size, cell=False), background), named=named
    )


def three(rng: Random) -> Example:
    """Two or three objects at named places, or spread over the picture in the order of the text."""
    background, named = _ground(rng)
    looks = distinct_looks(rng, rng.choice((2, 3, 3, 3)))
    size, placed = rng.random() < 0.3, rng.random() < 0.3
    items = None if placed else spread(rng, looks)
    while items is None:
        items = arrange(rng, looks)
    phrases = [article(varied(rng, item, size=size)) for item in items]
    if placed:
        phrases = [f"{phrase} {place_phrase(rng, item.cell)}" for phrase, item in zip(phrases, items, strict=True)]
    phrase = listed(phrases) if rng.random() < 0.8 else rng.choice((", ", " and ")).join(phrases)
    wanted = Wanted(things(items, size=size, cell=placed), background)
    world = make_scene(items, background)
    return _drawn(rng, "three" if len(items) == 3 else "pair", phrase, world, wanted, named=named)


DRAW = ((one, 0.15), (two, 0.35), (count, 0.2), (three, 0.3))


def draw(rng: Random) -> Example:
    """A text and its picture."""
    return pick(rng, DRAW)(rng)


def planned(rng: Random) -> Example:
    """Like `draw`, with a plan in words before the picture."""
    made = draw(rng)
    assert made.target is not None
    return replace(made, texts=(THINK_IMAGE_PROMPT, *made.texts), answer=plan(made.target))
