"""Right, or a clear error of the documented kind, within its deadline: the verdict on one outcome."""

from __future__ import annotations

from io import BytesIO

import numpy as np
from PIL import Image

from bagel.images import read_settings
from tests.campaign.faults import Round
from tests.campaign.workload import Ask, Outcome
from tests.helpers import agree

DOCUMENTED = frozenset(
    {"ABORTED", "DATA_LOSS", "DEADLINE_EXCEEDED", "FAILED_PRECONDITION", "RESOURCE_EXHAUSTED", "UNAVAILABLE"}
)
"""Statuses of docs/grpc.md that a fault may end a good request with."""
DOCUMENTED_HTTP = frozenset({"408", "429", "503", "504"})
LOST_KV = ", asked for twice"
"""What the one error says that REST tells with 500, though it is no bug: DATA_LOSS."""
BROKEN = frozenset({"INTERNAL", "UNKNOWN", "CANCELLED", "UNIMPLEMENTED", "NOT_FOUND", "PERMISSION_DENIED"})
"""What gRPC itself ends a call with whose own connection is damaged."""
OWN_DEADLINE_S = 0.3
"""How soon before its deadline a call ends that has run into it."""


_SLOW = frozenset({"DEADLINE_EXCEEDED", "UNAVAILABLE", "RESOURCE_EXHAUSTED", "408", "429", "503", "504"})
"""What a service may say that had no time."""


class Late(str):
    """A failure by the clock, which a machine that is busy otherwise may have caused."""


def verdict(outcome: Outcome, twin: Outcome | None, round_: Round) -> str:
    """What is wrong with an outcome; empty if nothing is. twin: what undisturbed services answer to the same."""
    ask = outcome.ask
    if outcome.left and ask.front != "grpc" and round_.loses(ask):
        return ""  # its own network is dead, and REST has no deadline
    if outcome.left and not (ask.leaves or ask.leaves_s):
        return Late(f"no end {outcome.s:.1f} s after it was sent, with a deadline of {ask.deadline_s:g} s")
    if not outcome.left and outcome.s > ask.ends_s and not round_.loses(ask):
        return Late(f"ended {outcome.s - ask.deadline_s:.1f} s after its deadline: {outcome}")
    if outcome.left:
        return ""
    if outcome.answer is not None:
        if twin is None or twin.answer is None:
            return f"answered, but its twin is {twin}"
        if outcome.answer == twin.answer or close(outcome.answer, twin.answer):
            return ""
        return f"a wrong answer: {difference(outcome.answer, twin.answer)}"
    return _of_error(outcome, round_)


def _of_error(outcome: Outcome, round_: Round) -> str:
    ask = outcome.ask
    if not ask.stays and outcome.status == "DEADLINE_EXCEEDED":
        return ""
    ran_out = ask.front == "grpc" and outcome.status == "DEADLINE_EXCEEDED"
    if ran_out and outcome.s > ask.deadline_s - OWN_DEADLINE_S:
        # Its own connection has lost it: clients ask for no signs of life, and gRPC gives a silent connection up after
        # 15 s.
        return "" if round_.loses(ask) else Late(f"only its own deadline ended it: {outcome}")
    if round_.strict and ask.stays:
        kind = Late if outcome.status in _SLOW else str
        return kind(f"an error that no fault of this round excuses: {outcome}")
    if outcome.error in ("HTTP", "HTTP event"):
        documented = (
            outcome.status in DOCUMENTED_HTTP
            or (outcome.error == "HTTP event" and outcome.status != "UNREADABLE")
            or (outcome.status == "500" and LOST_KV in outcome.message)
        )
        return "" if documented and "internal error" not in outcome.message else f"an undocumented error: {outcome}"
    if outcome.error == "RemoteError" and round_.damages(ask) and outcome.status in BROKEN:
        return ""
    if outcome.error == "BagelError" or outcome.status not in DOCUMENTED:
        return f"an undocumented error: {outcome}"
    return ""


def close(one: tuple[object, ...], other: tuple[object, ...]) -> bool:
    """Whether two answers are equal but for a few values of their pictures that are one step off.

    Pictures that share their steps with others, and ranks that share a layer, add numbers up in another order.
    """
    for ours, theirs in zip(one, other, strict=True):
        if isinstance(ours, bytes) and isinstance(theirs, bytes) and ours and theirs:
            try:
                pictures = [Image.open(BytesIO(data)).convert("RGB") for data in (ours, theirs)]
            except (OSError, SyntaxError):  # a file that is none
                return False
            if read_settings(ours) != read_settings(theirs) or not agree(*pictures):
                return False
        elif ours != theirs:
            return False
    return True


def difference(one: tuple[object, ...], other: tuple[object, ...]) -> str:
    """Where two answers differ, in short."""
    for at, (ours, theirs) in enumerate(zip(one, other, strict=False)):
        if ours != theirs:
            if isinstance(ours, bytes) and isinstance(theirs, bytes):
                first = next((i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), -1)
                return f"part {at}: {len(ours)} and {len(theirs)} bytes, unequal from {first} on{_pixels(ours, theirs)}"
            return f"part {at}: {ours!r:.80}, not {theirs!r:.80}"
    return f"{len(one)} parts, not {len(other)}"


def _pixels(ours: bytes, theirs: bytes) -> str:
    """How far two pictures are apart, if they are some."""
    try:
        values = [np.asarray(Image.open(BytesIO(data)).convert("RGB"), dtype=np.int16) for data in (ours, theirs)]
        apart = np.abs(values[0] - values[1])
    except (OSError, SyntaxError, ValueError):
        return ""
    return f"; {int((apart > 0).sum())} values of {apart.size} differ, by at most {int(apart.max())}"


def shown(ask: Ask) -> str:
    """A request, in one line."""
    return f"{ask.modality} {ask.front} {'single' if ask.single else 'two stages'}{' think' * ask.think} {ask.prompt!r}"
