"""What a round is made of: faults with their places and times, and requests. All of it is derived from the seed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tests.campaign.fleet import DITS, FRONTS, PAGE_S, SILENCE_S, THINKERS, encrypted, is_framed
from tests.campaign.proxy import DAMAGES
from tests.campaign.workload import STAGES, Ask, ask

NETWORK = (
    "delay",
    "stall",
    "reorder",
    "cut",
    "truncate",
    "dribble",
    "blackhole",
    "garbage",
    "repeat",
    "flip",
    "refuse",
)
FRAMES = ("frame-head", "frame-lost")
"""Of the network's faults, those of plaintext alone, where the proxy sees what is whose."""
FRAMES_OFTEN = 3
"""How much more often than another kind: most hit a frame that is not missed."""
CHANGES = ("garbage", "repeat", "flip")
"""Of the network's faults, those that change what comes instead of ending it."""
PAGES = ("page-twice", "page-late", "page-header", "page-payload", "page-lost")
CLIENTS = ("leaves", "leaves-soon", "short-deadline", "slow", "unread")
PEERS = (
    "stale-lease", "foreign-fingerprint", "other-page-rule", "unknown-field", "unknown-enum", "older-client",
    "older-thinker", "newer-dit", "garbage-bytes",
)  # fmt: skip
CERTIFICATES = ("expired-client", "foreign-client", "wrong-client", "expired-service", "wrong-service")
DISPLACING = ("older-thinker", "newer-dit", "expired-service", "wrong-service")
"""Peers that stand in the place of a service, whose connections break."""
PROCESS = (
    "kill-runner", "kill-service", "stop-runner", "stop-service", "stop-long", "drain", "memory", "files", "clock",
    "disk", "shared-memory", "checkpoint",
)  # fmt: skip
FLAVOURS = {"network": 5, "pages": 3, "clients": 3, "peers": 2, "process": 4}
SPREAD_S = 0.8
"""The requests of a round begin within it."""
CROWD, CROWD_S = 32, 0.05
"""Requests that come nearly at once, so that some wait for places."""


@dataclass(frozen=True)
class Fault:
    """One injected fault. place: a link, a service, or empty for a fault of a request's own client.

    number: what it derives its own choices from; seconds: how long it lasts, where it does.
    """

    kind: str
    place: str
    at_s: float
    seconds: float
    number: int

    @property
    def group(self) -> str:
        """The table's row group."""
        groups = {
            "network": (*NETWORK, *FRAMES),
            "pages": PAGES,
            "clients": CLIENTS,
            "peers": PEERS,
            "certificates": CERTIFICATES,
        }
        return next((name for name, kinds in groups.items() if self.kind in kinds), "processes")


@dataclass(frozen=True)
class Round:
    """One round, as it is planned, or with the faults that have happened."""

    number: int
    flavour: str
    faults: tuple[Fault, ...]
    asks: tuple[tuple[float, Ask], ...]

    @property
    def strict(self) -> bool:
        """Whether none of its faults excuses an error of a request whose client waits."""
        return self.flavour == "clients" or (
            self.flavour == "peers" and not any(fault.kind in DISPLACING for fault in self.faults)
        )

    def damages(self, ask: Ask) -> bool:
        """Whether bytes of the connections that this request may have are damaged."""
        return self._to_client(ask, DAMAGES)

    def loses(self, ask: Ask) -> bool:
        """Whether bytes of the connections that this request may have are lost, or damaged."""
        return self._to_client(ask, (*DAMAGES, "blackhole"))

    def _to_client(self, ask: Ask, kinds: Sequence[str]) -> bool:
        link = f"client>gateway{'-single' * ask.single}/{'grpc' if ask.front == 'grpc' else 'http'}"
        return any(fault.kind in kinds and fault.place == link for fault in self.faults)


