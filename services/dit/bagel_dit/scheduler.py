"""Which requests take part in the next step. Decided in the server, between steps; no torch here."""

from __future__ import annotations

from dataclasses import dataclass

from bagel_dit.messages import StepPlan

TOKEN_BUDGET = 24_576
"""Latent tokens over all branches that one step packs: two pictures of 1024 x 1024 with three branches."""


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
    """Emits step plans. Whoever has waited longest goes first, with as many of its bucket as fit the budget.

    So small pictures are packed, large ones take turns, and none waits for another to be finished.
    """

    def __init__(self, token_budget: int = TOKEN_BUDGET) -> None:
        self._budget = token_budget
        self._active: dict[int, _Active] = {}
        self._turn = 0
        self.reading = False

    def add(self, picture: int, *, steps: int, bucket: int, rows: int) -> None:
        """Let a picture take part."""
        if steps:
            self._active[picture] = _Active(picture, steps, bucket, rows)

    def remove(self, picture: int) -> None:
        """Let a picture leave; nothing if it has left, as one does whose last step is planned."""
        self._active.pop(picture, None)

    def plan(self) -> StepPlan | None:
        """The next plan, or None if there is nothing to do."""
        if not self._active:
            return StepPlan((), read=True) if self.reading else None
        waiting = sorted(self._active.values(), key=lambda each: each.turn)
        chosen: list[_Active] = []
        for picture in waiting:
            same = not chosen or picture.bucket == chosen[0].bucket
            if same and (not chosen or sum(each.tokens for each in chosen) + picture.tokens <= self._budget):
                chosen.append(picture)
        for picture in chosen:
            picture.planned, picture.turn = picture.planned + 1, self._turn
            if picture.planned == picture.steps:
                del self._active[picture.id]
        self._turn += 1
        return StepPlan(tuple(picture.id for picture in chosen), read=self.reading)
