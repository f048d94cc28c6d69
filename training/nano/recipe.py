"""Train bagel-nano, one stage after the other: python -m training.nano.recipe RUN [--from 2].

It takes 19.5 minutes on one H200, and no stage takes more than ten. Each stage continues from the results of the one
before it in RUN. Flags that this command does not have go to every stage (see training.nano.train).
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from bagel.arguments import OnceParser

STAGES: tuple[tuple[str, float, tuple[str, ...]], ...] = (
    ("vae", 3.7, ()),
    ("joint", 7.4, ("--rate-to", "0.8")),
    ("joint", 8.4, ("--rate-from", "0.8", "--rise", "20")),
)
"""The name, the minutes and the flags of each stage."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages; returns the exit code of the first one that fails, otherwise 0."""
    parser = OnceParser(prog="python -m training.nano.recipe", description="Train bagel-nano.")
    parser.add_argument("run", type=Path, help="folder of checkpoint, state and log")
    parser.add_argument("--from", dest="first", type=int, choices=range(1, 1 + len(STAGES)), default=1, metavar="STAGE")
    parser.add_argument("--share", type=float, default=1.0, help="of every stage's minutes, to try it")
    args, more = parser.parse_known_args(argv)
    for name, minutes, flags in STAGES[args.first - 1 :]:
        stage = [name, "--run", str(args.run), "--minutes", f"{args.share * minutes:g}", *flags, *more]
        # Each stage is a process of its own, so that it begins with an empty GPU.
        if code := subprocess.run([sys.executable, "-m", "training.nano.train", *stage]).returncode:
            return code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
