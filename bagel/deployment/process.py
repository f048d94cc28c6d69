"""Run one service as a child process: find out its address, report its last words, end it. No torch here."""

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
"""Seconds that the child processes of a service have to end after it."""
TAIL_LINES = 40
LAST_LINES = 3
ERROR = "error: "
READY, STOPPED = (json.dumps({"event": event}) for event in ("ready", "stopped"))

Logs = LogFolder | Path | TextIO | None
"""Where the services' output goes: a folder (one log each), a stream (lines with their names), or nowhere."""


class Service:
    """One child process. title: its name in messages, like "stage 0 (thinker)".

    Other users of this machine do not see its arguments.
    """

    def __init__(
        self, name: str, title: str, module: str, arguments: Sequence[str], env: Mapping[str, str], logs: Logs
    ) -> None:
        self.name, self.title = name, title
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._listening: Future[str] = Future()
        self.http = ""
        """Its HTTP address, once it listens; empty if it has none."""
        self.said_ready = False
        """Whether it has printed that it is ready, as the gateway does."""
        self.said_stopped = False
        """Whether it has printed that its work is over, after which it only exports its last telemetry."""
        self._write, self._close_log, self.log = _sink(logs, name)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bagel.deployment.child", module],
            stdin=subprocess.PIPE,  # bagel.deployment.child ends when it closes
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=env,
            encoding="utf-8",
            errors="replace",
            process_group=0,  # a terminal's Ctrl-C reaches only us, so that we decide the order of the shutdown
        )
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended already, and `check` says how
            self.process.stdin.write(json.dumps(list(arguments)) + "\n")
            self.process.stdin.flush()
        streams = (self.process.stdout, self.process.stderr)
        self._readers = [
            Thread(target=self._read, args=(stream, stream is self.process.stdout), daemon=True) for stream in streams
        ]
        for reader in self._readers:
            reader.start()

    def address(self, deadline: float) -> str:
        """Wait until it listens; returns its address. Raises BagelError if it ends, TimeoutError at the deadline."""
        while not self._listening.done():
            self.check()
            if time.monotonic() > deadline:
                raise TimeoutError
            with suppress(TimeoutError):
                return self._listening.result(POLL_S)
        return self._listening.result()

    def check(self) -> None:
        """Raise BagelError with its last words if the process has ended."""
        if self.process.poll() is not None:
            self._raise_ended(self.process.returncode)

    def tell_to_stop(self) -> None:
        """Send SIGTERM, upon which it drains and ends."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)

    def until_stopped(self, limit_s: float) -> None:
        """Wait until its work is over, or for limit_s."""
        deadline = time.monotonic() + limit_s
        while not self.said_stopped and self.process.poll() is None and time.monotonic() < deadline:
            time.sleep(POLL_S)

    def end(self, limit_s: float) -> None:
        """Wait for it to end and kill it after limit_s; then end the processes that it started."""
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
        with suppress(ProcessLookupError, PermissionError):  # no such group: all of its processes have ended
            while time.monotonic() < deadline:  # gives its helpers time to tidy up, above all the shared memory
                os.killpg(self.process.pid, 0)
                time.sleep(POLL_S)
            os.killpg(self.process.pid, signal.SIGKILL)
        for reader in self._readers:  # at most a second: a process outside the group may still hold the pipe open
            reader.join(1)
        self._close_log()
        if self.process.stdin is not None:
            self.process.stdin.close()

    def _raise_ended(self, code: int) -> NoReturn:
        for reader in self._readers:
            reader.join(1)  # its last lines may still be in the pipe
        errors = [line.removeprefix(ERROR) for line in self._tail if line.startswith(ERROR)]
        if errors:  # a service prints one line for the user; later lines matter less
            raise (ConfigError if code == 2 else BagelError)(f"{self.title}: {errors[-1]}")
        lines: list[str] = []
        for line in self._tail:
            if line.startswith("Traceback "):
                if code > 0:  # a signal may have a cause that was told before
                    lines.clear()  # a traceback's last line, which follows, explains the end better
            elif line and not line[0].isspace():
                lines.append(_plain(line))
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        last = "; ".join(lines[-LAST_LINES:])
        raise BagelError(f"{self.title} {how}" + (f": {last}" if last else ""))

    def _read(self, stream: IO[str], announces: bool) -> None:
        """Pass a stream's lines to the log. announces: the stream is stdout, where a service prints its state."""
        with stream:
            # Only stdout counts: the log on stderr has the same events, and both streams are read at once.
            for line in stream:
                if announces and not self._listening.done() and (event := _listening(line)):
                    self.http = event.get("http", "")
                    self._listening.set_result(event["address"])
                    continue
                if announces and not self.said_ready and line.strip() == READY:
                    self.said_ready = True
                    continue
                if announces and line.strip() == STOPPED:
                    self.said_stopped = True
                    continue
                self._tail.append(line.rstrip("\n"))
                self._write(line)


def _listening(line: str) -> dict[str, str] | None:
    """The addresses in the line that a service prints once it listens; None for any other line."""
    with suppress(ValueError, AttributeError):
        event = json.loads(line)
        if event.get("event") == "listening":
            return {name: str(value) for name, value in event.items()}
    return None


def _plain(line: str) -> str:
    """A line of a service's output for an error message; a JSON log line is reduced to its event and error."""
    try:
        fields = json.loads(line)
        error = str(fields.get("error", "")).strip().splitlines()
        return ": ".join(filter(None, (str(fields.get("event", "")), error[-1] if error else "")))
    except (ValueError, AttributeError):
        return line.strip()


def _sink(logs: Logs, name: str) -> tuple[Callable[[str], object], Callable[[], object], Path | None]:
    """The function that takes a service's lines, the function to call after the last one, and the log file if any."""
    if logs is None:
        return lambda line: None, lambda: None, None
    if isinstance(logs, LogFolder | Path):
        file = (LogFolder(logs) if isinstance(logs, Path) else logs).open(name)
        return file.line, file.close, Path(file.baseFilename)
    stream = logs

    def write(line: str) -> None:
        with suppress(OSError, ValueError):  # even if our own output is closed, the service's pipe must be read on
            stream.write(f"{name} | {line}")
            stream.flush()

    return write, lambda: None, None
