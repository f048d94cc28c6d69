"""python -m tests.campaign: see the package."""

from __future__ import annotations

import argparse
import asyncio
import compileall
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.campaign import plants, report
from tests.campaign.campaign import Campaign, Verdict
from tests.campaign.faults import plan
from tests.campaign.fleet import ROOT, Fleet

FIRST, GENERATION = 18, 100
"""Rounds until the fleet is started anew, with TLS where it had none and without where it had it: twice soon, so that
a short campaign has both, then seldom."""


MISSED = "missed"


def is_tls(number: int) -> bool:
    """Whether that round's services speak TLS."""
    return number >= FIRST if number < 2 * FIRST else bool((number - 2 * FIRST) // GENERATION % 2)


def ranks_of(number: int) -> int:
    """How many ranks one of its DiTs has: one in a short campaign, then two."""
    return 1 if number < 2 * FIRST else 2


async def run(seed: int, faults: int, only: int | None, folder: Path) -> list[Verdict]:
    """Rounds until so many faults have happened, or one round alone."""
    verdicts: list[Verdict] = []
    fleet: Fleet | None = None
    number, count = only or 0, 0
    try:
        while count < faults:
            if fleet is None or (fleet.tls, fleet.ranks) != (is_tls(number), ranks_of(number)):
                if fleet is not None:
                    await fleet.stop()
                began = time.perf_counter()
                fleet = Fleet(folder / f"fleet-{number}", ROOT, is_tls(number), ranks_of(number))
                await fleet.start()
                campaign = Campaign(fleet)
                print(
                    f"fleet {'with' if fleet.tls else 'without'} TLS: {time.perf_counter() - began:.1f} s",
                    flush=True,
                )
            verdict = await campaign.run(plan(seed, number, sorted(fleet.links), tls=fleet.tls))
            verdicts.append(verdict)
            count += verdict.fired.total()
            print(report.line(verdict, count), flush=True)
            for wrong in verdict.wrong:
                print(f"  {wrong}\n  again: python -m tests.campaign --seed {seed} --only {number}", flush=True)
            if only is not None:
                break
            number += 1
    finally:
        if fleet is not None:
            await fleet.stop()
    return verdicts


async def prove(seed: int, names: Sequence[str], folder: Path) -> list[str]:
    """Plant each of these faults, and see how many injected faults it takes to find it: a table of them."""
    rows = ["| planted fault | found after | by |", "|---|--:|---|"]
    fleet = Fleet(folder / "fleet", ROOT, tls=False)
    try:
        await fleet.start()
        for name in names:
            code = plants.plant(name, folder / name)
            compileall.compile_dir(code, quiet=1)  # once, and not in each process
            await fleet.run_code(code, plants.PLANTS[name].services)
            rows.append(await _find(seed, name, fleet))
            print(rows[-1], flush=True)
    finally:
        await fleet.stop()
    return rows


async def _find(seed: int, name: str, fleet: Fleet) -> str:
    """Rounds until one fails; the row of the table."""
    campaign, count, number = Campaign(fleet), 0, 0
    while count < plants.LIMIT:
        verdict = await campaign.run(plan(seed, number, sorted(fleet.links), tls=False))
        count, number = count + verdict.fired.total(), number + 1
        print(report.line(verdict, count), flush=True)
        if verdict.wrong:
            return f"| {plants.PLANTS[name].about} | {count} | {verdict.wrong[0]} |"
    return f"| {plants.PLANTS[name].about} | {MISSED} | |"


def main() -> int:
    """Run the command; its exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.campaign", description="Faults against real services.")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--faults", type=int, default=300, help="how many are injected, at least")
    parser.add_argument("--only", type=int, metavar="ROUND", help="this round alone")
    parser.add_argument("--logs", type=Path, metavar="FOLDER", help="keep the services' logs there")
    parser.add_argument("--plant", metavar="NAME,...", help="plant these faults one by one; list: name them")
    parser.add_argument("--prove", action="store_true", help="plant all of them, one after the other")
    args = parser.parse_args()
    if args.plant == "list":
        print("\n".join(f"{name:20} {each.about}" for name, each in plants.PLANTS.items()))
        return 0
    if args.plant or args.prove:
        names = args.plant.split(",") if args.plant else list(plants.PLANTS)
        with tempfile.TemporaryDirectory(prefix="campaign-") as folder:
            rows = asyncio.run(prove(args.seed, names, Path(folder)))
        print("\n".join(rows))
        return 1 if any(MISSED in row for row in rows) else 0
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="campaign-") as folder:
        verdicts = asyncio.run(run(args.seed, args.faults, args.only, args.logs or Path(folder)))
    print(report.table(verdicts))
    print(f"requests: {report.ends(verdicts)}")
    wrong, count = sum(len(verdict.wrong) for verdict in verdicts), report.total(verdicts).total()
    print(f"seed {args.seed}: {count} faults in {time.perf_counter() - began:.0f} s, {wrong} failures")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
