"""The tasks: each makes examples of its kind from a random generator.

Groups have one shape each in training: `draw` (text, picture), `plan` (think text, picture), `edit` (picture, text,
picture), `see` (picture or none, question, answer) and `reason` (the same with a think text).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from random import Random
from typing import TypeVar

from bagel.prompts import THINK_IMAGE_PROMPT, THINK_TEXT_PROMPT
from training.nano.phrases import (
    ABOVE,
    BELOW,
    LEFT,
    NUMBERS,
    RIGHT,
    WITH,
    article,
    described,
    listed,
    on_background,
    ordered,
    place_phrase,
    plan,
    plural,
    relation,
    styled,
    varied,
    word,
)
from training.nano.world import (
    BACKGROUNDS,
    CELLS,
    CENTRE,
    COLOURS,
    SHAPES,
    SIZES,
    Item,
    Look,
    Scene,
    arrange,
    counted_scene,
    distinct_looks,
    fits,
    look,
    make_scene,
    place,
    random_background,
    random_scene,
    recoloured,
    spread,
    with_item,
)

T = TypeVar("T")


@dataclass(frozen=True)
class Example:
    """One sequence. texts come before `answer`, which is learned; source is read, target is drawn.

    vae, vit: how the source enters. what: the kind of task, rows of the evaluation. expected: what a picture must
    show, attributes that nobody asked for being None (`Expected`); named: what an edit touches.
    """

    what: str
    texts: tuple[str, ...]
    answer: str | None = None
    source: Scene | None = None
    target: Scene | None = None
    vae: bool = False
    vit: bool = False
    wanted: Wanted | None = None


@dataclass(frozen=True)
class Thing:
    """An object asked for; None where anything goes."""

    shape: str
    colour: str
    size: str | None = None
    cell: int | None = None


@dataclass(frozen=True)
class Wanted:
    """What a drawn picture must show: exactly these objects, and relations (index, left/right/above/below, index)."""

    things: tuple[Thing, ...]
    background: str | None = None
    relations: tuple[tuple[int, str, int], ...] = field(default=())


def _things(items: tuple[Item, ...] | list[Item], *, size: bool, cell: bool) -> tuple[Thing, ...]:
    return tuple(
        Thing(item.shape, item.colour, item.size if size else None, item.cell if cell else None) for item in items
    )


def _drawn(rng: Random, what: str, phrase: str, world: Scene, wanted: Wanted, *, named: bool) -> Example:
    """An example of drawing; an order, a background and a style are added to the phrase."""
    text = on_background(rng, phrase, world.background) if named else phrase
    return Example(what, (styled(rng, ordered(rng, text)),), target=world, wanted=wanted)


def _ground(rng: Random) -> tuple[str, bool]:
    """A background and whether it is named; it is white unless named."""
    return (rng.choice(tuple(BACKGROUNDS)), True) if rng.random() < 0.6 else ("white", False)


def one(rng: Random) -> Example:
    """One object, in the centre unless a place is named."""
    thing, (background, named) = look(rng), _ground(rng)
    size, placed = rng.random() < 0.6, rng.random() < 0.5
    cell = rng.randrange(9) if placed else CENTRE
    item = place(rng, thing, cell)
    phrase = article(varied(rng, thing, size=size))
    if placed:
        phrase += " " + place_phrase(rng, cell)
    wanted = Wanted(_things([item], size=size, cell=placed), background)
    return _drawn(rng, "one", phrase, make_scene([item], background), wanted, named=named)


def two(rng: Random) -> Example:
    """Two objects and where one is from the other."""
    background, named = _ground(rng)
    while True:
        looks, vertical, line = distinct_looks(rng, 2), rng.random() < 0.5, rng.choice((1, 1, 1, 0, 2))
        ends = rng.choice(((0, 2), (0, 2), (0, 1), (1, 2)))
        cells = [end * 3 + line if vertical else line * 3 + end for end in ends]
        items = arrange(rng, looks, cells)
        if items is not None:
            break
    first, second = items
    forward = rng.random() < 0.5
    a, b = (first, second) if forward else (second, first)
    kind = (("above", "below") if vertical else ("left", "right"))[0 if forward else 1]
    size = rng.random() < 0.35
    one_, other = (article(varied(rng, each, size=size)) for each in (a, b))
    if rng.random() < 0.1:
        phrase = f"{other} with {one_} {rng.choice(WITH[kind])}"
    else:
        words = {"left": LEFT, "right": RIGHT, "above": ABOVE, "below": BELOW}[kind]
        phrase = f"{one_} {relation(rng, words)} {other}"
    wanted = Wanted(_things([a, b], size=size, cell=False), background, ((0, kind, 1),))
    return _drawn(rng, "two", phrase, make_scene(items, background), wanted, named=named)


def count(rng: Random) -> Example:
    """The same object several times, spread over the picture."""
    background, named = _ground(rng)
    number, thing, size = rng.choice((2, 3, 3, 4, 4)), look(rng), rng.random() < 0.4
    if number > 2 and thing.size == "large" and rng.random() < 0.5:
        thing = replace(thing, size="small")
    world = make_scene(spread(rng, [thing] * number), background)
    many = str(number) if rng.random() < 0.2 else NUMBERS[number]
    noun = varied(rng, thing, size=size)
    phrase = f"{'exactly ' if rng.random() < 0.05 else ''}{many} {plural(noun)}"
    return _drawn(
        rng, "count", phrase, world, Wanted(_things(world.items, size=size, cell=False), background), named=named
    )


def three(rng: Random) -> Example:
    """Two or three objects at named places, or spread over the picture in the order of the words."""
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
    wanted = Wanted(_things(items, size=size, cell=placed), background)
    world = make_scene(items, background)
    return _drawn(rng, "three" if len(items) == 3 else "pair", phrase, world, wanted, named=named)


DRAW = ((one, 0.15), (two, 0.25), (count, 0.25), (three, 0.35))


def draw(rng: Random) -> Example:
    """A text and its picture."""
    return _pick(rng, DRAW)(rng)


def planned(rng: Random) -> Example:
    """As `draw`, with a plan in words first."""
    made = draw(rng)
    assert made.target is not None
    return replace(made, texts=(THINK_IMAGE_PROMPT, *made.texts), answer=plan(made.target))


def _refer(rng: Random, item: Item, world: Scene) -> str:
    """Words that single out an object of a scene."""
    others = [other for other in world.items if other is not item]
    forms = [f"the {item.colour} {word(rng, item.shape)}"] * 3
    if all(other.shape != item.shape for other in others):
        forms.append(f"the {word(rng, item.shape)}")
    if all(other.colour != item.colour for other in others):
        forms.append(f"the {item.colour} one")
    if not others:
        forms += ["it", "the shape"]
    return rng.choice(forms)


def _edited(rng: Random, what: str, text: str, source: Scene, target: Scene) -> Example:
    if rng.random() < 0.15:
        text = rng.choice(("please {}", "can you {}?", "{} please", "now {}")).format(text)
    wanted = Wanted(_things(target.items, size=True, cell=True), target.background)
    return Example(what, (styled(rng, text),), source=source, target=target, vae=True, vit=True, wanted=wanted)


def recolour(rng: Random) -> Example:
    """Another colour for one object."""
    source = random_scene(rng)
    item = rng.choice(source.items)
    taken = {other.colour for other in source.items if other.shape == item.shape}
    colour = rng.choice([name for name in COLOURS if name not in taken])
    who = _refer(rng, item, source)
    forms: tuple[str, ...] = (f"make {who} {colour}", f"turn {who} {colour}", f"change the colour of {who} to {colour}")
    forms += (
        f"change {who} to {colour}",
        f"paint {who} {colour}",
        f"recolour {who} to {colour}",
        f"{who} should be {colour}",
    )
    return _edited(rng, "recolour", rng.choice(forms), source, with_item(source, item, recoloured(item, colour)))


def add(rng: Random) -> Example:
    """One more object, at a named place."""
    while True:
        source = random_scene(rng, (1, 2))
        new = look(rng)
        cell = rng.choice([c for c in range(9) if all(item.cell != c for item in source.items)])
        item = place(rng, new, cell)
        if fits(item, source.items) and all(
            other.shape != new.shape or other.colour != new.colour for other in source.items
        ):
            break
    where = place_phrase(rng, cell)
    thing = article(varied(rng, new, size=True))
    forms = (
        f"add {thing} {where}",
        f"put {thing} {where}",
        f"draw {thing} {where}",
        f"place {thing} {where}",
        f"{where}, add {thing}",
    )
    return _edited(rng, "add", rng.choice(forms), source, make_scene([*source.items, item], source.background))


def remove(rng: Random) -> Example:
    """One object less."""
    source = random_scene(rng, (1, 2, 2, 3, 3))
    item = rng.choice(source.items)
    who = _refer(rng, item, source)
    forms = (
        f"remove {who}",
        f"delete {who}",
        f"take away {who}",
        f"erase {who}",
        f"get rid of {who}",
        f"take {who} away",
    )
    return _edited(rng, "remove", rng.choice(forms), source, with_item(source, item, None))


def move(rng: Random) -> Example:
    """One object to another cell."""
    while True:
        source = random_scene(rng)
        item = rng.choice(source.items)
        others = [other for other in source.items if other is not item]
        cell = rng.choice([c for c in range(9) if all(other.cell != c for other in source.items)])
        moved = replace(place(rng, Look(item.shape, item.colour, item.size), cell), radius=item.radius)
        if fits(moved, others):
            break
    who = _refer(rng, item, source)
    to = "to the " + (word(rng, CELLS[cell]) if cell == CENTRE else CELLS[cell])
    forms = (
        f"move {who} {to}",
        f"move {who} {to}",
        f"put {who} {place_phrase(rng, cell)}",
        f"shift {who} {to}",
        f"bring {who} {to}",
    )
    return _edited(rng, "move", rng.choice(forms), source, with_item(source, item, moved))


def background(rng: Random) -> Example:
    """Another background."""
    source = random_scene(rng)
    name = rng.choice([each for each in BACKGROUNDS if each != source.background])
    said = word(rng, name)
    forms: tuple[str, ...] = (
        f"make the background {said}",
        f"change the background to {said}",
        f"turn the background {said}",
    )
    forms += (
        f"{said} background",
        f"put it on {article(said)} background",
        f"set the background to {said}",
        f"{said} bg",
    )
    return _edited(rng, "background", rng.choice(forms), source, replace(source, background=name))


EDIT = ((recolour, 0.22), (add, 0.22), (remove, 0.2), (move, 0.22), (background, 0.14))


def edit(rng: Random) -> Example:
    """A picture, what to change, and the picture changed."""
    return _pick(rng, EDIT)(rng)


def _asked(rng: Random, what: str, question: str, answer: str, why: str, source: Scene | None) -> tuple[Example, str]:
    """A question with its answer, and the reasoning that leads to it."""
    return Example(what, (styled(rng, question),), answer=answer, source=source, vit=source is not None), why


def describe(rng: Random) -> tuple[Example, str]:
    """A picture in words."""
    if rng.random() < 0.25:
        source = counted_scene(rng, rng.choice((2, 3, 4)), random_background(rng))
    else:
        source = random_scene(rng)
    forms: tuple[str, ...] = (
        "describe the image",
        "describe the image",
        "describe this picture",
        "what is in this picture?",
    )
    forms += (
        "what is in the image?",
        "what do you see?",
        "describe what you see",
        "what does the picture show?",
        "caption this image",
    )
    where = ", ".join(f"{item.colour} {item.shape} at the {CELLS[item.cell]}" for item in source.items)
    return _asked(rng, "describe", rng.choice(forms), described(source), f"{where}.", source)


def _pick_item(rng: Random, unique: str) -> tuple[Scene, Item]:
    """A scene with an object whose shape, or colour, no other object has."""
    while True:
        source = random_scene(rng)
        item = rng.choice(source.items)
        if [getattr(other, unique) for other in source.items].count(getattr(item, unique)) == 1:
            return source, item


def ask_colour(rng: Random) -> tuple[Example, str]:
    """The colour of an object, or of the background."""
    if rng.random() < 0.2:
        source = random_scene(rng)
        question = rng.choice(
            ("what colour is the background?", "what is the background colour?", "background colour?")
        )
        return _asked(rng, "question", question, f"{source.background}.", f"background: {source.background}.", source)
    source, item = _pick_item(rng, "shape")
    noun = word(rng, item.shape)
    forms = (
        f"what colour is the {noun}?",
        f"what color is the {noun}?",
        f"which colour does the {noun} have?",
        f"the colour of the {noun}?",
    )
    return _asked(rng, "question", rng.choice(forms), f"{item.colour}.", f"{item.shape}: {item.colour}.", source)


def ask_shape(rng: Random) -> tuple[Example, str]:
    """The shape or size of an object."""
    source, item = _pick_item(rng, "colour")
    if rng.random() < 0.4:
        question = rng.choice(
            (f"is the {item.colour} {item.shape} large or small?", f"how big is the {item.colour} {item.shape}?")
        )
        return _asked(rng, "question", question, f"{item.size}.", f"{item.colour} {item.shape}: {item.size}.", source)
    forms = (
        f"what shape is the {item.colour} object?",
        f"what is the {item.colour} shape?",
        f"which shape is {item.colour}?",
    )
    return _asked(rng, "question", rng.choice(forms), f"{item.shape}.", f"{item.colour}: {item.shape}.", source)


def ask_count(rng: Random) -> tuple[Example, str]:
    """How many objects, or how many of a kind."""
    source = (
        counted_scene(rng, rng.choice((1, 2, 3, 4)), random_background(rng))
        if rng.random() < 0.5
        else random_scene(rng)
    )
    items, noun = list(source.items), rng.choice(("object", "shape"))
    if rng.random() < 0.6:
        noun = rng.choice(items).shape if rng.random() < 0.85 else rng.choice(SHAPES)
        items = [item for item in items if item.shape == noun]
    name = plural(noun)
    forms = (
        f"how many {name} are there?",
        f"how many {name} are in the picture?",
        f"count the {name}",
        f"how many {name}?",
    )
    where = ", ".join(CELLS[item.cell] for item in items) or "none"
    return _asked(rng, "question", rng.choice(forms), f"{NUMBERS[len(items)]}.", f"{name}: {where}.", source)


def ask_place(rng: Random) -> tuple[Example, str]:
    """Where an object is."""
    source, item = _pick_item(rng, rng.choice(("shape", "colour")))
    who = f"{item.colour} {item.shape}"
    forms = (
        f"where is the {who}?",
        f"where is the {who} in the picture?",
        f"in which part of the picture is the {who}?",
    )
    return _asked(rng, "question", rng.choice(forms), f"{CELLS[item.cell]}.", f"{who}: {CELLS[item.cell]}.", source)


def ask_whether(rng: Random) -> tuple[Example, str]:
    """Whether something is there, or where one object is from another."""
    if rng.random() < 0.5:
        source = random_scene(rng)
        item, other = rng.choice(source.items), look(rng)
        shape, colour = (item.shape, item.colour) if rng.random() < 0.5 else (other.shape, item.colour)
        if rng.random() < 0.3:
            shape, colour = item.shape, other.colour
        yes = any((each.shape, each.colour) == (shape, colour) for each in source.items)
        forms = (
            f"is there a {colour} {shape}?",
            f"is there a {colour} {shape} in the picture?",
            f"do you see a {colour} {shape}?",
        )
        seen = ", ".join(f"{each.colour} {each.shape}" for each in source.items)
        return _asked(rng, "question", rng.choice(forms), "yes." if yes else "no.", f"{seen}.", source)
    made = two(rng)
    assert made.wanted is not None and made.target is not None
    a, b = (f"{thing.colour} {thing.shape}" for thing in made.wanted.things)
    kind = made.wanted.relations[0][1]
    yes = rng.random() < 0.5
    asked = kind if yes else {"left": "right", "right": "left", "above": "below", "below": "above"}[kind]
    words = {"left": LEFT[:2], "right": RIGHT[:2], "above": ABOVE[:1], "below": BELOW[:1]}[asked]
    question = f"is the {a} {rng.choice(words)} the {b}?"
    where = ", ".join(f"{item.colour} {item.shape}: {CELLS[item.cell]}" for item in made.target.items)
    return _asked(rng, "question", question, "yes." if yes else "no.", f"{where}.", made.target)


MIXES = {
    ("red", "yellow"): "orange",
    ("red", "blue"): "purple",
    ("blue", "yellow"): "green",
    ("red", "white"): "pink",
    ("black", "white"): "grey",
    ("blue", "green"): "cyan",
}
SIDES = {"triangle": 3, "square": 4, "diamond": 4, "circle": 0}


def mix(rng: Random) -> tuple[Example, str]:
    """Two colours mixed."""
    pair = rng.choice(tuple(MIXES))
    a, b = pair if rng.random() < 0.5 else pair[::-1]
    forms: tuple[str, ...] = (
        f"what do you get when you mix {a} and {b}?",
        f"mix {a} and {b}",
        f"which colour do {a} and {b} make?",
    )
    forms += (f"what colour is {a} mixed with {b}?", f"{a} and {b} make what colour?", f"what is {a} plus {b}?")
    return _asked(rng, "text", rng.choice(forms), f"{MIXES[pair]}.", f"{pair[0]} + {pair[1]} = {MIXES[pair]}.", None)


def add_numbers(rng: Random) -> tuple[Example, str]:
    """A small sum or difference."""
    a, b = rng.randint(0, 10), rng.randint(0, 10)
    spell = rng.random() < 0.4
    x, y = (NUMBERS[a], NUMBERS[b]) if spell else (str(a), str(b))
    if rng.random() < 0.7 or a < b:
        forms = (
            f"what is {x} plus {y}?",
            f"what is {x} + {y}?",
            f"{x} + {y}",
            f"how much is {x} and {y}?",
            f"{x} plus {y} is",
        )
        return _asked(rng, "text", rng.choice(forms), f"{NUMBERS[a + b]}.", f"{a} + {b} = {a + b}.", None)
    forms = (f"what is {x} minus {y}?", f"what is {x} - {y}?", f"{x} - {y}", f"{x} minus {y} is", f"take {y} from {x}")
    return _asked(rng, "text", rng.choice(forms), f"{NUMBERS[a - b]}.", f"{a} - {b} = {a - b}.", None)


def compare(rng: Random) -> tuple[Example, str]:
    """Which of two numbers, or sizes, is more."""
    a, b = rng.sample(range(11), 2)
    x, y = (NUMBERS[a], NUMBERS[b]) if rng.random() < 0.4 else (str(a), str(b))
    kind = rng.random()
    if kind < 0.4:
        forms = (f"which is more, {x} or {y}?", f"what is more: {x} or {y}?", f"which is larger, {x} or {y}?")
        return _asked(rng, "text", rng.choice(forms), f"{NUMBERS[max(a, b)]}.", f"{max(a, b)} > {min(a, b)}.", None)
    if kind < 0.7:
        more = rng.random() < 0.5
        question = f"is {x} {rng.choice(('more', 'larger', 'bigger') if more else ('less', 'smaller'))} than {y}?"
        return _asked(rng, "text", question, "yes." if (a > b) == more else "no.", f"{max(a, b)} > {min(a, b)}.", None)
    one_, other = rng.sample(SHAPES, 2)
    question = rng.choice(("are there more {} or {}", "which is more, {} or {}")).format(plural(one_), plural(other))
    said = f"there are {x} {plural(one_)} and {y} {plural(other)}. {question}?"
    more_of = plural(one_) if a > b else plural(other)
    return _asked(rng, "text", said, f"{more_of}.", f"{max(a, b)} > {min(a, b)}.", None)


def tally(rng: Random) -> tuple[Example, str]:
    """Counting things in a list."""
    looks = [look(rng) for _ in range(rng.randint(2, 4))]
    by = rng.choice(("shape", "colour"))
    name = getattr(rng.choice(looks), by)
    said = ", ".join(article(f"{each.colour} {each.shape}") for each in looks)
    found = [f"{each.colour} {each.shape}" for each in looks if getattr(each, by) == name]
    asked = plural(name) if by == "shape" else f"{name} shapes"
    question = f"{said}. how many {asked} are there?" if rng.random() < 0.5 else f"how many {asked}: {said}?"
    return _asked(rng, "text", question, f"{NUMBERS[len(found)]}.", f"{', '.join(found)}.", None)


def facts(rng: Random) -> tuple[Example, str]:
    """What shapes and sizes are."""
    if rng.random() < 0.5:
        shape = rng.choice(tuple(SIDES))
        question = rng.choice((f"how many sides does a {shape} have?", f"how many corners does a {shape} have?"))
        return _asked(rng, "text", question, f"{NUMBERS[SIDES[shape]]}.", f"{shape}: {SIDES[shape]}.", None)
    name = rng.choice((*SHAPES, *COLOURS, *SIZES))
    kind = "shape" if name in SHAPES else "colour" if name in COLOURS else "size"
    asked = rng.choice(("shape", "colour", "size"))
    question = f"is {name} a {asked}?"
    return _asked(rng, "text", question, "yes." if asked == kind else "no.", f"{name}: {kind}.", None)


SEE = (
    (describe, 0.32),
    (ask_colour, 0.1),
    (ask_shape, 0.08),
    (ask_count, 0.12),
    (ask_place, 0.08),
    (ask_whether, 0.1),
    (mix, 0.03),
    (add_numbers, 0.06),
    (compare, 0.05),
    (tally, 0.04),
    (facts, 0.02),
)


def see(rng: Random) -> Example:
    """A question, about a picture or none, and its answer."""
    return _pick(rng, SEE)(rng)[0]


def reason(rng: Random) -> Example:
    """As `see`, with the reasoning before the answer."""
    made, why = _pick(rng, SEE)(rng)
    return replace(made, texts=(THINK_TEXT_PROMPT, *made.texts), answer=f"<think> {why} </think> {made.answer}")


NOISY = 0.08
"""Share of drawings under the text of another one, as captions from the web are: this is what guidance takes away."""

GROUPS: dict[str, Callable[[Random], Example]] = {
    "draw": draw,
    "plan": planned,
    "edit": edit,
    "see": see,
    "reason": reason,
}


def drop(rng: Random, example: Example) -> Example:
    """Take conditions away at random, so that each branch of guidance is trained.

    draw: no text, or another picture's (NOISY). plan: no plan (cfg_img), or the system prompt alone (cfg_text).
    edit: the picture alone (cfg_text), the text alone (cfg_img), or nothing.
    """
    if example.target is None:
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


def _pick(rng: Random, weighted: tuple[tuple[T, float], ...]) -> T:
    chance = rng.random() * sum(weight for _, weight in weighted)
    for each, weight in weighted:
        chance -= weight
        if chance < 0:
            return each
    return weighted[-1][0]
