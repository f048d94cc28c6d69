"""Which requests take part in the next step. Decided between steps, outside of the engine; no torch here."""

from __future__ import annotations

from dataclasses import dataclass

from bagel.engine.commands import StepPlan
from bagel.engine.events import Begun, Event, Planned, Stepped

TOKEN_BUDGET = 24_576
"""Latent tokens over all branches that one step packs: two pictures of 1024 x 1024 with three branches.

Of ranks that divide the rows or latents of a step, each has so many."""
PLANS_AHEAD = 2
"""Plans that an engine may have at once: it begins the next without a round trip, and a cancel takes one step."""


@dataclass
class _Active:
    """A picture that takes steps. planned: steps that plans have been made for; turn: the last of those plans."""

    id: int
    steps: int
    bucket: int
    rows: int
    planned: int = 0
    turn: int = -1

    @property
    def tokens(self) -> int:
        return self.bucket * self.rows


class Scheduler:
    """Makes step plans for one engine, from what the engine says (`observe`).

    The picture that has waited longest goes first, with as many of its bucket as fit the budget. So small pictures
    are packed, large ones take turns, and none waits for another to be finished.
    """

    def __init__(self, token_budget: int = TOKEN_BUDGET) -> None:
        self._budget = token_budget
        self._active: dict[int, _Active] = {}
        self._turn = self._under_way = self._stale = 0
        self._reading = False
        self._planned: dict[int, None] = {}

    def observe(self, event: Event) -> None:
        """Take note of an event of the engine."""
        match event:
            case Begun() if event.steps:
                self._active[event.id] = _Active(event.id, event.steps, event.bucket, event.rows)
            case Planned():
                self._reading = True
                self._planned[event.id] = None
                self._stale = self._under_way  # plans made before say nothing of this request
            case Stepped():
                self._under_way -= 1
                if self._stale:
                    self._stale -= 1
                else:
                    self._reading = event.reading

    def remove(self, id_: int) -> None:
        """Let a request leave; nothing if it has left, as a picture does when its last step is planned."""
        self._active.pop(id_, None)
        self._planned.pop(id_, None)

    def plan(self) -> StepPlan | None:
        """The next plan; None if there is nothing to do, or the engine has enough to do."""
        if self._under_way == PLANS_AHEAD or not (self._active or self._reading):
            return None
        self._under_way += 1
        begin, self._planned = tuple(self._planned), {}
        return StepPlan(self._choose(), read=self._reading, begin=begin)

    def _choose(self) -> tuple[int, ...]:
        chosen: list[_Active] = []
        # A picture that has had no step yet has turn -1 and goes first.
        for picture in sorted(self._active.values(), key=lambda each: each.turn):
            same = not chosen or picture.bucket == chosen[0].bucket
            # The first is taken whatever its size: one above the budget would never be drawn.
            if same and (not chosen or sum(each.tokens for each in chosen) + picture.tokens <= self._budget):
                chosen.append(picture)
        for picture in chosen:
            picture.planned, picture.turn = picture.planned + 1, self._turn
            # Nothing is left to plan: the engine decodes it by itself after its last step.
            if picture.planned == picture.steps:
                del self._active[picture.id]
        self._turn += 1
        return tuple(picture.id for picture in chosen)
