"""Faults of the product that the campaign must find: each is a change of a copy of its packages, which services run."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from tests.campaign.fleet import DITS, FRONTS, ROOT, THINKERS

PACKAGES = ("bagel", "services/thinker/bagel_thinker", "services/dit/bagel_dit", "gateway/bagel_gateway")
LIMIT = 1000
"""Injected faults within which each is to be found."""


@dataclass(frozen=True)
class Plant:
    """One fault. services: those that have it; changes: (file, text, what it becomes)."""

    about: str
    services: tuple[str, ...]
    changes: tuple[tuple[str, str, str], ...]


PLANTS = {
    "lease-unchecked": Plant(
        "a Thinker sends K/V whoever asks, without a look at the lease",
        THINKERS,
        (("bagel/kv/service.py", "        self.store.check_lease(request.lease_id)\n", ""),),
    ),
    "header-unchecked": Plant(
        "the checksum of a page covers its payload alone, as in version 1 of the rule",
        (*THINKERS, *DITS),
        (
            (
                "bagel/kv/codec.py",
                "    digest.update(_LENGTH.pack(len(key.digest)) + key.digest + _NUMBERS.pack(*numbers))\n",
                "    list(numbers)\n",
            ),
        ),
    ),
    "error-swallowed": Plant(
        "a stream whose work failed ends as if it had not",
        tuple(FRONTS),
        (
            (
                "bagel/rpc/errors.py",
                "        if failed is not None:  # last: a client that reads nothing does not take this either\n",
                "        if failed is not None and not failed:\n",
            ),
        ),
    ),
    "digest-unchecked": Plant(
        "the gateway does not hold the end of an answer against what it has received",
        tuple(FRONTS),
        (
            (
                "gateway/bagel_gateway/uploads.py",
                "            self.digest.check(await self._call.trailing_metadata(), self._peer)\n",
                "",
            ),
        ),
    ),
    "stale-fingerprint": Plant(
        "a runner that starts again loads whatever lies on the disk",
        DITS,
        (
            (
                "services/dit/bagel_dit/workers/rank.py",
                "    if served and checkpoint.fingerprint != served:\n",
                "    if served and not checkpoint.fingerprint:\n",
            ),
        ),
    ),
    "waiter-not-woken": Plant(
        "a place that becomes free is lost if somebody waits for it",
        (*THINKERS, *DITS, *FRONTS),
        (
            (
                "bagel/rpc/admission.py",
                "            self._took(time.perf_counter() - began)\n            self._give_back()\n",
                "            if not self.waiting:\n                self._give_back()\n",
            ),
        ),
    ),
    "memory-freed-early": Plant(
        "shared memory of leased segments is given to others",
        (*THINKERS, *DITS),
        (
            (
                "bagel/kv/segment.py",
                "        return not self.leases and not self.pins and not self.claimed\n",
                "        return not self.pins and not self.claimed\n",
            ),
        ),
    ),
    "cancelled-stays": Plant(
        "a request whose client has left stays on the canvas",
        DITS,
        (
            (
                "services/dit/bagel_dit/runner_client.py",
                "            self._ranks.send(Remove(id_))\n",
                "",
            ),
        ),
    ),
    "wrong-branch": Plant(
        "the branch without images is drawn from the K/V of the branch without the last text",
        tuple(FRONTS),
        (
            (
                "gateway/bagel_gateway/routes/staged.py",
                "        gen = contexts[BranchName.GEN]\n",
                "        gen = contexts[BranchName.GEN]\n"
                "        contexts[BranchName.CFG_IMG] = contexts.get(BranchName.CFG_TEXT, gen)\n",
            ),
        ),
    ),
    "lost-call-awaited": Plant(
        "the gateway waits without a limit for an answer that gives no sign of life",
        tuple(FRONTS),
        (
            (
                "gateway/bagel_gateway/uploads.py",
                "            async with asyncio.timeout(self._limit_s) as self._timer:\n",
                "            async with asyncio.timeout(None) as self._timer:\n",
            ),
            (
                "gateway/bagel_gateway/uploads.py",
                "        if self._timer is not None:\n",
                "        if self._timer is None:\n",
            ),
        ),
    ),
}


def plant(name: str, folder: Path) -> Path:
    """A copy of the packages with that fault in it: the root that services import them from."""
    for package in PACKAGES:
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    for file, old, new in PLANTS[name].changes:
        path = folder / file
        source = path.read_text()
        if source.count(old) != 1:
            raise ValueError(f"{name}: {file} does not have what is to be changed once: {old!r}")
        path.write_text(source.replace(old, new))
    return folder
