"""`python -m tests.fuzz TARGET --seconds N`: fuzz one target with atheris, and say what was found.

New inputs that reach new code go to --corpus (a folder outside of the repository), findings to --findings.
`--minimise FOLDER` copies the smallest of them that reach the same code to FOLDER.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from tests.fuzz.target import CORPUS, load, names

LONGEST_RUN_S = 10
"""Seconds that one input may take: libFuzzer stops at a slower one, with the input."""
MOST_MIB = 2048


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz", description="Fuzz one target with atheris.", allow_abbrev=False
    )
    parser.add_argument("target", choices=names())
    parser.add_argument("--seconds", type=int, default=300)
    parser.add_argument("--corpus", type=Path, default=Path("build/fuzz"), help="inputs of earlier runs, and new ones")
    parser.add_argument("--minimise", type=Path, help="write a smallest corpus with the same coverage here, and end")
    # libFuzzer starts this program again to minimise, with words of its own.
    args, inner = parser.parse_known_args()
    try:
        import atheris
    except ImportError:
        sys.exit("atheris is not installed; pip install -e '.[fuzz]'")
    logging.disable(logging.CRITICAL)
    with atheris.instrument_imports(include=["bagel", "bagel_gateway", "python_multipart", "yaml", "json"]):
        target = load(args.target)
    folder = args.corpus / args.target
    folder.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(target.seeds()):
        (folder / f"seed-{number}").write_bytes(seed)
    words = folder.with_suffix(".words")
    words.write_text("".join('"' + "".join(f"\\x{byte:02x}" for byte in word) + '"\n' for word in target.words))
    committed = CORPUS / args.target
    folders = [str(folder), *([str(committed)] if committed.is_dir() else [])]
    options = [
        f"-max_len={target.longest}",
        f"-timeout={LONGEST_RUN_S}",
        f"-rss_limit_mb={MOST_MIB}",
        f"-artifact_prefix={args.corpus}/finding-{args.target}-",
        f"-dict={words}",
        "-print_final_stats=1",
    ]
    if args.minimise:
        args.minimise.mkdir(parents=True, exist_ok=True)
        options, folders = [*options, "-merge=1", "-use_counters=0"], [str(args.minimise), *folders]
    else:
        options.append(f"-max_total_time={args.seconds}")

    def run(data: bytes) -> None:
        target.run(data)

    again = folder.with_suffix(".again")
    again.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m tests.fuzz {args.target} --corpus "{args.corpus}" "$@"\n')
    again.chmod(0o700)
    atheris.Setup([str(again), *(inner or [*options, *folders])], run)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
