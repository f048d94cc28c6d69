"""The requests of a campaign: all modalities, topologies and fronts, and what came of each."""

from __future__ import annotations

import asyncio
import random
import time
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from io import BytesIO
from typing import Any

from PIL import Image, ImageDraw

from bagel.client import PLAINTEXT, AsyncClient, Security
from bagel.errors import BagelError
from bagel.events import Accepted, Result, TextDelta
from tests.campaign import http

DEADLINE_S = 14.0
"""Of every request; the services' own limits end what hangs before that."""
LATE_S = 1.5
"""How much later than its deadline a call may end, on a machine that is busy."""
LOST_ONE_BY_ONE_S = 10.0
"""How much longer a request over REST may take: two calls more that are lost, of two silences each."""
STEPS, TOKENS = 3, 5
COLOURS, THINGS = ("red", "blue", "green", "grey", "teal"), ("cup", "boat", "cat", "tower", "leaf", "door")
STAGES = ("accepted", "prefill", "text", "drawing", "step", "picture")


@dataclass(frozen=True)
class Ask:
    """One request and how its client behaves.

    front: grpc, rest or rest-stream. leaves: the event after which the client leaves; leaves_s: or how soon; reads_s:
    how long it waits between two events.
    """

    modality: str
    prompt: str
    seed: int
    single: bool = False
    front: str = "grpc"
    think: bool = False
    image: int = 0
    options: tuple[tuple[str, Any], ...] = ()
    leaves: str = ""
    leaves_s: float = 0.0
    reads_s: float = 0.0
    deadline_s: float = DEADLINE_S

    @property
    def stays(self) -> bool:
        """Whether its client waits for the answer, as long as it may take."""
        return not self.leaves and not self.leaves_s and self.deadline_s >= DEADLINE_S

    @property
    def ends_s(self) -> float:
        """When it has ended at the latest, whatever is lost but its client's own connection.

        Over REST there is no deadline: each lost call between services ends after two silences, one after the other.
        """
        return self.deadline_s + LATE_S + (0.0 if self.front == "grpc" else LOST_ONE_BY_ONE_S)

    @property
    def twin(self) -> Ask:
        """The same request to undisturbed services, from a client that waits."""
        return replace(self, single=True, leaves="", leaves_s=0.0, reads_s=0.0, deadline_s=4 * DEADLINE_S)

    def settings(self) -> dict[str, Any]:
        """The arguments of `generate`."""
        settings: dict[str, Any] = {"modality": self.modality, "seed": self.seed, "think": self.think}
        if self.modality.endswith("img"):
            settings |= {"steps": STEPS}
            if self.modality == "text2img":
                settings |= {"height": 64, "width": 64}
            if self.think:
                settings |= {"max_think_tokens": TOKENS}
        else:
            settings |= {"max_tokens": TOKENS}
        if self.image:
            settings |= {"image": picture(self.image)}
        return settings | dict(self.options)


@dataclass
class Outcome:
    """What came of a request: an answer, or an error, or its client left. s: how long it took.

    error: its class, or HTTP and the code; status: of gRPC, or the HTTP code.
    """

    ask: Ask
    answer: tuple[Any, ...] | None = None
    error: str = ""
    status: str = ""
    message: str = ""
    left: bool = False
    s: float = 0.0
    texts: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        if self.answer is not None:
            return "answered"
        return "left" if self.left else f"{self.error} ({self.status}): {self.message}"


@dataclass(frozen=True)
class Front:
    """Where a gateway is called."""

    grpc: str
    http: str
    security: Security = PLAINTEXT


def picture(number: int) -> bytes:
    """A small picture as a PNG, one of many."""
    chance = random.Random(number)
    image = Image.new("RGB", (64 + 16 * chance.randrange(3), 64), (chance.randrange(256), 90, 200))
    ImageDraw.Draw(image).ellipse((8, 8, 30 + chance.randrange(30), 50), fill=(250, chance.randrange(256), 0))
    stream = BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def ask(chance: random.Random) -> Ask:
    """Any request, from a client that waits."""
    modality = chance.choice(("text2img", "text2img", "img2img", "img2text", "text2text"))
    front = chance.choice(("grpc", "grpc", "grpc", "rest", "rest-stream"))
    image = chance.randrange(1, 40) if modality.startswith("img") else 0
    text = f"a {chance.choice(COLOURS)} {chance.choice(THINGS)} {chance.randrange(400)}"
    think = chance.random() < 0.3
    made = Ask(modality, text, chance.randrange(50), chance.random() < 0.3, front, think, image)
    return replace(made, options=tuple(_options(made, chance).items()))


def _options(made: Ask, chance: random.Random) -> dict[str, Any]:
    """Settings that change the result, some of the time."""
    options: dict[str, Any] = {}
    if made.modality.endswith("img"):
        if chance.random() < 0.3:
            options["cfg_text_scale"] = 1.0  # no second branch
        elif chance.random() < 0.3:
            options["negative_prompt"] = "fog"
        if made.modality == "img2img" and chance.random() < 0.5:
            options["posterior"] = "seed"
    elif chance.random() < 0.3:
        options["do_sample"] = True
    return options


async def send(ask: Ask, front: Front) -> Outcome:
    """Send a request, and behave as its client does."""
    outcome, began = Outcome(ask), time.perf_counter()
    work = _over_grpc(outcome, front) if ask.front == "grpc" else http.request(outcome, front)
    try:
        limit = ask.leaves_s or (ask.ends_s + 5.0)
        async with asyncio.timeout(limit):
            await work
    except TimeoutError:
        outcome.left = True
    except BagelError as error:
        outcome.error, outcome.status, outcome.message = type(error).__name__, error.grpc_status, str(error)
    except Exception as error:  # not what a client should ever see
        outcome.error, outcome.status, outcome.message = type(error).__name__, "UNDOCUMENTED", str(error)
    outcome.s = time.perf_counter() - began
    return outcome


async def _over_grpc(outcome: Outcome, front: Front) -> None:
    ask = outcome.ask
    async with AsyncClient(front.grpc, front.security) as client:
        stream = client.stream(ask.prompt, timeout=ask.deadline_s, **ask.settings())
        async with aclosing(stream) as events:
            async for event in events:
                if isinstance(event, TextDelta):
                    outcome.texts.append(event.text)
                if isinstance(event, Result):
                    outcome.answer = (event.text, event.token_ids, event.seed, event.file, "".join(outcome.texts))
                elif ask.leaves == _name(event):
                    outcome.left = True
                    return
                if ask.reads_s:
                    await asyncio.sleep(ask.reads_s)


def _name(event: object) -> str:
    """The stage that an event tells of, by the names of the API."""
    if isinstance(event, Accepted):
        return "accepted"
    return {"PrefillDone": "prefill", "TextDelta": "text", "DrawingStarted": "drawing", "StepDone": "step"}.get(
        type(event).__name__, ""
    )
