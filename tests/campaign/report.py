"""What a campaign has found, as lines and as the table of docs/reliability.md."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from tests.campaign.campaign import Verdict


def table(verdicts: Sequence[Verdict]) -> str:
    """Faults by kind with their counts."""
    fired = total(verdicts)
    rows = [f"| {group} | {kind} | {count} |" for (group, kind), count in sorted(fired.items())]
    return "\n".join(["| group | fault | injected |", "|---|---|--:|", *rows, f"| | all | {fired.total()} |"])


def total(verdicts: Iterable[Verdict]) -> Counter[tuple[str, str]]:
    """All faults that happened."""
    counts: Counter[tuple[str, str]] = Counter()
    for verdict in verdicts:
        counts += verdict.fired
    return counts


def ends(verdicts: Iterable[Verdict]) -> str:
    """How requests ended, the commonest first."""
    counts: Counter[str] = Counter()
    for verdict in verdicts:
        counts += verdict.ends
    return ", ".join(f"{count} {end}" for end, count in counts.most_common())


def line(verdict: Verdict, faults: int) -> str:
    """A round in one line."""
    kinds = ", ".join(f"{kind} {count}" for (_, kind), count in sorted(verdict.fired.items()))
    state = "ok" if not verdict.wrong else "undecided" if verdict.undecided else "FAILED"
    return (
        f"round {verdict.round.number} {verdict.round.flavour}: {state}, {verdict.s:.1f} s, {faults} faults ({kinds})"
    )
