"""`python -m bagel_gateway`: run a gateway until SIGTERM."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence

from bagel.errors import BagelError
from bagel.telemetry import Log, set_up_logs
from bagel_gateway.server import serve
from bagel_gateway.settings import parse


def main(args: Sequence[str] | None = None) -> int:
    """Exit code: 0 after SIGTERM, 2 for a wrong setting, 1 for a failure."""
    try:
        settings = parse(args)
        set_up_logs("gateway", settings.log_level)
        Log("bagel_gateway").info("configuration", **settings.shown())
        asyncio.run(serve(settings))
    except BagelError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
