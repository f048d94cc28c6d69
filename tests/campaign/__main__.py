"""python -m tests.campaign: see the package."""

from __future__ import annotations

import argparse
import asyncio
import compileall
import itertools
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tests.campaign import plants, report
from tests.campaign.campaign import Campaign, Verdict
from tests.campaign.faults import plan
from tests.campaign.fleet import ROOT, Fleet

GENERATION = 100
"""Rounds of one fleet. Then the other half of the services speaks TLS, and from the second on a DiT has two ranks."""
REPEATS = 2
"""How often a round is run again that says nothing because others had the CPUs."""
MISSED = "missed"


def is_tls(number: int) -> bool:
    """Whether the two stages of that round speak TLS; if not, the single stage does."""
    return bool(number // GENERATION % 2)


def ranks_of(number: int) -> int:
    """How many ranks one of its DiTs has."""
    return 1 if number < GENERATION else 2


class Rounds:
    """Rounds of one seed, on a fleet that is kept while it fits. planted: the fault of the product, if there is one."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.seed, self.folder, self.planted = seed, folder, ""
        self._code: tuple[Path, Sequence[str]] = (ROOT, ())
        self._fleet: Fleet | None = None
        self._fleets = 0

    async def plant(self, name: str) -> None:
        """Have the services run the packages with that fault."""
        code = plants.plant(name, self.folder / name)
        compileall.compile_dir(code, quiet=1)  # once, and not in each process
        self.planted, self._code = name, (code, plants.PLANTS[name].services)
        if self._fleet is not None:
            await self._fleet.run_code(*self._code)
            self._campaign = Campaign(self._fleet)

    async def run(self, number: int) -> Verdict:
        """A round, again if the machine had no time for it."""
        verdict = await self._once(number)
        for _ in range(REPEATS):
            if not verdict.undecided:
                break
            print(f"round {number} again: others had {verdict.others:.0%} of the CPUs; {verdict.wrong[0]}", flush=True)
            before, verdict = verdict, await self._once(number)
            verdict.fired += before.fired
        return verdict

    async def stop(self) -> None:
        """End the services."""
        if self._fleet is not None:
            await self._fleet.stop()
            self._fleet = None

    async def _once(self, number: int) -> Verdict:
        fleet = await self._ready(number)
        round_ = plan(self.seed, number, sorted(fleet.links), tls=fleet.tls)
        try:
            return await self._campaign.run(round_)
        except Exception as error:
            # The services cannot go on, which is this round's failure; the next one gets others.
            await self.stop()
            return Verdict(round_, wrong=[f"no further round is possible: {type(error).__name__}: {error}"])

    async def _ready(self, number: int) -> Fleet:
        wanted = (is_tls(number), ranks_of(number))
        if self._fleet is not None and (self._fleet.tls, self._fleet.ranks) != wanted:
            await self.stop()
        if self._fleet is None:
            began = time.perf_counter()
            self._fleets += 1
            self._fleet = fleet = Fleet(self.folder / f"fleet-{self._fleets}", ROOT, *wanted)
            await fleet.start()
            if self.planted:
                await fleet.run_code(*self._code)
            self._campaign = Campaign(fleet)
            print(f"{len(fleet.services)} services after {time.perf_counter() - began:.1f} s", flush=True)
        return self._fleet

    def report(self, verdict: Verdict, count: int) -> None:
        """Print a round; for each failure, how it is repeated."""
        print(report.line(verdict, count), flush=True)
        plant = f" --plant {self.planted}" if self.planted else ""
        for wrong in verdict.wrong:
            print(f"  {wrong}", flush=True)
        if verdict.wrong:
            print(
                f"  again: python -m tests.campaign --seed {self.seed}{plant} --only {verdict.round.number}", flush=True
            )


async def run(seed: int, faults: int, begin: int, only: int | None, fleets: int, folder: Path) -> list[Verdict]:
    """Rounds from `begin` on until so many faults have happened, on so many fleets at once; or one round alone."""
    verdicts: list[Verdict] = []
    numbers, done = itertools.count(begin if only is None else only), Counter[str]()

    async def work(number: int) -> None:
        rounds = Rounds(seed, folder / f"{number}")
        try:
            while done["faults"] < faults and (only is None or not verdicts):
                verdicts.append(verdict := await rounds.run(next(numbers)))
                done["faults"] += verdict.fired.total()
                rounds.report(verdict, done["faults"])
        finally:
            await rounds.stop()

    async with asyncio.TaskGroup() as group:
        for number in range(fleets):
            group.create_task(work(number))
    return verdicts


async def prove(seed: int, names: Sequence[str], only: int | None, folder: Path) -> list[str]:
    """Plant each of these faults, and see how many injected faults it takes to find it: a table of them."""
    rows = ["| planted fault | found after | by |", "|---|--:|---|"]
    rounds = Rounds(seed, folder)
    try:
        for name in names:
            await rounds.plant(name)
            count, number, by = 0, only or 0, ""
            while count < plants.LIMIT and not by and (only is None or number == only):
                verdict = await rounds.run(number)
                count, number = count + verdict.fired.total(), number + 1
                rounds.report(verdict, count)
                by = verdict.wrong[0] if verdict.wrong else ""
                if verdict.undecided:  # each time that it was run, as in no round of the product as it is
                    by += f" (with {verdict.others:.0%} of the CPUs in others' use)"
            rows.append(f"| {plants.PLANTS[name].about} | {count if by else MISSED} | {by} |")
            print(rows[-1], flush=True)
    finally:
        await rounds.stop()
    return rows


def main() -> int:
    """Run the command; its exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.campaign", description="Faults against real services.")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--faults", type=int, default=300, help="how many are injected, at least")
    parser.add_argument("--fleets", type=int, default=1, metavar="N", help="sets of services at once")
    parser.add_argument("--begin", type=int, default=0, metavar="ROUND", help="the first round")
    parser.add_argument("--only", type=int, metavar="ROUND", help="this round alone; of a proof, with --plant")
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
            rows = asyncio.run(prove(args.seed, names, args.only, args.logs or Path(folder)))
        print("\n".join(rows))
        return 1 if any(MISSED in row for row in rows) else 0
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="campaign-") as folder:
        where = args.logs or Path(folder)
        verdicts = asyncio.run(run(args.seed, args.faults, args.begin, args.only, args.fleets, where))
    print(report.table(verdicts))
    print(f"requests: {report.ends(verdicts)}")
    wrong = sum(len(verdict.wrong) for verdict in verdicts if not verdict.undecided)
    if undecided := sum(verdict.undecided for verdict in verdicts):
        print(f"{undecided} rounds say nothing of what is measured by the clock: others had the CPUs")
    count = report.total(verdicts).total()
    print(f"seed {args.seed}: {count} faults in {time.perf_counter() - began:.0f} s, {wrong} failures")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
