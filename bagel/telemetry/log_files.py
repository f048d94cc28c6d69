"""Logs of child processes as files that are bounded in size and number. No torch here."""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from logging.handlers import RotatingFileHandler
from pathlib import Path

from bagel.errors import ConfigError

LOG_BYTES = 16 * 2**20
LOG_FILES = 5


@dataclass(frozen=True)
class LogFolder:
    """A folder with a log of each service: NAME.log, and the older NAME.log.1, NAME.log.2 and so on.

    files: of each service in all; max_bytes: of each file.
    """

    folder: Path
    max_bytes: int = LOG_BYTES
    files: int = LOG_FILES

    def __post_init__(self) -> None:
        if self.max_bytes < 1024:
            raise ConfigError(f"--log-max-bytes is {self.max_bytes}; it must be at least 1024")
        if not 2 <= self.files <= 1000:
            raise ConfigError(f"--log-files is {self.files}; it must be from 2 to 1000")

    def open(self, name: str) -> LogFile:
        """The log of a service; ConfigError if it cannot be written."""
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            return LogFile(self.folder / f"{name}.log", self.max_bytes, self.files)
        except OSError as error:
            raise ConfigError(
                f"the log {str(self.folder / name)!r}.log cannot be written: {error.strerror}; choose another --log-dir"
            ) from None


class LogFile(RotatingFileHandler):
    """One service's log, for lines that end themselves, of several threads."""

    terminator = ""

    def __init__(self, path: Path, max_bytes: int, files: int) -> None:
        super().__init__(path, maxBytes=max_bytes, backupCount=files - 1, encoding="utf-8")
        self._told = False

    def line(self, text: str) -> None:
        """Write a line."""
        self.handle(logging.makeLogRecord({"msg": text}))

    def close(self) -> None:
        """End; what a full disk does not take any more is lost."""
        try:
            super().close()
        except OSError:
            self.handleError(logging.makeLogRecord({}))

    def handleError(self, record: logging.LogRecord) -> None:
        """Say once that lines are lost, as on a full disk: the service goes on, and must be read on."""
        if not self._told:
            self._told = True
            print(f"warning: the log {self.baseFilename} cannot be written: {sys.exc_info()[1]}", file=sys.stderr)
