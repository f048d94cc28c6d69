"""A wall clock that jumps: each service reads the time with an offset that lies in a file of its own."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static volatile long long *offset;

__attribute__((constructor)) static void begin(void) {
  const char *path = getenv("CAMPAIGN_CLOCK");
  int fd = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
  if (fd < 0) return;
  void *at = mmap(0, sizeof(long long), PROT_READ, MAP_SHARED, fd, 0);
  if (at != MAP_FAILED) offset = at;
  close(fd);
}

static long long ahead(void) { return offset ? *offset : 0; }

int clock_gettime(clockid_t id, struct timespec *at) {
  static int (*real)(clockid_t, struct timespec *);
  if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
  int code = real(id, at);
  if (!code && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE)) at->tv_sec += ahead();
  return code;
}

int gettimeofday(struct timeval *restrict at, void *restrict zone) {
  static int (*real)(struct timeval *, void *);
  if (!real) real = dlsym(RTLD_NEXT, "gettimeofday");
  int code = real(at, zone);
  if (!code && at) at->tv_sec += ahead();
  return code;
}

time_t time(time_t *at) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  if (at) *at = now.tv_sec;
  return now.tv_sec;
}
"""


class Clock:
    """The wall clocks of the services of one fleet. here: whether this machine can make them jump."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._shim = folder, folder / "clock.so"
        compiler = shutil.which("cc") or shutil.which("gcc")
        self.here = compiler is not None
        if compiler is not None:
            source = folder / "clock.c"
            source.write_text(SHIM)
            command = [compiler, "-shared", "-fPIC", "-O1", "-o", str(self._shim), str(source), "-ldl"]
            subprocess.run(command, check=True)

    def env(self, name: str) -> Mapping[str, str]:
        """The environment of a service whose clock `jump` moves."""
        if not self.here:
            return {}
        self.jump(name, 0)
        return {"LD_PRELOAD": str(self._shim), "CAMPAIGN_CLOCK": str(self._file(name))}

    def jump(self, name: str, seconds: int) -> None:
        """Set a service's clock so many seconds off."""
        with self._file(name).open("r+b" if self._file(name).exists() else "wb") as file:
            file.write(seconds.to_bytes(8, "little", signed=True))

    def _file(self, name: str) -> Path:
        return self._folder / f"clock-{name}"
