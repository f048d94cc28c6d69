"""Which branches guide a picture, without torch. The times agree with bagel.model.flow to the last bit."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from bagel.prompts import BranchName

if TYPE_CHECKING:  # bagel.request asks what is guided
    from bagel.request import ImageSettings


def needed_branches(settings: ImageSettings) -> frozenset[BranchName]:
    """The branches whose K/V a picture needs: gen, and those that guide it in at least one step."""
    gen = frozenset({BranchName.GEN})
    if settings.cfg_text_scale <= 1 or not guided_anywhere(settings):
        return gen
    companions = {BranchName.CFG_TEXT} if settings.cfg_img_scale <= 1 else {BranchName.CFG_TEXT, BranchName.CFG_IMG}
    return gen | companions


def timesteps(num_timesteps: int, shift: float) -> list[float]:
    """The times of the steps from 1 to 0, each a float32: t = s u / (1 + (s - 1) u), rounded as torch rounds."""
    # float64 is precise enough that rounding a sum, product or quotient of float32 numbers gives torch's result.
    step = _f32(-1.0 / (num_timesteps - 1))
    half = num_timesteps // 2
    s, s1 = _f32(shift), _f32(shift - 1)
    times = []
    for i in range(num_timesteps):
        # torch.linspace counts from the nearer end and rounds once (a fused multiply-add).
        u = _f32(1.0 + step * i) if i < half else _f32(-step * (num_timesteps - 1 - i))
        times.append(_f32(_f32(s * u) / _f32(1.0 + _f32(s1 * u))))
    return times


def guided_anywhere(settings: ImageSettings) -> bool:
    """Whether a step begins within the guidance interval."""
    lo, hi = (_f32(end) for end in settings.cfg_interval)
    return any(lo < t <= hi for t in timesteps(settings.steps, settings.timestep_shift)[:-1])


def _f32(value: float) -> float:
    """The nearest float32."""
    return float(struct.unpack("<f", struct.pack("<f", value))[0])
