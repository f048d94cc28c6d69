"""One service as a child process: its address, its last words, its end. No torch here."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import IO, NoReturn, TextIO

from bagel.errors import BagelError, ConfigError
from bagel.telemetry.log_files import LogFolder

POLL_S = 0.05
GROUP_LIMIT_S = 0.5
"""Seconds that the processes of a service have after its own end."""
TAIL_LINES = 40
TOLD_LINES = 3
ERROR = "error: "
READY = json.dumps({"event": "ready"})

Logs = LogFolder | Path | TextIO | None
"""Where the services' output goes: a folder (files of each), a stream (lines with their names), or nowhere."""


class Service:
    """One child process. title: what it is called in messages, like "stage 0 (thinker)"."""

    def __init__(
        self, name: str, title: str, module: str, arguments: Sequence[str], env: Mapping[str, str], logs: Logs
    ) -> None:
        self.name, self.title = name, title
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._listening: Future[str] = Future()
        self.http = ""
        """Where it speaks HTTP, once it listens; empty if it does not."""
        self.said_ready = False
        """Whether it has said so on stdout, as the gateway does."""
        self._write, self._close_log, self.log = _sink(logs, name)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bagel.deployment.child", module, *arguments],
            stdin=subprocess.PIPE,  # never written to: bagel.child ends with it
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=env,
            encoding="utf-8",
            errors="replace",
            process_group=0,  # a terminal's Ctrl-C is ours alone, so that the order of the shutdown is too
        )
        streams = (self.process.stdout, self.process.stderr)
        self._readers = [
            Thread(target=self._read, args=(stream, stream is self.process.stdout), daemon=True) for stream in streams
        ]
        for reader in self._readers:
            reader.start()

    def address(self, deadline: float) -> str:
        """Where it listens, once it does. Raises BagelError if it ends before; TimeoutError at the deadline."""
        while not self._listening.done():
            self.check()
            if time.monotonic() > deadline:
                raise TimeoutError
            with suppress(TimeoutError):
                return self._listening.result(POLL_S)
        return self._listening.result()

    def check(self) -> None:
        """Raise BagelError with its last words if it has ended."""
        if self.process.poll() is not None:
            self._raise_ended(self.process.returncode)

    def tell_to_stop(self) -> None:
        """Send SIGTERM: it drains and ends."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)

    def end(self, limit_s: float) -> None:
        """Wait for it to end, and kill it after limit_s; then the same for what it started."""
        try:
            self.process.wait(limit_s)
        except subprocess.TimeoutExpired:
            pass
        finally:
            self.process.kill()
            self.process.wait()
            self._end_group()

    def _end_group(self) -> None:
        deadline = time.monotonic() + GROUP_LIMIT_S
        with suppress(ProcessLookupError, PermissionError):  # no such group: nothing is left
            while time.monotonic() < deadline:  # its helpers tidy up after it, shared memory above all
                os.killpg(self.process.pid, 0)
                time.sleep(POLL_S)
            os.killpg(self.process.pid, signal.SIGKILL)
        for reader in self._readers:
            reader.join(1)
        self._close_log()
        if self.process.stdin is not None:
            self.process.stdin.close()

    def _raise_ended(self, code: int) -> NoReturn:
        for reader in self._readers:
            reader.join(1)  # what it said last may still be on its way
        told = [line.removeprefix(ERROR) for line in self._tail if line.startswith(ERROR)]
        if told:  # its one line for a user, whatever came after it
            raise (ConfigError if code == 2 else BagelError)(f"{self.title}: {told[-1]}")
        said: list[str] = []
        for line in self._tail:
            if line.startswith("Traceback "):
                said.clear()  # its last line tells
            elif line and not line[0].isspace():
                said.append(_plain(line))
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        last = "; ".join(said[-TOLD_LINES:])
        raise BagelError(f"{self.title} {how}" + (f": {last}" if last else ""))

    def _read(self, stream: IO[str], announces: bool) -> None:
        """Hand a stream's lines on. announces: it is stdout, where a service says its address and that it is ready; its
        log on stderr says the same, and the two are read at once.
        """
        with stream:
            for line in stream:
                if announces and not self._listening.done() and (told := _listening(line)):
                    self.http = told.get("http", "")
                    self._listening.set_result(told["address"])
                    continue
                if announces and not self.said_ready and line.strip() == READY:
                    self.said_ready = True
                    continue
                self._tail.append(line.rstrip("\n"))
                self._write(line)


def _listening(line: str) -> dict[str, str] | None:
    """The addresses in the line that a service prints when it listens; None for any other line."""
    with suppress(ValueError, AttributeError):
        event = json.loads(line)
        if event.get("event") == "listening":
            return {name: str(value) for name, value in event.items()}
    return None


def _plain(line: str) -> str:
    """A line of a service's output for an error message: of a JSON log line its event and error."""
    try:
        fields = json.loads(line)
        error = str(fields.get("error", "")).strip().splitlines()
        return ": ".join(filter(None, (str(fields.get("event", "")), error[-1] if error else "")))
    except (ValueError, AttributeError):
        return line.strip()


def _sink(logs: Logs, name: str) -> tuple[Callable[[str], object], Callable[[], object], Path | None]:
    """What a service's lines are given to, what is called when there are no more, and the file if it is one."""
    if logs is None:
        return lambda line: None, lambda: None, None
    if isinstance(logs, LogFolder | Path):
        file = (LogFolder(logs) if isinstance(logs, Path) else logs).open(name)
        return file.line, file.close, Path(file.baseFilename)
    stream = logs

    def write(line: str) -> None:
        with suppress(OSError, ValueError):  # a reader that has gone must not stop the service's own output
            stream.write(f"{name} | {line}")
            stream.flush()

    return write, lambda: None, None
