"""Measurements that need a CUDA device: times by events, peak memory, and whether the host waited."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from statistics import median

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

Work = Callable[[], object]


class Meter:
    """Measures on one CUDA device. On any other device the work runs once and every result is None."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.cuda = device, device.type == "cuda"
        if self.cuda:
            torch.cuda.set_device(device)

    def median_ms(self, work: Work, *, warmup: int = 3, repeats: int = 10) -> float | None:
        """The median device time of one call, with calls back to back."""
        if not self.cuda:
            work()
            return None
        for _ in range(warmup):
            work()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
        torch.cuda.synchronize()
        events[0].record()
        for event in events[1:]:
            work()
            event.record()
        torch.cuda.synchronize()
        return float(median(before.elapsed_time(after) for before, after in pairwise(events)))

    def host_ms(self, work: Work, repeats: int = 5) -> float | None:
        """The median time until a call returns on an idle device: the host's cost of launching."""
        if not self.cuda:
            return None
        times = []
        for _ in range(repeats):
            torch.cuda.synchronize()
            start = time.perf_counter()
            work()
            times.append(1e3 * (time.perf_counter() - start))
        torch.cuda.synchronize()
        return median(times)

    def seconds(self, work: Work) -> float | None:
        """The wall time of one call; waits for the device before and after it."""
        self.wait()
        start = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - start if self.cuda else None

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def release(self) -> None:
        """Free the memory that nothing refers to any more."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()

    def allocated(self) -> int:
        """Bytes of tensors on the device now; 0 if it is not a CUDA device."""
        return torch.cuda.memory_allocated() if self.cuda else 0

    def reset_peak(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int | None:
        """The most bytes of tensors at any time since the last reset."""
        return torch.cuda.max_memory_allocated() if self.cuda else None

    @contextmanager
    def no_host_wait(self) -> Iterator[None]:
        """Let operations that make the host wait for the device raise RuntimeError within the block."""
        if not self.cuda:
            yield
            return
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)


def top_kernels(meter: Meter, work: Work, count: int) -> list[tuple[str, int, float | None]]:
    """The slowest kernels of one call, as (name, launches, milliseconds); on a CPU, its operators."""
    activities = [ProfilerActivity.CUDA if meter.cuda else ProfilerActivity.CPU]
    work()  # compiles and allocates, which must not show in the profile
    with profile(activities=activities) as profiler:
        work()
        meter.wait()
    key = "self_device_time_total" if meter.cuda else "self_cpu_time_total"
    events = sorted(profiler.key_averages(), key=lambda event: getattr(event, key), reverse=True)
    return [(e.key, e.count, getattr(e, key) / 1e3 if meter.cuda else None) for e in events[:count]]


def matmul_tflops(meter: Meter, side: int, dtype: torch.dtype) -> float | None:
    """The rate of a square matrix product, the ceiling for all steps."""
    # Random data: with zeros a GPU draws less power and runs faster than any real work.
    a, b = (torch.randn(side, side, device=meter.device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    ms = meter.median_ms(lambda: torch.mm(a, b, out=out), warmup=10, repeats=30)
    return None if ms is None else 2 * side**3 / ms / 1e9


def copy_gb_per_s(meter: Meter, nbytes: int) -> float | None:
    """The rate of a device-to-device copy, counting bytes read and bytes written."""
    source: Tensor = torch.randint(0, 256, (nbytes,), dtype=torch.uint8, device=meter.device)
    target = torch.empty_like(source)
    ms = meter.median_ms(lambda: target.copy_(source))
    return None if ms is None else 2 * nbytes / ms / 1e6
