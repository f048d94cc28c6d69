"""Whether this machine has a GPU, asked of the driver: loading torch to find out takes seconds. No torch here."""

from __future__ import annotations

import ctypes
import os

from bagel.errors import ConfigError

_AMD = "/dev/kfd"


def check_device(device: str) -> None:
    """Raise ConfigError for a CUDA device where the driver shows no GPU, as with an empty CUDA_VISIBLE_DEVICES."""
    if device.startswith("cuda") and not has_gpu():
        raise ConfigError(
            f"device {device} is not there: the driver shows no GPU; use device cpu, or leave it out", "device"
        )


def has_gpu() -> bool:
    """Whether torch could find a GPU: one that NVIDIA's driver shows, or AMD's interface."""
    return os.path.exists(_AMD) or gpu_count() > 0


def gpu_count() -> int:
    """The GPUs that NVIDIA's driver shows; 0 where it shows none, or is not there."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int()
    shown = driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0
    return count.value if shown else 0