def plan(seed: int, number: int, links: Sequence[str], *, tls: bool) -> Round:
    """The round of that number. links: the names of those that there are; tls: whether the two stages speak it."""
    chance = random.Random(f"{seed}/{number}")
    flavour = chance.choices(list(FLAVOURS), list(FLAVOURS.values()))[0]
    if flavour == "pages" and tls:
        flavour = "network"  # nobody sees a frame there
    match flavour:
        case "network":
            faults = [_network(chance, links, tls) for _ in range(18)]
            asks = _asks(chance, 14)
        case "pages":
            pulls = [link for link in links if is_pull(link)]
            faults = [_fault(chance, chance.choice(PAGES), chance.choice(pulls)) for _ in range(14)]
            asks = [(at, _picture(each)) for at, each in _asks(chance, 12)]
        case "clients":
            count, spread_s = chance.choice(((18, SPREAD_S), (CROWD, CROWD_S)))
            asks = [
                (at, _client(chance, each) if chance.random() < 0.8 else each)
                for at, each in _asks(chance, count, spread_s)
            ]
            faults = [Fault(_behaviour(each), "", at, 0.0, 0) for at, each in asks if _behaviour(each)]
        case "peers":
            kinds = (*PEERS, *CERTIFICATES)  # half of the services speak TLS
            faults = [_fault(chance, chance.choice(kinds), chance.choice((*THINKERS, *DITS))) for _ in range(12)]
            asks = _asks(chance, 8)
        case _:
            faults = [_process(chance) for _ in range(chance.choice((2, 3)))]
            faults += [_network(chance, links, tls) for _ in range(10)]
            asks = _asks(chance, 12)
    return Round(number, flavour, tuple(sorted(faults, key=lambda fault: fault.at_s)), tuple(asks))


def _asks(chance: random.Random, count: int, spread_s: float = SPREAD_S) -> list[tuple[float, Ask]]:
    return [(round(chance.random() * spread_s, 3), ask(chance)) for _ in range(count)]


def _picture(each: Ask) -> Ask:
    """A picture of two stages from the same prompt, so that K/V are pulled."""
    options = tuple(option for option in each.options if option[0] != "do_sample")
    modality = each.modality if each.modality.endswith("2img") else "img2img" if each.image else "text2img"
    return replace(each, single=False, modality=modality, options=options)


def _fault(chance: random.Random, kind: str, place: str, seconds: float = 0.0) -> Fault:
    return Fault(kind, place, round(chance.random() * SPREAD_S, 3), seconds, chance.randrange(2**31))


def _network(chance: random.Random, links: Sequence[str], tls: bool) -> Fault:
    place = chance.choice([*links, *(link for link in links if is_pull(link))])
    kinds = [kind for kind in NETWORK if kind not in CHANGES or encrypted(place, tls) or is_covered(place)]
    if is_framed(place, tls):
        kinds += FRAMES_OFTEN * FRAMES
    kind = chance.choice(kinds)
    seconds = {"delay": 0.05, "reorder": 0.2, "stall": 0.5, "refuse": 0.3}.get(kind, 0.0) * (0.5 + chance.random())
    if kind == "stall" and chance.random() < 0.15:
        seconds = PAGE_S + 0.5
    return _fault(chance, kind, place, round(seconds, 3))


def is_pull(link: str) -> bool:
    """Whether K/V pass there."""
    return link.startswith("dit-")


def is_covered(link: str) -> bool:
    """Whether what is changed there in plaintext is found: gRPC's messages have digests, REST's bodies have none."""
    return not link.endswith("/http")


def _client(chance: random.Random, each: Ask) -> Ask:
    match chance.choice(CLIENTS):
        case "leaves":
            return replace(each, front="grpc", leaves=chance.choice(STAGES))
        case "leaves-soon":
            return replace(each, leaves_s=round(0.01 + chance.random() ** 2 * 0.4, 3))
        case "short-deadline":
            return replace(each, front="grpc", deadline_s=round(0.02 + chance.random() * 0.3, 3))
        case "slow":
            return replace(each, reads_s=0.03)
        case _:
            return replace(each, front="grpc", reads_s=1.0, leaves_s=1.0)


def _behaviour(each: Ask) -> str:
    """The fault of a request's own client, if there is one."""
    if each.leaves:
        return "leaves"
    if each.leaves_s:
        return "unread" if each.reads_s else "leaves-soon"
    if each.reads_s:
        return "slow"
    return "" if each.stays else "short-deadline"


def _process(chance: random.Random) -> Fault:
    kind = chance.choice((*PROCESS, "checkpoint"))
    seconds = round(0.1 + chance.random() * 0.9, 2)
    match kind:
        case "kill-runner" | "stop-runner":
            place = chance.choice((*DITS, "single"))
        case "checkpoint":
            place = "dit-1"
        case "shared-memory" | "disk":
            place = chance.choice(("thinker-1", "dit-1"))
        case "kill-service" | "drain":
            place = chance.choice((*THINKERS, *DITS, "single", *FRONTS))
        case "stop-long":
            place, seconds = chance.choice((*THINKERS, *DITS, "single")), SILENCE_S + 1.5
        case "memory":
            place = chance.choice((*THINKERS, *DITS, "single"))
        case _:
            place = chance.choice((*THINKERS, *DITS, "single", *FRONTS))
    return _fault(chance, kind, place, seconds)
