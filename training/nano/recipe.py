"""The whole training of bagel-nano, one stage after the other: python -m training.nano.recipe RUN [--from 2].

19.5 minutes on one H200, no stage above ten; a stage goes on from what the one before it left in RUN. Flags that are
not of the recipe go to every stage (see training.nano.train).
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
"""Each stage's name, minutes and flags."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages; the exit code of the first that fails, 0 if none does."""
    parser = OnceParser(prog="python -m training.nano.recipe", description="Train bagel-nano.")
    parser.add_argument("run", type=Path, help="folder of checkpoint, state and log")
    parser.add_argument("--from", dest="first", type=int, choices=range(1, 1 + len(STAGES)), default=1, metavar="STAGE")
    parser.add_argument("--share", type=float, default=1.0, help="of every stage's minutes, to try it")
    args, more = parser.parse_known_args(argv)
    for name, minutes, flags in STAGES[args.first - 1 :]:
        stage = [name, "--run", str(args.run), "--minutes", f"{args.share * minutes:g}", *flags, *more]
        if code := subprocess.run([sys.executable, "-m", "training.nano.train", *stage]).returncode:
            return code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
