"""What is not built yet: one table for the deploy file, the command line and the Thinker's engines."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from operator import attrgetter


@dataclass(frozen=True)
class NotBuilt:
    """A setting that has no effect yet. of: it is a key of a stage or of the whole deploy file.

    works: the one value that is right; None: none is, and it is left out. on_vllm: a Thinker on vLLM has it.
    remedy: what does the same here.
    """

    key: str
    works: object = None
    on_vllm: bool = False
    of: str = "stage"
    remedy: str = ""

    @property
    def name(self) -> str:
        """The key without its section: the name of the setting, and of the flag."""
        return self.key.rpartition(".")[2]

    @property
    def instead(self) -> str:
        """What to do instead."""
        instead = "leave it out" if self.works is None else f"only {str(self.works).lower()} works"
        return f"{instead}; {self.remedy}" if self.remedy else instead


_CONTEXT = "context_parallel_size divides the latents of a picture among GPUs"
_SEQUENCE = ("sequence_parallel_size", "ulysses_degree", "ring_degree", "allgather_degree")
NOT_BUILT = (
    NotBuilt("parallel_config.pipeline_parallel_size", works=1, remedy="tensor_parallel_size divides the layers"),
    NotBuilt("parallel_config.data_parallel_size", works=1, remedy="start several DiTs (docs/parallel.md)"),
    *(NotBuilt(f"parallel_config.{key}", works=1, remedy=_CONTEXT) for key in _SEQUENCE),
    NotBuilt("parallel_config.enable_expert_parallel", works=False),
    NotBuilt("async_chunk", works=False, of="file"),
)
"""Delete a row when its effect exists."""


def unbuilt(rows: Iterable[NotBuilt], owner: object) -> list[tuple[NotBuilt, object]]:
    """The rows whose settings ask for something that is not built, with the values that ask for it.

    owner: what has the settings as its attributes.
    """
    found = ((row, attrgetter(row.key)(owner)) for row in rows)
    return [(row, value) for row, value in found if value not in (None, row.works)]
