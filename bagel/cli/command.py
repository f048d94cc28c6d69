"""The command `bagel`: arguments in, an exit code out, and every error of a user's in one line.

Exit codes: 0; 1 something failed; 2 the request, a flag or a file is wrong; 130 Ctrl-C; 141 the reader of our output
has gone. Torch is never imported here, so that --help and mistakes are answered at once.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module

from bagel import __version__
from bagel.arguments import KeptExamples, Parser, for_command_line
from bagel.cli.flags import (
    EXAMPLES,
    INTERRUPTED,
    add_eval_nano_flags,
    add_generate_flags,
    add_health_flags,
    add_keys_flags,
    add_serve_flags,
    add_verify_flags,
    complain_of_unknown,
)
from bagel.errors import BagelError, ConfigError

BROKEN_PIPE = 141
COMMANDS = {
    "generate": (
        add_generate_flags,
        "make pictures or text",
        "Make pictures or text: in this process, in the services of a two-stage deploy file, or at a running gateway. "
        "Pictures' paths and answers go to stdout, everything else to stderr.",
    ),
    "serve": (
        add_serve_flags,
        "start all services of a deploy file",
        "Start all services of a deploy file on this machine and run them until Ctrl-C or SIGTERM. The gateway's "
        "address goes to stdout once it is ready, everything else to stderr.",
    ),
    "eval-nano": (
        add_eval_nano_flags,
        "score the shipped model",
        "Ask a gateway for pictures and answers of bagel-nano's world, judge them by their pixels and words, and print "
        "how many are right, with 95% Wilson intervals.",
    ),
    "verify": (
        add_verify_flags,
        "check a checkpoint and name its content",
        "Read a checkpoint in full: print its fingerprint, the digest of each file, and which services would load it. "
        "What goes to stdout is the same on all hosts that have the same model. The exit code is 0 if every service "
        "would load it, 2 if a file is wrong or one would not.",
    ),
    "health": (
        add_health_flags,
        "ask a service whether it is ready",
        "Ask a Thinker, a DiT or a gateway whether it is ready (grpc.health.v1). The exit code is 0 if it is; else 1, "
        "with its state on stderr.",
    ),
    "keys": (
        add_keys_flags,
        "make an API key",
        "Make an API key. Two lines go to stdout: the key, for its holder, shown this once; and the line by which a "
        "gateway knows it, for the file of --api-keys. Whoever's line is deleted there has a key no more.",
    ),
}
"""What adds each command's flags, its help and its description. A module of its name runs it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `bagel ARGV` (sys.argv without it) and return its exit code."""
    # First, since every error below is printed too.
    _make_printable()
    try:
        _run(argv)
        sys.stdout.flush()  # here, so that a full disk or a closed pipe is reported below and not at exit
        return 0
    except SystemExit as exit:  # argparse's --help and --version
        return _flushed(int(exit.code or 0))
    except BagelError as error:
        return _flushed(_fail(for_command_line(error), error.exit_code))
    except KeyboardInterrupt:
        return _flushed(_fail("interrupted", INTERRUPTED))
    except BrokenPipeError:
        return _silenced(BROKEN_PIPE)
    except OSError as error:
        what = repr(error.filename) if error.filename else "a read or write"
        return _silenced(_fail(f"{what} failed: {error.strerror or error}", 1))


def _run(argv: Sequence[str] | None) -> None:
    parser = Parser(prog="bagel", description="Serve BAGEL, one model that understands and generates images.")
    parser.add_argument("--version", action="version", version=f"bagel {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name, (add_flags, about, description) in COMMANDS.items():
        add_flags(commands.add_parser(name, help=about, description=description))
    generate = commands.choices["generate"]
    generate.usage = "bagel generate --prompts TEXT [TEXT ...] [--modality MODALITY] [--image-path FILE] [options]"
    generate.epilog, generate.formatter_class = EXAMPLES, KeptExamples
    if "serve" in (sys.argv[1:2] if argv is None else argv[:1]):  # no other command need load the services' flags
        from bagel.cli.passing import add_service_flags

        add_service_flags(commands.choices["serve"])
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        elsewhere: Mapping[str, str] = {}
        if args.command == "serve":
            from bagel.cli.passing import NOT_PASSED as elsewhere
        complain_of_unknown(unknown, commands.choices.get(args.command, parser), elsewhere)
    if args.command is None:
        raise ConfigError("no command; try bagel generate --prompts 'a large red circle', or bagel --help")
    name = args.command.replace("-", "_")
    # Imported by name, so that --help and mistakes load no other command's modules.
    getattr(import_module(f"bagel.cli.{name}"), name)(args)


def _make_printable() -> None:
    """Let neither a closed stream nor a character that its encoding lacks cost the user a result."""
    # Python sets a stream to None that was closed before it started (`bagel ... >&-`).
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 (needed until the process ends)
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _fail(message: str, code: int) -> int:
    kind = "" if code == INTERRUPTED else "error: "
    with contextlib.suppress(OSError):
        print(f"bagel: {kind}{' '.join(message.split())}", file=sys.stderr, flush=True)
    return code


def _flushed(code: int) -> int:
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        return _silenced(code or BROKEN_PIPE)
    except OSError as error:
        return _silenced(code or _fail(f"a write failed: {error.strerror or error}", 1))
    return code


def _silenced(code: int) -> int:
    """Point stdout at nothing, so that Python does not fail once more when it flushes at exit."""
    with contextlib.suppress(OSError, ValueError):  # ValueError: a stdout without a file behind it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code
