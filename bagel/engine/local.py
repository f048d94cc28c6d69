"""The engine in this process, for what must not import torch itself: it gets here by this module's name.

`load` is the whole interface; its values in and out are plain or come from modules without torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch

from bagel.checkpoint.files import Checkpoint
from bagel.deployment.schema import StageDeploy
from bagel.engine.engine import BagelEngine
from bagel.engine.memory import is_out_of_memory
from bagel.errors import OutOfMemory
from bagel.events import OnEvent, Result
from bagel.model.device import DTYPES, choose_device, choose_dtype
from bagel.request import Request


class LocalEngine:
    """A loaded engine. device ("cpu", "cuda:0") and dtype ("bfloat16") are what auto came to.

    fingerprint: the checkpoint's.
    """

    def __init__(self, engine: BagelEngine, device: torch.device, dtype: str, fingerprint: bytes) -> None:
        self._engine, self._device, self.fingerprint = engine, device, fingerprint
        self.device, self.dtype = str(device), dtype

    def generate(self, requests: Sequence[Request], on_event: OnEvent | None = None) -> list[Result]:
        """As BagelEngine.generate; OutOfMemory if the device has too little."""
        # A current device belongs to a thread, and this may not be the one that loaded.
        current = torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext()
        with current, _memory_told("draw fewer or smaller pictures at once, or lower max_num_seqs"):
            return self._engine.generate(requests, on_event)


def load(
    checkpoint: Checkpoint, stage: StageDeploy, *, device: str = "auto", dtype: str = "auto", profile: bool = False
) -> LocalEngine:
    """Load a model as the deploy file's stage says.

    device: auto, cpu, cuda (the stage's GPU) or cuda:N; dtype: auto, bfloat16 or float32; profile: as BagelEngine has
    it. Raises ConfigError if there is no such device, CheckpointError if the files do not fit, OutOfMemory if the
    device is too small.
    """
    place = choose_device(device, stage.device_ids[0])
    dtype = choose_dtype(dtype, place)
    with _memory_told("choose a device with more, or --dtype bfloat16"):
        engine = BagelEngine.load(
            checkpoint,
            dtype=DTYPES[dtype],
            device=place,
            vae_use_tiling=stage.tiling,
            max_num_seqs=stage.max_num_seqs,
            max_model_len=stage.max_model_len,
            profile=profile,
        )
    return LocalEngine(engine, place, dtype, checkpoint.fingerprint)


@contextmanager
def _memory_told(remedy: str) -> Iterator[None]:
    """Turn PyTorch's ways to say that memory ran out into one line."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(f"the memory of the device is full; {remedy}") from error
