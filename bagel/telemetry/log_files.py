"""Write the logs of child processes to files, bounded in size and number. No torch here."""

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
    """A folder with one log per service: NAME.log, and the older NAME.log.1, NAME.log.2 and so on.

    max_bytes: the largest size of a file; files: the number of files per service.
    """

    folder: Path
    max_bytes: int = LOG_BYTES
    files: int = LOG_FILES

    def __post_init__(self) -> None:
        if self.max_bytes < 1024:
            raise ConfigError(f"log_max_bytes is {self.max_bytes}; it must be at least 1024", "log_max_bytes")
        if not 2 <= self.files <= 1000:  # with a single file, RotatingFileHandler would never rotate
            raise ConfigError(f"log_files is {self.files}; it must be from 2 to 1000", "log_files")

    def open(self, name: str) -> LogFile:
        """Open the log of a service; ConfigError if it cannot be written."""
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            return LogFile(self.folder / f"{name}.log", self.max_bytes, self.files)
        except OSError as error:
            raise ConfigError(
                f"the log {str(self.folder / name)!r}.log cannot be written: {error.strerror}; choose another log_dir",
                "log_dir",
            ) from None


class LogFile(RotatingFileHandler):
    """One service's log; several threads may write lines to it."""

    terminator = ""  # a child's line brings its own end

    def __init__(self, path: Path, max_bytes: int, files: int) -> None:
        super().__init__(path, maxBytes=max_bytes, backupCount=files - 1, encoding="utf-8")
        self._warned = False

    def line(self, text: str) -> None:
        """Write one line."""
        self.handle(logging.makeLogRecord({"msg": text}))

    def close(self) -> None:
        """Close the file; lines that a full disk no longer takes are lost."""
        try:
            super().close()
        except OSError:
            self.handleError(logging.makeLogRecord({}))

    def handleError(self, record: logging.LogRecord) -> None:
        """Warn once that lines are lost, as on a full disk."""
        # No exception: the thread must go on reading the service's output, or the service would block on a full pipe.
        if not self._warned:
            self._warned = True
            print(f"warning: the log {self.baseFilename} cannot be written: {sys.exc_info()[1]}", file=sys.stderr)
