"""Editing tasks: a picture, a change in words, and the changed picture."""

from __future__ import annotations

from dataclasses import replace
from random import Random

from training.nano.examples import Example, Wanted, pick, things
from training.nano.phrases import (
    article,
    place_phrase,
    styled,
    varied,
    word,
)
from training.nano.world import (
    BACKGROUNDS,
    CELLS,
    CENTRE,
    COLOURS,
    Item,
    Look,
    Scene,
    fits,
    look,
    make_scene,
    place,
    random_scene,
    recoloured,
    with_item,
)


def _refer(rng: Random, item: Item, world: Scene) -> str:
    """Words that refer to exactly one object of a scene."""
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
    wanted = Wanted(things(target.items, size=True, cell=True), target.background)
    return Example(what, (styled(rng, text),), source=source, target=target, vae=True, vit=True, wanted=wanted)


def recolour(rng: Random) -> Example:
    """Give one object another colour."""
    source = random_scene(rng)
    item = rng.choice(source.items)
    # A second object of the same shape and colour could no longer be referred to.
    taken = {other.colour for other in source.items if other.shape == item.shape}
    colour = rng.choice([name for name in COLOURS if name not in taken])
    thing = _refer(rng, item, source)
    forms = (
        f"make {thing} {colour}",
        f"turn {thing} {colour}",
        f"change the colour of {thing} to {colour}",
        f"change {thing} to {colour}",
        f"paint {thing} {colour}",
        f"recolour {thing} to {colour}",
        f"{thing} should be {colour}",
    )
    return _edited(rng, "recolour", rng.choice(forms), source, with_item(source, item, recoloured(item, colour)))


def add(rng: Random) -> Example:
    """Add an object at a named place."""
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
    """Remove an object."""
    source = random_scene(rng, (1, 2, 2, 3, 3))
    item = rng.choice(source.items)
    thing = _refer(rng, item, source)
    forms = (
        f"remove {thing}",
        f"delete {thing}",
        f"take away {thing}",
        f"erase {thing}",
        f"get rid of {thing}",
        f"take {thing} away",
    )
    return _edited(rng, "remove", rng.choice(forms), source, with_item(source, item, None))


def move(rng: Random) -> Example:
    """Move an object to another cell."""
    while True:
        source = random_scene(rng)
        item = rng.choice(source.items)
        others = [other for other in source.items if other is not item]
        cell = rng.choice([c for c in range(9) if all(other.cell != c for other in source.items)])
        # It keeps its radius: a move must not change the size, even within the same name.
        moved = replace(place(rng, Look(item.shape, item.colour, item.size), cell), radius=item.radius)
        if fits(moved, others):
            break
    thing = _refer(rng, item, source)
    to = "to the " + (word(rng, CELLS[cell]) if cell == CENTRE else CELLS[cell])
    forms = (
        f"move {thing} {to}",
        f"move {thing} {to}",
        f"put {thing} {place_phrase(rng, cell)}",
        f"shift {thing} {to}",
        f"bring {thing} {to}",
    )
    return _edited(rng, "move", rng.choice(forms), source, with_item(source, item, moved))


def background(rng: Random) -> Example:
    """Change the background."""
    source = random_scene(rng)
    name = rng.choice([each for each in BACKGROUNDS if each != source.background])
    said = word(rng, name)
    forms = (
        f"make the background {said}",
        f"change the background to {said}",
        f"turn the background {said}",
        f"{said} background",
        f"put it on {article(said)} background",
        f"set the background to {said}",
        f"{said} bg",
    )
    return _edited(rng, "background", rng.choice(forms), source, replace(source, background=name))


EDIT = ((recolour, 0.22), (add, 0.22), (remove, 0.2), (move, 0.22), (background, 0.14))


def edit(rng: Random) -> Example:
    """A picture, a change in words, and the changed picture."""
    return pick(rng, EDIT)(rng)
