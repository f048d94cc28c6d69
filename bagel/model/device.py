"""Which device a name means, and which dtype `auto` means there: one rule for every process."""

from __future__ import annotations

import torch

from bagel.errors import ConfigError

AUTO = "auto"
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def choose_device(name: str, gpu: int = 0) -> torch.device:
    """The device of a name: auto, cpu, cuda or cuda:N; gpu is the number that cuda without one means.

    auto: that GPU if there are any. Raises ConfigError for a GPU that is not there.
    """
    count = torch.cuda.device_count()
    if name == "cpu" or (name == AUTO and not count):
        return torch.device("cpu")
    number = int(name.removeprefix("cuda:")) if name.startswith("cuda:") else gpu
    if not count:
        raise ConfigError(f"device {name} is not there: torch sees no GPU; use --device cpu")
    if number >= count:
        there = ", ".join(map(str, range(count)))
        raise ConfigError(f"there is no GPU {number}; torch sees {there}; set devices in the deploy file, or --device")
    return torch.device("cuda", number)


def choose_dtype(name: str, device: torch.device) -> str:
    """The dtype that a name means on a device. auto: bfloat16 on a GPU, float32 on a CPU."""
    if name == AUTO:
        return "bfloat16" if device.type == "cuda" else "float32"
    return name
