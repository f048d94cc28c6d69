"""The host's memory as a GPU's copies see it: pinned, so that nobody waits for them, or else through pinned buffers."""

from __future__ import annotations

import logging
import time
from contextlib import suppress

import torch
from torch import Tensor

STAGING_BYTES = 8 << 20
"""Of one staging buffer: a copy of so many bytes takes the link's full speed."""
STAGING_BUFFERS = 4

logger = logging.getLogger(__name__)


def pin(memory: Tensor, device: torch.device) -> bool:
    """Register memory with the driver of a GPU until `unpin`; whether it has done so.

    Copies between pinned memory and the device need no processor and hold up nobody. False on a CPU, which has no use
    for it. All of the memory is committed then.
    """
    if device.type != "cuda":
        return False
    began = time.perf_counter()
    result = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)
    if int(result) != 0:
        # The driver's last error stays until it is read, and would be taken for the next kernel's.
        with suppress(RuntimeError):
            torch.zeros(1, device=device).add_(1)
        logger.warning(
            "shared memory could not be pinned; K/V are copied once more on their way",
            extra={"fields": {"bytes": memory.nbytes, "error": str(result)}},
        )
        return False
    seconds = round(time.perf_counter() - began, 2)
    logger.info("shared memory pinned", extra={"fields": {"bytes": memory.nbytes, "seconds": seconds}})
    return True


def unpin(memory: Tensor) -> None:
    """Take back `pin`, before the memory is unmapped: the driver would copy to what lay there, whatever lies there
    later. No copy may be under way."""
    torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())


class Staging:
    """Buffers, pinned on a GPU's host, for rows whose own memory is not pinned or not contiguous.

    Used by one thread, on the present stream: a buffer is filled again once the copy out of it is done.
    """

    def __init__(self, device: torch.device, nbytes: int = STAGING_BYTES, count: int = STAGING_BUFFERS) -> None:
        self._device, cuda = device, device.type == "cuda"
        self._buffers = [torch.empty(nbytes, dtype=torch.uint8, pin_memory=cuda) for _ in range(count)]
        self._emptied: list[torch.cuda.Event | None] = [None] * count
        self._next = 0

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Copy rows [n, ...] of the host to the device; the source may change once this returns."""
        rows = max(1, self._buffers[0].nbytes // source[:1].nbytes)
        for begin in range(0, len(source), rows):
            self._copy(target[begin : begin + rows], source[begin : begin + rows])

    def _copy(self, target: Tensor, source: Tensor) -> None:
        at, self._next = self._next, (self._next + 1) % len(self._buffers)
        if (emptied := self._emptied[at]) is not None:
            emptied.synchronize()
        staged = self._buffers[at][: source.nbytes].view(source.dtype).view(source.shape)
        staged.copy_(source)
        target.copy_(staged, non_blocking=True)
        if self._device.type == "cuda":
            self._emptied[at] = torch.cuda.current_stream(self._device).record_event()
