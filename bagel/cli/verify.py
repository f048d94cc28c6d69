"""`bagel verify`: read a checkpoint in full; what names its content, and which services would load it.

stdout is the same on every host that has the same model, so that two of them can be compared; where it lies and how
long it took goes to stderr.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

from bagel.checkpoint.files import AE, CONFIG_FILES, EMA, TEXT_FILES, Checkpoint
from bagel.checkpoint.headers import read_header
from bagel.cli.outputs import write_out
from bagel.cli.progress import say
from bagel.deployment.defaults import find_model, missing_install_named
from bagel.errors import CheckpointError

ROLES = "bagel.model.verify"
"""The torch side, by name: an import statement would bring torch into the command line."""
SERVICES = {
    "understand": "the Thinker with --role understand",
    "context": "the Thinker",
    "denoise": "the DiT",
    "full": "the single stage, and bagel generate in one process",
}
"""Which service loads which role."""


@dataclass
class _File:
    """One file of the report. tensors: how many of each type a safetensors file has."""

    name: str
    nbytes: int
    digest: str
    tensors: dict[str, int] = field(default_factory=dict)


@dataclass
class _Report:
    """What was found. services: why each role's service would refuse the model; empty if it would not."""

    folder: Path
    files: list[_File] = field(default_factory=list)
    fingerprint: str = ""
    services: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Note what is wrong and go on: a report says all that it can."""
        try:
            yield
        except CheckpointError as error:
            if str(error) not in self.problems:
                self.problems.append(str(error))


def verify(args: argparse.Namespace) -> None:
    """Run the command; raises CheckpointError, after the report, if a file is wrong or a service would refuse."""
    name, checkpoint = find_model(args.model, cached_only=True)
    say(f"reading {name} in {checkpoint.folder}")
    if unfinished := _unfinished(checkpoint.folder):
        say(f"note: the hub's cache has {unfinished} bytes of downloads that broke off; fetch the model again")
    report = _Report(checkpoint.folder)
    with missing_install_named():
        _examine(report, checkpoint, args.role)
    write_out(_as_json(report) if args.json else _as_text(report))
    if report.problems:
        more = f" (and {len(report.problems) - 1} more)" if len(report.problems) > 1 else ""
        raise CheckpointError(f"{report.problems[0]}{more}")


def _unfinished(folder: Path) -> int:
    """Bytes of what the hub's client had begun to fetch, beside a snapshot in its cache."""
    blobs = folder.parent.parent / "blobs"
    cached = folder.parent.name == "snapshots" and blobs.is_dir()
    return sum(part.stat().st_size for part in blobs.glob("*.incomplete")) if cached else 0


def _examine(report: _Report, checkpoint: Checkpoint, role: str | None) -> None:
    from bagel.checkpoint.digest_cache import DigestCache
    from bagel.checkpoint.identity import fingerprint_of, text_digest, weights_digest

    folder, cache, covered, began = checkpoint.folder, DigestCache.of_user(), [], time.monotonic()
    for name in CONFIG_FILES:
        with report.noting():
            found = text_digest(checkpoint.path(name))
            report.files.append(_File(name, found.nbytes, found.digest.hex()))
    for name in TEXT_FILES:
        if (folder / name).is_file():
            with report.noting():
                covered.append(text_digest(folder / name))
                report.files.append(_File(name, covered[-1].nbytes, covered[-1].digest.hex()))
    for name in (EMA, AE):
        with report.noting():
            # Read anew, since a digest from the cache would hide a disk that has lost bytes.
            found = weights_digest(checkpoint.path(name), cache, anew=True)
            covered.append(found)
            types = Counter(info.dtype for info in read_header(folder / name).tensors.values())
            report.files.append(_File(name, found.nbytes, found.digest.hex(), dict(sorted(types.items()))))
            if found.known not in (None, found.digest):
                raise CheckpointError(
                    f"{folder / name} has other content than when it was last read, and the same size and times: the "
                    "disk may be failing; fetch it again"
                )
    say(f"{sum(file.nbytes for file in report.files)} bytes in {time.monotonic() - began:.2f} s")
    with report.noting():
        report.services = _services(checkpoint, role)
        # The files may have been replaced while they were read.
        checkpoint.check_unchanged()
        if not [name for name in (EMA, AE) if name not in {file.name for file in covered}]:
            report.fingerprint = fingerprint_of(checkpoint.config, covered).hex()
    # Several services may refuse a model for the same reason.
    report.problems += sorted({why for why in report.services.values() if why} - set(report.problems))


def _services(checkpoint: Checkpoint, role: str | None) -> dict[str, str]:
    checkpoint.config  # noqa: B018  what is wrong with it is one problem, not one a role
    found: dict[str, str] = import_module(ROLES).problems_of(checkpoint)
    return {name: why for name, why in found.items() if role in (None, name)}


def _as_text(report: _Report) -> str:
    lines = [f"fingerprint {report.fingerprint or 'none'}"]
    for file in report.files:
        count = sum(file.tensors.values())
        about = f"  {count} tensors, {', '.join(file.tensors)}" if file.tensors else ""
        lines.append(f"{file.digest} {file.nbytes:>14}  {file.name}{about}")
    lines += [f"{'refused' if why else 'accepted'} by {SERVICES[role]}" for role, why in report.services.items()]
    return "\n".join(lines + [f"problem: {' '.join(problem.split())}" for problem in report.problems]) + "\n"


def _as_json(report: _Report) -> str:
    files = {file.name: {"bytes": file.nbytes, "digest": file.digest} for file in report.files}
    for file in report.files:
        if file.tensors:
            files[file.name] |= {"tensors": file.tensors}
    found = {
        "ok": not report.problems,
        "fingerprint": report.fingerprint or None,
        "files": files,
        "services": {role: {"accepts": not why, "problem": why or None} for role, why in report.services.items()},
        "problems": report.problems,
    }
    return json.dumps(found, indent=2) + "\n"
