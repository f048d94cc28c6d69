"""Reading tasks: a picture or none, a question, and the answer, perhaps after reasoning in words."""

from __future__ import annotations

from dataclasses import replace
from random import Random

from bagel.prompts import THINK_TEXT_PROMPT
from training.nano.drawing import two
from training.nano.examples import Example, pick
from training.nano.phrases import (
    ABOVE,
    BELOW,
    LEFT,
    NUMBERS,
    RIGHT,
    article,
    described,
    plural,
    styled,
    word,
)
from training.nano.world import (
    CELLS,
    COLOURS,
    SHAPES,
    SIZES,
    Item,
    Scene,
    counted_scene,
    look,
    random_background,
    random_scene,
)


def _asked(rng: Random, what: str, question: str, answer: str, why: str, source: Scene | None) -> tuple[Example, str]:
    """A question with its answer, and the reasoning that leads to the answer."""
    return Example(what, (styled(rng, question),), answer=answer, source=source, vit=source is not None), why


def describe(rng: Random) -> tuple[Example, str]:
    """Describe a picture in words."""
    if rng.random() < 0.25:
        source = counted_scene(rng, rng.choice((2, 3, 4)), random_background(rng))
    else:
        source = random_scene(rng)
    forms = (
        "describe the image",
        "describe the image",
        "describe this picture",
        "what is in this picture?",
        "what is in the image?",
        "what do you see?",
        "describe what you see",
        "what does the picture show?",
        "caption this image",
    )
    where = ", ".join(f"{item.colour} {item.shape} at the {CELLS[item.cell]}" for item in source.items)
    return _asked(rng, "describe", rng.choice(forms), described(source), f"{where}.", source)


def _pick_item(rng: Random, unique: str) -> tuple[Scene, Item]:
    """A scene and one of its objects, whose shape or colour (as `unique` says) no other object has."""
    while True:
        source = random_scene(rng)
        item = rng.choice(source.items)
        if [getattr(other, unique) for other in source.items].count(getattr(item, unique)) == 1:
            return source, item


def ask_colour(rng: Random) -> tuple[Example, str]:
    """Ask for the colour of an object or of the background."""
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
    """Ask for the shape or the size of an object."""
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
    """Ask for the number of objects, or of objects of one kind."""
    source = (
        counted_scene(rng, rng.choice((1, 2, 3, 4)), random_background(rng))
        if rng.random() < 0.5
        else random_scene(rng)
    )
    items, noun = list(source.items), rng.choice(("object", "shape"))
    if rng.random() < 0.6:
        noun = rng.choice(items).shape if rng.random() < 0.85 else rng.choice(SHAPES)  # now and then the answer is zero
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
    """Ask for the place of an object."""
    source, item = _pick_item(rng, rng.choice(("shape", "colour")))
    thing = f"{item.colour} {item.shape}"
    forms = (
        f"where is the {thing}?",
        f"where is the {thing} in the picture?",
        f"in which part of the picture is the {thing}?",
    )
    return _asked(rng, "question", rng.choice(forms), f"{CELLS[item.cell]}.", f"{thing}: {CELLS[item.cell]}.", source)


def ask_whether(rng: Random) -> tuple[Example, str]:
    """Ask whether an object exists, or whether two objects are in a relation."""
    if rng.random() < 0.5:
        source = random_scene(rng)
        item, other = rng.choice(source.items), look(rng)
        # Wrong in one property only: otherwise the answer would follow from the colour alone.
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
    made = two(rng, anywhere=True)
    assert made.wanted is not None and made.target is not None
    a, b = (f"{thing.colour} {thing.shape}" for thing in made.wanted.things)
    kind = made.wanted.relations[0][1]
    yes = rng.random() < 0.5
    # Half of the answers are no: the question then names the opposite relation.
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
    """Ask which colour two others make."""
    pair = rng.choice(tuple(MIXES))
    a, b = pair if rng.random() < 0.5 else pair[::-1]
    forms = (
        f"what do you get when you mix {a} and {b}?",
        f"mix {a} and {b}",
        f"which colour do {a} and {b} make?",
        f"what colour is {a} mixed with {b}?",
        f"{a} and {b} make what colour?",
        f"what is {a} plus {b}?",
    )
    return _asked(rng, "text", rng.choice(forms), f"{MIXES[pair]}.", f"{pair[0]} + {pair[1]} = {MIXES[pair]}.", None)


def add_numbers(rng: Random) -> tuple[Example, str]:
    """Ask for a small sum or difference."""
    a, b = rng.randint(0, 10), rng.randint(0, 10)
    spell = rng.random() < 0.4
    x, y = (NUMBERS[a], NUMBERS[b]) if spell else (str(a), str(b))
    if rng.random() < 0.7 or a < b:  # no negative differences
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
    """Ask which of two numbers is larger."""
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
    """Ask for the number of certain things in a list."""
    looks = [look(rng) for _ in range(rng.randint(2, 4))]
    by = rng.choice(("shape", "colour"))
    name = getattr(rng.choice(looks), by)
    said = ", ".join(article(f"{each.colour} {each.shape}") for each in looks)
    found = [f"{each.colour} {each.shape}" for each in looks if getattr(each, by) == name]
    asked = plural(name) if by == "shape" else f"{name} shapes"
    question = f"{said}. how many {asked} are there?" if rng.random() < 0.5 else f"how many {asked}: {said}?"
    return _asked(rng, "text", question, f"{NUMBERS[len(found)]}.", f"{', '.join(found)}.", None)


def facts(rng: Random) -> tuple[Example, str]:
    """Ask for properties of a word: the sides of a shape, or whether it names a shape, a colour or a size."""
    if rng.random() < 0.5:
        shape = rng.choice(tuple(SIDES))
        question = rng.choice((f"how many sides does a {shape} have?", f"how many corners does a {shape} have?"))
        return _asked(rng, "text", question, f"{NUMBERS[SIDES[shape]]}.", f"{shape}: {SIDES[shape]}.", None)
    name = rng.choice((*SHAPES, *COLOURS, *SIZES))
    kind = "shape" if name in SHAPES else "colour" if name in COLOURS else "size"
    asked = rng.choice(("shape", "colour", "size"))
    question = f"is {name} a {asked}?"
    return _asked(rng, "text", question, "yes." if asked == kind else "no.", f"{name}: {kind}.", None)


TEXTS = ((mix, 0.15), (add_numbers, 0.3), (compare, 0.25), (tally, 0.2), (facts, 0.1))
"""Questions without a picture, with their shares in the evaluation."""
# Lists are the hardest to count in, so training has more of them.
SEE = (
    (describe, 0.28),
    (ask_colour, 0.1),
    (ask_shape, 0.08),
    (ask_count, 0.12),
    (ask_place, 0.08),
    (ask_whether, 0.1),
    (mix, 0.02),
    (add_numbers, 0.06),
    (compare, 0.05),
    (tally, 0.09),
    (facts, 0.02),
)
"""All questions, with their shares in training."""


def ask_text(rng: Random) -> Example:
    """A question without a picture, and its answer."""
    return pick(rng, TEXTS)(rng)[0]


def see(rng: Random) -> Example:
    """A question, with or without a picture, and its answer."""
    return pick(rng, SEE)(rng)[0]


def reason(rng: Random) -> Example:
    """Like `see`, with the reasoning before the answer."""
    made, why = pick(rng, SEE)(rng)
    return replace(made, texts=(THINK_TEXT_PROMPT, *made.texts), answer=f"<think> {why} </think> {made.answer}")
