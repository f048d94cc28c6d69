"""The torch-free account of guidance agrees with the engine's."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from bagel.guidance import needed_branches, timesteps
from bagel.model import flow
from bagel.prompts import BranchName
from bagel.request import ImageSettings

SHIFTS = st.floats(0.001, 100.0)
STEPS = st.integers(2, 1000)


@given(STEPS, SHIFTS)
def test_the_schedule_is_the_engines_to_the_bit(steps: int, shift: float) -> None:
    assert timesteps(steps, shift) == flow.timesteps(steps, shift).tolist()


@given(STEPS, SHIFTS, st.data())
def test_the_same_branches_are_needed(steps: int, shift: float, data: st.DataObject) -> None:
    # Ends that lie on a timestep are where rounding decides.
    times = [t for t in timesteps(steps, shift) if t <= 1]  # rounding makes some schedules begin above it
    end = st.sampled_from(times) | st.floats(0.0, 1.0)
    lo, hi = sorted((data.draw(end), data.draw(end)))
    scale = st.sampled_from([0.0, 1.0, 1.0000001, 4.0])
    settings = ImageSettings(
        steps=steps,
        timestep_shift=shift,
        cfg_interval=(lo, hi),
        cfg_text_scale=data.draw(scale),
        cfg_img_scale=data.draw(scale),
    )
    guided = any(flow.guided_steps(flow.timesteps(steps, shift)[:-1], (lo, hi)))
    expected = flow.guiding_branches(settings) if guided else frozenset()
    assert needed_branches(settings) == expected | {BranchName.GEN}
