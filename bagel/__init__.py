"""bagel-serving: exact serving of BAGEL, one model that understands and generates images."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bagel.client.omni import Omni

__all__ = ["Omni", "__version__"]
__version__ = "0.1.0"

# Read when torch is loaded, so set before. PyTorch's threads on a CPU spin where they wait for each other; beside any
# other process on the same cores that costs tens of times what they compute.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Read when gRPC is loaded. Its own lines would stand between the JSON lines of a log and under a command's one line of
# error; what went wrong is in the status of the call. GRPC_VERBOSITY=ERROR brings them back.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")


def __getattr__(name: str) -> Any:
    """`bagel.Omni`, imported when it is first asked for: the command line's --help needs none of it."""
    if name == "Omni":
        from bagel.client.omni import Omni

        return Omni
    raise AttributeError(f"module 'bagel' has no attribute {name!r}")
