"""`python -m bagel.deployment.child MODULE` runs MODULE until the parent process ends.

The parent holds the other end of standard input. Its one line there is the arguments, as a JSON list: on the command
line every user of the machine could read them. However the parent ends, its end closes and the service stops. So no
process is left behind, on any system and whichever of the parent's threads started it.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import sys
import time
from threading import Thread

STOP_LIMIT_S = 60.0
"""Seconds that an orphaned service has to drain."""


def main() -> None:
    """Run the module of the first argument as __main__, with the arguments that the parent writes."""
    module = sys.argv[1]
    if not (line := sys.stdin.buffer.readline()):
        sys.exit(1)  # the parent has gone already
    sys.argv = [module, *json.loads(line)]
    Thread(target=_stop_with_parent, name="parent", daemon=True).start()
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _stop_with_parent() -> None:
    while os.read(0, 4096):  # returns nothing once the parent's end is closed
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(STOP_LIMIT_S)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
