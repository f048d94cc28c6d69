"""How a run is shown on stderr: think text as it comes, and how far each picture is."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from bagel.client.tables import LABEL_CHARACTERS, short
from bagel.events import Result, StepDone, TextDelta

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bars
    from rich.progress import TaskID


def say(message: str) -> None:
    """One line of the command's own on stderr."""
    print(f"bagel: {message}", file=sys.stderr, flush=True)


class Progress:
    """Plain lines, for a stderr that is a file or a pipe: one when a picture is done.

    The think text of a single prompt is written as it comes; several are written together, so each is shown when its
    picture is begun.
    """

    def __init__(self, prompts: Sequence[str]) -> None:
        self._labels = [short(prompt, LABEL_CHARACTERS) for prompt in prompts]
        self._thoughts = [""] * len(prompts)
        self._begun: set[int] = set()

    def think(self, delta: TextDelta) -> None:
        """Some more think text."""
        self._thoughts[delta.index] += delta.text
        if len(self._labels) == 1:
            self.write_thought(delta.text)

    def step(self, done: StepDone) -> None:
        """One Euler step of a picture; the first one ends its think text."""
        if done.index not in self._begun:
            self._begun.add(done.index)
            self._end_thought(done.index)

    @contextmanager
    def finish(self, result: Result) -> Iterator[None]:
        """Around the output of a picture that is done, which may go to the same terminal."""
        yield
        seconds = result.timings.get("total", sum(result.timings.values()))
        say(f"{self.label(result.index)} is done, {seconds:.1f} s")

    def close(self) -> None:
        """Leave the terminal as it was."""

    def label(self, index: int) -> str:
        """What a picture is called."""
        return f"picture {index + 1} of {len(self._labels)}, {self._labels[index]!r}"

    def write_thought(self, text: str) -> None:
        """Think text, as it is."""
        sys.stderr.write(text)
        sys.stderr.flush()

    def _end_thought(self, index: int) -> None:
        if self._thoughts[index]:
            # In one piece: what is written while bars are live must be whole lines.
            self.write_thought("\n" if len(self._labels) == 1 else f"{self.label(index)}: {self._thoughts[index]}\n")


class TerminalProgress(Progress):
    """A bar for each picture that is being drawn; think text is dim."""

    def __init__(self, prompts: Sequence[str]) -> None:
        from rich.console import Console

        super().__init__(prompts)
        self._console = Console(stderr=True, highlight=False)
        self._drawing: dict[int, StepDone] = {}
        self._bars: Bars | None = None
        self._tasks: dict[int, TaskID] = {}

    def step(self, done: StepDone) -> None:
        super().step(done)
        self._drawing[done.index] = done
        if self._bars is None:
            self._bars, self._tasks = _new_bars(self._console), {}
        for index, last in self._drawing.items():
            if index not in self._tasks:
                self._tasks[index] = self._bars.add_task(self.label(index), total=last.steps)
            self._bars.update(self._tasks[index], completed=last.step)
        self._bars.start()

    @contextmanager
    def finish(self, result: Result) -> Iterator[None]:
        # The bars go first, since the picture's path may go to the same terminal.
        self.close()
        self._drawing.pop(result.index, None)
        yield

    def close(self) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def write_thought(self, text: str) -> None:
        from rich.text import Text

        self._console.print(Text(text, style="dim"), end="", soft_wrap=True)


def _new_bars(console: Console) -> Bars:
    """Bars that vanish when they stop. They cannot start again: rich would go up over what was written meanwhile."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    label = TextColumn("{task.description}", markup=False)  # a prompt is no markup
    columns = (label, BarColumn(), MofNCompleteColumn(), TextColumn("steps"), TimeRemainingColumn())
    # Redirected, stdout would go through rich's console, which is on stderr.
    return Bars(*columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False)


@contextmanager
def shown(prompts: Sequence[str]) -> Iterator[Progress]:
    """The display that fits stderr, closed at the end whatever happens."""
    progress = TerminalProgress(prompts) if sys.stderr.isatty() else Progress(prompts)
    try:
        yield progress
    finally:
        progress.close()
